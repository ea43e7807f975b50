"""The task of image-text retrieval (paper, section Image-Text Retrieval)."""

from typing import TYPE_CHECKING

from ...lazy import lazily

if TYPE_CHECKING:
    from .collator import DataCollatorForUnicoderVLRetrieval
    from .first_stage import train_first_stage
    from .losses import (
        BinaryMatchingLoss,
        ContrastiveLoss,
        GroupSoftmaxLoss,
        HardestNegativeLoss,
        HardNegativeLoss,
        RetrievalLoss,
        SumOfNegativesLoss,
        TwoStageLoss,
    )
    from .metrics import confidence_intervals, rank_queries, retrieval_metrics
    from .mining import MiningRule, mine, mine_hard_negatives
    from .protocols import (
        PROTOCOLS,
        Protocol,
        RetrievalResult,
        RetrievalTest,
        chance,
        evaluate_folds,
        results_table,
        retrieval_test,
    )
    from .training import RetrievalArguments, RetrievalSetup, evaluate_retrieval, prepare_retrieval
    from .two_stage_report import TwoStageReport, measure_similarity_weight
    from .zero_shot import zero_shot_retrieval

__getattr__, __dir__ = lazily(
    __name__,
    {
        "collator": ["DataCollatorForUnicoderVLRetrieval"],
        "first_stage": ["train_first_stage"],
        "losses": [
            "BinaryMatchingLoss",
            "ContrastiveLoss",
            "GroupSoftmaxLoss",
            "HardNegativeLoss",
            "HardestNegativeLoss",
            "RetrievalLoss",
            "SumOfNegativesLoss",
            "TwoStageLoss",
        ],
        "metrics": ["confidence_intervals", "rank_queries", "retrieval_metrics"],
        "mining": ["MiningRule", "mine", "mine_hard_negatives"],
        "protocols": [
            "PROTOCOLS",
            "Protocol",
            "RetrievalResult",
            "RetrievalTest",
            "chance",
            "evaluate_folds",
            "results_table",
            "retrieval_test",
        ],
        "training": ["RetrievalArguments", "RetrievalSetup", "evaluate_retrieval", "prepare_retrieval"],
        "two_stage_report": ["TwoStageReport", "measure_similarity_weight"],
        "zero_shot": ["zero_shot_retrieval"],
    },
)

__all__ = [
    "PROTOCOLS",
    "BinaryMatchingLoss",
    "ContrastiveLoss",
    "DataCollatorForUnicoderVLRetrieval",
    "GroupSoftmaxLoss",
    "HardNegativeLoss",
    "HardestNegativeLoss",
    "MiningRule",
    "Protocol",
    "RetrievalArguments",
    "RetrievalLoss",
    "RetrievalResult",
    "RetrievalSetup",
    "RetrievalTest",
    "SumOfNegativesLoss",
    "TwoStageLoss",
    "TwoStageReport",
    "chance",
    "confidence_intervals",
    "evaluate_folds",
    "evaluate_retrieval",
    "measure_similarity_weight",
    "mine",
    "mine_hard_negatives",
    "prepare_retrieval",
    "rank_queries",
    "results_table",
    "retrieval_metrics",
    "retrieval_test",
    "train_first_stage",
    "zero_shot_retrieval",
]
