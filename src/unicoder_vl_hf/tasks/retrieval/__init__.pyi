from .calibration import calibrate as calibrate
from .collator import DataCollatorForUnicoderVLRetrieval as DataCollatorForUnicoderVLRetrieval
from .first_stage import train_first_stage as train_first_stage
from .losses import (
    BinaryMatchingLoss as BinaryMatchingLoss,
    ContrastiveLoss as ContrastiveLoss,
    GroupSoftmaxLoss as GroupSoftmaxLoss,
    HardestNegativeLoss as HardestNegativeLoss,
    HardNegativeLoss as HardNegativeLoss,
    RetrievalLoss as RetrievalLoss,
    SumOfNegativesLoss as SumOfNegativesLoss,
    TwoStageLoss as TwoStageLoss,
)
from .metrics import (
    confidence_intervals as confidence_intervals,
    rank_queries as rank_queries,
    retrieval_metrics as retrieval_metrics,
)
from .mining import MiningRule as MiningRule, mine as mine, mine_hard_negatives as mine_hard_negatives
from .protocols import (
    PROTOCOLS as PROTOCOLS,
    Protocol as Protocol,
    RetrievalResult as RetrievalResult,
    RetrievalTest as RetrievalTest,
    chance as chance,
    evaluate_folds as evaluate_folds,
    results_table as results_table,
    retrieval_test as retrieval_test,
)
from .training import (
    RetrievalArguments as RetrievalArguments,
    RetrievalSetup as RetrievalSetup,
    evaluate_retrieval as evaluate_retrieval,
    prepare_retrieval as prepare_retrieval,
)
from .two_stage_report import TwoStageReport as TwoStageReport, measure_similarity_weight as measure_similarity_weight
from .zero_shot import zero_shot_retrieval as zero_shot_retrieval
