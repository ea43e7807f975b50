"""The options of scripts that search in two stages."""

from dataclasses import dataclass

from ...modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...regions.store import RegionStore
from ...runs.arguments import option
from ...runs.evaluation import EvaluationArguments
from ...search.encoders import DualEncoder, UnicoderVLDualEncoder, open_dual_encoder


@dataclass(kw_only=True)
class SearchArguments(EvaluationArguments):
    """Names a checkpoint, the data that it searches, and the first stage of the search."""

    dual_encoder: str | None = option(
        None, "First stage: another Unicoder-VL, or CLIP or alike on --photos. Default: the model's own."
    )
    photos: str | None = option(None, "Photos: a folder, a .tar, or the folder of a dataset.")
    photo_ids: str = option("stem", "Source of the photos' ids, as --ids of `extract`.")

    def open_first_stage(
        self, model: UnicoderVLForImageTextRetrieval, processor: UnicoderVLProcessor, store: RegionStore
    ) -> DualEncoder:
        """
        Opens the first stage whose candidates `model` is to score.

        Raises:
            `ValueError`: there is no such model, its first stage was not trained, or it needs `photos`.
        """
        if self.dual_encoder is None:
            return UnicoderVLDualEncoder(model, processor, store, self.model)
        return open_dual_encoder(self.dual_encoder, store, self.photos, self.photo_ids)
