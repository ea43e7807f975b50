"""What several formats read alike: TSV, JSON, base64 matrices, and side files."""

import base64
import binascii
import json
import os
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...name_lists import read_names
from ...records_unicoder_vl import RegionRecord
from . import restricted_pickle
from .restricted_pickle import brief

MAX_BYTES = restricted_pickle.MAX_MEMBER_BYTES  # of one line, or one image, too: what is longer is no such file


def integer(image_id: str, name: str, text: bytes | str) -> int:
    """A whole number from text. Raises ValueError naming the image and the field."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"Image {image_id!r}: {name} is {text[:40]!r}, expected a whole number.") from None


def matrix(image_id: str, name: str, text: bytes | str, n: int, dtype: str = "<f4") -> np.ndarray:
    """`(n, columns)` from base64 of C-order numbers. Raises ValueError naming the image and the field."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"Image {image_id!r}: {name} is no base64 ({error}): the line may be cut short.") from None
    size = np.dtype(dtype).itemsize
    if not data or len(data) % (size * n):
        raise ValueError(
            f"Image {image_id!r}: {name} has {len(data)} bytes, expected {n} equal rows of {np.dtype(dtype).name}."
        )
    return np.frombuffer(data, dtype).reshape(n, -1)


def num_boxes(image_id: str, text: bytes | str) -> int:
    """The number of regions, n >= 1, from text. Raises ValueError naming the image."""
    n = integer(image_id, "num_boxes", text)
    if n < 1:
        raise ValueError(f"Image {image_id!r}: num_boxes is {n}, expected at least 1: take the line out.")
    return n


def from_json(source: str, text: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError naming `source`, whatever is wrong with the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON ({error}): it may be cut short.") from None


def listed(path: str | os.PathLike) -> list[Path]:
    """`path`, or what is in a folder, by name."""
    path = Path(path)
    return sorted(path.iterdir()) if path.is_dir() else [path]


def files(path: str | os.PathLike, suffix: str) -> list[Path]:
    """Those of `listed` that have `suffix` among theirs: `a.tsv.0` has `.tsv`."""
    return [file for file in listed(path) if suffix in file.suffixes]


def first_fields(path: Path, size: int = 4096) -> list[bytes]:
    """Columns of the first line of a TSV, as far as its first `size` bytes go: lines may be megabytes."""
    with path.open("rb") as file:
        return file.read(size).split(b"\n", 1)[0].split(b"\t")


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line that is not empty, after its place, `<path>, line <number>`. Raises ValueError where one has no end."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES), b""), start=1):
            # A cut may leave base64 of whole rows, so that the features would only be fewer.
            if not line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number} has no end: the file was cut short, or is damaged.")
            if stripped := line.rstrip(b"\r\n"):
                yield f"{path}, line {number}", stripped


def read_tsv(
    path: str | os.PathLike, skip: Container[str], record: Callable[[str, list[bytes]], RegionRecord]
) -> Iterator[RegionRecord]:
    """
    `record(image_id, columns)` of each line of a .tsv, or of all in a folder by name. The first column is the image_id.

    Raises:
        ValueError: There is no .tsv, or what `record` raises, after the file and the line.
    """
    found = files(path, ".tsv")
    if not found:
        raise ValueError(f"{path} is no .tsv file, nor a folder of them.")
    if not any(file.stat().st_size for file in found):
        raise ValueError(f"{path} is empty: copy it again.")
    for file in found:
        for place, line in lines(file):
            fields = line.split(b"\t")
            try:
                image_id = fields[0].decode()
                if image_id not in skip:
                    yield record(image_id, fields)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error


def read_index(path: str | os.PathLike) -> dict[int, str]:
    """
    Row → image_id of a side file: `{image_id: row}` in .pkl or .json, or the ids row by row in .json or text.

    Raises:
        ValueError: The file is damaged, or a row is no row or has two ids; the message names the file.
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix == ".pkl":
        index = restricted_pickle.load(data, str(path))
    elif path.suffix == ".json":
        index = from_json(str(path), data)
    else:
        index = read_names(path)
    if isinstance(index, list):
        pairs = list(enumerate(index))
    elif isinstance(index, dict):
        pairs = [(row, image_id) for image_id, row in index.items()]
    else:
        raise ValueError(f"{path} holds a {type(index).__name__}, expected {{image_id: row}} or a list of ids.")
    if not pairs:
        raise ValueError(f"{path} names no image.")
    ids: dict[int, str] = {}
    for row, image_id in pairs:
        if not isinstance(row, (int, np.integer)) or not isinstance(image_id, (str, int, np.integer)) or row in ids:
            raise ValueError(f"{path}: {brief(image_id)} has row {brief(row)}, expected an id, and a row of its own.")
        ids[int(row)] = str(image_id)
    return ids
