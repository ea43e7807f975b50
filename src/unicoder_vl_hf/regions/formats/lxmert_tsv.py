"""
The TSV of LXMERT (Tan and Bansal, 2019; its `extract_*_image.py` and `utils.load_obj_tsv`): a line an image, no header:

    img_id  img_h  img_w  objects_id  objects_conf  attrs_id  attrs_conf  num_boxes  boxes  features

Height before width, unlike bottom-up-attention's. The arrays are base64: ids int64 (n,), 0-based and without
background; the rest float32, boxes (n, 4) x1 y1 x2 y2 in pixels. A variant appends

    cls_prob  attrs  classes

of shapes (n, 1601), (n, 401) and (n, 1601), whose column 0 is background. Of these a record has room for `cls_prob`;
`classes` repeats it, and the attribute that leads in `attrs` is in `attrs_id`.
"""

from base64 import b64encode
from collections.abc import Container, Iterable, Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ..tensor_files import new_file
from ._parsing import files, first_fields, integer, matrix, num_boxes, read_tsv

NAME = "lxmert-tsv"
FIELDS = tuple("img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split())
VARIANT_FIELDS = (*FIELDS, "cls_prob", "attrs", "classes")


def matches(path: str | PathLike) -> bool:
    """Whether `path` is a .tsv (or part of one: `.tsv.0`) with LXMERT's columns, or a folder of such files."""
    # Enough for the eight columns before the boxes, of a thousand regions.
    fields = next((first_fields(file, 2**16) for file in files(path, ".tsv")), [])
    if len(fields) < 9 or not all(fields[column].isdigit() and len(fields[column]) < 9 for column in (1, 2, 7)):
        return False
    return len(fields[3]) == len(b64encode(bytes(8 * int(fields[7]))))


def read(path: str | PathLike, skip: Container[str] = ()) -> Iterator[RegionRecord]:
    """
    Records of a file, or of all .tsv files of a folder by name, a line at a time.

    Raises:
        ValueError: A line is malformed; the message names the file, the line, the field and the value.
    """
    return read_tsv(path, skip, _record)


def write(records: Iterable[RegionRecord], path: str | PathLike) -> None:
    """
    Writes the ten columns to a new file, for LXMERT's own loader. It has no word for unknown: unknown classes and
    attributes become id -1 with confidence 0, which `read` undoes. Features become float32; class probabilities
    are left out; boxes are clipped to the image, since LXMERT refuses what is a pixel outside.

    Args:
        records (iterable of `RegionRecord`): With image size and boxes.
        path (`str` or `os.PathLike`): The file, complete or not there at all.

    Raises:
        ValueError: `path` exists or does not end in .tsv, or a record lacks what LXMERT needs.
    """
    if Path(path).suffix != ".tsv":
        raise ValueError(f"{path}: LXMERT reads files of the name *.tsv, expected such as {Path(path).name}.tsv.")
    with new_file(path) as file:
        for record in records:
            file.write(_line(record))


def not_written(record: RegionRecord) -> list[str]:
    """The class probabilities; and scores without ids, which `read` takes for unknown."""
    lost = ["class_probabilities"]
    for ids, scores in (("object_ids", "object_scores"), ("attribute_ids", "attribute_scores")):
        known = getattr(record, ids)
        if known is None or (known == -1).all():
            lost += [ids, scores]
    return [name for name in lost if getattr(record, name) is not None]


def _record(image_id: str, fields: list[bytes]) -> RegionRecord:
    if len(fields) not in (len(FIELDS), len(VARIANT_FIELDS)):
        raise ValueError(f"Image {image_id!r}: {len(fields)} columns, expected {', '.join(FIELDS)}.")
    texts = dict(zip(VARIANT_FIELDS, fields, strict=False))
    n = num_boxes(image_id, texts["num_boxes"])

    def vector(name: str, dtype: str) -> np.ndarray:
        return matrix(image_id, name, texts[name], n, dtype).ravel()

    object_ids, attribute_ids = vector("objects_id", "<i8"), vector("attrs_id", "<i8")
    has_objects, has_attributes = (object_ids != -1).any(), (attribute_ids != -1).any()
    return RegionRecord(
        image_id,
        image_width=integer(image_id, "img_w", texts["img_w"]),
        image_height=integer(image_id, "img_h", texts["img_h"]),
        boxes=matrix(image_id, "boxes", texts["boxes"], n),
        features=matrix(image_id, "features", texts["features"], n),
        object_ids=object_ids if has_objects else None,
        object_scores=vector("objects_conf", "<f4") if has_objects else None,
        attribute_ids=attribute_ids if has_attributes else None,
        attribute_scores=vector("attrs_conf", "<f4") if has_attributes else None,
        class_probabilities=matrix(image_id, "cls_prob", texts["cls_prob"], n)[:, 1:] if "cls_prob" in texts else None,
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
