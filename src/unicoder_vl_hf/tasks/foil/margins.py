"""Margins of foils, by any scorer of pairs."""

from collections.abc import Callable, Sequence

import numpy as np

from ...data.foils import Foil
from ...scoring.scorer import ImageTextScorer, distinct

# Scores each caption with the image of the same place: captions and image ids -> scores.
PairScorer = Callable[[Sequence[str], Sequence[str]], np.ndarray]
Embed = Callable[[Sequence[str]], np.ndarray]  # captions or image ids -> `(n, dim)`, of unit length


def by_matching_head(scorer: ImageTextScorer) -> PairScorer:
    """Makes a scorer of pairs of one that scores by the matching head."""

    def score(captions: Sequence[str], image_ids: Sequence[str]) -> np.ndarray:
        (texts, text_of_pair), (images, image_of_pair) = distinct(captions), distinct(image_ids)
        return scorer.score_pairs(texts, images, text_of_pair, image_of_pair)

    return score


def by_similarity(embed_captions: Embed, embed_images: Embed) -> PairScorer:
    """Makes a scorer of pairs of a first stage, which embeds captions and images: their similarity."""

    def score(captions: Sequence[str], image_ids: Sequence[str]) -> np.ndarray:
        (texts, text_of_pair), (images, image_of_pair) = distinct(captions), distinct(image_ids)
        embedded = embed_captions(texts)[text_of_pair], embed_images(images)[image_of_pair]
        return (embedded[0] * embedded[1]).sum(axis=1)

    return score


def foil_margins(foils: Sequence[Foil], score: PairScorer) -> np.ndarray:
    """Scores captions and foils with their images: `(num_foils,)`, above 0 where the caption is preferred."""
    image_ids = [foil.image_id for foil in foils]
    scores = score([foil.caption for foil in foils] + [foil.foil for foil in foils], image_ids * 2)
    return scores[: len(foils)] - scores[len(foils) :]
