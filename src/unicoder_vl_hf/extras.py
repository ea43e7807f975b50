"""Libraries that not every user has."""

import importlib
from types import ModuleType


def optional_import(module: str, extra: str) -> ModuleType:
    """A library of one of our extras. Raises ImportError, which names the extra, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"This needs {module}: pip install '.[{extra}]' in a checkout of unicoder-vl-hf.") from error
