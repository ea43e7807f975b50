"""Scores pairs of captions and images, at any scale."""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .checkpoints import checkpoint_provenance, load_for_scoring, load_for_store
    from .scorer import ImageTextScorer, ScoringPlan

__getattr__, __dir__ = lazily(
    __name__,
    {
        "checkpoints": ["checkpoint_provenance", "load_for_scoring", "load_for_store"],
        "scorer": ["ImageTextScorer", "ScoringPlan"],
    },
)

__all__ = ["ImageTextScorer", "ScoringPlan", "checkpoint_provenance", "load_for_scoring", "load_for_store"]
