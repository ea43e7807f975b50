"""The task of expressions that refer to a region of a photo: RefCOCO, RefCOCO+, RefCOCOg and Flickr30k Entities."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
