"""
The HDF5 of Volta (Bugliarello et al., 2021; its `features_extraction` by detectron2), a group an image, whose name is
the image id (with the folders in it, where there are):

    img_h  img_w  boxes (n, 4)  features (n, D)  obj_id  obj_conf  attr_id  attr_conf (n,)

as `volta_lmdb` has them, into which its `h5_to_lmdb.py` makes them.
"""

import math
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from ...records_unicoder_vl import RegionRecord
from . import volta_lmdb
from ._parsing import MAX_BYTES
from .hdf5 import Load, first_matches, hdf5_items
from .items import Item

NAME = "volta-hdf5"
MAX_DEPTH = 8  # limit of the folders in an image id


def matches(path: str | PathLike) -> bool:
    """
    Tells whether `path` is an HDF5 file with a group an image, or a folder in which the first .hdf5 or .h5 is one.
    """
    try:
        return first_matches(path, lambda groups: next(_images(groups, set()), None) is not None)
    except ImportError:
        return False  # `hdf5` says what to install


def items(path: str | PathLike, *, feature_dtype: str | None = None) -> Iterator[Item]:
    """
    Yields the images of a file, or of all .hdf5 and .h5 of a folder by name, in the order of their names.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        feature_dtype (`str`, *optional*): Type of the features where the file holds their bytes.

    Raises:
        ImportError: h5py is not installed.
        ValueError: There is no file.
    """

    def images(file: Path, groups: Any) -> Iterator[tuple[str, str, Load]]:
        for name, group in _images(groups, set()):
            yield f"group {name!r}", name, partial(_record, name, group, feature_dtype)

    return hdf5_items(path, images)


def _images(group: Any, seen: set[Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the groups that hold features, with their paths. A group that links to one above it is not followed."""
    import h5py

    if depth == MAX_DEPTH or group.id in seen:
        return
    seen.add(group.id)
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):  # links to other files are not followed
            continue
        member = group[name]
        if isinstance(member, h5py.Group):
            if "features" in member:
                yield prefix + name, member
            else:
                yield from _images(member, seen, f"{prefix}{name}/", depth + 1)


def _record(image_id: str, group: Any, feature_dtype: str | None) -> RegionRecord:
    fields = {name: _values(image_id, name, group[name]) for name in volta_lmdb.FIELDS if name in group}
    return volta_lmdb.record(image_id, fields, feature_dtype)


def _values(image_id: str, name: str, array: Any) -> Any:
    """Reads the numbers of a dataset. Raises ValueError where it holds none, or its header promises terabytes."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or dtype.kind not in "iuf":
        raise ValueError(f"Image {image_id!r}: {name} is {array}, expected an array of numbers.")
    size = dtype.itemsize * max(math.prod(array.shape), math.prod(array.chunks or ()))
    if size > MAX_BYTES:
        raise ValueError(f"Image {image_id!r}: {name} takes {size} bytes, expected {MAX_BYTES} at most.")
    return array[()]
