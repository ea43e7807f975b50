from .evaluation import evaluate_foils as evaluate_foils, foil_table as foil_table
from .making import (
    hard_foils as hard_foils,
    make_foils as make_foils,
    noun_foils as noun_foils,
    training_foils as training_foils,
)
from .margins import foil_margins as foil_margins
from .metrics import (
    FoilAccuracy as FoilAccuracy,
    FoilGain as FoilGain,
    accuracies_by_kind as accuracies_by_kind,
    foil_accuracy as foil_accuracy,
    foil_gain as foil_gain,
    gains_by_kind as gains_by_kind,
)
from .text_only import TextOnlyScorer as TextOnlyScorer, train_text_only as train_text_only
