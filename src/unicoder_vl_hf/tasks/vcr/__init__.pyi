from .collator import DataCollatorForUnicoderVLMultipleChoice as DataCollatorForUnicoderVLMultipleChoice
from .data import VCRExamples as VCRExamples, boxes_of_images as boxes_of_images, read_vcr as read_vcr
from .metrics import (
    check_submission as check_submission,
    vcr_metrics as vcr_metrics,
    write_submission as write_submission,
)
from .pictures import draw_question as draw_question
from .pretraining import (
    DataCollatorForVCRPreTraining as DataCollatorForVCRPreTraining,
    VCRPretrainingArguments as VCRPretrainingArguments,
    prepare_vcr_pretraining as prepare_vcr_pretraining,
)
from .training import (
    VCRArguments as VCRArguments,
    choice_probabilities as choice_probabilities,
    evaluate_vcr as evaluate_vcr,
    load_for_vcr as load_for_vcr,
    prepare_vcr as prepare_vcr,
)
