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


@dataclass
class ZeroShotRetrieval:
    """
    Retrieval by the matching head of a pre-trained model, without fine-tuning (paper, Image-Text Retrieval, zero-shot).

    Args:
        captions (`list[str]`), image_ids (`list[str]`): The C captions and M images.
        image_of_caption (`np.ndarray` of shape `(C,)`): The index in `image_ids` of each caption's image.
        scores (`np.ndarray` of shape `(C, M)`): Higher = better match.
        metrics, chance (`dict[str, float]`): See [`retrieval_metrics`] and [`chance_recalls`].
    """

    captions: list[str]
    image_ids: list[str]
    image_of_caption: np.ndarray
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
    Scores the first `num_images` images of `captions` (rows of `image_id` and `caption`) with all their captions, in
    `dtype` if it is not to be the model's.
    """
    image_ids = list(dict.fromkeys(captions["image_id"]))[:num_images]
    column = {image_id: index for index, image_id in enumerate(image_ids)}
    rows = [row for row in captions if row["image_id"] in column]
    image_of_caption = np.array([column[row["image_id"]] for row in rows])
    texts = [row["caption"] for row in rows]
    scores = ImageTextScorer(model, processor, store, dtype=dtype).score(texts, image_ids)
    return ZeroShotRetrieval(
        captions=texts,
        image_ids=image_ids,
        image_of_caption=image_of_caption,
        scores=scores,
        metrics=retrieval_metrics(scores, image_of_caption),
        chance=chance_recalls(image_of_caption),
    )
