"""
The LMDB of Volta (Bugliarello et al., 2021; its `convert_*_lmdb.py`, `h5_to_lmdb.py`) and of ViLBERT-MT
(`convert_to_lmdb.py`): key = image id, value = a pickled dict; under the key `keys` stands the list of ids.

    Volta:       img_id  img_h  img_w  num_boxes  boxes  features, and more of LXMERT's columns
    ViLBERT-MT:  image_id  image_h  image_w  num_boxes  boxes  features

Volta's values are the cells of LXMERT's TSV (see `lxmert_tsv`), so numbers are text and arrays base64, and columns that
the TSV lacked are None; those that come from HDF5 are plain, and call classes and attributes `obj_id`, `obj_conf`,
`attr_id`, `attr_conf`. Ids are 0-based and without background; column 0 of `cls_prob` is background. ViLBERT-MT's
`num_boxes` counts the boxes that scored above 0, which come first; as its own reader does, all rows are read.
"""

from collections.abc import Iterator
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ._pickled import array, box_array, feature_array, first_fields, pickled_items, whole_number, without_background
from .items import Item

NAME = "volta-lmdb"
# Field of a record -> its names in the source, and its type in base64.
_VECTORS = {
    "object_ids": ("objects_id", "obj_id", "<i8"),
    "object_scores": ("objects_conf", "obj_conf", "<f4"),
    "attribute_ids": ("attrs_id", "attr_id", "<i8"),
    "attribute_scores": ("attrs_conf", "attr_conf", "<f4"),
}
# All fields from which a record is made.
FIELDS = "img_h img_w num_boxes boxes features cls_prob".split() + [n for row in _VECTORS.values() for n in row[:2]]


def matches(path: str | PathLike) -> bool:
    """
    Tells whether `path` is an LMDB (its folder or file) whose first value is a pickled dict with `boxes` and a size.
    """
    fields = first_fields(path)
    return {"boxes", "features"} <= fields and bool({"img_h", "image_h"} & fields)


def items(path: str | PathLike, *, feature_dtype: str | None = None) -> Iterator[Item]:
    """Yields the images by ascending key. Nothing of a pickle is executed."""
    return pickled_items(path, partial(record, feature_dtype=feature_dtype))


def record(image_id: str, fields: dict[str, Any], feature_dtype: str | None) -> RegionRecord:
    """Makes the record of the known fields. Raises ValueError naming the image and the field."""
    height, width = ("img_h", "img_w") if "img_h" in fields else ("image_h", "image_w")
    missing = [name for name in (height, width, "boxes", "features") if name not in fields]
    if missing:
        raise ValueError(f"Image {image_id!r}: {missing} missing among {list(fields)}.")
    n = whole_number(image_id, "num_boxes", fields["num_boxes"]) if "num_boxes" in fields else None
    if n is not None and n < 1:
        raise ValueError(f"Image {image_id!r}: num_boxes is {n}, expected at least 1: take the image out.")
    features = feature_array(image_id, "features", fields["features"], n, feature_dtype)
    if n is not None and (n > len(features) or (n < len(features) and height == "img_h")):
        raise ValueError(f"Image {image_id!r}: num_boxes is {n}, but features have {len(features)} rows.")
    vectors: dict[str, np.ndarray] = {}
    for field, (name, other, dtype) in _VECTORS.items():
        name = name if name in fields else other
        if name in fields:
            vectors[field] = array(image_id, name, fields[name], n, dtype).ravel()
    probabilities = array(image_id, "cls_prob", fields["cls_prob"], n) if "cls_prob" in fields else None
    return RegionRecord(
        image_id,
        image_width=whole_number(image_id, width, fields[width]),
        image_height=whole_number(image_id, height, fields[height]),
        boxes=box_array(image_id, "boxes", fields["boxes"], n),
        features=features,
        class_probabilities=None if probabilities is None else without_background(image_id, "cls_prob", probabilities),
        **vectors,
    )
