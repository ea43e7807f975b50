"""The task of telling a true caption from a foil that differs in a word: made, measured, and told without looking."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
