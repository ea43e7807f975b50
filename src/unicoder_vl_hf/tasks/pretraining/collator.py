"""
Makes the inputs of pre-training of rows: it fetches their regions, masks both, and batches them.

Follows the paper's pre-training tasks: masked language modelling (15 % of the WordPiece tokens), masked object
classification (15 % of the regions, the feature zeroed in 90 % of them) and visual-linguistic matching (one mismatch
for each pair). What is masked is a pure function of (seed, epoch, row index), so that more workers, more processes,
another micro-batch or a resume change no example. Left out: drawing mismatches, which the rows carry
(`data/negatives.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ... import logging
from ...data.masking import IGNORED, Masking
from ...data.rows import check_rows, fetch
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord

logger = logging.get_logger(__name__)


@dataclass
class DataCollatorForUnicoderVLPreTraining:
    """
    Batches N rows into N matches, followed by their N mismatches where the rows carry any.

    Matches and mismatches are masked alike: a `[MASK]` or a zeroed region that occurs in matches alone would tell the
    label. At least one token is chosen in each row, and one region where a class is known.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors; its tokenizer must have a mask token.
        store (`Mapping[str, RegionRecord]`):
            The regions of every image.
        seed (`int`, *optional*, defaults to 0):
            Seed of the masks, at least 0.
        max_length (`int`, *optional*, defaults to 44):
            Most tokens of a caption with `[CLS]` and `[SEP]`; longer ones are cut (paper: 144 less 100 regions).
        mlm_probability (`float`, *optional*, defaults to 0.15):
            Share of the tokens that are predicted, in `[0, 1]`; 0 leaves the text as it is.
        mask_replace_prob, random_replace_prob (`float`, *optional*, default to 1.0 and 0.0):
            Shares of the predicted tokens that are replaced by `[MASK]` and by a random token, each in `[0, 1]`; the
            rest stays. The paper masks all; BERT's values are 0.8 and 0.1.
        whole_word_mask (`bool`, *optional*, defaults to `False`):
            Whether whole words are chosen, with all of their WordPiece tokens.
        moc_probability (`float`, *optional*, defaults to 0.15):
            Share of the regions of known class that are predicted, in `[0, 1]`; 0 leaves the regions as they are.
        region_zero_prob (`float`, *optional*, defaults to 0.9):
            Share of the predicted regions whose feature is set to zero, in `[0, 1]`; the rest stays.
        num_region_classes (`int`, *optional*):
            Number of classes that the model knows. With it a class out of range is an error here, which names the
            image, and not in the loss.

    Rows hold `image_id`, `caption`, `row_index` and `epoch`, and optionally `mismatch_image_id` and `mismatch_caption`,
    as those of [`PairsWithMismatches`] do. Without mismatches matching is unknown, and a warning says so.

    Returns:
        `dict` of `input_ids`, `token_type_ids`, `attention_mask`, `region_features`, `region_locations`,
        `region_attention_mask`, `masked_regions`, `labels`, `region_labels` and `matching_labels`: the arguments of
        [`UnicoderVLForPreTraining`], and nothing else.

    Raises:
        `ValueError`: an option out of range, a row that lacks something, an empty caption, an object class out of
        range, or a store without object classes while `moc_probability` is above 0; the message names the image.
        `KeyError`: an image that the store lacks.

    Example:

    ```python
    >>> collator = DataCollatorForUnicoderVLPreTraining(processor, store, num_region_classes=80)
    >>> batch = collator([PairsWithMismatches(pairs, seed=0)[0]])
    >>> batch["matching_labels"]
    tensor([1, 0])
    ```
    """

    processor: UnicoderVLProcessor
    store: Mapping[str, RegionRecord]
    seed: int = 0
    max_length: int = 44
    mlm_probability: float = 0.15
    mask_replace_prob: float = 1.0
    random_replace_prob: float = 0.0
    whole_word_mask: bool = False
    moc_probability: float = 0.15
    region_zero_prob: float = 0.9
    num_region_classes: int | None = None

    def __post_init__(self):
        self.masking = Masking(**{rule.name: getattr(self, rule.name) for rule in fields(Masking)})
        if self.mlm_probability > 0 and self.processor.tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token, which masked language modelling needs: use BERT's.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        with_mismatches = any("mismatch_image_id" in row for row in rows)
        if not with_mismatches:
            logging.warn_once(
                logger,
                "These rows carry no mismatches: matching is unknown, and not learned. PairsWithMismatches(pairs, "
                "seed=0) draws them.",
            )
        return self._collate(rows, with_mismatches)

    def collate_matches(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Batches the N matches of the rows alone, masked as they are with their mismatches; matching is unknown."""
        return self._collate(rows, with_mismatches=False)

    def _collate(self, rows: Sequence[Mapping[str, Any]], with_mismatches: bool) -> dict[str, torch.Tensor]:
        mismatch = ("mismatch_image_id", "mismatch_caption") if with_mismatches else ()
        check_rows(rows, ("image_id", "caption", "row_index", "epoch", *mismatch), "PairsWithMismatches(pairs, seed=0)")
        pairs = [(row["image_id"], row["caption"]) for row in rows]
        if with_mismatches:
            pairs += [(row["mismatch_image_id"], row["mismatch_caption"]) for row in rows]
        for index, (_, caption) in enumerate(pairs):
            if not caption.strip():
                raise ValueError(f"{self._whose(rows, index)} has no word, expected at least one.")

        text = self.processor.tokenizer(
            [caption for _, caption in pairs],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=True,
            return_attention_mask=True,
            return_special_tokens_mask=True,
            return_tensors="np",
        )
        records = fetch(self.store, [image_id for image_id, _ in pairs])
        regions = self.processor.feature_extractor(records, return_tensors="np", return_kept_indices=True)

        input_ids, features = text["input_ids"], regions["region_features"]
        is_word = text.pop("special_tokens_mask") == 0
        for index in np.flatnonzero(~is_word.any(axis=1)).tolist():
            raise ValueError(
                f"{self._whose(rows, index)} has no token besides [CLS] and [SEP], with max_length={self.max_length}; "
                "expected at least one."
            )
        object_ids = self.masking.object_ids(records, regions.pop("kept_indices"))
        labels = np.full_like(input_ids, IGNORED)
        region_labels, masked_regions = np.full_like(object_ids, IGNORED), np.zeros_like(object_ids)
        tokenizer = self.processor.tokenizer
        for index in range(len(pairs)):
            slot, row = divmod(index, len(rows))  # slot 0: the match, 1: the mismatch
            rng = self.masking.generator(rows[row], slot)
            word_ids = text.word_ids(index) if self.whole_word_mask else None
            self.masking.hide_tokens(rng, input_ids[index], labels[index], is_word[index], tokenizer, word_ids)
            hidden = self.masking.hide_regions(rng, features[index], region_labels[index], object_ids[index])
            masked_regions[index, hidden] = 1

        matching_labels = np.full(len(pairs), IGNORED)
        if with_mismatches:
            matching_labels[: len(rows)], matching_labels[len(rows) :] = 1, 0
        labels_of = {
            "masked_regions": masked_regions,
            "labels": labels,
            "region_labels": region_labels,
            "matching_labels": matching_labels,
        }
        return {name: torch.from_numpy(array) for name, array in {**text, **regions, **labels_of}.items()}

    @staticmethod
    def _whose(rows: Sequence[Mapping[str, Any]], index: int) -> str:
        """Names a caption of the batch for a message. A mismatch may have the caption of its row or another one."""
        row = rows[index % len(rows)]
        if index < len(rows) or row["mismatch_caption"] == row["caption"]:
            return f"Image {row['image_id']!r}: its caption {row['caption']!r}"
        return f"Image {row['image_id']!r}: {row['mismatch_caption']!r}, the caption of another that is its mismatch,"
