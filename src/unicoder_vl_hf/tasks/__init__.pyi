from . import pretraining as pretraining, retrieval as retrieval, vcr as vcr, vqa as vqa
