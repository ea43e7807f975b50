# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""
One image's regions (`RegionRecord`), and how records become padded tensors (`UnicoderVLFeatureExtractor`).

Follows the input section of the paper (arXiv 1908.06066): at most 100 regions an image, the best by score, each
with the 5-d location `(x1/W, y1/H, x2/W, y2/H, area/(W*H))`. Values are checked here, once, so that the model need
not. Left out: finding regions in photos and storing them (`unicoder_vl_hf.regions`), and masking them (the collators).
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import TensorType, logging

logger = logging.get_logger(__name__)

PIXEL_TOLERANCE = 1.0
FRACTION_TOLERANCE = 0.01  # a pixel of a 100-pixel image, and far above the rounding of a float16 fraction
SCORE_TOLERANCE = 1e-3  # float16 softmax outputs may exceed 1 by so much
# Two stores may differ in these and still hold features of one kind.
PROVENANCE_DETAILS = frozenset({"detector_declared", "dtype", "source_format", "package_version"})


@dataclass(eq=False)
class RegionRecord:
    """
    The regions of one image in NumPy, checked and coerced on construction. All but `image_id` and `features` may be
    None, which means unknown. Row order carries no meaning. `dataclasses.replace` changes a field and checks again.

    Args:
        image_id (`str`): Name of the image; what captions are joined by.
        image_width, image_height (`int`, *optional*): Size in pixels of the image the boxes refer to. Both or neither.
        boxes (`np.ndarray` of shape `(n, 4)`, float32, *optional*): `x1 y1 x2 y2`, in pixels when the image size is
            known, as fractions of the image when it is not; within a pixel of the image. A box of zero width or height
            passes: detectors clip boxes to the image, and real files hold what that leaves of one at the border.
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
        if self.object_ids is not None:
            self.object_ids = self._ids("object_ids", self.object_ids, n)
        if self.object_scores is not None:
            self.object_scores = self._scores("object_scores", self.object_scores, n).astype(np.float32, copy=False)
        if self.attribute_ids is not None:
            self.attribute_ids = self._ids("attribute_ids", self.attribute_ids, n)
        if self.attribute_scores is not None:
            scores = self._scores("attribute_scores", self.attribute_scores, n)
            self.attribute_scores = scores.astype(np.float32, copy=False)
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
        """Builds a record from `{field: value}`. Raises ValueError on keys that are no field."""
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
        """A record of `{field: value}`, all fields given, without checks: they were made when it was stored."""
        record = cls.__new__(cls)
        vars(record).update(values)
        return record

    def to_dict(self) -> dict[str, Any]:
        """`{field: value}` of the fields that are not None; arrays are shared, not copied."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def num_regions(self) -> int:
        """n, at least 1."""
        return self.features.shape[0]

    def __len__(self) -> int:
        return self.num_regions

    def locations(self) -> np.ndarray:
        """
        The paper's location vectors, `(n, 5)` float32: x1, y1, x2, y2 and area, all as fractions of the image. Zeros,
        with a warning, when the boxes are unknown.
        """
        locations = np.zeros((self.num_regions, 5), dtype=np.float32)
        if self.boxes is None:
            logger.warning_once("Some records have no boxes: their region_locations are zeros.")
            return locations
        boxes = self.boxes.astype(np.float64)
        if self.image_width is not None and self.image_height is not None:
            boxes /= (self.image_width, self.image_height, self.image_width, self.image_height)
        locations[:, :4] = boxes
        locations[:, 4] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return locations

    def save(self, path: str | os.PathLike) -> None:
        """Writes one .npz without pickles, keys = field names, to exactly `path`, atomically."""
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
        """Reads and checks what `save` wrote. ValueError, naming the file, on anything else; nothing is unpickled."""
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
        inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
        if inverted.any():
            row = inverted.argmax()
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
        outside = (boxes[:, :2] < -tolerance).any(axis=1) | (boxes[:, 2:] > size + tolerance).any(axis=1)
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
        row = outside.argmax()
        raise self._error("boxes", f"[{row}] = {boxes[row].tolist()} is outside, expected {expected}: {advice}")

    def _numbers(self, field: str, values: Any, *shape: int | None) -> np.ndarray:
        """`values` as an array of numbers of this shape, where None fits any length."""
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise self._error(field, f"are no array ({error}): give rows of equal length") from error
        if array.dtype.kind not in "iuf":
            raise self._error(field, f"have dtype {array.dtype}, expected numbers: decode them first")
        fits = array.ndim == len(shape) and all(
            size in (None, got) for size, got in zip(shape, array.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise self._error(field, f"have shape {array.shape}, expected ({expected}): give one row a row of features")
        return array

    def _floats(self, field: str, values: Any, *shape: int | None) -> np.ndarray:
        array = self._numbers(field, values, *shape)
        if array.dtype not in (np.float16, np.float32):
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is caught below
                array = array.astype(np.float32)
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
        wrong = ~((array >= -1) & (array == np.floor(array)) & (array < 2**63))  # NaN is wrong too
        if wrong.any():
            value = array[wrong][0]
            raise self._error(field, f"hold {value}, expected whole numbers from 0, or -1 for none, without background")
        return array.astype(np.int64, copy=False)


def is_region_record(value: Any) -> bool:
    """
    Whether `value` is a `RegionRecord`, by name: a checkpoint loaded with `trust_remote_code` brings its own class,
    and must take the records of an installed package's store all the same.
    """
    return any(cls.__name__ == "RegionRecord" for cls in type(value).__mro__)


class UnicoderVLFeatureExtractor(FeatureExtractionMixin):
    """
    Turns records into the three `region_*` inputs of the model, padded with zeros to the largest image of the batch.

    Args:
        max_regions (`int`, defaults to 100): At most so many regions an image, as in the paper. The best by
            `object_scores` stay, in record order (ties: the earlier row); without scores the first, with a warning.
        score_threshold (`float`, *optional*): Keeps only regions that score above it, but the best `min_regions` in any
            case. The paper's 0.2 changes nothing, since it fills up to 100 whatever the score: hence None.
        min_regions (`int`, defaults to 10): See `score_threshold`. 10 is the floor of the usual adaptive features.
        feature_dim (`int`, *optional*): The feature width to insist on. None takes any width that a batch agrees on.
        feature_mean (sequence of `float` of length D, *optional*): Subtracted from every feature; the training set's.
            A masked region, whose feature is zeroed, then looks like an average one.
        feature_std (`float`, *optional*): Divides every feature after that; above 0. Without either, as in the paper,
            features pass as they are.
        region_provenance (`dict`, *optional*): `RegionStore.provenance` of the store that the model was trained on;
            saved with the rest. See `check_provenance`.
    """

    _auto_class = "AutoFeatureExtractor"
    model_input_names = ["region_features", "region_locations", "region_attention_mask"]

    def __init__(
        self,
        max_regions: int = 100,
        score_threshold: float | None = None,
        min_regions: int = 10,
        feature_dim: int | None = None,
        feature_mean: Sequence[float] | None = None,
        feature_std: float | None = None,
        region_provenance: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        for name, value in (("max_regions", max_regions), ("min_regions", min_regions), ("feature_dim", feature_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be in 0..1, or None to keep every score, got {score_threshold}.")
        if feature_std is not None and not 0 < feature_std < np.inf:
            raise ValueError(f"feature_std must be above 0, or None to leave the scale, got {feature_std}.")
        self.feature_mean = None if feature_mean is None else np.asarray(feature_mean, dtype=np.float32).tolist()
        if self.feature_mean is not None and not np.isfinite(self.feature_mean).all():
            raise ValueError("feature_mean must be finite, but holds NaN or infinity.")
        self.feature_std = feature_std
        self.max_regions = max_regions
        self.score_threshold = score_threshold
        self.min_regions = min_regions
        self.feature_dim = feature_dim
        self.region_provenance = region_provenance
        super().__init__(**kwargs)

    def select(self, record: RegionRecord) -> np.ndarray:
        """Rows of `record` that the model will see, int64 and increasing. Whoever points at a region remaps by them."""
        count = min(record.num_regions, self.max_regions)
        scores = record.object_scores
        if scores is None:
            if count < record.num_regions or self.score_threshold is not None:
                logger.warning_once(
                    f"Some records have no object_scores: score_threshold does not apply to them, and of more than "
                    f"{self.max_regions} regions the first are kept, which need not be the best."
                )
            return np.arange(count)
        if self.score_threshold is not None:
            count = min(count, max(int((scores > self.score_threshold).sum()), self.min_regions))
        if count == record.num_regions:
            return np.arange(count)
        return np.sort(np.argsort(-scores, kind="stable")[:count])

    def __call__(
        self,
        records: RegionRecord | Sequence[RegionRecord],
        return_tensors: str | TensorType | None = "pt",
        return_kept_indices: bool = False,
    ) -> BatchFeature:
        """
        Batches B records; R is the largest number of regions kept in one of them.

        Args:
            records (`RegionRecord` or sequence of them): A single record is a batch of one.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` gives torch tensors; `"np"` and None, arrays.
            return_kept_indices (`bool`, defaults to `False`): Adds `kept_indices`.

        Returns:
            `BatchFeature` of
            - **region_features** `(B, R, D)`: in the dtype of the records, float32 where they differ or are scaled by
              `feature_mean` and `feature_std`. The model casts.
            - **region_locations** `(B, R, 5)`, float32: see `RegionRecord.locations`.
            - **region_attention_mask** `(B, R)`, int64: 1 = region, 0 = padding.
            - **kept_indices** `(B, R)`, int64: the row of the record that a region comes from, -1 = padding.

        Raises:
            ValueError: There is no record, something is no record, or feature widths differ.
        """
        batch: list[RegionRecord] = [records] if is_region_record(records) else list(records)  # type: ignore[list-item, arg-type]
        width = self._check_widths(batch)
        kept = [self.select(record) for record in batch]
        counts = np.array([len(indices) for indices in kept])
        size = (len(batch), counts.max())

        features = np.zeros((*size, width), dtype=np.result_type(*{record.features.dtype for record in batch}))
        locations = np.zeros((*size, 5), dtype=np.float32)
        for row, (record, indices) in enumerate(zip(batch, kept, strict=True)):
            # A slice is copied once, straight from a memory-mapped store; rows picked by index are copied twice.
            rows = slice(None) if len(indices) == record.num_regions else indices
            features[row, : len(indices)] = record.features[rows]
            locations[row, : len(indices)] = record.locations()[rows]
        mask = np.arange(size[1]) < counts[:, None]  # (B, R)
        if self.feature_mean is not None or self.feature_std is not None:
            features = self._scale(features, mask)
        data = {
            "region_features": features,
            "region_locations": locations,
            "region_attention_mask": mask.astype(np.int64),
        }
        if return_kept_indices:
            data["kept_indices"] = np.full(size, -1)
            data["kept_indices"][mask] = np.concatenate(kept)
        return BatchFeature(data, tensor_type=return_tensors)

    def _scale(self, features: np.ndarray, mask: np.ndarray) -> np.ndarray:
        features = features.astype(np.float32, copy=False)
        if self.feature_mean is not None:
            if len(self.feature_mean) != features.shape[-1]:
                raise ValueError(
                    f"feature_mean has length {len(self.feature_mean)}, but the features have width "
                    f"{features.shape[-1]}: give the mean of these features."
                )
            features -= np.asarray(self.feature_mean, dtype=np.float32)
            features[~mask] = 0
        if self.feature_std is not None:
            features /= np.float32(self.feature_std)
        return features

    def check_provenance(self, provenance: Mapping[str, Any]) -> bool:
        """
        Whether a store's `provenance` is of the kind that the model was trained on; warns, naming both, if it is not.
        What one of them does not know is no difference, and what leaves the features alone (`PROVENANCE_DETAILS`) is
        not compared.
        """
        trained = self.region_provenance or {}
        differences = [
            f"{name} {_shorten(trained[name])} in training, {_shorten(provenance[name])} here"
            for name in sorted((trained.keys() & provenance.keys()) - PROVENANCE_DETAILS)
            if None not in (trained[name], provenance[name]) and trained[name] != provenance[name]
        ]
        if differences:
            logger.warning(
                "These regions are not of the kind that the model was trained on, so its outputs mean little: "
                f"{'; '.join(differences)}."
            )
        return not differences

    def _check_widths(self, records: Sequence[RegionRecord]) -> int:
        if not records:
            raise ValueError("records is empty, expected at least one RegionRecord.")
        for position, record in enumerate(records):
            if not is_region_record(record):
                kind = type(record).__name__
                raise ValueError(
                    f"records[{position}] is a {kind}, expected a RegionRecord: see RegionRecord.from_dict."
                )
        if self.feature_dim is None:
            expected, source = records[0].features.shape[1], f"that of image {records[0].image_id!r} in the same batch"
        else:
            expected, source = self.feature_dim, "feature_dim of the feature extractor"
        for record in records:
            width = record.features.shape[1]
            if width != expected:
                raise ValueError(
                    f"Image {record.image_id!r}: features have width {width}, expected {expected}, {source}: a model "
                    "takes the features of one detector only."
                )
        return expected


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = ["RegionRecord", "UnicoderVLFeatureExtractor"]
