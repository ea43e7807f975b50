"""
Makes the inputs of fine-tuning for retrieval: groups of a match and its negatives, each caption and image once.

Words and regions may be hidden. In all groups of an epoch they are the same ones of a caption, and of an image (a
function of seed, epoch, and caption or image id). Left out: drawing negatives, which the rows carry
(`data/negatives.py`).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...data.masking import SALT
from ...data.rows import check_rows, fetch, is_mismatch
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord


@dataclass
class DataCollatorForUnicoderVLRetrieval:
    """
    Batches N rows into N groups: a match, its caption negatives and its image negatives. Each caption and each image is
    in the batch once, however many pairs share it; `caption_index` and `image_index` make the pairs.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors.
        store (`Mapping[str, RegionRecord]`):
            The regions of every image.
        max_length (`int`, *optional*, defaults to 44):
            Most tokens of a caption with `[CLS]` and `[SEP]`; longer ones are cut (paper: 144 less 100 regions).
        in_batch_negatives (`bool`, *optional*, defaults to `False`):
            Whether captions and images of different rows that do not match are paired, too, and the batch becomes one
            group of N * N pairs beside the negatives that the rows carry. A row's negatives then depend on its batch.
        contrastive (`bool`, *optional*, defaults to `False`):
            Whether `mismatches` is added, which tells a contrastive loss the captions and images of different rows
            that mismatch. Such a batch is for the losses of `losses.py`, which call the model themselves.
        mask_probability (`float`, *optional*, defaults to 0.0):
            Share, in `[0, 1)`, of the tokens that become `[MASK]`, and of the regions whose feature is set to zero, as
            the model knows them from pre-training, so that few photos are not learned by heart. The draw is a function
            of `seed`, the epoch, and the caption's text or the image id: pairs that share a caption or an image share
            what is hidden of it, whatever the micro-batch.
        random_epochs (`int`, *optional*, defaults to 0):
            Number of first epochs in whose batches of `contrastive` a `hardness` is drawn at random, a function of
            `seed`, epoch and rows, by which [`HardNegativeLoss`] takes its negatives: new weights learn nothing from
            those that are hard.
        scored_ratio (`float`, *optional*, defaults to 1.0):
            Share of the rows, above 0, at most 1, the first ones of a batch, whose negatives are in it: those that a
            [`HardNegativeLoss`] of the same share scores. Of the others the match alone is, for its contrastive loss.
        seed (`int`, *optional*, defaults to 0):
            Seed of the hiding and of the hardness, at least 0.

    Rows are those of [`PairsWithNegatives`].

    Returns:
        `dict` of `input_ids`, `token_type_ids`, `attention_mask`, `region_features`, `region_locations`,
        `region_attention_mask`, `caption_index`, `image_index`, `group_ids` and `labels`: the arguments of
        [`UnicoderVLForImageTextRetrieval`], and nothing else, but for `mismatches` and `hardness` of `contrastive`. The
        pairs of a row follow one another, its match first.

    Raises:
        `ValueError`: an empty caption, a row that lacks something, or an option out of range.
        `KeyError`: an image that the store lacks.

    Example:

    ```python
    >>> collator = DataCollatorForUnicoderVLRetrieval(processor, store)
    >>> batch = collator([PairsWithNegatives(pairs, seed=0, num_captions=2, num_images=1)[0]])
    >>> batch["labels"], batch["caption_index"], batch["image_index"]
    (tensor([1, 0, 0, 0]), tensor([0, 1, 2, 0]), tensor([0, 0, 0, 1]))
    ```
    """

    processor: UnicoderVLProcessor
    store: Mapping[str, RegionRecord]
    max_length: int = 44
    in_batch_negatives: bool = False
    contrastive: bool = False
    mask_probability: float = 0.0
    random_epochs: int = 0
    scored_ratio: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.mask_probability < 1:
            raise ValueError(f"mask_probability={self.mask_probability}, expected a share in 0..1, below 1.")
        if not 0 < self.scored_ratio <= 1:
            raise ValueError(f"scored_ratio={self.scored_ratio}, expected a share of the rows: above 0, at most 1.")
        if self.scored_ratio < 1 and (self.in_batch_negatives or not self.contrastive):
            raise ValueError(
                f"scored_ratio={self.scored_ratio} is for HardNegativeLoss on negatives of each row's own: give "
                "contrastive=True, and leave out in_batch_negatives."
            )
        if self.mask_probability > 0 and self.processor.tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token, which mask_probability needs: use BERT's.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_rows(rows, self._needed(), "PairsWithNegatives(pairs, seed=0)")
        captions: dict[str, int] = {}  # caption -> its row of input_ids
        images: dict[str, int] = {}
        pairs: list[tuple[int, int, int, int]] = []  # caption, image, group, label

        def add(group: int, caption: str, image_id: str, label: int) -> None:
            caption_index = captions.setdefault(caption, len(captions))
            pairs.append((caption_index, images.setdefault(image_id, len(images)), group, label))

        scored = math.ceil(self.scored_ratio * len(rows))
        for group, row in enumerate(rows):
            add(group, row["caption"], row["image_id"], 1)
            if group >= scored:
                continue
            for caption in row["negative_captions"]:
                add(group, caption, row["image_id"], 0)
            for image_id in row["negative_image_ids"]:
                add(group, row["caption"], image_id, 0)
        if self.in_batch_negatives:
            for row in rows:
                for other in rows:
                    if is_mismatch(row, other):
                        add(0, row["caption"], other["image_id"], 0)
            # A pair that two rows have in common counts once in the one group that is left.
            pairs = list(dict.fromkeys((caption, image, 0, label) for caption, image, _, label in pairs))

        index = torch.tensor(pairs).unbind(1)
        inputs = self.processor(text=list(captions), padding=True, max_length=self.max_length, return_tensors="pt")
        inputs |= self.processor.feature_extractor(fetch(self.store, list(images)), return_tensors="pt")
        if self.mask_probability > 0:
            self._hide(inputs, list(captions), list(images), epoch=rows[0]["epoch"])
        batch = {**inputs, **dict(zip(("caption_index", "image_index", "group_ids", "labels"), index, strict=True))}
        if self.contrastive:
            matches = rows
            if self.in_batch_negatives:  # where a match counts once, as above
                matches = list({(row["caption"], row["image_id"]): row for row in rows}.values())
            batch["mismatches"] = torch.tensor([[is_mismatch(row, other) for other in matches] for row in matches])
            if self.random_epochs > 0 and rows[0]["epoch"] < self.random_epochs:
                rng = np.random.default_rng([self.seed, rows[0]["epoch"], SALT, *(row["row_index"] for row in rows)])
                batch["hardness"] = torch.from_numpy(rng.random(batch["mismatches"].shape, dtype=np.float32))
        return batch

    def _needed(self) -> tuple[str, ...]:
        """The names of the fields that a row must hold."""
        epoch = ("epoch",) if self.mask_probability > 0 or self.random_epochs > 0 else ()
        row_index = ("row_index",) if self.random_epochs > 0 else ()
        codes = ("image_code", "codes_of_caption") if self.in_batch_negatives or self.contrastive else ()
        return ("image_id", "caption", "negative_captions", "negative_image_ids", *epoch, *row_index, *codes)

    def _hide(self, inputs: Mapping[str, torch.Tensor], captions: Sequence[str], images: Sequence[str], epoch: int):
        tokenizer = self.processor.tokenizer
        is_word = ~np.isin(inputs["input_ids"].numpy(), tokenizer.all_special_ids)
        is_region = inputs["region_attention_mask"].numpy() > 0
        for names, may_hide, values, hidden in (
            (captions, is_word, inputs["input_ids"].numpy(), tokenizer.mask_token_id),
            (images, is_region, inputs["region_features"].numpy(), 0),
        ):
            for name, may, value in zip(names, may_hide, values, strict=True):
                places = np.flatnonzero(may)
                rng = np.random.default_rng([self.seed, epoch, *hashlib.sha256(name.encode()).digest()[:8], SALT])
                value[places[rng.random(len(places)) < self.mask_probability]] = hidden
