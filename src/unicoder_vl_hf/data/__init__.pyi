from .captions import (
    JoinReport as JoinReport,
    check_tokens as check_tokens,
    join as join,
    read_captions as read_captions,
)
from .image_ids import id_mapping as id_mapping, photo_ids as photo_ids
from .masking import IGNORED as IGNORED, Masking as Masking
from .negatives import (
    MismatchIndex as MismatchIndex,
    PairsWithMismatches as PairsWithMismatches,
    PairsWithNegatives as PairsWithNegatives,
    pairs_digest as pairs_digest,
    read_duplicate_groups as read_duplicate_groups,
)
from .preparation import PreparedCaptions as PreparedCaptions, prepare as prepare
from .samplers import StepBatchSampler as StepBatchSampler, TokenBatchSampler as TokenBatchSampler
