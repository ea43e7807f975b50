"""Measures the cost and the losses of a search in two stages, by number of candidates and weight of the similarity."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...scoring.scorer import ImageTextScorer, duration
from ...search.encoders import DualEncoder, UnicoderVLDualEncoder
from ...search.index import nearest
from .metrics import QueryRanks, rank_queries, summarize, with_recall_sum
from .protocols import DIRECTIONS, KS, RECALLS, RetrievalFold, captions_of_images, retrieval_test

# Weights of the similarity that are tried, from the score alone to where the score hardly counts.
SIMILARITY_WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# What is measured for that: at most so many captions, and images, ask among at most so many images, and have so many
# candidates each. That are 10,000 pairs, among as many images as a test split has.
WEIGHING_QUERIES, WEIGHING_IMAGES, WEIGHING_CANDIDATES = 250, 1000, 20


@dataclass(frozen=True)
class StageResult:
    """
    A row of [`TwoStageReport`].

    Attributes:
        candidates (`int`): The number K of candidates of each query; 0 for the first stage alone.
        similarity_weight (`float`): The weight of the first stage's similarity in the sum by which the K are ordered.
        pairs (`int`): The number of pairs that were scored for both directions; those in common count once.
        seconds (`float`, *optional*): The time of scoring, or of embedding all captions and images.
        ceiling (`dict[str, float]`): The share of queries of each direction with a right item among the K: no order
            of them reaches more. Empty for the first stage alone.
        metrics (`dict[str, float]`): Recalls by the names of [`retrieval_metrics`].
    """

    candidates: int
    similarity_weight: float
    pairs: int
    seconds: float | None
    ceiling: dict[str, float]
    metrics: dict[str, float]

    @property
    def recall_sum(self) -> float:
        """The sum of the six recalls."""
        return with_recall_sum(self.metrics)["recall_sum"]


@dataclass(frozen=True)
class TwoStageReport:
    """
    The figures that [`two_stage_report`] measured; `str` of it is a table in Markdown.

    Attributes:
        num_captions, num_images (`int`): The captions and images among which is searched.
        num_queries (`dict[str, int]`): The number of queries of each direction.
        rows (`tuple[StageResult, ...]`): The first stage alone, then each K by each weight.
        with_query_bank (`dict[str, float]`, *optional*): The metrics of the first stage's similarities alone, less what
            the model's query bank takes from them; None without a bank.
    """

    num_captions: int
    num_images: int
    num_queries: dict[str, int]
    rows: tuple[StageResult, ...]
    with_query_bank: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Gives the figures as values of JSON."""
        return asdict(self)

    @property
    def best(self) -> StageResult:
        """The re-ranked row of the highest sum of recalls; of equal ones that of the smallest weight, then K."""
        # Equal sums of shares may differ in their last bits.
        return min(self.rows[1:], key=lambda row: (-round(row.recall_sum, 9), row.similarity_weight, row.candidates))

    def __str__(self) -> str:
        lines = [
            "| candidates | pairs | time | ceiling T, I | " + " | ".join(RECALLS.values()) + " |",
            "|---|--:|--:|--:|" + "--:|" * len(RECALLS),
        ]
        for row in self.rows:
            name = str(row.candidates or "first stage alone")
            if row.similarity_weight:
                name += f", score + {row.similarity_weight:g} similarity"
            ceiling = ", ".join(f"{100 * row.ceiling[direction]:.1f}" for direction in DIRECTIONS if row.ceiling)
            figures = " | ".join(f"{100 * row.metrics[recall]:.1f}" for recall in RECALLS)
            lines.append(f"| {name} | {row.pairs:,} | {_duration(row.seconds)} | {ceiling} | {figures} |")
        if (banked := self.with_query_bank) is not None:
            figures = " | ".join(f"{100 * banked[recall]:.1f}" for recall in RECALLS)
            lines.insert(3, f"| first stage and query bank alone | 0 | | | {figures} |")  # behind the first stage alone
        last = self.rows[-1]
        pairs = self.num_captions * self.num_images
        seconds = None if last.seconds is None else last.seconds / last.pairs * pairs
        cost = f"| all, not scored: the cost | {pairs:,} | about {_duration(seconds)} |"
        lines.append(cost + " |" * (1 + len(RECALLS)))
        return "\n".join(lines)


