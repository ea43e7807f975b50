"""Accuracies of visual commonsense reasoning from scores, as a module of `evaluate`; it loads from its folder, offline.

Thin over `unicoder_vl_hf.tasks.vcr.metrics`, which does the same without `evaluate`.
"""

import datasets
import evaluate

try:
    from unicoder_vl_hf.tasks.vcr.metrics import vcr_metrics
except ImportError as error:
    raise ImportError("This metric needs unicoder_vl_hf: pip install . in a checkout of unicoder-vl-hf") from error

_DESCRIPTION = """\
Accuracies of VCR's Q->A, QA->R and Q->AR, which counts a question when both of its choices are right. Ties count
against the system.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: for each question the scores of its answers, higher = better.
    rationale_predictions: for each question the scores of its rationales, after the right answer.
    references: for each question the right answer.
    rationale_references: for each question the right rationale.

Returns:
    `answer_accuracy`, `rationale_accuracy` and `joint_accuracy`, as fractions; `answer_ties` and `rationale_ties`, the
    questions that count as wrong because the right choice shares the highest score.

Examples:
    >>> metric = evaluate.load("metrics/vcr")
    >>> scores = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]]
    >>> metric.compute(
    ...     predictions=scores, rationale_predictions=scores, references=[0, 1], rationale_references=[0, 2]
    ... )
    {'answer_accuracy': 1.0, 'rationale_accuracy': 0.5, 'joint_accuracy': 0.5, 'answer_ties': 0, 'rationale_ties': 0}
"""

_CITATION = """\
@inproceedings{zellers2019vcr,
  title     = {From Recognition to Cognition: Visual Commonsense Reasoning},
  author    = {Zellers, Rowan and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
  booktitle = {CVPR},
  year      = {2019}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class VisualCommonsenseReasoning(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        scores, label = datasets.Sequence(datasets.Value("float32")), datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": scores,
                    "rationale_predictions": scores,
                    "references": label,
                    "rationale_references": label,
                }
            ),
        )

    def _compute(self, predictions, rationale_predictions, references, rationale_references) -> dict[str, float]:
        return vcr_metrics(predictions, rationale_predictions, references, rationale_references)
