# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""
The regions of one image in NumPy: `RegionRecord`.

Values are checked here, once, so that neither the feature extractor nor the model need do so. The file imports neither
torch nor transformers: reading, checking and converting stores of records starts without them. Left out: finding
regions in photos and storing them (`unicoder_vl_hf.regions`), and making tensors of records
(`feature_extraction_unicoder_vl`).
"""

import functools
import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

logger = logging.getLogger(__name__)

PIXEL_TOLERANCE = 1.0
FRACTION_TOLERANCE = 0.01  # one pixel of a 100-pixel image; rounding a fraction to float16 changes far less
SCORE_TOLERANCE = 1e-3  # a softmax in float16 may exceed 1 by this much


@dataclass(eq=False)
class RegionRecord:
    """
    The regions of one image in NumPy, checked and coerced on construction. Every field except `image_id` and `features`
    may be None, which means unknown. The order of the rows carries no meaning. `dataclasses.replace` changes a field
    and checks again.

    Args:
        image_id (`str`): Name of the image, by which captions are joined to it.
        image_width, image_height (`int`, *optional*): Size in pixels of the image the boxes refer to. Both or neither.
        boxes (`np.ndarray` of shape `(n, 4)`, float32, *optional*): `x1 y1 x2 y2`, in pixels when the image size is
            known, as fractions of the image when it is not; at most a pixel outside the image. A box of zero width or
            height passes, since detectors clip boxes at the border of the image.
        features (`np.ndarray` of shape `(n, D)`): One row a region, n >= 1, finite. float16 and float32 stay as they
            are, other numbers become float32.
        object_ids (`np.ndarray` of shape `(n,)`, int64, *optional*): Detector class, 0-based and without background;
            -1 = no class.
        object_scores (`np.ndarray` of shape `(n,)`, float32, *optional*): Confidence in `object_ids`, 0 to 1.
        attribute_ids (`np.ndarray` of shape `(n,)`, int64, *optional*): Attribute, 0-based and without background;
            -1 = none.
        attribute_scores (`np.ndarray` of shape `(n,)`, float32, *optional*): Confidence in `attribute_ids`, 0 to 1.
        class_probabilities (`np.ndarray` of shape `(n, K)`, *optional*): Probability of each class, 0 to 1, without
            background (so rows need not sum to 1). float16 and float32 stay as they are.

    Raises:
        ValueError: A field is malformed; the message names the image id, the field, the value and what was expected.
    """

    image_id: str
    _: KW_ONLY
    image_width: int | None = None
    image_height: int | None = None
    boxes: np.ndarray | None = None
    features: np.ndarray
    object_ids: np.ndarray | None = None
    object_scores: np.ndarray | None = None
    attribute_ids: np.ndarray | None = None
    attribute_scores: np.ndarray | None = None
    class_probabilities: np.ndarray | None = None

    def __post_init__(self):
        if not isinstance(self.image_id, str) or not self.image_id:
            raise ValueError(f"image_id must be a str of at least one character, got {self.image_id!r}: pass str(id).")
        self.image_id = str(self.image_id)  # an np.str_ is a str too, but one that prints and pickles differently
        self._check_image_size()
        self.features = self._floats("features", self.features, None, None)
        if 0 in self.features.shape:
            shape = self.features.shape
            raise self._error(
                "features", f"have shape {shape}, expected n >= 1 regions: leave out images without regions"
            )
        n = self.num_regions
        if self.boxes is not None:
            self.boxes = self._floats("boxes", self.boxes, n, 4).astype(np.float32, copy=False)
            self._check_boxes(self.boxes)
        for name in ("object_ids", "attribute_ids"):
            if (ids := getattr(self, name)) is not None:
                setattr(self, name, self._ids(name, ids, n))
        for name in ("object_scores", "attribute_scores"):
            if (scores := getattr(self, name)) is not None:
                setattr(self, name, self._scores(name, scores, n).astype(np.float32, copy=False))
        if self.class_probabilities is not None:
            self.class_probabilities = self._scores("class_probabilities", self.class_probabilities, n, None)
            num_classes = self.class_probabilities.shape[1]
            if self.object_ids is not None and self.object_ids.max() >= num_classes:
                raise self._error(
                    "object_ids",
                    f"hold {self.object_ids.max()}, expected ids below {num_classes}, as in class_probabilities: "
                    "take the background out of both",
                )

    @classmethod
    def from_dict(cls, arrays: Mapping[str, Any]) -> "RegionRecord":
        """
        Builds a record from `{field: value}`, and checks it. Raises ValueError on a key that is no field, and where
        `image_id` or `features` is missing.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in arrays if name not in names]
        missing = [name for name in ("image_id", "features") if arrays.get(name) is None]
        if unknown or missing:
            problem = f"unknown keys {unknown}" if unknown else f"{missing} must be given"
            raise ValueError(f"Image {arrays.get('image_id')!r}: {problem}; the fields of a record are {names}.")
        # An .npz makes 0-d arrays of strings and numbers.
        return cls(**{name: x.item() if isinstance(x, np.ndarray) and not x.ndim else x for name, x in arrays.items()})

    @classmethod
    def unchecked(cls, values: dict[str, Any]) -> "RegionRecord":
        """
        Builds a record from `{field: value}`, with all fields given, without checks: they were made when it was stored.
        """
        record = cls.__new__(cls)
        vars(record).update(values)
        return record

    def to_dict(self) -> dict[str, Any]:
        """Gives `{field: value}` of the fields that are not None; arrays are shared, not copied."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def num_regions(self) -> int:
        """The number n of regions, at least 1."""
        return self.features.shape[0]

    def __len__(self) -> int:
        return self.num_regions

    def locations(self) -> np.ndarray:
        """
        Gives the paper's location vectors, `(n, 5)` float32: x1, y1, x2, y2 and area, all as fractions of the image (0
        to 1). They are zeros, with a warning, when the boxes are unknown.
        """
        locations = np.zeros((self.num_regions, 5), dtype=np.float32)
        if self.boxes is None:
            _warn_once("Some records have no boxes: their region_locations are zeros.")
            return locations
        boxes = self.boxes.astype(np.float64)
        if self.image_width is not None and self.image_height is not None:
            boxes /= (self.image_width, self.image_height, self.image_width, self.image_height)
        locations[:, :4] = boxes
        locations[:, 4] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return locations

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes the record to exactly `path`, atomically: an .npz without pickles, whose keys are the names of the
        fields.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **self.to_dict())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RegionRecord":
        """
        Reads and checks a file that `save` wrote; nothing is unpickled. Raises ValueError, naming the file, on any
        other.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return cls.from_dict(dict(arrays))
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{os.fspath(path)} is no valid file of RegionRecord.save: {error}") from error

    def _error(self, field: str, problem: str) -> ValueError:
        return ValueError(f"Image {self.image_id!r}: {field} {problem}.")

    def _check_image_size(self) -> None:
        width, height = self.image_width, self.image_height
        if width is None and height is None:
            return
        for name, size in (("image_width", width), ("image_height", height)):
            if size is None:
                raise self._error(name, "is None although the other side is known: give both, or neither and fractions")
            if not isinstance(size, (int, float, np.number)) or not 0 < size < np.inf or size != int(size):
                raise self._error(name, f"is {size!r}, expected the positive number of pixels that the boxes refer to")
            setattr(self, name, int(size))

    def _check_boxes(self, boxes: np.ndarray) -> None:
        inverted = boxes[:, 2:] < boxes[:, :2]
        if inverted.any():
            row = inverted.any(axis=1).argmax()
            raise self._error(
                "boxes",
                f"[{row}] = {boxes[row].tolist()} is inverted, expected x1 <= x2 and y1 <= y2: convert boxes that are "
                "stored as x, y, width, height or as y1, x1, y2, x2",
            )
        if self.image_width is None or self.image_height is None:
            size, tolerance = np.ones(2), FRACTION_TOLERANCE
            expected = "fractions in 0..1 because the image size is unknown"
        else:
            size, tolerance = np.array([self.image_width, self.image_height]), PIXEL_TOLERANCE
            expected = f"pixels inside image_width {self.image_width}, image_height {self.image_height}"
        outside = (boxes[:, :2] < -tolerance) | (boxes[:, 2:] > size + tolerance)
        if not outside.any():
            return
        if self.image_width is None:
            advice = "give image_width and image_height when boxes are in pixels"
        elif (boxes[:, :2] >= -tolerance).all() and (boxes[:, 2:] <= size[::-1] + tolerance).all():
            advice = "they fit with width and height swapped, so check the order in which the source stores them"
        else:
            advice = (
                "the size must be of the photo that the boxes refer to; some tools (an MMF script) store that of the "
                "RESIZED photo beside boxes of the original"
            )
        row = outside.any(axis=1).argmax()
        raise self._error("boxes", f"[{row}] = {boxes[row].tolist()} is outside, expected {expected}: {advice}")

    def _numbers(self, field: str, values: Any, *shape: int | None) -> np.ndarray:
        """Gives `values` as an array of numbers of this shape, where None fits any length."""
        try:
            array = np.asarray(values)
        except (ValueError, TypeError, RuntimeError) as error:  # of torch, where a gradient or bfloat16 is in the way
            raise self._error(field, f"are no array ({error}): give rows of numbers, of equal length") from error
        if array.dtype.kind not in "iuf":
            raise self._error(field, f"have dtype {array.dtype}, expected numbers: decode them first")
        fits = array.ndim == len(shape) and all(
            size in (None, got) for size, got in zip(shape, array.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise self._error(field, f"have shape {array.shape}, expected ({expected}): give one row for each region")
        return array

    def _floats(self, field: str, values: Any, *shape: int | None) -> np.ndarray:
        array = self._numbers(field, values, *shape)
        if array.dtype not in (np.float16, np.float32):
            with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and are refused below
                array = array.astype(np.float32)
        if array.dtype == np.float16:  # isfinite takes ten times as long
            finite = array.view(np.uint16) & 0x7C00 != 0x7C00
        else:
            finite = np.isfinite(array)
        if not finite.all():
            index = np.argwhere(~finite)[0].tolist()
            value = array[tuple(index)]
            raise self._error(
                field, f"{index} = {value}, expected finite numbers: extract this image again or leave it out"
            )
        return array

    def _scores(self, field: str, values: Any, *shape: int | None) -> np.ndarray:
        array = self._floats(field, values, *shape)
        outside = (array < -SCORE_TOLERANCE) | (array > 1 + SCORE_TOLERANCE)
        if outside.any():
            value = array[outside][0]
            raise self._error(field, f"hold {value}, expected 0..1: give probabilities, neither logits nor percentages")
        return array

    def _ids(self, field: str, values: Any, *shape: int | None) -> np.ndarray:
        array = self._numbers(field, values, *shape)
        if array.dtype == np.int64 and array.min() >= -1:
            return array
        wrong = ~((array >= -1) & (array == np.floor(array)) & (array < 2**63))  # NaN is wrong too
        if wrong.any():
            value = array[wrong][0]
            raise self._error(field, f"hold {value}, expected whole numbers from 0, or -1 for none, without background")
        return array.astype(np.int64, copy=False)


def is_region_record(value: Any) -> TypeGuard[RegionRecord]:
    """
    Tells whether `value` is a `RegionRecord`, by the name of its class: a checkpoint loaded with `trust_remote_code`
    brings a class of its own, and must still take the records that an installed package reads from a store.
    """
    return any(cls.__name__ == "RegionRecord" for cls in type(value).__mro__)


def check_several(name: str, given: Any) -> None:
    """
    Checks that an argument holds several texts, image ids or records: the letters of a text given alone would be taken
    for them.

    Raises:
        ValueError: One is given alone; the message names the argument, the value and the list to give.
    """
    # A store is a path, too, and holds several ids.
    if isinstance(given, str) or (isinstance(given, os.PathLike) and not isinstance(given, Mapping)):
        raise ValueError(f"{name} is {given!r}, expected several: give a list, [{given!r}].")
    if is_region_record(given):
        raise ValueError(f"{name} is the record of image {given.image_id!r}, expected several: give a list, [record].")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


__all__ = ["RegionRecord"]
