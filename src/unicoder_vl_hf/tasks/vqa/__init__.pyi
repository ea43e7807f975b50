from .asking import QuestionAnswerer as QuestionAnswerer
from .collator import (
    DataCollatorForUnicoderVLQuestionAnswering as DataCollatorForUnicoderVLQuestionAnswering,
)
from .data import AnswerVocabulary as AnswerVocabulary, read_questions as read_questions
from .metrics import (
    answer_accuracy as answer_accuracy,
    normalise_answer as normalise_answer,
    vqa_metrics as vqa_metrics,
)
from .submission import check_submission as check_submission, write_submission as write_submission
from .training import (
    VQAArguments as VQAArguments,
    answer_questions as answer_questions,
    load_for_vqa as load_for_vqa,
    prepare_vqa as prepare_vqa,
)
