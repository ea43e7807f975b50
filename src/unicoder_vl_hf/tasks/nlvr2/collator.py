"""Makes the inputs of sentences about two photos."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data.inputs import TextsWithImages
from ...data.rows import check_rows


@dataclass
class DataCollatorForUnicoderVLVisualReasoning(TextsWithImages):
    """
    Batches B sentences, each about two photos; a photo of several pairs is in the batch once.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors.
        store (`Mapping[str, RegionRecord]`):
            The regions of every photo.
        max_length (`int`, *optional*, defaults to 44):
            Most tokens of a sentence with `[CLS]` and `[SEP]`; longer ones are cut.

    Rows are those of [`read_nlvr2`].

    Returns:
        `dict` of the text's and regions' tensors, `image_index (B, 2)` and `labels (B,)`: the arguments of
        [`UnicoderVLForVisualReasoning`], and nothing else.

    Raises:
        `ValueError`: an empty sentence, or a row that lacks something.
        `KeyError`: a photo that the store lacks.
    """

    max_length: int = 44

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_rows(rows, ("sentence", "image_id", "second_id", "label"), "the rows of read_nlvr2")
        photos = [row[name] for row in rows for name in ("image_id", "second_id")]
        sentences = [row["sentence"] for row in rows]
        batch = self.inputs(sentences, photos, self.max_length)
        batch["image_index"] = batch["image_index"].view(-1, 2)
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}
