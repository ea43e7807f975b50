"""Unicoder-VL (AAAI 2020) in the Hugging Face way: model, processor, region stores, training and retrieval.

What it offers is loaded when it is first asked for, and so are PyTorch and transformers. Its classes are registered
with transformers' Auto classes as soon as these are loaded, before or after: see `registration`.
"""

import lazy_loader

from . import registration

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

registration.install()
