"""Searches with trained models: encoders, indexes, and the two stages. The function is `search.search`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
