"""A second stage of pre-training on the text of VCR, which is not in the paper; UNITER showed that it helps.

The text is question `;` right answer `;` right rationale, whose references point at regions as in fine-tuning. Masked
tokens and masked object classes are predicted; matching is unknown. A masked region has no feature for the tokens that
refer to it, either. Left out: whole-word masking.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from ...data.masking import IGNORED, Masking
from ...data.rows import Row, RowsOfEpoch
from ...modeling_unicoder_vl import UnicoderVLForPreTraining
from ...records_unicoder_vl import RegionRecord
from ...runs.arguments import option
from ...runs.model_card import pretrained_by
from ...runs.setup import TrainingSetup
from .collator import DataCollatorForUnicoderVLMultipleChoice
from .data import require_labels
from .training import VCRDataArguments, open_and_load


@dataclass
class VCRPretrainingArguments(VCRDataArguments):
    """Names data and model of a second stage of pre-training on VCR; without `annotations`, rendered scenes."""

    mlm_probability: float = option(0.15, "Share of the tokens that are predicted.")
    moc_probability: float = option(0.15, "Share of the regions that are predicted; 0 for regions without classes.")


class RightTexts(RowsOfEpoch):
    """
    Gives questions with their right answers and rationales, one a row, as examples of a single choice. A row carries
    its number and the epoch, which decide what is masked.

    Args:
        rows (`datasets.Dataset`): Questions with labels, as [`read_vcr`] gives them.
        fixed_epoch (`int`, *optional*): The epoch of every row; by default that of the training.

    Raises:
        `ValueError`: a row has no labels.
    """

    def __init__(self, rows: datasets.Dataset, fixed_epoch: int | None = None):
        for name in ("answer_label", "rationale_label"):
            require_labels(rows, name, "which belongs to the text: give a labelled split.")
        super().__init__(fixed_epoch)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def make_rows(self, numbers: Sequence[int]) -> list[Row]:
        """Makes the rows of these numbers, as [`DataCollatorForVCRPreTraining`] takes them."""
        return [self._make_row(number) for number in numbers]

    def _make_row(self, number: int) -> Row:
        row = self.rows[number]
        right = [row[f"{name}_choices"][row[f"{name}_label"]] for name in ("answer", "rationale")]
        return Row(row, choices=[[row["question"], *right]], label=0, row_index=number, epoch=self.epoch)


@dataclass
class DataCollatorForVCRPreTraining(DataCollatorForUnicoderVLMultipleChoice):
    """
    Batches rows of [`RightTexts`], and hides the tokens and regions that are to be predicted.

    Args:
        masking ([`Masking`]): The rules of hiding.

    Returns:
        `dict` of the tensors of [`DataCollatorForUnicoderVLPreTraining`], and `token_region_ids`; `matching_labels` are
        -100.
    """

    masking: Masking = field(kw_only=True)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {name: tensor.numpy() for name, tensor in super().__call__(rows).items()}
        for name in ("input_ids", "token_type_ids", "attention_mask", "token_region_ids"):
            batch[name] = batch[name][:, 0]
        object_ids = batch.pop("object_ids")
        input_ids, tokenizer = batch["input_ids"], self.processor.tokenizer
        is_word = ~np.isin(input_ids, tokenizer.all_special_ids)
        batch["labels"] = np.full_like(input_ids, IGNORED)
        batch["region_labels"] = np.full_like(object_ids, IGNORED)
        batch["masked_regions"] = np.zeros_like(object_ids)
        batch["matching_labels"] = np.full(len(rows), IGNORED)
        for index, row in enumerate(rows):
            rng = self.masking.generator(row)
            self.masking.hide_tokens(rng, input_ids[index], batch["labels"][index], is_word[index], tokenizer)
            hidden = self.masking.hide_regions(
                rng, batch["region_features"][index], batch["region_labels"][index], object_ids[index]
            )
            batch["masked_regions"][index, hidden] = 1
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _tensors(self, records: Sequence[RegionRecord]) -> Mapping[str, np.ndarray]:
        tensors = super()._tensors(records)
        mask = tensors["region_attention_mask"]
        kept = np.where(mask, np.arange(mask.shape[1]), -1)  # nothing is left out of these records
        return {**tensors, "object_ids": self.masking.object_ids(records, kept)}


@dataclass
class VCRPretrainingSetup(TrainingSetup):
    """The setup of a second stage of pre-training, as [`prepare_vcr_pretraining`] builds it."""

    model: UnicoderVLForPreTraining
    collator: DataCollatorForVCRPreTraining
    train: RightTexts
    validation: RightTexts

    rows = "examples"

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """The losses of the tasks that are trained."""
        return self.collator.masking.loss_parts

    @property
    def trained_by(self) -> str:
        """The tasks that are trained, in words."""
        return pretrained_by(self.loss_parts, "pre-trained further on the text of VCR by")

    @property
    def measured_on(self) -> str:
        """The number of validation questions, in words."""
        return f"{len(self.validation):,} questions"


def prepare_vcr_pretraining(
    arguments: VCRPretrainingArguments, output_dir: str | Path, seed: int
) -> VCRPretrainingSetup:
    """
    Reads questions and regions, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: an image has no regions, the checkpoint is of another kind, both probabilities are 0, or a file
        has a fault.
    """
    data, model, processor = open_and_load(arguments, output_dir, UnicoderVLForPreTraining)
    masking = Masking(
        seed=seed,
        mlm_probability=arguments.mlm_probability,
        moc_probability=arguments.moc_probability,
        num_region_classes=model.config.num_region_classes,
    )
    if not masking.loss_parts:
        raise ValueError("mlm_probability=0 and moc_probability=0 leave nothing to learn: raise one of them.")
    choices = data.collator(processor, arguments)
    collator = DataCollatorForVCRPreTraining(**{**vars(choices), "masking": masking})
    return VCRPretrainingSetup(
        model=model,
        processor=processor,
        collator=collator,
        train=RightTexts(data.train),
        validation=RightTexts(data.validation, fixed_epoch=0),
        data_name=data.name,
    )
