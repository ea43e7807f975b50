"""
Reading that the formats of pickled dicts share: LMDB of them, and fields that are numbers or text, arrays or base64.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from . import _lmdb, restricted_pickle
from ._numbers import coordinates, features, matrix, typed_features
from ._parsing import integer
from .items import Item
from .restricted_pickle import brief

KEYS = b"keys"  # the key of the list of all ids, which is no image


def pickled_items(path: str | os.PathLike, record: Callable[[str, dict[str, Any]], RegionRecord]) -> Iterator[Item]:
    """
    Yields an image for each pickled dict of an LMDB, whose key is the image_id; `record(image_id, fields)` makes its
    record of the known fields.
    """

    def load(image_id: str, value: bytes) -> RegionRecord:
        fields = restricted_pickle.load(value, f"image {image_id!r}")
        if not isinstance(fields, dict):
            raise ValueError(f"Image {image_id!r} is a {type(fields).__name__}, expected a dict of fields.")
        fields = known(fields)
        for name in ("img_id", "image_id", "feature_path"):
            given = fields.get(name, image_id)
            if not isinstance(given, str | int | np.integer) or str(given) != image_id:
                raise ValueError(f"Image {image_id!r}: {name} is {brief(given)}, unlike the key.")
        return record(image_id, fields)

    return _lmdb.lmdb_items(path, KEYS, load)


def known(fields: Mapping[Any, Any]) -> dict[Any, Any]:
    """Leaves out the fields that are None, which some tools write for unknown values."""
    return {
        name: value
        for name, value in fields.items()
        # np.savez makes an array of it.
        if value is not None and not (isinstance(value, np.ndarray) and value.dtype == object and value.item(0) is None)
    }


def first_fields(path: str | os.PathLike) -> set[str]:
    """Gives the names of the fields of an LMDB's first image; none where the file is no LMDB of pickled dicts."""
    value = _lmdb.first_value(Path(path), KEYS) or b""
    if not value.startswith(b"\x80"):  # as every pickle by Python 3 does
        return set()
    try:
        fields = restricted_pickle.load(value, "")
    except ValueError:
        return set()
    return {str(name) for name in fields} if isinstance(fields, dict) else set()


def whole_number(image_id: str, name: str, value: Any) -> int:
    """Reads an integer from text, a number, or an array of one. Raises ValueError naming the image and the field."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, str | bytes):
        return integer(image_id, name, value)
    try:
        if int(value) == value:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"Image {image_id!r}: {name} is {brief(value)}, expected a whole number.")


def array(image_id: str, name: str, value: Any, n: int | None, dtype: str = "<f4") -> np.ndarray:
    """Gives an array as it is, or `(n, columns)` from base64. Raises ValueError naming the image and the field."""
    if isinstance(value, str | bytes):
        return matrix(image_id, name, value, _rows(image_id, name, n), dtype)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or not value.ndim:
        raise ValueError(f"Image {image_id!r}: {name} is {brief(value)}, expected an array of numbers.")
    return value


def feature_array(image_id: str, name: str, value: Any, n: int | None, dtype: str | None) -> np.ndarray:
    """Gives features from an array or base64; `dtype` as in `_numbers.features`, and the same errors."""
    if isinstance(value, str | bytes):
        return features(image_id, name, value, _rows(image_id, name, n), dtype)
    return typed_features(image_id, name, array(image_id, name, value, n), dtype)


def box_array(image_id: str, name: str, value: Any, n: int | None) -> np.ndarray:
    """Gives boxes from an array or base64. Raises ValueError naming the image and the field."""
    if isinstance(value, str | bytes):
        return coordinates(image_id, name, value, _rows(image_id, name, n))
    return array(image_id, name, value, n)


def _rows(image_id: str, name: str, n: int | None) -> int:
    if n is None:
        raise ValueError(f"Image {image_id!r}: {name} is base64, whose shape only num_boxes could tell: it is missing.")
    return n


def foreground(
    image_id: str, name: str, probabilities: np.ndarray, background: bool | None, classes: int
) -> tuple[np.ndarray, bool]:
    """
    Gives class probabilities without that of the background, and tells whether there was one.

    Args:
        image_id, name (`str`): The image and the field, for errors.
        probabilities (`np.ndarray` of shape `(n, columns)`): Probabilities of all classes, 0 to 1; that of the
            background, if there is one, comes first.
        background (`bool`, *optional*): Whether there is one; None takes it so where there are `classes + 1` columns.
        classes (`int`): Number of classes of the usual detector, which `background` must not contradict.
    """
    columns = probabilities.shape[-1]
    if background is None:
        background = columns == classes + 1
    if columns == classes + (not background):
        raise ValueError(
            f"Image {image_id!r}: {name} has {columns} columns, but background is {background}: it is a class where "
            f"there are {classes + 1} columns."
        )
    return (without_background(image_id, name, probabilities) if background else probabilities), background


def without_background(image_id: str, name: str, probabilities: np.ndarray) -> np.ndarray:
    """Gives all columns of class probabilities except the first. Raises ValueError naming the image and the field."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"Image {image_id!r}: {name} have shape {probabilities.shape}, expected a row a region, and after the "
            "background's a column a class."
        )
    return probabilities[:, 1:]
