"""Hides the regions of an image in turn, and predicts their classes (paper, Masked Object Classification)."""

import numpy as np
import torch

from ...modeling_unicoder_vl import UnicoderVLForPreTraining
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...scoring.scorer import evaluating


def predict_hidden_regions(
    model: UnicoderVLForPreTraining, processor: UnicoderVLProcessor, record: RegionRecord, caption: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Predicts the class of each region from its location, the other regions and the whole caption, its feature being
    hidden. Where boxes overlap, the others show some of what is hidden.

    Returns:
        The indices `(R,)` of the regions that the model sees, and the probabilities `(R, num_region_classes)` of their
        classes, float32.

    Raises:
        `ValueError`: the processor refuses the caption or the record.
    """
    seen = processor.feature_extractor.select(record)
    inputs = processor(text=[caption] * len(seen), regions=[record] * len(seen), return_tensors="pt").to(model.device)
    with evaluating(model):
        logits = model(**inputs, masked_regions=torch.eye(len(seen), device=model.device)).region_logits
    of_hidden = logits.diagonal().T[:, -model.config.num_region_classes :]  # UNITER's head has one of background
    return seen, of_hidden.float().softmax(-1).cpu().numpy()
