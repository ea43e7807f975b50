"""
Regions of images: stores of records, the foreign formats that they are read from, and the detectors that find them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
