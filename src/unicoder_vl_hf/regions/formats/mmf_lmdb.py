"""
MMF's LMDB (`lmdb_conversion.py`): key = path of `<id>.npy` below the folder of features, without .npy; value = a
pickled dict of `feature_path`, `features` and the fields of `mmf_npy`; under the key `keys` stands the list of keys.
"""

from collections.abc import Container, Iterator
from os import PathLike

from ...records_unicoder_vl import RegionRecord
from ._pickled import first_fields, read_lmdb
from .mmf_npy import record

NAME = "mmf-lmdb"


def matches(path: str | PathLike) -> bool:
    """Whether `path` is an LMDB (its folder or file) whose first value is a pickled dict as MMF makes it."""
    fields = first_fields(path)
    return {"feature_path", "features"} <= fields and "boxes" not in fields


def read(path: str | PathLike, skip: Container[str] = (), *, background: bool | None = None) -> Iterator[RegionRecord]:
    """
    Records by ascending key. Nothing of a pickle is executed. `background` as in `mmf_npy.read`.

    Raises:
        ValueError: The file or a value is malformed; the message names the file, the image, the field and the value.
    """
    return read_lmdb(path, skip, lambda image_id, fields: record(image_id, fields, background))
