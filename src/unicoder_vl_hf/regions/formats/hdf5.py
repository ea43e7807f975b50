"""
The HDF5 files of bottom-up-attention-vqa, BAN and ReGAT (`tools/*detection_features_converter.py`). As many regions as
there are, image after image, or the same number in each:

    image_features      (regions, D)        or     (images, 36, D)
    spatial_features    (regions, 6)        or     (images, 36, 6)      x1 y1 x2 y2 w h as fractions of the image
    image_bb            (regions, 4)        or     (images, 36, 4)      x1 y1 x2 y2 in pixels
    pos_boxes           (images, 2)                                     first region, and the one behind the last

beside `<name>_imgid2idx.pkl`, `{image_id: row of the image}`. The image size is nowhere, so the record has the
fractions. There are no classes and no scores.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from ... import logging
from ...extras import optional_import
from ...records_unicoder_vl import RegionRecord
from ._numbers import typed_features
from ._parsing import MAX_BYTES, listed, read_index
from .items import Item, broken

NAME = "hdf5"
SUFFIXES = (".hdf5", ".h5")
SIGNATURE = b"\x89HDF\r\n\x1a\n"
# The errors that h5py raises on damaged files, depending on where the damage is.
ERRORS = (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, MemoryError, OverflowError)

Load = Callable[[], RegionRecord]

logger = logging.get_logger(__name__)


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is an HDF5 file with `image_features`, or a folder in which the first such file has them."""
    try:
        return first_matches(path, lambda arrays: "image_features" in arrays)
    except ImportError:
        return True  # so that reading says what to install


def items(
    path: str | PathLike, *, index: str | PathLike | None = None, feature_dtype: str | None = None
) -> Iterator[Item]:
    """
    Yields the images of a file, or of all .hdf5 and .h5 of a folder by name, in the order of their rows.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        index (`str` or `os.PathLike`, *optional*): `{image_id: row}` of a single file as .pkl or .json, if it is not
            beside the file as `<name>_imgid2idx.pkl`.
        feature_dtype (`str`, *optional*): Type of the features where the file holds their bytes.

    Raises:
        ImportError: h5py is not installed.
        ValueError: There is no file or no index, or one of them is damaged; the message names the file.
    """
    optional_import("h5py", "hdf5")  # or a missing index would be told first
    found = _files(path)
    if index is not None and len(found) > 1:
        raise ValueError(f"{path} has {len(found)} .hdf5 or .h5 files, expected one, or several without an index.")
    ids = {file: read_index(_index_file(file) if index is None else index) for file in found}

    def images(file: Path, arrays: Any) -> Iterator[tuple[str, str, Load]]:
        for row, image_id in sorted(ids[file].items()):
            yield f"row {row}", image_id, partial(_record, image_id, row, arrays, feature_dtype)

    yield from hdf5_items(path, images)


def hdf5_items(path: str | PathLike, images: Callable[[Path, Any], Iterator[tuple[str, str, Load]]]) -> Iterator[Item]:
    """
    Yields the images of an HDF5 file, or of all .hdf5 and .h5 of a folder by name. `images(file, content)` yields the
    place, the id and the function that makes the record of each.

    Raises:
        ImportError: h5py is not installed.
        ValueError: There is no file.
    """
    h5py = optional_import("h5py", "hdf5")
    found = _files(path)
    if not found:
        raise ValueError(f"{path} is no .hdf5 or .h5 file, nor a folder of them.")
    for file in found:
        try:
            with h5py.File(file, "r") as content:
                for where, image_id, load in images(file, content):
                    yield Item(str(file), where, image_id, partial(_decoded, load))
        except ERRORS as error:
            yield broken(str(file), file.name, error)


def _decoded(load: Load) -> RegionRecord:
    """Gives the record that `load` makes. Raises ValueError in place of the errors of h5py on damaged files."""
    try:
        return load()
    except ERRORS as error:
        raise ValueError(str(error)) from error


