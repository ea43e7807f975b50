"""The metrics of retrieval, from a matrix of scores: pure NumPy, no model and no files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

_BLOCK = 1 << 20  # numbers compared at a time: what is held beside the scores stays a few megabytes


def with_recall_sum(metrics: dict[str, float]) -> dict[str, float]:
    """Adds `recall_sum`, the sum of the six recalls, by which checkpoints are compared, before the metrics."""
    return {"recall_sum": sum(value for name, value in metrics.items() if "recall@" in name), **metrics}


def retrieval_metrics(
    scores: ArrayLike, image_of_caption: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """
    Measures recall@K, median and mean rank, mean average precision and the number of tied ranks in both directions.

    Args:
        scores (array of shape `(num_captions, num_images)`): higher = better match, -inf = last; ranked in float32.
        image_of_caption (integer array of shape `(num_captions,)`): the column of each caption's image. Images may
            have any number of captions, but at least one.
        ks (sequence of `int`, *optional*, defaults to `(1, 5, 10)`): the places at which the ranking is cut.

    Returns:
        `dict[str, float]`: `image_retrieval_recall@K` (a caption finds its image) and `text_retrieval_recall@K` (an
        image finds one of its captions) as fractions, and beside them, for either direction, `…_median_rank` and
        `…_mean_rank` (from 1), `…_map` (mean average precision, over all captions of an image) and `…_tied_ranks`
        (how many queries have a wrong item that scores exactly as their best right one).

    Raises:
        `ValueError`: shapes that do not fit, NaN, an index out of range, an image without captions, or a K below 1.

    Example:

    ```python
    >>> retrieval_metrics([[0.9, 0.1], [0.8, 0.2]], [0, 1], ks=[1])
    {'image_retrieval_recall@1': 0.5, 'image_retrieval_mean_rank': 1.5, 'image_retrieval_map': 0.75,
     'image_retrieval_median_rank': 1.5, 'image_retrieval_tied_ranks': 0, 'text_retrieval_recall@1': 1.0, ...}
    ```
    """
    _check_ks(ks)
    return summarize([rank_queries(scores, image_of_caption)], ks)


def chance_recalls(image_of_caption: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """
    Computes the recalls of `retrieval_metrics` that random scores reach on average, by the same names.

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


@dataclass(frozen=True)
class QueryRanks:
    """
    The ranks of the queries of one direction.

    Attributes:
        ranks (`np.ndarray` of shape `(num_queries,)`): the rank of the first right item, from 1.
        average_precisions (`np.ndarray` of shape `(num_queries,)`): the average precision over all right items.
        tied (`np.ndarray` of shape `(num_queries,)`): whether a wrong item scores as the first right one does.
        image_of_query (`np.ndarray` of shape `(num_queries,)`): the query itself, or the caption's image.
    """

    ranks: np.ndarray
    average_precisions: np.ndarray
    tied: np.ndarray
    image_of_query: np.ndarray

    def select(self, queries: np.ndarray) -> "QueryRanks":
        """Selects the ranks of some of the queries, by their numbers."""
        return QueryRanks(*(getattr(self, field.name)[queries] for field in fields(self)))


def rank_queries(
    scores: ArrayLike,
    image_of_caption: ArrayLike,
    directions: Sequence[str] = ("image_retrieval", "text_retrieval"),
) -> dict[str, QueryRanks]:
    """
    Ranks the queries of `"image_retrieval"` (a query is a caption) and of `"text_retrieval"` (a query is an image), or
    those of one of these `directions`.

    The other arguments and errors are those of `retrieval_metrics`. Nothing is sorted but what belongs to one image: a
    rank is a count. The scores are read in blocks of rows, so that a memory map will do.
    """
    scores, image_of_caption = _check_scores(scores, image_of_caption)
    right = scores[np.arange(len(scores)), image_of_caption].astype(np.float32)
    rank = {"image_retrieval": _rank_images, "text_retrieval": _rank_captions}
    return {direction: rank[direction](scores, image_of_caption, right) for direction in directions}


def _rank_images(scores: np.ndarray, image_of_caption: np.ndarray, right: np.ndarray) -> QueryRanks:
    """Ranks the images for each caption; `right` are the scores of each caption with its image."""
    ranks, tied = np.empty(len(scores), dtype=np.int64), np.empty(len(scores), dtype=bool)
    for rows, block in _row_blocks(scores):
        of_rows = right[rows, None]
        ranks[rows] = (block >= of_rows).sum(axis=1)  # the right image itself makes the ranks start at 1
        tied[rows] = (block == of_rows).sum(axis=1) > 1
    return QueryRanks(ranks, 1 / ranks, tied, image_of_caption)


def _rank_captions(scores: np.ndarray, image_of_caption: np.ndarray, right: np.ndarray) -> QueryRanks:
    """Ranks the captions for each image; `right` are the scores of each caption with its image."""
    num_captions, num_images = scores.shape
    captions_of_image = np.bincount(image_of_caption, minlength=num_images)
    best = np.full(num_images, -np.inf, dtype=np.float32)
    np.maximum.at(best, image_of_caption, right)
    wrong_above = np.zeros(num_captions, dtype=np.int64)  # captions of other images that score as high with its image
    equal_best = -np.bincount(image_of_caption, weights=right == best[image_of_caption]).astype(np.int64)
    for rows, block in _row_blocks(scores):
        equal_best += (block == best).sum(axis=0)
        others = image_of_caption[rows, None] != image_of_caption
        wrong_above += ((block[:, image_of_caption] >= right) & others).sum(axis=0)

    # Of an image's captions, the i-th best (from 1) ranks behind i - 1 right ones and the wrong ones above it.
    by_image = np.lexsort((wrong_above, image_of_caption))
    first = np.cumsum(captions_of_image) - captions_of_image
    ith = 1 + np.arange(num_captions) - np.repeat(first, captions_of_image)
    ranks = ith + wrong_above[by_image]
    precisions = np.bincount(image_of_caption[by_image], weights=ith / ranks) / captions_of_image
    return QueryRanks(ranks[first], precisions, equal_best > 0, np.arange(num_images))


