from . import (
    entailment as entailment,
    nlvr2 as nlvr2,
    pretraining as pretraining,
    retrieval as retrieval,
    vcr as vcr,
    vqa as vqa,
)
