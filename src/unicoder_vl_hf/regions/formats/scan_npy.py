"""
The features of SCAN (Lee et al., 2018; its `util/convert_data.py` and `data.py`): `<split>_ims.npy`, an array
(images, 36, D), beside `<split>_caps.txt`, five lines an image.

The image_id is the number of the image, by which `data.py` joins captions, unless names are given. There are no boxes,
classes and scores. Older files repeat each image five times, once a caption; `data.py` recognises them by their length,
this module by the five equal rows.
"""

import mmap
import re
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ._numbers import typed_features
from ._parsing import listed, read_index
from .items import Item
from .restricted_pickle import load_npy

NAME = "scan-npy"
ENDING = "_ims.npy"
CAPTIONS = 5


def matches(path: str | PathLike) -> bool:
    """
    Tells whether `path` is a three-dimensional array `<split>_ims.npy`, or a folder in which the first such file is
    one.
    """
    file = next(iter(_files(path)), None)
    if file is None:
        return False
    with file.open("rb") as start:
        return re.search(rb"'shape': \(\d+, \d+, \d+\)", start.read(256)) is not None


def items(
    path: str | PathLike, *, index: str | PathLike | None = None, feature_dtype: str | None = None
) -> Iterator[Item]:
    """
    Yields the images of one file, from its memory map. A folder must hold one such file only: the ids of several would
    be the same numbers.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        index (`str` or `os.PathLike`, *optional*): Names of the images, row by row, as text or a .json list.
        feature_dtype (`str`, *optional*): Type of the features where the file holds their bytes.

    Raises:
        ValueError: The file is malformed; the message names the file, the field and the value.
    """
    found = _files(path)
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} files <split>{ENDING}, expected one: their ids would be the same.")
    file = found[0]
    rows = _rows(file)
    step = CAPTIONS if _repeats(rows, 0) else 1
    names = None if index is None else read_index(index)
    if names is not None and len(names) not in (len(rows), len(rows) // step):
        raise ValueError(f"{index} has {len(names)} names, but {file} has {len(rows) // step} images.")

    def load(row: int, image_id: str) -> RegionRecord:
        if step > 1 and not _repeats(rows, row):
            raise ValueError(f"Image {image_id!r}: rows {row} to {row + step - 1} differ, unlike the first {step}.")
        return RegionRecord(image_id, features=typed_features(image_id, "features", rows[row], feature_dtype))

    for row in range(0, len(rows), step):
        number = row // step
        image_id = str(number) if names is None else names[number if len(names) < len(rows) else row]
        yield Item(str(file), f"row {row}", image_id, partial(load, row, image_id))


def _files(path: str | PathLike) -> list[Path]:
    return [file for file in listed(path) if file.name.endswith(ENDING) and file.is_file()]


def _rows(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty.")
        # The reader of untrusted .npy files takes the map for bytes, and copies nothing.
        rows = load_npy(cast(bytes, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), str(path))
    if rows.ndim != 3:
        raise ValueError(f"{path} has shape {rows.shape}, expected (images, regions, D).")
    return rows


def _repeats(rows: np.ndarray, row: int) -> bool:
    group = rows[row : row + CAPTIONS]
    return len(rows) % CAPTIONS == 0 and len(group) == CAPTIONS and bool((group == group[0]).all())
