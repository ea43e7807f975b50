from .collator import DataCollatorForUnicoderVLPreTraining as DataCollatorForUnicoderVLPreTraining
from .evaluation import (
    evaluate_pretraining as evaluate_pretraining,
    metrics_table as metrics_table,
    pretraining_chance as pretraining_chance,
)
from .hidden_regions import predict_hidden_regions as predict_hidden_regions
from .loop import LoopArguments as LoopArguments
from .setup import (
    PretrainingArguments as PretrainingArguments,
    PretrainingSetup as PretrainingSetup,
    prepare_pretraining as prepare_pretraining,
)
