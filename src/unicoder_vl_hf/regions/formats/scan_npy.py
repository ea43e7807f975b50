"""
The features of SCAN (Lee et al., 2018; its `util/convert_data.py` and `data.py`): `<split>_ims.npy`, an array
(images, 36, D), beside `<split>_caps.txt`, five lines an image.

The image_id is the number of the image, by which `data.py` joins captions, unless names are given. Boxes, classes and
scores are gone. Older files repeat each image five times, once a caption; `data.py` knows them by their length, this
module by the five equal rows.
"""

import mmap
import re
from collections.abc import Container, Iterator
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ._parsing import listed, read_index
from .restricted_pickle import load_npy

NAME = "scan-npy"
ENDING = "_ims.npy"
CAPTIONS = 5


def matches(path: str | PathLike) -> bool:
    """Whether `path` is a three-dimensional array `<split>_ims.npy`, or a folder in which the first one is."""
    file = next(iter(_files(path)), None)
    if file is None:
        return False
    with file.open("rb") as start:
        return re.search(rb"'shape': \(\d+, \d+, \d+\)", start.read(256)) is not None


def read(
    path: str | PathLike, skip: Container[str] = (), *, index: str | PathLike | None = None
) -> Iterator[RegionRecord]:
    """
    Records of one file, from its memory map. A folder must hold one only: the ids of several would be the same numbers.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        skip (container of `str`): Ids of images to pass over.
        index (`str` or `os.PathLike`, *optional*): Names of the images, row by row, as text or a .json list.

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
    try:
        for row in range(0, len(rows), step):
            number = row // step
            image_id = str(number) if names is None else names[number if len(names) < len(rows) else row]
            if image_id in skip:
                continue
            if step > 1 and not _repeats(rows, row):
                raise ValueError(f"Image {image_id!r}: rows {row} to {row + step - 1} differ, unlike the first {step}.")
            yield RegionRecord(image_id, features=rows[row])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _files(path: str | PathLike) -> list[Path]:
    return [file for file in listed(path) if file.name.endswith(ENDING) and file.is_file()]


def _rows(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty.")
        # The map is as good as bytes to the reader of untrusted .npy files, which copies nothing.
        rows = load_npy(cast(bytes, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), str(path))
    if rows.ndim != 3:
        raise ValueError(f"{path} has shape {rows.shape}, expected (images, regions, D).")
    return rows


def _repeats(rows: np.ndarray, row: int) -> bool:
    group = rows[row : row + CAPTIONS]
    return len(rows) % CAPTIONS == 0 and len(group) == CAPTIONS and bool((group == group[0]).all())
