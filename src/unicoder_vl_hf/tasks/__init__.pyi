from . import (
    entailment as entailment,
    grounding as grounding,
    nlvr2 as nlvr2,
    pretraining as pretraining,
    retrieval as retrieval,
    vcr as vcr,
    vqa as vqa,
)
