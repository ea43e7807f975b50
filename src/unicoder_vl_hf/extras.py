"""Imports of libraries that not every user has."""

import importlib
from types import ModuleType


def optional_import(module: str, extra: str) -> ModuleType:
    """
    Imports a library of one of our extras. Raises ImportError where it is not installed, naming the extra that brings
    it, and where it is installed but fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]):
            raise ImportError(f"{module} is installed, but cannot be imported: {error}") from error
        raise ImportError(f"This needs {module}: pip install '.[{extra}]' in a checkout of unicoder-vl-hf.") from error
