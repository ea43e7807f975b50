"""The task of pre-training (paper, section Pre-training)."""

from typing import TYPE_CHECKING

from ...lazy import lazily

if TYPE_CHECKING:
    from .collator import DataCollatorForUnicoderVLPreTraining
    from .evaluation import evaluate_pretraining, metrics_table, pretraining_chance
    from .loop import LoopArguments
    from .setup import PretrainingArguments, PretrainingSetup, prepare_pretraining

__getattr__, __dir__ = lazily(
    __name__,
    {
        "collator": ["DataCollatorForUnicoderVLPreTraining"],
        "evaluation": ["evaluate_pretraining", "metrics_table", "pretraining_chance"],
        "loop": ["LoopArguments"],
        "setup": ["PretrainingArguments", "PretrainingSetup", "prepare_pretraining"],
    },
)

__all__ = [
    "DataCollatorForUnicoderVLPreTraining",
    "LoopArguments",
    "PretrainingArguments",
    "PretrainingSetup",
    "evaluate_pretraining",
    "metrics_table",
    "prepare_pretraining",
    "pretraining_chance",
]
