"""The task of visual commonsense reasoning (paper, section Visual Commonsense Reasoning)."""

from typing import TYPE_CHECKING

from ...lazy import lazily

if TYPE_CHECKING:
    from .collator import DataCollatorForUnicoderVLMultipleChoice
    from .data import VCRExamples, boxes_of_images, read_vcr
    from .metrics import check_submission, vcr_metrics, write_submission
    from .pictures import draw_question
    from .pretraining import DataCollatorForVCRPreTraining, VCRPretrainingArguments, prepare_vcr_pretraining
    from .training import VCRArguments, choice_probabilities, evaluate_vcr, load_for_vcr, prepare_vcr

__getattr__, __dir__ = lazily(
    __name__,
    {
        "collator": ["DataCollatorForUnicoderVLMultipleChoice"],
        "data": ["VCRExamples", "boxes_of_images", "read_vcr"],
        "metrics": ["check_submission", "vcr_metrics", "write_submission"],
        "pictures": ["draw_question"],
        "pretraining": ["DataCollatorForVCRPreTraining", "VCRPretrainingArguments", "prepare_vcr_pretraining"],
        "training": ["VCRArguments", "choice_probabilities", "evaluate_vcr", "load_for_vcr", "prepare_vcr"],
    },
)

__all__ = [
    "DataCollatorForUnicoderVLMultipleChoice",
    "DataCollatorForVCRPreTraining",
    "VCRArguments",
    "VCRExamples",
    "VCRPretrainingArguments",
    "boxes_of_images",
    "check_submission",
    "choice_probabilities",
    "draw_question",
    "evaluate_vcr",
    "load_for_vcr",
    "prepare_vcr",
    "prepare_vcr_pretraining",
    "read_vcr",
    "vcr_metrics",
    "write_submission",
]
