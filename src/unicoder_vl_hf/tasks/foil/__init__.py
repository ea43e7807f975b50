"""The task of telling a true caption from a foil that differs in a word: made, measured, and told without looking."""

from typing import TYPE_CHECKING

from ...lazy import lazily

if TYPE_CHECKING:
    from .evaluation import evaluate_foils, foil_margins, foil_table
    from .making import hard_foils, make_foils, noun_foils
    from .metrics import FoilAccuracy, accuracies_by_kind, foil_accuracy
    from .text_only import TextOnlyScorer, train_text_only

__getattr__, __dir__ = lazily(
    __name__,
    {
        "evaluation": ["evaluate_foils", "foil_margins", "foil_table"],
        "making": ["hard_foils", "make_foils", "noun_foils"],
        "metrics": ["FoilAccuracy", "accuracies_by_kind", "foil_accuracy"],
        "text_only": ["TextOnlyScorer", "train_text_only"],
    },
)

__all__ = [
    "FoilAccuracy",
    "TextOnlyScorer",
    "accuracies_by_kind",
    "evaluate_foils",
    "foil_accuracy",
    "foil_margins",
    "foil_table",
    "hard_foils",
    "make_foils",
    "noun_foils",
    "train_text_only",
]
