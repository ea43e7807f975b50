"""Sisters' checkpoints: reading them, importing them, and a look into any folder of weights."""

from .importing import import_checkpoint
from .inspection import inspect_checkpoint

__all__ = ["import_checkpoint", "inspect_checkpoint"]
