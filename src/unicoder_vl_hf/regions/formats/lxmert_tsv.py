"""
The TSV of LXMERT (Tan and Bansal, 2019; its `extract_*_image.py` and `utils.load_obj_tsv`): a line an image, no header:

    img_id  img_h  img_w  objects_id  objects_conf  attrs_id  attrs_conf  num_boxes  boxes  features

Height before width, unlike bottom-up-attention's. The arrays are base64: ids int64 (n,), 0-based and without
background; the rest float32, boxes (n, 4) x1 y1 x2 y2 in pixels; files of other makers may hold another type,
which `_numbers` detects. Detectors without attributes leave these two columns out. A variant appends

    cls_prob  attrs  classes

of shapes (n, 1601), (n, 401) and (n, 1601), whose column 0 is background. A record keeps `cls_prob`; `classes`
repeats it, and the most probable attribute of `attrs` is in `attrs_id`.
"""

from base64 import b64encode
from collections.abc import Iterable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from ...files import new_file
from ...records_unicoder_vl import RegionRecord
from ._numbers import coordinates, features, matrix
from ._parsing import files, first_fields, integer, num_boxes, tsv_items
from .items import Item

NAME = "lxmert-tsv"
FIELDS = tuple("img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split())
VARIANT_FIELDS = (*FIELDS, "cls_prob", "attrs", "classes")
WITHOUT_ATTRIBUTES = tuple(name for name in FIELDS if not name.startswith("attrs_"))
LAYOUTS = {len(fields): fields for fields in (FIELDS, VARIANT_FIELDS, WITHOUT_ATTRIBUTES)}


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is a .tsv (or part of one: `.tsv.0`) with LXMERT's columns, or a folder of such files."""
    # Enough for the eight columns before the boxes, of a thousand regions.
    fields = next((first_fields(file, 2**16) for file in files(path, ".tsv")), [])
    for count in (7, 5):  # the column num_boxes, with and without attributes
        numbers = [fields[column] for column in (1, 2, count) if len(fields) > count + 1]
        if numbers and all(number.isdigit() and len(number) < 9 for number in numbers):
            ids = len(b64encode(bytes(8 * int(fields[count]))))
            return len(fields[3]) in (ids, ids + len("b''"))
    return False


def items(path: str | PathLike, *, feature_dtype: str | None = None) -> Iterator[Item]:
    """Yields the images of a file, or of all .tsv files of a folder by name, a line at a time."""
    return tsv_items(path, partial(_record, feature_dtype=feature_dtype))


def write(records: Iterable[RegionRecord], path: str | PathLike) -> None:
    """
    Writes the ten columns to a new file, for LXMERT's own loader. The format has no value for unknown: unknown classes
    and attributes become id -1 with confidence 0, which reading undoes. Features become float32; class probabilities
    are left out; boxes are clipped to the image, since LXMERT refuses boxes that are a pixel outside.

    Args:
        records (iterable of `RegionRecord`): Records with image size and boxes.
        path (`str` or `os.PathLike`): The new file, which appears whole or not at all.

    Raises:
        ValueError: `path` exists or does not end in .tsv, or a record lacks boxes or the image size.
    """
    if Path(path).suffix != ".tsv":
        raise ValueError(f"{path}: LXMERT reads files that end in .tsv, expected such as {Path(path).name}.tsv.")
    with new_file(path) as file:
        for record in records:
            file.write(_line(record))


def not_written(record: RegionRecord) -> list[str]:
    """Names the class probabilities, and scores without ids, which are read as unknown."""
    lost = ["class_probabilities"]
    for ids, scores in (("object_ids", "object_scores"), ("attribute_ids", "attribute_scores")):
        known = getattr(record, ids)
        if known is None or (known == -1).all():
            lost += [ids, scores]
    return [name for name in lost if getattr(record, name) is not None]


def _record(image_id: str, fields: list[bytes], feature_dtype: str | None) -> RegionRecord:
    if len(fields) not in LAYOUTS:
        raise ValueError(f"Image {image_id!r}: {len(fields)} columns, expected {', '.join(FIELDS)}.")
    texts = dict(zip(LAYOUTS[len(fields)], fields, strict=True))
    n = num_boxes(image_id, texts["num_boxes"])

    known: dict[str, np.ndarray] = {}
    for name, field in (("objects", "object"), ("attrs", "attribute")):
        if f"{name}_id" in texts:
            ids = matrix(image_id, f"{name}_id", texts[f"{name}_id"], n, "<i8").ravel()
            scores = matrix(image_id, f"{name}_conf", texts[f"{name}_conf"], n).ravel()
            if (ids != -1).any():
                known |= {f"{field}_ids": ids, f"{field}_scores": scores}
    if "cls_prob" in texts:
        known["class_probabilities"] = matrix(image_id, "cls_prob", texts["cls_prob"], n)[:, 1:]
    return RegionRecord(
        image_id,
        image_width=integer(image_id, "img_w", texts["img_w"]),
        image_height=integer(image_id, "img_h", texts["img_h"]),
        boxes=coordinates(image_id, "boxes", texts["boxes"], n),
        features=features(image_id, "features", texts["features"], n, feature_dtype),
        **known,
    )


def _line(record: RegionRecord) -> bytes:
    width, height, boxes = record.image_width, record.image_height, record.boxes
    if width is None or height is None or boxes is None:
        raise ValueError(
            f"Image {record.image_id!r}: the {'boxes' if boxes is None else 'image size'} must be known, since LXMERT "
            "divides boxes in pixels by it: convert from a format that has both."
        )
    if set(record.image_id) & set('\t\n\r"'):
        raise ValueError(f"Image {record.image_id!r}: image_id holds a tab, line end or quote: rename the image.")

    def text(values: np.ndarray | None, dtype: str, unknown: int = -1) -> bytes:
        return b64encode((np.full(len(record), unknown) if values is None else values).astype(dtype).tobytes())

    fields = (
        record.image_id.encode(),
        str(height).encode(),
        str(width).encode(),
        text(record.object_ids, "<i8"),
        text(record.object_scores, "<f4", 0),
        text(record.attribute_ids, "<i8"),
        text(record.attribute_scores, "<f4", 0),
        str(len(record)).encode(),
        text(boxes.clip(0, (width, height, width, height)), "<f4"),
        text(record.features, "<f4"),
    )
    return b"\t".join(fields) + b"\n"
