"""
The LMDB of Volta (Bugliarello et al., 2021; its `convert_*_lmdb.py`, `h5_to_lmdb.py`) and of ViLBERT-MT
(`convert_to_lmdb.py`): key = image id, value = a pickled dict; under the key `keys` stands the list of ids.

    Volta:       img_id  img_h  img_w  num_boxes  boxes  features, and more of LXMERT's columns
    ViLBERT-MT:  image_id  image_h  image_w  num_boxes  boxes  features

Volta's values are the cells of LXMERT's TSV (see `lxmert_tsv`), so numbers are text and arrays base64; those that come
from HDF5 are plain, and call classes and attributes `obj_id`, `obj_conf`, `attr_id`, `attr_conf`. Ids are 0-based and
without background; column 0 of `cls_prob` is background. ViLBERT-MT's `num_boxes` counts the boxes that scored above 0,
which come first; as its own reader does, all rows are read.
"""

from collections.abc import Container, Iterator
from os import PathLike
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ._pickled import array, first_fields, read_lmdb, whole_number, without_background

NAME = "volta-lmdb"
# Field of a record: names in the source, type in base64.
_VECTORS = {
    "object_ids": ("objects_id", "obj_id", "<i8"),
    "object_scores": ("objects_conf", "obj_conf", "<f4"),
    "attribute_ids": ("attrs_id", "attr_id", "<i8"),
    "attribute_scores": ("attrs_conf", "attr_conf", "<f4"),
}


def matches(path: str | PathLike) -> bool:
    """Whether `path` is an LMDB (its folder or file) whose first value is a pickled dict with `boxes` and a size."""
    fields = first_fields(path)
    return {"boxes", "features"} <= fields and bool({"img_h", "image_h"} & fields)


def read(path: str | PathLike, skip: Container[str] = ()) -> Iterator[RegionRecord]:
    """
    Records by ascending key. Nothing of a pickle is executed.

    Raises:
        ValueError: The file or a value is malformed; the message names the file, the image, the field and the value.
    """
    return read_lmdb(path, skip, _record)


def _record(image_id: str, fields: dict[str, Any]) -> RegionRecord:
    height, width = ("img_h", "img_w") if "img_h" in fields else ("image_h", "image_w")
    missing = [name for name in (height, width, "boxes", "features") if name not in fields]
    if missing:
        raise ValueError(f"Image {image_id!r}: {missing} missing among {list(fields)}.")
    n = whole_number(image_id, "num_boxes", fields["num_boxes"]) if "num_boxes" in fields else None
    if n is not None and n < 1:
        raise ValueError(f"Image {image_id!r}: num_boxes is {n}, expected at least 1: take the image out.")
    features = array(image_id, "features", fields["features"], n)
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
        boxes=array(image_id, "boxes", fields["boxes"], n),
        features=features,
        class_probabilities=None if probabilities is None else without_background(image_id, "cls_prob", probabilities),
        **vectors,
    )
