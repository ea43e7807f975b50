"""Reading that several formats share: TSV, JSON, and side files."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...name_lists import read_names
from ...records_unicoder_vl import RegionRecord
from . import restricted_pickle
from .items import Item, check_text, text_id
from .restricted_pickle import brief

MAX_BYTES = restricted_pickle.MAX_MEMBER_BYTES  # the limit of one line, or one image, too


def integer(image_id: str, name: str, text: bytes | str) -> int:
    """Reads a whole number from text. Raises ValueError naming the image and the field."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"Image {image_id!r}: {name} is {text[:40]!r}, expected a whole number.") from None


def num_boxes(image_id: str, text: bytes | str) -> int:
    """Reads the number of regions, n >= 1, from text. Raises ValueError naming the image."""
    n = integer(image_id, "num_boxes", text)
    if n < 1:
        raise ValueError(f"Image {image_id!r}: num_boxes is {n}, expected at least 1: take the line out.")
    return n


def from_json(source: str, text: bytes | str) -> Any:
    """Reads the value of a JSON text. Raises ValueError naming `source`, whatever is wrong with the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON ({error}): it may be cut short.") from None


def listed(path: str | os.PathLike) -> list[Path]:
    """Lists `path` itself, or the contents of a folder, by name."""
    path = Path(path)
    return sorted(path.iterdir()) if path.is_dir() else [path]


def files(path: str | os.PathLike, suffix: str) -> list[Path]:
    """Lists the files of `listed` that have `suffix` among their suffixes: `a.tsv.0` has `.tsv`."""
    return [file for file in listed(path) if suffix in file.suffixes]


def first_fields(path: Path, size: int = 4096) -> list[bytes]:
    """Reads the columns of the first line of a TSV, within its first `size` bytes: lines may be megabytes."""
    with path.open("rb") as file:
        return file.read(size).split(b"\n", 1)[0].split(b"\t")


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the lines that are not empty, each as its place, `line <number>`, and its bytes with the line end."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES), b""), start=1):
            # Skip the rest of the line: `columns` refuses it, and the next line is whole.
            if len(line) == MAX_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_BYTES)) and not rest.endswith(b"\n"):
                    pass
            if line not in (b"\n", b"\r\n"):
                yield f"line {number}", line


def columns(line: bytes) -> list[bytes]:
    """
    Splits a line of a TSV into its columns. Raises ValueError where it has no line end, or its first column, the
    image_id, is no text.
    """
    # A line that was cut short may hold base64 of whole rows: without this check it would just have fewer features.
    if not line.endswith(b"\n"):
        raise ValueError("the line has no end: the file was cut short, or is damaged.")
    # The last column is nearly all of the line, so it is copied only once.
    last, tail = line.rfind(b"\t"), line[-2:]
    end = len(line) - len(tail) + len(tail.rstrip(b"\r\n"))
    fields = [*line[:last].split(b"\t"), line[last + 1 : end]] if last >= 0 else [line[:end]]
    check_text(fields[0])
    return fields


def tsv_items(path: str | os.PathLike, record: Callable[[str, list[bytes]], RegionRecord]) -> Iterator[Item]:
    """
    Yields an image for each line of a .tsv, or of all in a folder by name; `record(image_id, columns)` makes its
    record. The first column is the image_id.

    Raises:
        ValueError: There is no .tsv, or all are empty.
    """
    found = files(path, ".tsv")
    if not found:
        raise ValueError(f"{path} is no .tsv file, nor a folder of them.")
    if not any(file.stat().st_size for file in found):
        raise ValueError(f"{path} is empty: copy it again.")

    def load(image_id: str, line: bytes) -> RegionRecord:
        return record(image_id, columns(line))

    for file in found:
        for where, line in lines(file):
            image_id = text_id(first_column(line))
            yield Item(str(file), where, image_id, partial(load, image_id, line))


def first_column(line: bytes) -> bytes:
    """Gives the image_id of a line."""
    return line[: line.find(b"\t")] if b"\t" in line else line.rstrip(b"\r\n")


def read_index(path: str | os.PathLike) -> dict[int, str]:
    """
    Reads row → image_id from a side file: `{image_id: row}` in .pkl or .json, or the ids row by row in .json or text.

    Raises:
        ValueError: The file is damaged, a row is no whole number, or two ids share a row; the message names the file.
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
