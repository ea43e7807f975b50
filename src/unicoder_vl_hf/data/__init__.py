"""Rows of captions and pairs: reading them, joining them with regions, and drawing negatives, masks and their order."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
