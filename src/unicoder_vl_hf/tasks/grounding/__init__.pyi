from .collator import DataCollatorForUnicoderVLGrounding as DataCollatorForUnicoderVLGrounding
from .data import read_entities as read_entities, read_references as read_references
from .metrics import grounding_metrics as grounding_metrics, target_ious as target_ious
from .training import (
    GroundingArguments as GroundingArguments,
    load_for_grounding as load_for_grounding,
    prepare_grounding as prepare_grounding,
)
