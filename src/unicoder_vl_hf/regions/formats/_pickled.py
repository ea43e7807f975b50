"""What the formats of pickled dicts share: LMDB of them, and fields that are numbers or text, arrays or base64."""

import os
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from . import _lmdb, restricted_pickle
from ._parsing import integer, matrix
from .restricted_pickle import brief

KEYS = b"keys"  # the list of all ids, under which no image is


def read_lmdb(
    path: str | os.PathLike, skip: Container[str], record: Callable[[str, dict[str, Any]], RegionRecord]
) -> Iterator[RegionRecord]:
    """
    `record(image_id, fields)` of each pickled dict of an LMDB, whose key is the image_id.

    Raises:
        ValueError: The LMDB is damaged, a pickle is refused, or what `record` raises, after the file and the id.
    """
    path = Path(path)
    for key, value in _lmdb.entries(path):
        if key == KEYS:
            continue
        try:
            image_id = key.decode()
            if image_id in skip:
                continue
            fields = restricted_pickle.load(value(), f"image {image_id!r}")
            if not isinstance(fields, dict):
                raise ValueError(f"Image {image_id!r} is a {type(fields).__name__}, expected a dict of fields.")
            for name in ("img_id", "image_id", "feature_path"):
                given = fields.get(name, image_id)
                if not isinstance(given, str | int | np.integer) or str(given) != image_id:
                    raise ValueError(f"Image {image_id!r}: {name} is {brief(given)}, unlike the key.")
            yield record(image_id, fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def first_fields(path: str | os.PathLike) -> set[str]:
    """Names of the fields of an LMDB's first image; none where it is no LMDB of pickled dicts."""
    value = _lmdb.first_value(Path(path), KEYS) or b""
    if not value.startswith(b"\x80"):  # as every pickle by Python 3 does
        return set()
    try:
        fields = restricted_pickle.load(value, "")
    except ValueError:
        return set()
    return {str(name) for name in fields} if isinstance(fields, dict) else set()


def whole_number(image_id: str, name: str, value: Any) -> int:
    """An integer from text, a number, or an array of one. Raises ValueError naming the image and the field."""
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
    """An array as it is, or `(n, columns)` from base64. Raises ValueError naming the image and the field."""
    if isinstance(value, str | bytes):
        if n is None:
            raise ValueError(
                f"Image {image_id!r}: {name} is base64, whose shape only num_boxes could tell: it is missing."
            )
        return matrix(image_id, name, value, n, dtype)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or not value.ndim:
        raise ValueError(f"Image {image_id!r}: {name} is {brief(value)}, expected an array of numbers.")
    return value


def without_background(image_id: str, name: str, probabilities: np.ndarray) -> np.ndarray:
    """Columns of class probabilities but the first. Raises ValueError naming the image and the field."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"Image {image_id!r}: {name} have shape {probabilities.shape}, expected a row a region, and after the "
            "background's a column a class."
        )
    return probabilities[:, 1:]
