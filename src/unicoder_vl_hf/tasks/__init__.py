"""The tasks, a folder each: data, collator, losses, metrics, training, evaluation, pictures. None imports another."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
