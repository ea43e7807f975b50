"""Unicoder-VL (AAAI 2020) in the Hugging Face way: model, processor, region stores, training and retrieval.

What it offers is loaded when it is first asked for, and so are PyTorch and transformers. Its classes are registered
with transformers' Auto classes as soon as these are loaded, before or after: see `registration`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import registration
from ._version import package_version

if TYPE_CHECKING:
    from .configuration_unicoder_vl import UnicoderVLConfig
    from .feature_extraction_unicoder_vl import UnicoderVLFeatureExtractor
    from .modeling_unicoder_vl import (
        UnicoderVLForImageTextRetrieval,
        UnicoderVLForMultipleChoice,
        UnicoderVLForPreTraining,
        UnicoderVLModel,
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

# Name -> where it is.
_LAZY = {
    "DataCollatorForUnicoderVLMultipleChoice": ".tasks.vcr.collator",
    "DataCollatorForUnicoderVLPreTraining": ".tasks.pretraining.collator",
    "DataCollatorForUnicoderVLRetrieval": ".tasks.retrieval.collator",
    "ImageTextScorer": ".scoring.scorer",
    "RegionRecord": ".records_unicoder_vl",
    "RegionStore": ".regions.store",
    "RegionStoreWriter": ".regions.store",
    "UnicoderVLConfig": ".configuration_unicoder_vl",
    "UnicoderVLFeatureExtractor": ".feature_extraction_unicoder_vl",
    "UnicoderVLForImageTextRetrieval": ".modeling_unicoder_vl",
    "UnicoderVLForMultipleChoice": ".modeling_unicoder_vl",
    "UnicoderVLForPreTraining": ".modeling_unicoder_vl",
    "UnicoderVLModel": ".modeling_unicoder_vl",
    "UnicoderVLProcessor": ".processing_unicoder_vl",
    "retrieval_metrics": ".tasks.retrieval.metrics",
}
# Modules that are attributes, too, though nobody imported them.
_MODULES = [
    f"{part}_unicoder_vl" for part in ("configuration", "feature_extraction", "modeling", "processing", "records")
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    elif name == "__version__":
        value = package_version()
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # so that this function is not asked again
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


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
    "UnicoderVLProcessor",
    "retrieval_metrics",
]