def summarize(folds: Sequence[Mapping[str, QueryRanks]], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """
    Computes the metrics of `retrieval_metrics` over one or more folds, each ranked by itself with `rank_queries`: their
    mean over the folds, but the sum of the tied ranks.
    """
    _check_ks(ks)
    metrics: dict[str, float] = {}
    for direction in folds[0]:
        of_folds = [fold[direction] for fold in folds]
        means = [
            {name: np.mean(values) for name, values in _query_values(direction, queries, ks).items()}
            | {f"{direction}_median_rank": np.median(queries.ranks)}
            for queries in of_folds
        ]
        metrics |= {name: float(np.mean([of_fold[name] for of_fold in means])) for name in means[0]}
        metrics[f"{direction}_tied_ranks"] = sum(int(queries.tied.sum()) for queries in of_folds)
    return metrics


def confidence_intervals(
    folds: Sequence[Mapping[str, QueryRanks]],
    ks: Sequence[int] = (1, 5, 10),
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """
    Computes percentile bootstrap intervals of the recalls, mean ranks and mAPs of `summarize`, by the same names.

    Images are drawn with replacement, each with all of its captions, within its fold: the captions of an image are not
    independent, and drawn one by one they would make the intervals too narrow. The candidates of a query stay those of
    its fold. The interval of a recall of 0 or 1 is that point: what never happened cannot be drawn.

    Args:
        folds (sequence of `dict[str, QueryRanks]`): the results of `rank_queries`, one for a test ranked as a whole.
        ks (sequence of `int`, *optional*, defaults to `(1, 5, 10)`): the places at which the ranking is cut.
        level (`float`, *optional*, defaults to 0.95): the share of resamples in the interval, in (0, 1).
        num_resamples (`int`, *optional*, defaults to 1000): the number of resamples, at least 1.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same intervals.

    Returns:
        `dict[str, tuple[float, float]]`: the lower and the upper bound of each metric.

    Raises:
        `ValueError`: a K, `level` or `num_resamples` is out of its range.
    """
    _check_ks(ks)
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(
            f"level={level} and num_resamples={num_resamples}; expected a level in (0, 1) and at least 1 resample."
        )
    means = []  # (num_folds, num_resamples, num_metrics)
    for index, fold in enumerate(folds):
        rng = np.random.default_rng([seed, index])
        num_images = len(fold["text_retrieval"].ranks)
        sums, counts = {}, {}  # over the queries of each image
        for direction, queries in fold.items():
            for name, values in _query_values(direction, queries, ks).items():
                sums[name] = np.bincount(queries.image_of_query, weights=values, minlength=num_images)
                counts[name] = np.bincount(queries.image_of_query, minlength=num_images)
        all_sums, all_counts = np.stack(list(sums.values()), axis=1), np.stack(list(counts.values()), axis=1)
        of_fold = []
        for _ in range(num_resamples):
            times_drawn = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
            of_fold.append((times_drawn @ all_sums) / (times_drawn @ all_counts))
        means.append(of_fold)
    low, high = np.quantile(np.mean(means, axis=0), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(sums, low, high, strict=True)}


def _query_values(direction: str, queries: QueryRanks, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Gives the value of each query in each metric that is a mean over queries."""
    return {f"{direction}_recall@{k}": queries.ranks <= k for k in ks} | {
        f"{direction}_mean_rank": queries.ranks,
        f"{direction}_map": queries.average_precisions,
    }


def _row_blocks(scores: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Gives blocks of rows in float32, small enough that `(rows, num_captions)` numbers may be made of each."""
    step = max(1, _BLOCK // max(scores.shape))
    for start in range(0, len(scores), step):
        rows = slice(start, start + step)
        yield rows, scores[rows].astype(np.float32, order="C", copy=False)


def _check_ks(ks: Sequence[int]):
    if any(k < 1 for k in ks):
        raise ValueError(f"ks={list(ks)}; expected integers of at least 1.")


def _check_scores(scores: ArrayLike, image_of_caption: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, image_of_caption = np.asarray(scores), np.asarray(image_of_caption)
    if scores.ndim != 2 or 0 in scores.shape or scores.dtype.kind not in "fiub":
        raise ValueError(
            f"scores have shape {scores.shape} and hold {scores.dtype}; expected numbers of shape (captions, images), "
            "none of them 0."
        )
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
    image_of_caption = image_of_caption.astype(np.int64)
    bare = np.flatnonzero(np.bincount(image_of_caption, minlength=num_images) == 0)
    if len(bare):
        raise ValueError(
            f"{len(bare)} images have no caption, such as {bare[:5].tolist()}; expected one or more each. Leave their "
            "columns out, or add their captions."
        )
    for rows, block in _row_blocks(scores):
        if np.isnan(block).any():
            caption, image = np.argwhere(np.isnan(block))[0]
            raise ValueError(f"scores[{rows.start + caption}, {image}] is NaN; expected a number for every pair.")
    return scores, image_of_caption
