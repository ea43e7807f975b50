"""Sisters' checkpoints: importing them, and a look into any folder of weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
