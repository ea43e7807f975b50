"""How tests read with a format that they name."""

import functools
from collections.abc import Callable
from types import ModuleType

from unicoder_vl_hf.regions.formats import read_records


def reader(module: ModuleType) -> Callable:
    """`read_records` in the format of a module."""
    return functools.partial(read_records, format=module.NAME)
