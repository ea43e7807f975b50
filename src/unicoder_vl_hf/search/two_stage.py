"""Searches in two stages: the cross-encoder orders the items of an index that are nearest to a query."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..processing_unicoder_vl import RegionInput
from ..records_unicoder_vl import RegionRecord, check_several
from ..regions.store import RegionStore
from ..scoring.scorer import ImageTextScorer
from .encoders import DualEncoder, UnicoderVLDualEncoder
from .index import SearchIndex


@dataclass(frozen=True)
class SimilarityWeight:
    """
    The weight in the sum by which the first stage's candidates are ordered: score + weight x similarity. `str` writes
    it in words.

    Attributes:
        value (`float`): The weight; 0 is the score alone.
        origin (`str`): `"given"` by who searches; `"measured"` when the checkpoint was trained; `"unknown"`, and 0,
            if it was measured for no such pair of checkpoint and first stage.
    """

    value: float
    origin: Literal["given", "measured", "unknown"]

    @classmethod
    def of(cls, given: float | None, encoder: DualEncoder | None, scorer: ImageTextScorer) -> "SimilarityWeight":
        """
        Takes the weight that is given, else the one that was measured for a model with its own first stage, else 0.

        Raises:
            `ValueError`: the weight is NaN, infinite or below 0.
        """
        if given is not None:
            if not 0 <= given < math.inf:
                raise ValueError(f"similarity_weight={given}; expected a number that is at least 0 and finite.")
            return cls(given, "given")
        own = isinstance(encoder, UnicoderVLDualEncoder) and encoder.model is scorer.model
        measured = scorer.model.config.similarity_weight if own else None
        return cls(0.0, "unknown") if measured is None else cls(float(measured), "measured")

    @property
    def formula(self) -> str:
        """The sum by which hits are ordered, in words."""
        return f"score + {self.value:g} similarity" if self.value or self.origin == "measured" else "score"

    def __str__(self) -> str:
        where = {
            "given": ", the weight that was asked for",
            "measured": ", the weight that was measured on validation captions",
            "unknown": " alone: no weight of the similarity was measured for this checkpoint with this first stage",
        }
        return self.formula + where[self.origin]


@dataclass(frozen=True)
class Hit:
    """
    An image or a caption that was found.

    Attributes:
        name (`str`): The image id, or the caption.
        score (`float`): The value that orders hits, `matching_score` + weight x `similarity`; higher is better.
        similarity (`float`, *optional*): The similarity of the first stage, in `[-1, 1]`; None without one.
        matching_score (`float`, *optional*): The score of the cross-encoder; None where an image sought images.
    """

    name: str
    score: float
    similarity: float | None
    matching_score: float | None = None

    @property
    def is_alike(self) -> bool:
        """Whether an image was found for an image, by the similarity alone."""
        return self.matching_score is None

    @property
    def summands(self) -> str:
        """The summands of `score` in words."""
        if self.matching_score is None:
            return f"similarity {self.similarity:.3f}"
        similarity = "" if self.similarity is None else f", similarity {self.similarity:.3f}"
        return f"score {self.matching_score:+.2f}{similarity}"


def search(
    queries: Sequence[RegionInput],
    index: SearchIndex,
    encoder: DualEncoder,
    scorer: ImageTextScorer,
    *,
    top_k: int = 10,
    candidates: int = 100,
    similarity_weight: float | None = None,
) -> list[list[Hit]]:
    """
    Finds the images of an index that match each caption best, or the captions that match each image best.

    Args:
        queries (sequence of `str` or [`RegionRecord`]): Captions, to search an index of images; image ids, records or
            photos, as [`ImageTextScorer.score`] takes them, to search an index of captions.
        index ([`SearchIndex`]): An index that `encoder` made from the store of `scorer`, which is checked.
        encoder ([`UnicoderVLDualEncoder`] or [`TransformersDualEncoder`]): The first stage.
        scorer ([`ImageTextScorer`]): The second stage.
        top_k (`int`, *optional*, defaults to 10): The number of hits of a query.
        candidates (`int`, *optional*, defaults to 100): The number of items that the first stage proposes and the
            second scores, at least `top_k`.
        similarity_weight (`float`, *optional*): Weight of the similarity that is added to the matching score, as BLIP
            adds it. Defaults to the weight that was measured for the scorer's model with its own first
            stage, else to 0; see [`SimilarityWeight.of`].

    Returns:
        `list[list[Hit]]`: the best hits of each query, the best first.

    Raises:
        `ValueError`: `top_k` or `candidates` is below 1, the weight is below 0, or the index is of another checkpoint
        or store.
    """
    check_several("queries", queries)
    if min(top_k, candidates) < 1:
        raise ValueError(f"top_k={top_k}, candidates={candidates}; expected at least 1 of each.")
    weight = SimilarityWeight.of(similarity_weight, encoder, scorer).value
    index.check(encoder, scorer.store if isinstance(scorer.store, RegionStore) else None)
    if index.items == "captions":
        asked, queries = queries, scorer.processor.find_regions(queries, scorer.store)
        ours = isinstance(encoder, UnicoderVLDualEncoder)  # others embed the photo, where it is none of the store
        embedded = encoder.embed_images(queries if ours else _photos(asked, queries))
    else:
        embedded = encoder.embed_captions(cast(Sequence[str], queries))
    positions, similarities = index.search(embedded, max(top_k, candidates))
    scores = rerank(queries, index, positions, scorer)
    sums = scores + weight * np.where(positions >= 0, similarities, 0)
    found = []
    for total, score, near, row in zip(sums, scores, similarities, positions, strict=True):
        best = [place for place in np.argsort(-total, kind="stable")[:top_k] if row[place] >= 0]
        found.append(
            [Hit(index.names[row[place]], *(float(of[place]) for of in (total, near, score))) for place in best]
        )
    return found


def search_similar(
    images: Sequence[Any], index: SearchIndex, encoder: DualEncoder, *, top_k: int = 10
) -> list[list[Hit]]:
    """
    Finds the images of an index that are most like each image, by the similarity of their embeddings in the first
    stage: the matching head scores a caption with an image, and no two images.

    Args:
        images (sequence of `str`, `os.PathLike`, `PIL.Image.Image` or [`RegionRecord`]): Image ids, or what else
            the encoder embeds: ours all that [`ImageTextScorer.score`] takes, those of transformers photos.
        index ([`SearchIndex`]): An index of images that `encoder` made, which is checked.
        encoder ([`UnicoderVLDualEncoder`] or [`TransformersDualEncoder`]): The first stage.
        top_k (`int`, *optional*, defaults to 10): The number of hits of an image.

    Returns:
        `list[list[Hit]]`: the most similar images of each image, the best first; itself, if the index holds it.

    Raises:
        `ValueError`: `top_k` is below 1, or the index is of captions or another checkpoint.
    """
    check_several("images", images)
    if index.items != "images":
        raise ValueError(f"{index.path} holds {index.items}: give an index of images.")
    index.check(encoder)
    found = index.search(encoder.embed_images(images), top_k)
    return [
        [Hit(index.names[place], float(near), float(near)) for place, near in zip(*row, strict=True) if place >= 0]
        for row in zip(*found, strict=True)
    ]


def _photos(images: Sequence[Any], found: Sequence[str | RegionRecord]) -> list[Any]:
    """Gives images with the names of files as paths, told from ids by the records that were found for them."""
    pairs = zip(images, found, strict=True)
    return [Path(image) if isinstance(image, str) and not isinstance(known, str) else image for image, known in pairs]


def rerank(
    queries: Sequence[RegionInput], index: SearchIndex, positions: np.ndarray, scorer: ImageTextScorer
) -> np.ndarray:
    """Scores each query with its candidates, `positions` `(Q, K)` in `index`: `(Q, K)` float32, -inf for none (-1)."""
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
