"""A server that ranks images by a sentence and sentences by an image, see docs/serving.md."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
