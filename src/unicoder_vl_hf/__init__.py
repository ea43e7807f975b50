"""Unicoder-VL (AAAI 2020) in the Hugging Face way: model, processor, region stores, training and retrieval.

Importing the package registers its classes with transformers' Auto classes and loads no more than the four Hub files.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from .configuration_unicoder_vl import UnicoderVLConfig
from .feature_extraction_unicoder_vl import RegionRecord, UnicoderVLFeatureExtractor
from .modeling_unicoder_vl import (
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForPreTraining,
    UnicoderVLModel,
)
from .processing_unicoder_vl import UnicoderVLProcessor

if TYPE_CHECKING:
    from .data.collators import (
        DataCollatorForUnicoderVLMultipleChoice,
        DataCollatorForUnicoderVLPreTraining,
        DataCollatorForUnicoderVLRetrieval,
    )
    from .regions.store import RegionStore, RegionStoreWriter
    from .retrieval.metrics import retrieval_metrics
    from .retrieval.scoring import ImageTextScorer

try:
    __version__ = version("unicoder-vl-hf")
except PackageNotFoundError:  # A source tree on the path, not installed.
    __version__ = "0+unknown"

AutoConfig.register(UnicoderVLConfig.model_type, UnicoderVLConfig)
AutoModel.register(UnicoderVLConfig, UnicoderVLModel)
AutoModelForPreTraining.register(UnicoderVLConfig, UnicoderVLForPreTraining)
AutoModelForSequenceClassification.register(UnicoderVLConfig, UnicoderVLForImageTextRetrieval)
AutoModelForMultipleChoice.register(UnicoderVLConfig, UnicoderVLForMultipleChoice)
AutoFeatureExtractor.register(UnicoderVLConfig, UnicoderVLFeatureExtractor)
AutoProcessor.register(UnicoderVLConfig, UnicoderVLProcessor)

_LAZY = {
    "DataCollatorForUnicoderVLMultipleChoice": ".data.collators",
    "DataCollatorForUnicoderVLPreTraining": ".data.collators",
    "DataCollatorForUnicoderVLRetrieval": ".data.collators",
    "ImageTextScorer": ".retrieval.scoring",
    "RegionStore": ".regions.store",
    "RegionStoreWriter": ".regions.store",
    "retrieval_metrics": ".retrieval.metrics",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


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
    "UnicoderVLProcessor",
    "retrieval_metrics",
]
