"""Packages that load what they offer when it is first asked for, so that whoever needs a part waits for that alone."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(package: str, places: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Makes `__getattr__` and `__dir__` of a package.

    Args:
        package (`str`): Its `__name__`.
        places (`Mapping[str, Sequence[str]]`): The names that it offers, by the module below it that has them. The
            modules are attributes, too, though nobody imported them; no name may be one of theirs.
    """
    module_of = {name: module for module, names in places.items() for name in names}

    def load(name: str) -> Any:
        if name in module_of:
            value = getattr(importlib.import_module(f".{module_of[name]}", package), name)
        elif name in places:
            return importlib.import_module(f".{name}", package)  # which makes it an attribute
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # so that this function is not asked again
        return value

    return load, lambda: sorted(module_of)