def first_matches(path: str | PathLike, is_ours: Callable[[Any], bool]) -> bool:
    """Tells whether `path` is an HDF5 file whose content `is_ours`, or a folder in which the first such file is one."""
    file = _first(path)
    if file is None:
        return False
    try:
        with optional_import("h5py", "hdf5").File(file, "r") as content:
            return is_ours(content)
    except ERRORS:
        return False


def damage(path: Path) -> str | None:
    """Describes the damage of an HDF5 file that cannot be opened; None where the file is none, or is whole."""
    file = _first(path)
    if file is None:
        return None
    try:
        optional_import("h5py", "hdf5").File(file, "r").close()
    except ERRORS as error:
        return f"{file} is damaged, or was cut short: {error}."
    return None


def _files(path: str | PathLike) -> list[Path]:
    """Lists the .hdf5 and .h5 files that `path` is, or that are in it, by name."""
    return [file for file in listed(path) if file.suffix in SUFFIXES and file.is_file()]


def _first(path: str | PathLike) -> Path | None:
    """Gives the first of these files if it begins as HDF5 does."""
    for file in _files(path)[:1]:
        with file.open("rb") as start:
            if start.read(len(SIGNATURE)) == SIGNATURE:
                return file
    return None


def _index_file(file: Path) -> Path:
    names = [f"{file.stem}_{kind}.{suffix}" for kind in ("imgid2idx", "img2idx") for suffix in ("pkl", "json")]
    for name in names:
        if (beside := file.with_name(name)).is_file():
            return beside
    raise ValueError(f"{file} holds no image ids, and none of {names} is beside it: give the index, {{image_id: row}}.")


def _record(image_id: str, row: int, arrays: Any, feature_dtype: str | None) -> RegionRecord:
    features, spatial = _array(arrays, "image_features"), _array(arrays, "spatial_features")
    if features is None:
        raise ValueError(f"there is no image_features, expected it among {list(arrays)}.")
    if not 0 <= row < len(features) and features.ndim == 3:
        raise ValueError(f"Image {image_id!r}: its row is {row}, but image_features has {len(features)} images.")
    where: int | slice = row if features.ndim == 3 else _range(image_id, row, arrays, len(features))
    for array in (features, spatial):
        if array is not None:
            check_size(image_id, array, where)
    if spatial is None:
        logging.warn_once(
            logger, f"{arrays.filename} has no spatial_features, and pixels without an image size are no boxes."
        )
    return RegionRecord(
        image_id,
        features=typed_features(image_id, "image_features", features[where], feature_dtype),
        boxes=None if spatial is None else spatial[where][:, :4],
    )


def _array(arrays: Any, name: str) -> Any:
    array = arrays.get(name)
    if array is not None and (getattr(array, "ndim", 0) not in (2, 3) or array.dtype.kind not in "fiu"):
        raise ValueError(f"{name} is {array}, expected numbers of 2 or 3 dimensions.")
    return array


def _range(image_id: str, row: int, arrays: Any, regions: int) -> slice:
    positions = _array(arrays, "pos_boxes")
    if positions is None or positions.ndim != 2 or not 0 <= row < len(positions):
        raise ValueError(f"Image {image_id!r}: its row is {row}, which pos_boxes ({positions}) does not have.")
    first, last = positions[row].tolist()
    if not 0 <= first < last <= regions:
        raise ValueError(f"Image {image_id!r}: pos_boxes is {[first, last]}, expected rows within 0..{regions}.")
    return slice(first, last)


def check_size(image_id: str, array: Any, where: int | slice) -> None:
    """Raises ValueError, before anything is read, where a damaged header promises terabytes."""
    regions = where.stop - where.start if isinstance(where, slice) else array.shape[1]
    size = array.dtype.itemsize * max(regions * array.shape[-1], math.prod(array.chunks or ()))
    if size > MAX_BYTES:
        raise ValueError(f"Image {image_id!r}: {array.name} takes {size} bytes, expected {MAX_BYTES} at most.")
