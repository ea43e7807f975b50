from . import (
    entailment as entailment,
    pretraining as pretraining,
    retrieval as retrieval,
    vcr as vcr,
    vqa as vqa,
)
