"""
The TSV of bottom-up-attention (Anderson et al., 2018): a line an image, without a header:

    image_id  image_w  image_h  num_boxes  boxes  features

The last two are base64 of C-order float32: (n, 4) x1 y1 x2 y2 in pixels, and (n, D); files of other makers may hold
another type, which `_numbers` detects. There are no classes and no scores. Boxes are proposals in the original tool and
regressed boxes in later ports; the file does not say which.
"""

from collections.abc import Iterator
from functools import partial
from os import PathLike

from ...records_unicoder_vl import RegionRecord
from ._numbers import coordinates, features
from ._parsing import files, first_fields, integer, num_boxes, tsv_items
from .items import Item

NAME = "bottom-up-tsv"
FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is a .tsv (or part of one: `.tsv.0`) of six columns, or a folder of such files."""
    # The four columns before the base64 are short.
    fields = next((first_fields(file) for file in files(path, ".tsv")), [])
    return len(fields) in (5, 6) and all(field.isdigit() for field in fields[1:4])


def items(path: str | PathLike, *, feature_dtype: str | None = None) -> Iterator[Item]:
    """Yields the images of a file, or of all .tsv files of a folder by name, a line at a time."""
    return tsv_items(path, partial(_record, feature_dtype=feature_dtype))


def _record(image_id: str, fields: list[bytes], feature_dtype: str | None) -> RegionRecord:
    if len(fields) != len(FIELDS):
        hint = "; 10 and more are LXMERT's layout" if len(fields) >= 10 else ""
        raise ValueError(f"Image {image_id!r}: {len(fields)} columns, expected {', '.join(FIELDS)}{hint}.")
    n = num_boxes(image_id, fields[3])
    return RegionRecord(
        image_id,
        image_width=integer(image_id, "image_w", fields[1]),
        image_height=integer(image_id, "image_h", fields[2]),
        boxes=coordinates(image_id, "boxes", fields[4], n),
        features=features(image_id, "features", fields[5], n, feature_dtype),
    )
