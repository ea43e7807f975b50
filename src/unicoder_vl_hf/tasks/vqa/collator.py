"""Makes the inputs of questions about images, and the soft labels of their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data.inputs import TextsWithImages
from ...data.rows import check_rows
from .data import AnswerVocabulary


@dataclass
class DataCollatorForUnicoderVLQuestionAnswering(TextsWithImages):
    """
    Batches B questions; an image that several of them are about is in the batch once.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors.
        store (`Mapping[str, RegionRecord]`):
            The regions of every image.
        vocabulary ([`AnswerVocabulary`]):
            The answers that the model chooses among.
        max_length (`int`, *optional*, defaults to 44):
            Most tokens of a question with `[CLS]` and `[SEP]`; longer ones are cut.
        with_mask_token (`bool`, *optional*, defaults to `False`):
            Whether a question ends in `[MASK]`, whose state VisualBERT's head reads.

    Rows are those of [`read_questions`].

    Returns:
        `dict` of the text's and regions' tensors, `image_index (B,)` and `labels (B, num_answers)`, float32: how right
        each answer is, by the official evaluation, in `[0, 1]`; zeros where nobody gave an answer of the vocabulary.
        They are the arguments of [`UnicoderVLForQuestionAnswering`], and nothing else.

    Raises:
        `ValueError`: an empty question, or a row that lacks something.
        `KeyError`: an image that the store lacks.

    Example:

    ```python
    >>> collator = DataCollatorForUnicoderVLQuestionAnswering(processor, store, AnswerVocabulary.build(rows))
    >>> batch = collator([rows[0], rows[1]])
    >>> batch["labels"].shape
    torch.Size([2, 3129])
    ```
    """

    vocabulary: AnswerVocabulary
    max_length: int = 44
    with_mask_token: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_rows(rows, ("question", "image_id", "answers"), "the rows of read_questions")
        mask = f" {self.processor.tokenizer.mask_token}" if self.with_mask_token else ""
        questions = [row["question"] + mask for row in rows]
        image_ids = [row["image_id"] for row in rows]
        batch = self.inputs(questions, image_ids, self.max_length)
        if self.with_mask_token:  # which a question that is cut would lose
            attended = batch["attention_mask"]
            last = attended.shape[1] - 1 - attended.flip(1).argmax(1)
            batch["input_ids"][torch.arange(len(rows)), last - 1] = self.processor.tokenizer.mask_token_id
        batch["labels"] = torch.zeros(len(rows), len(self.vocabulary))
        for labels, row in zip(batch["labels"], rows, strict=True):
            for label, accuracy in self.vocabulary.targets(row["answers"]).items():
                labels[label] = accuracy
        return batch
