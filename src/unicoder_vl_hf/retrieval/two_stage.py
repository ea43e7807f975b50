"""Search in two stages: the nearest of an index, put in order by the cross-encoder; and what is lost by it.

Scoring every pair is exact and does not scale. Here a first stage that embeds captions and images alone proposes K
candidates a query, and only these are scored. What it does not propose cannot be found: the report shows this ceiling,
and what each K costs. Left out: the encoders, see `encoders`, and the index itself, see `index`.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..records_unicoder_vl import RegionRecord
from ..regions.store import RegionStore
from .encoders import DualEncoder
from .index import SearchIndex, nearest
from .metrics import QueryRanks, rank_queries, summarize
from .protocols import DIRECTIONS, KS, RetrievalFold
from .scoring import ImageTextScorer


@dataclass(frozen=True)
class Hit:
    """
    An image id, or a caption, that was found: the `score` by which hits are ordered, which is the matching score plus
    what was asked for of the `similarity` in `[-1, 1]` that the first stage saw, if there was one.
    """

    name: str
    score: float
    similarity: float | None


def search(
    queries: Sequence[str | RegionRecord],
    index: SearchIndex,
    encoder: DualEncoder,
    scorer: ImageTextScorer,
    *,
    top_k: int = 10,
    candidates: int = 100,
    similarity_weight: float = 0.0,
) -> list[list[Hit]]:
    """
    The images of an index that match each caption best, or the captions of an index that match each image best.

    Args:
        queries: Captions where the index holds images; image ids or records where it holds captions.
        index ([`SearchIndex`]): Made by `encoder` from the store of `scorer`, which is checked.
        encoder ([`UnicoderVLDualEncoder`] or [`TransformersDualEncoder`]): The first stage.
        scorer ([`ImageTextScorer`]): The second.
        top_k (`int`, *optional*, defaults to 10): Hits of a query.
        candidates (`int`, *optional*, defaults to 100): Of the first stage, scored by the second; `top_k` at least.
        similarity_weight (`float`, *optional*, defaults to 0.0): So much of the first stage's similarity is added to
            the matching score, as BLIP adds it.

    Returns:
        `list[list[Hit]]`: of each query the best hits, the best first.

    Raises:
        `ValueError`: `top_k` or `candidates` below 1, or an index of another checkpoint or store.
    """
    if min(top_k, candidates) < 1:
        raise ValueError(f"top_k={top_k}, candidates={candidates}; expected at least 1 of each.")
    index.check(encoder, scorer.store if isinstance(scorer.store, RegionStore) else None)
    embed = encoder.embed_captions if index.items == "images" else encoder.embed_images
    positions, similarities = index.search(embed(cast(Sequence[str], queries)), max(top_k, candidates))
    scores = rerank(queries, index, positions, scorer)
    scores += similarity_weight * np.where(positions >= 0, similarities, 0)
    found = []
    for of_query, near, row in zip(scores, similarities, positions, strict=True):
        best = [place for place in np.argsort(-of_query, kind="stable")[:top_k] if row[place] >= 0]
        found.append([Hit(index.names[row[place]], float(of_query[place]), float(near[place])) for place in best])
    return found


def rerank(
    queries: Sequence[str | RegionRecord], index: SearchIndex, positions: np.ndarray, scorer: ImageTextScorer
) -> np.ndarray:
    """The scores of each query with its candidates, `positions` `(Q, K)` in `index`; -inf where there is none (-1)."""
    scores = np.full(positions.shape, -np.inf, dtype=np.float32)
    of_query, place = np.nonzero(positions >= 0)
    distinct, candidate = np.unique(positions[of_query, place], return_inverse=True)
    names = [index.names[position] for position in distinct]
    if index.items == "images":
        found = scorer.score_pairs(cast(Sequence[str], queries), names, of_query, candidate)
    else:
        found = scorer.score_pairs(names, queries, candidate, of_query)
    scores[of_query, place] = found
    return scores


@dataclass(frozen=True)
class StageResult:
    """
    One row of [`TwoStageReport`].

    Attributes:
        candidates (`int`): K, of each query; 0 for the first stage alone.
        similarity_weight (`float`): Of the first stage's similarity, in the sum by which the K are ordered.
        pairs (`int`): That were scored, of both directions; those in common once.
        seconds (`float`, *optional*): For scoring, or for embedding all captions and images.
        ceiling (`dict[str, float]`): By direction, the share of queries with a right item among the K: no order of
            them reaches more. Empty for the first stage alone.
        metrics (`dict[str, float]`): Recalls by the names of [`retrieval_metrics`].
    """

    candidates: int
    similarity_weight: float
    pairs: int
    seconds: float | None
    ceiling: dict[str, float]
    metrics: dict[str, float]


@dataclass(frozen=True)
class TwoStageReport:
    """
    What [`two_stage_report`] measured; `str` of it is a table in Markdown.

    Attributes:
        num_captions, num_images (`int`): Among which is searched.
        num_queries (`dict[str, int]`): By direction.
        rows (`tuple[StageResult, ...]`): The first stage alone, then each K by each weight.
    """

    num_captions: int
    num_images: int
    num_queries: dict[str, int]
    rows: tuple[StageResult, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        recalls = [f"{direction}_recall@{k}" for direction in DIRECTIONS for k in KS]
        lines = [
            "| candidates | pairs | time | ceiling T, I | " + " | ".join(f"{d}R@{k}" for d in "TI" for k in KS) + " |",
            "|---|--:|--:|--:|" + "--:|" * len(recalls),
        ]
        for row in self.rows:
            name = str(row.candidates or "first stage alone")
            if row.similarity_weight:
                name += f", score + {row.similarity_weight:g} similarity"
            ceiling = ", ".join(f"{100 * row.ceiling[direction]:.1f}" for direction in DIRECTIONS if row.ceiling)
            figures = " | ".join(f"{100 * row.metrics[recall]:.1f}" for recall in recalls)
            lines.append(f"| {name} | {row.pairs:,} | {_seconds(row.seconds)} | {ceiling} | {figures} |")
        last = self.rows[-1]
        pairs = self.num_captions * self.num_images
        seconds = None if last.seconds is None else last.seconds / last.pairs * pairs
        lines.append(f"| all, for comparison | {pairs:,} | about {_seconds(seconds)} |" + " |" * (1 + len(recalls)))
        return "\n".join(lines)


def two_stage_report(
    encoder: DualEncoder,
    scorer: ImageTextScorer,
    fold: RetrievalFold,
    candidates: Sequence[int] = (10, 50, 100, 200),
    num_queries: int | None = None,
    scores_dir: str | os.PathLike[str] | None = None,
    similarity_weights: Sequence[float] = (0.0,),
) -> TwoStageReport:
    """
    Recall of the first stage alone, and of the second among the best K of the first, for each K and each weight of the
    similarity, in both directions.

    Args:
        encoder, scorer: The first stage and the second.
        fold ([`RetrievalFold`]): Captions and images, as [`retrieval_test`] gives them.
        candidates (sequence of `int`, *optional*, defaults to `(10, 50, 100, 200)`): The Ks. The pairs of the largest
            hold those of all others and are scored once; the time of the others is their share of it.
        num_queries (`int`, *optional*): Ask with so many captions and so many images only, drawn evenly, among all
            there are: the figures of fewer queries, of a task as hard.
        scores_dir (`str` or `os.PathLike`, *optional*): Where the scorer keeps what it finished, to go on from there;
            the time is then unknown where it went on.
        similarity_weights (sequence of `float`, *optional*, defaults to `(0.0,)`): Each as in [`search`].

    Raises:
        `ValueError`: no K, or one below 1; no weight; or no query.
    """
    if num_queries is not None and num_queries < 1:
        raise ValueError(f"num_queries={num_queries}; expected at least 1, or None for all.")
    if not candidates or min(candidates) < 1:
        raise ValueError(f"candidates={tuple(candidates)}; expected at least one number, each at least 1.")
    if not similarity_weights:
        raise ValueError("similarity_weights is empty; expected at least one number, such as 0 for the score alone.")
    shape = num_captions, num_images = len(fold.captions), len(fold.image_ids)
    right_image = np.asarray(fold.image_of_caption)
    started = time.perf_counter()
    texts, images = encoder.embed_captions(fold.captions), encoder.embed_images(fold.image_ids)
    asked = {"image_retrieval": _evenly(num_captions, num_queries), "text_retrieval": _evenly(num_images, num_queries)}

    def metrics_of(ranked: Mapping[str, QueryRanks]) -> dict[str, float]:
        return summarize([{name: ranked[name].select(queries) for name, queries in asked.items()}], KS)

    similarities = texts @ images.T
    alone = metrics_of(rank_queries(similarities, right_image))
    rows = [StageResult(0, 0.0, 0, time.perf_counter() - started, {}, alone)]

    largest, by_caption, by_image = max(candidates), asked["image_retrieval"], asked["text_retrieval"]
    images_of, _ = nearest(texts[by_caption], images, min(largest, num_images))
    captions_of, _ = nearest(images[by_image], texts, min(largest, num_captions))
    of_caption = by_caption[:, None] * num_images + images_of  # pairs, as numbers
    of_image = captions_of * num_images + by_image[:, None]
    pairs = np.union1d(of_caption, of_image)
    resumed = scores_dir is not None and Path(scores_dir).exists()
    started = time.perf_counter()
    scores = scorer.score_pairs(fold.captions, fold.image_ids, *np.divmod(pairs, num_images), output_dir=scores_dir)
    seconds = None if resumed else time.perf_counter() - started

    for count in sorted(candidates):
        chosen = {"image_retrieval": of_caption[:, :count], "text_retrieval": of_image[:, :count]}
        num_pairs = len(np.union1d(*chosen.values()))
        hits = {
            "text_retrieval": right_image[captions_of[:, :count]] == by_image[:, None],
            "image_retrieval": images_of[:, :count] == right_image[by_caption, None],
        }
        ceiling = {direction: float(found.any(axis=1).mean()) for direction, found in hits.items()}
        share = None if seconds is None else seconds * num_pairs / len(pairs)
        for weight in similarity_weights:
            sums = scores + weight * similarities.flat[pairs]
            ranked = {}
            for direction, numbers in chosen.items():
                matrix = np.full(shape, -np.inf, dtype=np.float32)  # what is no candidate comes last
                matrix.flat[numbers.ravel()] = sums[np.searchsorted(pairs, numbers.ravel())]
                ranked[direction] = rank_queries(matrix, right_image)[direction]
            rows.append(StageResult(count, weight, num_pairs, share, ceiling, metrics_of(ranked)))
    return TwoStageReport(
        num_captions, num_images, {name: len(queries) for name, queries in asked.items()}, tuple(rows)
    )


def _evenly(total: int, count: int | None) -> np.ndarray:
    """`count` of the numbers below `total`, at even steps; all of them where there are no more."""
    count = min(total, count or total)
    return np.arange(count) * total // count


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
