from .blocks import FinishedShare as FinishedShare, MissingShares as MissingShares, Share as Share
from .calibration import Calibration as Calibration, Matching as Matching
from .checkpoints import (
    checkpoint_provenance as checkpoint_provenance,
    load_for_scoring as load_for_scoring,
    load_for_store as load_for_store,
)
from .explanation import Explanation as Explanation, explain as explain
from .scorer import ImageTextScorer as ImageTextScorer, ScoringPlan as ScoringPlan
