"""
The per-image .npz from which UNITER (Chen et al., 2020) makes its LMDB, `<image_id>.npz`:

    features (n, D)  norm_bb (n, 6) = x1 y1 x2 y2 w h, fractions  conf (n, 1) or (n,)  soft_labels (n, 1 + classes)

Column 0 of `soft_labels` is background. The image size is not stored, so boxes are fractions. All rows are read:
UNITER's selection (the first min(100, max(10, how many score above 0.2))) is made on the way to its LMDB.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from ...records_unicoder_vl import FRACTION_TOLERANCE, RegionRecord
from ._npz import members, npz_items, write_files
from ._numbers import typed_features
from ._pickled import array, without_background
from .items import Item

NAME = "uniter-npz"
ARRAYS = ("features", "norm_bb", "conf", "soft_labels")


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is such an .npz, or a folder in which the first .npz is one."""
    return {"features", "norm_bb"} <= members(path)


def items(path: str | PathLike, *, feature_dtype: str | None = None) -> Iterator[Item]:
    """
    Yields the images of one file, or of all .npz files of a folder by name. The image_id is the file's name without
    `.npz`.
    """
    return npz_items(path, ARRAYS, partial(record, feature_dtype=feature_dtype))


def write(records: Iterable[RegionRecord], path: str | PathLike) -> None:
    """
    Writes a folder of .npz files. See `arrays_of` for the arrays in them.

    Raises:
        ValueError: `path` exists, or a record lacks boxes or has an image_id that is no file name.
    """
    write_files(records, path, arrays_of)


def not_written(record: RegionRecord) -> list[str]:
    """
    Names the image size, the attributes, and object classes that are not the most probable ones, from which `record`
    takes them.
    """
    lost = ["image_width", "image_height", "attribute_ids", "attribute_scores"]
    ids, probabilities = record.object_ids, record.class_probabilities
    if probabilities is None or ids is None or (probabilities.argmax(axis=1) != ids).any():
        lost.append("object_ids")
    return [name for name in lost if getattr(record, name) is not None]


def record(
    image_id: str, arrays: Mapping[str, Any], num_regions: int | None = None, feature_dtype: str | None = None
) -> RegionRecord:
    """Makes the record of the first `num_regions` rows. Raises ValueError naming the image and the field."""
    # Other members are left out: np.savez made a stray one of its keyword argument.
    found = {name: array(image_id, name, arrays[name], None)[:num_regions] for name in ARRAYS if name in arrays}
    missing = [name for name in ("features", "norm_bb") if name not in found]
    if missing:
        raise ValueError(f"Image {image_id!r}: {missing} missing among {list(arrays)}.")
    conf = found.get("conf")
    labels = without_background(image_id, "soft_labels", found["soft_labels"]) if "soft_labels" in found else None
    return RegionRecord(
        image_id,
        boxes=_boxes(image_id, found["norm_bb"]),
        features=typed_features(image_id, "features", found["features"], feature_dtype),
        object_ids=None if labels is None else labels.argmax(axis=1),
        object_scores=conf[:, 0] if conf is not None and conf.shape[1:] == (1,) else conf,
        class_probabilities=labels,
    )


def arrays_of(record: RegionRecord) -> dict[str, np.ndarray]:
    """
    Gives the arrays of UNITER for a record, with `conf` and `soft_labels` where the scores and class probabilities are
    known. The background gets the probability that the other classes leave.

    Raises:
        ValueError: The boxes are unknown.
    """
    if record.boxes is None:
        raise ValueError(f"Image {record.image_id!r}: boxes must be known: UNITER has no word for unknown ones.")
    boxes = record.boxes
    if record.image_width is not None and record.image_height is not None:
        boxes = boxes / np.array([record.image_width, record.image_height] * 2, np.float32)
    arrays = {"features": record.features, "norm_bb": np.hstack([boxes, boxes[:, 2:] - boxes[:, :2]])}
    if record.object_scores is not None:
        arrays["conf"] = record.object_scores[:, None]
    if record.class_probabilities is not None:
        labels = record.class_probabilities
        background = (1 - labels.sum(axis=1, dtype=np.float32, keepdims=True)).clip(0, 1)
        arrays["soft_labels"] = np.hstack([background.astype(labels.dtype), labels])
    return arrays


def _boxes(image_id: str, norm_bb: np.ndarray) -> np.ndarray:
    if norm_bb.ndim != 2 or norm_bb.shape[1] != 6:
        raise ValueError(f"Image {image_id!r}: norm_bb have shape {norm_bb.shape}, expected (n, 6): x1 y1 x2 y2 w h.")
    boxes = norm_bb[:, :4].astype(np.float32)
    wrong = np.abs(boxes[:, 2:] - boxes[:, :2] - norm_bb[:, 4:]) > FRACTION_TOLERANCE
    if wrong.any():
        row = wrong.any(axis=1).argmax()
        raise ValueError(
            f"Image {image_id!r}: norm_bb[{row}] = {norm_bb[row].tolist()}, expected x1 y1 x2 y2 w h with "
            "w = x2 - x1 and h = y2 - y1: the columns may be in another order."
        )
    return boxes