def two_stage_report(
    encoder: DualEncoder,
    scorer: ImageTextScorer,
    fold: RetrievalFold,
    candidates: Sequence[int] = (10, 50, 100, 200),
    num_queries: int | None = None,
    scores_dir: str | os.PathLike[str] | None = None,
    similarity_weights: Sequence[float] = (0.0,),
    max_length: int = 44,
    weighs_query_bank: bool = False,
) -> TwoStageReport:
    """
    Measures recall of the first stage alone, and of the second among the best K of the first, for each K and each
    weight of the similarity, in both directions.

    Args:
        encoder, scorer: The first stage and the second.
        fold ([`RetrievalFold`]): Captions and images, as [`retrieval_test`] gives them.
        candidates (sequence of `int`, *optional*, defaults to `(10, 50, 100, 200)`): The Ks. The pairs of the largest
            hold those of all others and are scored once; the time of the others is their share of it.
        num_queries (`int`, *optional*): Number of captions, and of images, that ask, drawn evenly, among all there are:
            fewer queries of a task as hard. By default all ask.
        scores_dir (`str` or `os.PathLike`, *optional*): The folder in which the scorer keeps scores, to go on from
            there; the time is unknown if it went on.
        similarity_weights (sequence of `float`, *optional*, defaults to `(0.0,)`): Weights, see [`search`].
        max_length (`int`, *optional*, defaults to 44): Most tokens of a caption that is scored.
        weighs_query_bank (`bool`, *optional*, defaults to `False`): Whether the similarities that are weighed are less
            what the model's query bank takes from them, as in its scores.

    Raises:
        `ValueError`: there is no K, or one below 1, no weight, or no query.
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
    asked = {"image_retrieval": evenly(num_captions, num_queries), "text_retrieval": evenly(num_images, num_queries)}

    def metrics_of(ranked: Mapping[str, QueryRanks]) -> dict[str, float]:
        return summarize([{name: ranked[name].select(queries) for name, queries in asked.items()}], KS)

    similarities = texts @ images.T
    alone = metrics_of(rank_queries(similarities, right_image))
    rows = [StageResult(0, 0.0, 0, time.perf_counter() - started, {}, alone)]
    weighed, with_bank = similarities, None
    if isinstance(encoder, UnicoderVLDualEncoder) and encoder.first_stage.query_bank is not None:
        in_scores = encoder.similarities_in_scores(texts, images)
        with_bank = metrics_of(rank_queries(in_scores, right_image))
        weighed = in_scores if weighs_query_bank else similarities

    largest, by_caption, by_image = max(candidates), asked["image_retrieval"], asked["text_retrieval"]
    images_of, _ = nearest(texts[by_caption], images, largest)
    captions_of, _ = nearest(images[by_image], texts, largest)
    of_caption = by_caption[:, None] * num_images + images_of  # pairs, as numbers
    of_image = captions_of * num_images + by_image[:, None]
    pairs = np.union1d(of_caption, of_image)
    resumed = scores_dir is not None and Path(scores_dir).exists()
    started = time.perf_counter()
    scores = scorer.score_pairs(
        fold.captions, fold.image_ids, *np.divmod(pairs, num_images), max_length=max_length, output_dir=scores_dir
    )
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
            sums = scores + weight * weighed.flat[pairs]
            ranked: dict[str, QueryRanks] = {}
            for direction, numbers in chosen.items():
                matrix = np.full(shape, -np.inf, dtype=np.float32)  # what is no candidate comes last
                matrix.flat[numbers.ravel()] = sums[np.searchsorted(pairs, numbers.ravel())]
                ranked |= rank_queries(matrix, right_image, [direction])
            rows.append(StageResult(count, weight, num_pairs, share, ceiling, metrics_of(ranked)))
    return TwoStageReport(
        num_captions, num_images, {name: len(queries) for name, queries in asked.items()}, tuple(rows), with_bank
    )


def measure_similarity_weight(
    encoder: UnicoderVLDualEncoder,
    scorer: ImageTextScorer,
    captions: datasets.Dataset,
    max_length: int = 44,
    num_queries: int | None = None,
) -> TwoStageReport:
    """
    Measures which of `SIMILARITY_WEIGHTS` orders the candidates of a model's own first stage best, and notes that
    weight in the model's configuration. Every process calls it.

    Args:
        encoder, scorer: The first stage and the second, of one model.
        captions (`datasets.Dataset`): Rows of the validation split, of which a bounded part is asked and scored.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a caption.
        num_queries (`int`, *optional*): Most captions, and most images, that ask. Defaults to `WEIGHING_QUERIES`.

    Returns:
        [`TwoStageReport`]: the first stage alone, then each weight; its `best` has the weight that was chosen.
    """
    (fold,) = retrieval_test(captions_of_images(captions, WEIGHING_IMAGES)).folds
    report = two_stage_report(
        encoder,
        scorer,
        fold,
        candidates=[WEIGHING_CANDIDATES],
        num_queries=num_queries or WEIGHING_QUERIES,
        similarity_weights=SIMILARITY_WEIGHTS,
        max_length=max_length,
        weighs_query_bank=True,
    )
    scorer.model.config.similarity_weight = report.best.similarity_weight
    return report


def describe_weight(report: TwoStageReport) -> str:
    """Says which weight [`measure_similarity_weight`] chose, by what figures, and on what."""
    alone, by_score, *_ = report.rows
    best, asked = report.best, report.num_queries
    tried = ", ".join(f"{row.similarity_weight:g}" for row in report.rows[1:])
    similarity, bank = "similarity", ""
    if (banked := report.with_query_bank) is not None:
        similarity = "(similarity less the query bank's)"
        bank = f", with the query bank {with_recall_sum(banked)['recall_sum']:.3f}"
    return (
        f"Candidates of the first stage are ordered by score + {best.similarity_weight:g} {similarity}. Of the weights "
        f"{tried} this one has the highest sum of recalls on the validation split, {best.recall_sum:.3f} (by the score "
        f"alone {by_score.recall_sum:.3f}, by the similarity alone {alone.recall_sum:.3f}{bank}): of "
        f"{asked['image_retrieval']:,} captions and {asked['text_retrieval']:,} images, each with up to "
        f"{best.candidates} candidates among {report.num_images:,} images and {report.num_captions:,} captions."
    )


def evenly(total: int, count: int | None) -> np.ndarray:
    """Gives `count` of the numbers below `total`, at even steps, or all if there are no more."""
    count = min(total, count or total)
    return np.arange(count) * total // count


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
