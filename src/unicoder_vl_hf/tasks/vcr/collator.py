"""Makes the inputs of multiple choice of questions: choices whose words point at the regions of one image (paper,
Visual Commonsense Reasoning)."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...data.rows import check_rows, fetch
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from .data import (
    LOW_IOU,
    Token,
    Word,
    closest_regions,
    ground_truth_boxes,
    ground_truth_record,
    referenced_objects,
    take_regions,
    truncate,
    words_of,
)


@dataclass
class DataCollatorForUnicoderVLMultipleChoice:
    """
    Batches B examples of visual commonsense reasoning, each of C choices. The choices share the regions of one image,
    to which `token_region_ids` refer.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors. Its feature extractor selects the detections of a record.
        store (`Mapping[str, RegionRecord]`):
            The detections of every image.
        max_length (`int`, *optional*, defaults to 156):
            Most tokens of a choice with `[CLS]` and `[SEP]`. Longer ones lose the last words of their longest segment,
            of equally long ones the later, but never a word of a reference.
        max_regions (`int`, *optional*, defaults to 100):
            Most ground-truth boxes and detections of an image; there are more only if a text refers to more.
        gt_features (`Mapping[str, RegionRecord]`, *optional*):
            Features pooled in the ground-truth boxes (`unicoder-vl extract --boxes`), a row an object. By default a box
            takes those of the detection that overlaps it most.

    Rows are those of [`VCRExamples`].

    Returns:
        `dict` of `input_ids`, `token_type_ids`, `attention_mask` and `token_region_ids`, each `(B, C, T)`,
        `region_features`, `region_locations` and `region_attention_mask`, each `(B, R, ...)`, and `labels (B,)`, -100
        for a question without one: the arguments of [`UnicoderVLForMultipleChoice`], and nothing else.

    Raises:
        `ValueError`: references that do not fit into `max_length`, or an image whose ground-truth boxes are unknown;
        the message names the annot_id.
        `KeyError`: an image that a store lacks.

    Example:

    ```python
    >>> collator = DataCollatorForUnicoderVLMultipleChoice(processor, store)
    >>> batch = collator([VCRExamples(read_vcr("val.jsonl", metadata_dir="vcr1images"), "qa")[0]])
    >>> batch["input_ids"].shape[:2], batch["labels"]
    (torch.Size([1, 4]), tensor([3]))
    ```
    """

    processor: UnicoderVLProcessor
    store: Mapping[str, RegionRecord]
    max_length: int = 156
    max_regions: int = 100
    gt_features: Mapping[str, RegionRecord] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_rows(rows, ("annot_id", "image_id", "objects", "choices", "label"), "VCRExamples(rows, task)")
        tokenizer = self.processor.tokenizer
        texts = [text for row_texts in self._texts(rows) for text, _ in row_texts]
        records, region_of_object = self._records(rows)
        shape = (len(rows), len(rows[0]["choices"]), max(map(len, texts)))
        input_ids = np.full((len(texts), shape[2]), tokenizer.pad_token_id)
        token_region_ids = np.full_like(input_ids, -1)
        attention_mask = np.zeros_like(input_ids)
        for number, text in enumerate(texts):
            # Object -1, of a token that refers to none, picks the -1 at the end.
            region_ids = np.append(region_of_object[number // shape[1]], -1)
            input_ids[number, : len(text)] = [token.id for token in text]
            token_region_ids[number, : len(text)] = region_ids[[token.object_index for token in text]]
            attention_mask[number, : len(text)] = 1
        batch = {
            "input_ids": input_ids.reshape(shape),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
            "attention_mask": attention_mask.reshape(shape),
            "token_region_ids": token_region_ids.reshape(shape),
            **self._tensors(records),
            "labels": np.array([row["label"] for row in rows]),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def count_truncated(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Counts the choices of `rows` that have more than `max_length` tokens and are cut."""
        return sum(is_cut for row in rows for texts in self._texts([row]) for _, is_cut in texts)

    def count_low_ious(self, rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
        """Counts the ground-truth boxes of all images that overlap no detection by an IoU of 0.1, and all boxes."""
        images = {row["image_id"]: row for row in rows}
        low = total = 0
        for row in images.values():
            detections = self._detections(self.store[row["image_id"]])
            _, ious = closest_regions(ground_truth_boxes(row, detections), detections)
            low, total = low + int((ious < LOW_IOU).sum()), total + len(ious)
        return low, total

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[list[Token], bool]]]:
        """Makes the tokens of each choice of each row, and says whether they were cut."""
        spelled = [[[words_of(part, row["objects"]) for part in choice] for choice in row["choices"]] for row in rows]
        words = {word.text for choices in spelled for parts in choices for part in parts for word in part}
        encoded = self.processor.tokenizer([*words, ";"], add_special_tokens=False)["input_ids"]
        ids = dict(zip([*words, ";"], encoded, strict=True))
        texts = []
        for row, choices in zip(rows, spelled, strict=True):
            try:
                texts.append([self._text(parts, ids) for parts in choices])
            except ValueError as error:
                raise ValueError(f"annot_id {row['annot_id']!r}: {error}") from error
        return texts

    def _text(self, parts: Sequence[Sequence[Word]], ids: Mapping[str, Sequence[int]]) -> tuple[list[Token], bool]:
        encoded = [
            [Token(token, word.object_index, word.in_reference) for word in part for token in ids[word.text]]
            for part in parts
        ]
        tokenizer = self.processor.tokenizer
        start, end = (Token(token, -1, False) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        separator = [Token(token, -1, False) for token in ids[";"]]
        is_cut = truncate(encoded, self.max_length - 2 - len(separator) * (len(parts) - 1))
        text = encoded[0]
        for part in encoded[1:]:
            text = [*text, *separator, *part]
        return [start, *text, end], is_cut

    def _records(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[RegionRecord], list[np.ndarray]]:
        """Makes for each row the record that the model is shown, and finds the region of each of its objects."""
        image_ids = [row["image_id"] for row in rows]
        found = fetch(self.store, image_ids)
        given = [None] * len(rows) if self.gt_features is None else fetch(self.gt_features, image_ids)
        records, region_of_object = [], []
        for row, record, pooled in zip(rows, found, given, strict=True):
            combined, regions = ground_truth_record(
                row,
                self._detections(record),
                self.max_regions,
                referenced=referenced_objects(row["choices"]),
                given=pooled,
            )
            records.append(combined)
            region_of_object.append(regions)
        return records, region_of_object

    def _tensors(self, records: Sequence[RegionRecord]) -> Mapping[str, np.ndarray]:
        extractor = copy(self.processor.feature_extractor)  # which must not select again, and lose what is referred to
        extractor.max_regions, extractor.score_threshold = max(map(len, records)), None
        return extractor(records, return_tensors="np")

    def _detections(self, record: RegionRecord) -> RegionRecord:
        kept = self.processor.feature_extractor.select(record)
        return record if len(kept) == len(record) else take_regions(record, kept)
