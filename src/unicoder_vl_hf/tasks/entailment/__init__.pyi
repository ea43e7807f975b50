from .collator import (
    DataCollatorForUnicoderVLVisualEntailment as DataCollatorForUnicoderVLVisualEntailment,
)
from .data import LABELS as LABELS, read_entailment as read_entailment
from .training import (
    EntailmentArguments as EntailmentArguments,
    load_for_entailment as load_for_entailment,
    prepare_entailment as prepare_entailment,
)
