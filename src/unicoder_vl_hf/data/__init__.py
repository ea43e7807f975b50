"""Rows of captions and pairs: reading them, joining them with regions, and drawing negatives, masks and their order."""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .captions import JoinReport, check_tokens, join, read_captions
    from .image_ids import id_mapping, photo_ids
    from .masking import IGNORED, Masking
    from .negatives import MismatchIndex, PairsWithMismatches, PairsWithNegatives, pairs_digest, read_duplicate_groups
    from .preparation import PreparedCaptions, prepare
    from .samplers import StepBatchSampler

__getattr__, __dir__ = lazily(
    __name__,
    {
        "captions": ["JoinReport", "check_tokens", "join", "read_captions"],
        "image_ids": ["id_mapping", "photo_ids"],
        "masking": ["IGNORED", "Masking"],
        "negatives": [
            "MismatchIndex",
            "PairsWithMismatches",
            "PairsWithNegatives",
            "pairs_digest",
            "read_duplicate_groups",
        ],
        "preparation": ["PreparedCaptions", "prepare"],
        "samplers": ["StepBatchSampler"],
    },
)

__all__ = [
    "IGNORED",
    "JoinReport",
    "Masking",
    "MismatchIndex",
    "PairsWithMismatches",
    "PairsWithNegatives",
    "PreparedCaptions",
    "StepBatchSampler",
    "check_tokens",
    "id_mapping",
    "join",
    "pairs_digest",
    "photo_ids",
    "prepare",
    "read_captions",
    "read_duplicate_groups",
]
