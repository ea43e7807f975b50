"""
The TSV of bottom-up-attention (Anderson et al., 2018): a line an image, without a header:

    image_id  image_w  image_h  num_boxes  boxes  features

The last two are base64 of C-order float32: (n, 4) absolute x1 y1 x2 y2, and (n, D). There are no classes and no scores.
Boxes are proposals in the original tool and regressed boxes in later ports; the file does not say which.
"""

from collections.abc import Container, Iterator
from os import PathLike

from ...records_unicoder_vl import RegionRecord
from ._parsing import files, first_fields, integer, matrix, num_boxes, read_tsv

NAME = "bottom-up-tsv"
FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


def matches(path: str | PathLike) -> bool:
    """Whether `path` is a .tsv (or part of one: `.tsv.0`) of six columns, or a folder of such files."""
    # The four columns before the base64 are short.
    fields = next((first_fields(file) for file in files(path, ".tsv")), [])
    return len(fields) in (5, 6) and all(field.isdigit() for field in fields[1:4])


def read(path: str | PathLike, skip: Container[str] = ()) -> Iterator[RegionRecord]:
    """
    Records of a file, or of all .tsv files of a folder by name, a line at a time.

    Raises:
        ValueError: A line is malformed; the message names the file, the line, the field and the value.
    """
    return read_tsv(path, skip, _record)


def _record(image_id: str, fields: list[bytes]) -> RegionRecord:
    if len(fields) != len(FIELDS):
        hint = "; 10 and more are LXMERT's layout" if len(fields) >= 10 else ""
        raise ValueError(f"Image {image_id!r}: {len(fields)} columns, expected {', '.join(FIELDS)}{hint}.")
    n = num_boxes(image_id, fields[3])
    return RegionRecord(
        image_id,
        image_width=integer(image_id, "image_w", fields[1]),
        image_height=integer(image_id, "image_h", fields[2]),
        boxes=matrix(image_id, "boxes", fields[4], n),
        features=matrix(image_id, "features", fields[5], n),
    )
