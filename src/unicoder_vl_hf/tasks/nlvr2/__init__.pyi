from .collator import (
    DataCollatorForUnicoderVLVisualReasoning as DataCollatorForUnicoderVLVisualReasoning,
)
from .data import read_nlvr2 as read_nlvr2
from .metrics import nlvr2_metrics as nlvr2_metrics, write_predictions as write_predictions
from .training import (
    NLVR2Arguments as NLVR2Arguments,
    load_for_nlvr2 as load_for_nlvr2,
    prepare_nlvr2 as prepare_nlvr2,
)
