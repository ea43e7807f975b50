"""
The per-image .npz of MILVLG's bottom-up-attention.pytorch (`extract_utils.save_roi_features`), `<image_id>.npz`:

    x (n, D)  bbox (n, 4) x1 y1 x2 y2 in pixels  num_bbox  image_h  image_w  info

Some call `bbox` `boxes`. `info` is a pickled dict of `objects_id`, `objects_conf`, `attrs_id`, `attrs_conf` (n,) and
more; some variants have these beside it. Ids are 0-based and without background, but the tool's first versions counted
background as 0, in objects and attributes alike, and the file does not say which version wrote it.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ._npz import members, npz_items, write_files
from ._pickled import array, feature_array, known, whole_number
from .items import Item
from .restricted_pickle import brief

NAME = "milvlg-npz"
REQUIRED = ("x", "bbox", "image_w", "image_h")
OPTIONAL = {
    "objects_id": "object_ids",
    "objects_conf": "object_scores",
    "attrs_id": "attribute_ids",
    "attrs_conf": "attribute_scores",
}


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is such an .npz, or a folder in which the first .npz is one."""
    names = members(path)
    return all(name in names for name in REQUIRED if name != "bbox") and bool({"bbox", "boxes"} & names)


def items(path: str | PathLike, *, background: bool = False, feature_dtype: str | None = None) -> Iterator[Item]:
    """
    Yields the images of one file, or of all .npz files of a folder by name. The image_id is the file's name without
    `.npz`.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        background (`bool`, defaults to `False`): Whether ids count background as 0.
        feature_dtype (`str`, *optional*): Type of the features where the files hold their bytes.
    """
    names = (*REQUIRED, *OPTIONAL, "boxes", "num_bbox", "info")
    return npz_items(path, names, partial(_record, background=background, feature_dtype=feature_dtype))


def write(records: Iterable[RegionRecord], path: str | PathLike) -> None:
    """
    Writes a folder of .npz files, with `info` as the tool writes it. Class probabilities are left out.

    Raises:
        ValueError: `path` exists, or a record lacks boxes or the image size, or has an image_id that is no file name.
    """
    write_files(records, path, _arrays)


def not_written(record: RegionRecord) -> list[str]:
    """Names the class probabilities."""
    return [] if record.class_probabilities is None else ["class_probabilities"]


def _record(image_id: str, arrays: dict[str, Any], background: bool, feature_dtype: str | None) -> RegionRecord:
    if "boxes" in arrays:
        arrays = {"bbox": arrays["boxes"]} | arrays
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        raise ValueError(f"Image {image_id!r}: {missing} missing, expected {list(REQUIRED)} among {list(arrays)}.")
    features = feature_array(image_id, "x", arrays["x"], None, feature_dtype)
    if "num_bbox" in arrays:
        n = whole_number(image_id, "num_bbox", arrays["num_bbox"])
        if n != len(features):
            raise ValueError(f"Image {image_id!r}: num_bbox is {n}, but x has {len(features)} rows.")
    if "info" in arrays:
        info = arrays["info"].item() if arrays["info"].size == 1 else None
        if not isinstance(info, dict):
            raise ValueError(f"Image {image_id!r}: info is {brief(arrays['info'])}, expected a pickled dict.")
        arrays = known(info) | arrays
    found = {field: array(image_id, key, arrays[key], None) for key, field in OPTIONAL.items() if key in arrays}
    if background:
        found |= {field: found[field] - 1 for field in ("object_ids", "attribute_ids") if field in found}
    return RegionRecord(
        image_id,
        image_width=whole_number(image_id, "image_w", arrays["image_w"]),
        image_height=whole_number(image_id, "image_h", arrays["image_h"]),
        boxes=array(image_id, "bbox", arrays["bbox"], None),
        features=features,
        **found,
    )


def _arrays(record: RegionRecord) -> dict[str, Any]:
    width, height = record.image_width, record.image_height
    if record.boxes is None or width is None or height is None:
        raise ValueError(f"Image {record.image_id!r}: boxes and image size must be known: the format has both.")
    sizes = {"image_h": height, "image_w": width}
    labels = {key: getattr(record, field) for key, field in OPTIONAL.items() if getattr(record, field) is not None}
    info: Any = {"image_id": record.image_id, **sizes, "num_boxes": len(record), **labels}
    return {"x": record.features, "bbox": record.boxes, "num_bbox": len(record), **sizes, "info": np.array(info)}
