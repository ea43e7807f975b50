"""The task of questions about images: VQA, GQA and OK-VQA, by a choice among frequent answers, as UNITER does it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
