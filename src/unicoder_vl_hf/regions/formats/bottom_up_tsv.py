"""
The TSV of bottom-up-attention (Anderson et al., 2018): a line an image, without a header:

    image_id  image_w  image_h  num_boxes  boxes  features

The last two are base64 of C-order float32: (n, 4) absolute x1 y1 x2 y2, and (n, D). There are no classes and no scores.
Boxes are proposals in the original tool and regressed boxes in later ports; the file does not say which.
"""

from collections.abc import Container, Iterator
from os import PathLike
from pathlib import Path

from ...feature_extraction_unicoder_vl import RegionRecord
from ._parsing import integer, matrix

NAME = "bottom-up-tsv"
FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


def matches(path: str | PathLike) -> bool:
    """Whether `path` is a .tsv (or part of one: `.tsv.0`) of six columns, or a folder of such files."""
    files = _files(Path(path))
    if not files:
        return False
    with files[0].open("rb") as file:
        # The four columns before the base64 are short, and lines may be megabytes.
        fields = file.read(4096).split(b"\n", 1)[0].split(b"\t")
    return len(fields) in (5, 6) and all(field.isdigit() for field in fields[1:4])


def read(path: str | PathLike, skip: Container[str] = ()) -> Iterator[RegionRecord]:
    """
    Records of a file, or of all .tsv files of a folder by name, a line at a time.

    Raises:
        ValueError: A line is malformed; the message names the file, the line, the field and the value.
    """
    files = _files(Path(path))
    if not files:
        raise ValueError(f"{path} is no .tsv file, nor a folder of them.")
    for name in files:
        with name.open("rb") as file:
            for number, line in enumerate(file, start=1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                if fields == [b""]:
                    continue
                try:
                    image_id = fields[0].decode()
                    if image_id not in skip:
                        yield _record(image_id, fields)
                except ValueError as error:
                    raise ValueError(f"{name}, line {number}: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if ".tsv" in file.suffixes)
    return [path] if ".tsv" in path.suffixes else []


def _record(image_id: str, fields: list[bytes]) -> RegionRecord:
    if len(fields) != len(FIELDS):
        hint = "; 10 and more are LXMERT's layout" if len(fields) >= 10 else ""
        raise ValueError(f"Image {image_id!r}: {len(fields)} columns, expected {', '.join(FIELDS)}{hint}.")
    width, height, n = (integer(image_id, name, text) for name, text in zip(FIELDS[1:4], fields[1:4], strict=True))
    if n < 1:
        raise ValueError(f"Image {image_id!r}: num_boxes is {n}, expected at least 1: take the line out.")
    boxes = matrix(image_id, "boxes", fields[4], n)
    features = matrix(image_id, "features", fields[5], n)
    return RegionRecord(image_id, image_width=width, image_height=height, boxes=boxes, features=features)
