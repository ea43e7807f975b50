"""Unicoder-VL (AAAI 2020) in the Hugging Face way: model, processor, region stores, training and retrieval.

What it offers is loaded when it is first asked for, and so are PyTorch and transformers. Its classes are registered
with transformers' Auto classes as soon as these are loaded, before or after: see `registration`.
"""

from typing import TYPE_CHECKING, Any

from . import registration
from ._version import package_version
from .lazy import lazily

if TYPE_CHECKING:
    from .configuration_unicoder_vl import UnicoderVLConfig
    from .feature_extraction_unicoder_vl import UnicoderVLFeatureExtractor
    from .modeling_unicoder_vl import (
        UnicoderVLForImageTextRetrieval,
        UnicoderVLForMultipleChoice,
        UnicoderVLForPreTraining,
        UnicoderVLModel,
        UnicoderVLPreTrainedModel,
    )
    from .processing_unicoder_vl import UnicoderVLProcessor
    from .records_unicoder_vl import RegionRecord
    from .regions.store import RegionStore, RegionStoreWriter
    from .scoring.scorer import ImageTextScorer
    from .tasks.pretraining.collator import DataCollatorForUnicoderVLPreTraining
    from .tasks.retrieval.collator import DataCollatorForUnicoderVLRetrieval
    from .tasks.retrieval.metrics import retrieval_metrics
    from .tasks.vcr.collator import DataCollatorForUnicoderVLMultipleChoice

    __version__: str

# A name that is a room is no function here: `unicoder_vl_hf.search` is the room, its function `search.search`.
_load, __dir__ = lazily(
    __name__,
    {
        "configuration_unicoder_vl": ["UnicoderVLConfig"],
        "feature_extraction_unicoder_vl": ["UnicoderVLFeatureExtractor"],
        "modeling_unicoder_vl": [
            "UnicoderVLForImageTextRetrieval",
            "UnicoderVLForMultipleChoice",
            "UnicoderVLForPreTraining",
            "UnicoderVLModel",
            "UnicoderVLPreTrainedModel",
        ],
        "processing_unicoder_vl": ["UnicoderVLProcessor"],
        "records_unicoder_vl": ["RegionRecord"],
        "regions.store": ["RegionStore", "RegionStoreWriter"],
        "scoring.scorer": ["ImageTextScorer"],
        "tasks.pretraining.collator": ["DataCollatorForUnicoderVLPreTraining"],
        "tasks.retrieval.collator": ["DataCollatorForUnicoderVLRetrieval"],
        "tasks.retrieval.metrics": ["retrieval_metrics"],
        "tasks.vcr.collator": ["DataCollatorForUnicoderVLMultipleChoice"],
        **dict.fromkeys(("data", "regions", "runs", "scenes", "scoring", "search", "tasks"), ()),
    },
)


def __getattr__(name: str) -> Any:
    return package_version() if name == "__version__" else _load(name)


registration.install()

__all__ = [
    "DataCollatorForUnicoderVLMultipleChoice",
    "DataCollatorForUnicoderVLPreTraining",
    "DataCollatorForUnicoderVLRetrieval",
    "ImageTextScorer",
    "RegionRecord",
    "RegionStore",
    "RegionStoreWriter",
    "UnicoderVLConfig",
    "UnicoderVLFeatureExtractor",
    "UnicoderVLForImageTextRetrieval",
    "UnicoderVLForMultipleChoice",
    "UnicoderVLForPreTraining",
    "UnicoderVLModel",
    "UnicoderVLPreTrainedModel",
    "UnicoderVLProcessor",
    "retrieval_metrics",
]
