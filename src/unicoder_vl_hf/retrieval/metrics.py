"""Retrieval metrics from a matrix of scores, and the area under the ROC curve: pure NumPy, no model and no files.

Recall@K as the retrieval papers count it: a caption query has one right image, an image query counts if any of its
captions is among the top K. Ties count against the system: a right item ranks after all wrong ones of the same score.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def retrieval_metrics(
    scores: ArrayLike, image_of_caption: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """
    Recall@K, median and mean rank in both directions.

    Args:
        scores (array of shape `(num_captions, num_images)`): higher = better match; ranked in float32.
        image_of_caption (integer array of shape `(num_captions,)`): the column of each caption's image. Images may
            have any number of captions, but at least one.
        ks (sequence of `int`, *optional*, defaults to `(1, 5, 10)`): where to cut the ranking.

    Returns:
        `dict[str, float]`: `image_retrieval_recall@K` (a caption finds its image) and `text_retrieval_recall@K` (an
        image finds one of its captions) as fractions, `…_median_rank` and `…_mean_rank` with ranks from 1.

    Raises:
        `ValueError`: shapes that do not fit, NaN, an index out of range, an image without captions, or a K below 1.

    Example:

    ```python
    >>> retrieval_metrics([[0.9, 0.1], [0.8, 0.2]], [0, 1], ks=[1])
    {'image_retrieval_recall@1': 0.5, 'image_retrieval_median_rank': 1.5, 'image_retrieval_mean_rank': 1.5,
     'text_retrieval_recall@1': 1.0, 'text_retrieval_median_rank': 1.0, 'text_retrieval_mean_rank': 1.0}
    ```
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks={list(ks)}; expected integers of at least 1.")
    image_ranks, text_ranks = retrieval_ranks(scores, image_of_caption)
    metrics: dict[str, float] = {}
    for direction, ranks in (("image_retrieval", image_ranks), ("text_retrieval", text_ranks)):
        metrics |= {f"{direction}_recall@{k}": float(np.mean(ranks <= k)) for k in ks}
        metrics |= {
            f"{direction}_median_rank": float(np.median(ranks)),
            f"{direction}_mean_rank": float(np.mean(ranks)),
        }
    return metrics


def chance_recalls(image_of_caption: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """
    The recalls of `retrieval_metrics` that random scores reach on average, by the same names.

    An image query hits unless all of the top K fall on captions of others: a hypergeometric draw for each image.
    """
    captions_of_image = np.bincount(np.asarray(image_of_caption))
    num_captions, num_images = int(captions_of_image.sum()), len(captions_of_image)
    chance = {f"image_retrieval_recall@{k}": min(k / num_images, 1.0) for k in ks}
    for k in ks:
        misses = [
            math.comb(num_captions - own, k) / math.comb(num_captions, k) if k <= num_captions else 0.0
            for own in captions_of_image.tolist()
        ]
        chance[f"text_retrieval_recall@{k}"] = 1.0 - float(np.mean(misses))
    return chance


def retrieval_ranks(scores: ArrayLike, image_of_caption: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """
    Rank (from 1) of each caption's image among the images, and of each image's best caption among the captions of
    other images.

    Arguments and errors are those of `retrieval_metrics`.
    """
    scores, image_of_caption = np.asarray(scores, dtype=np.float32), np.asarray(image_of_caption)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores have shape {scores.shape}; expected (captions, images), none of them 0.")
    num_captions, num_images = scores.shape
    if image_of_caption.shape != (num_captions,) or image_of_caption.dtype.kind not in "iu":
        raise ValueError(
            f"image_of_caption is {image_of_caption.dtype} of shape {image_of_caption.shape}; expected integers of "
            f"shape ({num_captions},), one for each row of scores {scores.shape}. Are the scores transposed?"
        )
    outside = np.flatnonzero((image_of_caption < 0) | (image_of_caption >= num_images))
    if len(outside):
        raise ValueError(
            f"image_of_caption[{outside[0]}] is {image_of_caption[outside[0]]}; expected a column of scores, 0 to "
            f"{num_images - 1}."
        )
    captions_of_image = np.bincount(image_of_caption, minlength=num_images)
    if not captions_of_image.all():
        bare = np.flatnonzero(captions_of_image == 0)
        raise ValueError(
            f"{len(bare)} images have no caption, such as {bare[:5].tolist()}; expected one or more each. Leave their "
            "columns out, or add their captions."
        )
    if np.isnan(scores).any():
        caption, image = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"scores[{caption}, {image}] is NaN; expected a number for every pair.")

    right = scores[np.arange(num_captions), image_of_caption]
    image_ranks = (scores >= right[:, None]).sum(axis=1)  # the right image itself makes the ranks start at 1

    best = np.full(num_images, -np.inf, dtype=np.float32)
    np.maximum.at(best, image_of_caption, right)
    own = np.bincount(image_of_caption, weights=right >= best[image_of_caption]).astype(np.int64)
    text_ranks = 1 + (scores >= best).sum(axis=0) - own
    return image_ranks, text_ranks


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """
    Area under the ROC curve: how often a match scores above a mismatch, a tie counting half.

    Args:
        scores (array of shape `(num_pairs,)`): higher = better match.
        labels (array of shape `(num_pairs,)`): 1 = match, 0 = mismatch; both must occur.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores have shape {scores.shape} and labels {labels.shape}; expected one dimension of equal length."
        )
    if np.isnan(scores).any():
        raise ValueError(f"scores[{np.flatnonzero(np.isnan(scores))[0]}] is NaN; expected a number for every pair.")
    if not np.isin(labels, (0, 1)).all() or len(np.unique(labels)) != 2:
        raise ValueError(
            f"labels hold {np.unique(labels)[:5].tolist()}; expected both 1 (match) and 0 (mismatch), and nothing else."
        )
    _, level, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, the mean rank of its ties
    matches = labels == 1
    num_matches, num_mismatches = int(matches.sum()), int((~matches).sum())
    return float((ranks[level[matches]].sum() - num_matches * (num_matches + 1) / 2) / (num_matches * num_mismatches))
