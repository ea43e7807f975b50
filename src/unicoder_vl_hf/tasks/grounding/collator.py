"""Makes the inputs of expressions, and finds the region that each refers to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data.inputs import TextsWithImages
from ...data.masking import IGNORED
from ...data.rows import check_rows
from .metrics import MIN_IOU, target_ious


@dataclass
class DataCollatorForUnicoderVLGrounding(TextsWithImages):
    """
    Batches B expressions; an image that several of them refer to is in the batch once.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors.
        store (`Mapping[str, RegionRecord]`):
            The regions of every image: detected ones, or those of the ground-truth boxes.
        max_length (`int`, *optional*, defaults to 44):
            Most tokens of an expression with `[CLS]` and `[SEP]`; longer ones are cut.
        without_text (`bool`, *optional*, defaults to `False`):
            Whether all expressions are replaced by `[UNK]`, to see what a model owes to them.

    Rows are those of [`read_references`].

    Returns:
        `dict` of the text's and regions' tensors, `image_index (B,)` and `labels (B,)`: the region that overlaps the
        box most, or -100 where that is by less than half (intersection over union). They are the arguments of
        [`UnicoderVLForGrounding`], and nothing else.

    Raises:
        `ValueError`: an empty expression, or a row that lacks something.
        `KeyError`: an image that the store lacks.
    """

    max_length: int = 44
    without_text: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        needed = ("expression", "image_id", "box", "image_width", "image_height")
        check_rows(rows, needed, "the rows of read_references")
        unknown = self.processor.tokenizer.unk_token
        texts = [unknown if self.without_text else row["expression"] for row in rows]
        batch = self.inputs(texts, [row["image_id"] for row in rows], self.max_length)
        labels = []
        for row, image in zip(rows, batch["image_index"].tolist(), strict=True):
            count = int(batch["region_attention_mask"][image].sum())
            boxes = batch["region_locations"][image, :count, :4].numpy()
            ious = target_ious(boxes, row["box"], row["image_width"], row["image_height"])
            labels.append(int(ious.argmax()) if ious.max() >= MIN_IOU else IGNORED)
        return {**batch, "labels": torch.tensor(labels)}
