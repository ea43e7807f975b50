# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""
Makes padded tensors of the regions of images: `UnicoderVLFeatureExtractor`, which reads each `RegionRecord`.

Follows the input section of the paper (arXiv 1908.06066): at most 100 regions an image, the best by score, each
with the 5-d location `(x1/W, y1/H, x2/W, y2/H, area/(W*H))`. Left out: finding regions in photos and storing them
(`unicoder_vl_hf.regions`), and masking them (the collators).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import TensorType, logging

from .records_unicoder_vl import RegionRecord, is_region_record

logger = logging.get_logger(__name__)

# Two stores may differ in these and still hold features of one kind.
PROVENANCE_DETAILS = frozenset({"detector_options", "detector_declared", "dtype", "source_format", "package_version"})


class UnicoderVLFeatureExtractor(FeatureExtractionMixin):
    """
    Turns records into the three `region_*` inputs of the model, padded with zeros to the largest image of the batch.

    Args:
        max_regions (`int`, defaults to 100): The most regions that an image keeps, 100 as in the paper. The best by
            `object_scores` stay, in record order (ties: the earlier row); without scores the first, with a warning.
        score_threshold (`float`, *optional*): Score in `[0, 1]` above which regions are kept; the best `min_regions`
            stay in any case. The paper's 0.2 changes nothing, since it fills up to 100 whatever the score: hence None.
        min_regions (`int`, defaults to 10): The regions that `score_threshold` leaves at least. 10 is the floor of the
            usual adaptive features.
        feature_dim (`int`, *optional*): The feature width to insist on. None takes any width that a batch agrees on.
        feature_mean (sequence of `float` of length D, *optional*): Mean of the training set, subtracted from every
            feature. A masked region, whose feature is zeroed, then looks like an average one.
        feature_std (`float`, *optional*): Standard deviation, above 0, that divides every feature after that. Without
            either, as in the paper, features pass as they are.
        region_provenance (`dict`, *optional*): `RegionStore.provenance` of the store that the model was trained on,
            saved with the rest. See `check_provenance`.

    Raises:
        `ValueError`: a count is below 1, the threshold not in `[0, 1]`, or the mean or the standard deviation not
            usable.
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
            if (value is None and name != "feature_dim") or (value is not None and value < 1):
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
        """
        Chooses the rows of the record that the model sees, int64, increasing: an index of a region must follow them.
        """
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
        Makes a batch of B records, padded to R, the largest number of regions kept in one of them.

        Args:
            records (`RegionRecord` or sequence of them): A single record is a batch of one.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` gives torch tensors; `"np"` and None, arrays.
            return_kept_indices (`bool`, defaults to `False`): Whether `kept_indices` are returned, too.

        Returns:
            `BatchFeature` of
            - **region_features** `(B, R, D)`: in the dtype of the records, float32 where they differ or are scaled by
              `feature_mean` and `feature_std`. The model casts.
            - **region_locations** `(B, R, 5)`, float32: see `RegionRecord.locations`.
            - **region_attention_mask** `(B, R)`, int64: 1 = region, 0 = padding.
            - **kept_indices** `(B, R)`, int64: the row of the record that a region comes from, -1 = padding.

        Raises:
            `ValueError`: there is no record, something is no record, or feature widths differ from each other or from
                `feature_dim` or `feature_mean`.
        """
        batch: list[RegionRecord] = [records] if is_region_record(records) else list(records)  # type: ignore[arg-type]
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
        A field that either does not know makes no difference, and fields without influence on the features
        (`PROVENANCE_DETAILS`) are not compared.
        """
        if differences := provenance_differences(self.region_provenance or {}, provenance):
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


def provenance_differences(
    trained: Mapping[str, Any], provenance: Mapping[str, Any], words: tuple[str, str] = ("in training", "here")
) -> list[str]:
    """
    Says in words how the provenance of regions differs from that of the training, see `check_provenance`. The name of a
    detector is that of its folder, for one, and counts for nothing where the revision is the same.
    """
    ignored = set(PROVENANCE_DETAILS)
    if trained.get("detector_revision") == provenance.get("detector_revision") is not None:
        ignored.add("detector")
    return [
        f"{name} {_shorten(trained[name])} {words[0]}, {_shorten(provenance[name])} {words[1]}"
        for name in sorted((trained.keys() & provenance.keys()) - ignored)
        if None not in (trained[name], provenance[name]) and trained[name] != provenance[name]
    ]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = ["RegionRecord", "UnicoderVLFeatureExtractor"]
