from . import (
    checkpoints as checkpoints,
    data as data,
    regions as regions,
    runs as runs,
    scenes as scenes,
    scoring as scoring,
    search as search,
    serving as serving,
    tasks as tasks,
)
from ._version import __version__ as __version__
from .configuration_unicoder_vl import UnicoderVLConfig as UnicoderVLConfig
from .feature_extraction_unicoder_vl import UnicoderVLFeatureExtractor as UnicoderVLFeatureExtractor
from .modeling_unicoder_vl import (
    UnicoderVLForGrounding as UnicoderVLForGrounding,
    UnicoderVLForImageTextRetrieval as UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice as UnicoderVLForMultipleChoice,
    UnicoderVLForPreTraining as UnicoderVLForPreTraining,
    UnicoderVLForQuestionAnswering as UnicoderVLForQuestionAnswering,
    UnicoderVLForVisualEntailment as UnicoderVLForVisualEntailment,
    UnicoderVLForVisualReasoning as UnicoderVLForVisualReasoning,
    UnicoderVLModel as UnicoderVLModel,
    UnicoderVLPreTrainedModel as UnicoderVLPreTrainedModel,
)
from .processing_unicoder_vl import UnicoderVLProcessor as UnicoderVLProcessor
from .records_unicoder_vl import RegionRecord as RegionRecord
from .regions.store import RegionStore as RegionStore, RegionStoreWriter as RegionStoreWriter
from .scoring.scorer import ImageTextScorer as ImageTextScorer
from .tasks.entailment.collator import (
    DataCollatorForUnicoderVLVisualEntailment as DataCollatorForUnicoderVLVisualEntailment,
)
from .tasks.grounding.collator import DataCollatorForUnicoderVLGrounding as DataCollatorForUnicoderVLGrounding
from .tasks.nlvr2.collator import (
    DataCollatorForUnicoderVLVisualReasoning as DataCollatorForUnicoderVLVisualReasoning,
)
from .tasks.pretraining.collator import DataCollatorForUnicoderVLPreTraining as DataCollatorForUnicoderVLPreTraining
from .tasks.retrieval.collator import DataCollatorForUnicoderVLRetrieval as DataCollatorForUnicoderVLRetrieval
from .tasks.retrieval.metrics import retrieval_metrics as retrieval_metrics
from .tasks.vcr.collator import DataCollatorForUnicoderVLMultipleChoice as DataCollatorForUnicoderVLMultipleChoice
from .tasks.vqa.collator import (
    DataCollatorForUnicoderVLQuestionAnswering as DataCollatorForUnicoderVLQuestionAnswering,
)
