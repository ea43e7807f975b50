"""The task of image-text retrieval (paper, section Image-Text Retrieval)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
