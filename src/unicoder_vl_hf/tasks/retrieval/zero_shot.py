"""Retrieval by the matching head of a pre-trained model, without fine-tuning (paper, Image-Text Retrieval)."""

from collections.abc import Mapping
from dataclasses import dataclass

import datasets
import numpy as np
import torch

from ...modeling_unicoder_vl import UnicoderVLForPreTraining
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...scoring.scorer import ImageTextScorer
from .metrics import chance_recalls, retrieval_metrics
from .protocols import RetrievalFold, retrieval_test


@dataclass(frozen=True)
class ZeroShotRetrieval(RetrievalFold):
    """
    The result of retrieval by a pre-trained model without fine-tuning (paper, Image-Text Retrieval, zero-shot).

    Args:
        captions, image_ids, image_of_caption: The C captions and M images, see [`RetrievalFold`].
        scores (`np.ndarray` of shape `(C, M)`): Higher = better match.
        metrics, chance (`dict[str, float]`): See [`retrieval_metrics`] and [`chance_recalls`].
    """

    scores: np.ndarray
    metrics: dict[str, float]
    chance: dict[str, float]


def zero_shot_retrieval(
    model: UnicoderVLForPreTraining,
    processor: UnicoderVLProcessor,
    store: Mapping[str, RegionRecord],
    captions: datasets.Dataset,
    num_images: int | None = None,
    dtype: torch.dtype | None = None,
) -> ZeroShotRetrieval:
    """
    Scores images with all their captions by the matching head of a pre-trained model.

    Args:
        model ([`UnicoderVLForPreTraining`]), processor ([`UnicoderVLProcessor`]): The model and its processor.
        store (`Mapping[str, RegionRecord]`): The regions of every image.
        captions (`datasets.Dataset`): Rows with `image_id` and `caption`.
        num_images (`int`, *optional*): Number of images, the first ones; by default all.
        dtype (`torch.dtype`, *optional*): Dtype of the computation; by default the model's.
    """
    if num_images is not None:
        num_images = min(num_images, len(captions.unique("image_id")))
    (fold,) = retrieval_test(captions, num_images=num_images).folds
    scores = ImageTextScorer(model, processor, store, dtype=dtype).score(fold.captions, fold.image_ids)
    return ZeroShotRetrieval(
        **vars(fold),
        scores=scores,
        metrics=retrieval_metrics(scores, fold.image_of_caption),
        chance=chance_recalls(fold.image_of_caption),
    )
