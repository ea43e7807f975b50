"""Makes the inputs of hypotheses about images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data.inputs import TextsWithImages
from ...data.rows import check_rows


@dataclass
class DataCollatorForUnicoderVLVisualEntailment(TextsWithImages):
    """
    Batches B hypotheses; an image that several of them are about is in the batch once.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors.
        store (`Mapping[str, RegionRecord]`):
            The regions of every image.
        max_length (`int`, *optional*, defaults to 44):
            Most tokens of a hypothesis with `[CLS]` and `[SEP]`; longer ones are cut.

    Rows are those of [`read_entailment`].

    Returns:
        `dict` of the text's and regions' tensors, `image_index (B,)` and `labels (B,)`: the arguments of
        [`UnicoderVLForVisualEntailment`], and nothing else.

    Raises:
        `ValueError`: an empty hypothesis, or a row that lacks something.
        `KeyError`: an image that the store lacks.
    """

    max_length: int = 44

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_rows(rows, ("hypothesis", "image_id", "label"), "the rows of read_entailment")
        texts, image_ids = ([row[name] for row in rows] for name in ("hypothesis", "image_id"))
        batch = self.inputs(texts, image_ids, self.max_length)
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}
