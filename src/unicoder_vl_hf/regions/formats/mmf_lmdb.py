"""
MMF's LMDB (`lmdb_conversion.py`): key = path of `<id>.npy` below the folder of features, without .npy; value = a
pickled dict of `feature_path`, `features` and the fields of `mmf_npy`; under the key `keys` stands the list of keys.
"""

from collections.abc import Iterator
from functools import partial
from os import PathLike

from ._pickled import first_fields, pickled_items
from .items import Item
from .mmf_npy import record

NAME = "mmf-lmdb"


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is an LMDB (its folder or file) whose first value is a pickled dict as MMF makes it."""
    fields = first_fields(path)
    return {"feature_path", "features"} <= fields and "boxes" not in fields


def items(path: str | PathLike, *, background: bool | None = None, feature_dtype: str | None = None) -> Iterator[Item]:
    """Yields the images by ascending key. Nothing of a pickle is executed. The options are those of `mmf_npy.items`."""
    return pickled_items(path, partial(record, background=background, feature_dtype=feature_dtype))
