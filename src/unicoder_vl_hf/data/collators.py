"""From rows to model inputs: fetch the regions, mask, and batch.

Follows the paper's pre-training tasks: masked language modelling (15 % of the WordPiece tokens), masked object
classification (15 % of the regions, the feature zeroed in 90 % of them) and visual-linguistic matching (one mismatch
for each pair). What is masked is a pure function of (seed, epoch, row index), so that more workers, more processes,
another micro-batch or a resume change no example. And its image-text retrieval: groups of a match and its negatives,
whose words and regions may be hidden, of each caption and each image the same in all groups of an epoch.
And its visual commonsense reasoning: choices whose words point at regions of one image.
Left out: drawing mismatches, which the rows carry (`negatives.py`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import logging
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord
from ..regions.store import RegionStore
from .vcr import (
    LOW_IOU,
    Token,
    Word,
    ground_truth_boxes,
    ground_truth_record,
    match_boxes,
    referenced_objects,
    take_regions,
    truncate,
    words_of,
)

SALT = 0x6D61736B  # keeps these draws apart from orders and mismatches that use the same seed
IGNORED = -100

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
            At least 0.
        max_length (`int`, *optional*, defaults to 44):
            Tokens of a caption with `[CLS]` and `[SEP]`; longer ones are cut (paper: 144 less 100 regions).
        mlm_probability (`float`, *optional*, defaults to 0.15):
            Share of the tokens that are predicted, in `[0, 1]`; 0 leaves the text as it is.
        mask_replace_prob, random_replace_prob (`float`, *optional*, default to 1.0 and 0.0):
            Of these, the share replaced by `[MASK]` and by a random token; the rest stays. The paper replaces all;
            BERT's values are 0.8 and 0.1.
        whole_word_mask (`bool`, *optional*, defaults to `False`):
            Choose whole words, with all of their WordPiece tokens.
        moc_probability (`float`, *optional*, defaults to 0.15):
            Share of the regions of known class that are predicted, in `[0, 1]`; 0 leaves the regions as they are.
        region_zero_prob (`float`, *optional*, defaults to 0.9):
            Of these, the share whose feature is set to zero; the rest stays.
        num_region_classes (`int`, *optional*):
            Where given, a larger `object_ids` is an error here, which names the image, and not in the loss.

    Rows hold `image_id`, `caption`, `row_index` and `epoch`, and optionally `mismatch_image_id` and `mismatch_caption`,
    as those of [`PairsWithMismatches`] do. Without mismatches matching is unknown, and a warning says so.

    Returns:
        `dict` of `input_ids`, `token_type_ids`, `attention_mask`, `region_features`, `region_locations`,
        `region_attention_mask`, `labels`, `region_labels` and `matching_labels`: the arguments of
        [`UnicoderVLForPreTraining`], and nothing else.

    Raises:
        `ValueError`: an option out of range, a row that lacks something, an empty caption, an object class out of
        range, or a store without object classes while `moc_probability` is above 0; the message names the image.
        `KeyError`: an image the store lacks.

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
        for name in (
            "mlm_probability",
            "mask_replace_prob",
            "random_replace_prob",
            "moc_probability",
            "region_zero_prob",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected a share in 0..1.")
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob={self.mask_replace_prob} and random_replace_prob={self.random_replace_prob} are "
                "shares of the chosen tokens: together at most 1."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}, expected at least 0.")
        if self.mlm_probability > 0 and self.processor.tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token, which masked language modelling needs: use BERT's.")

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """The losses of the masked tasks that are on, as the model's output names them."""
        shares = {"mlm_loss": self.mlm_probability, "moc_loss": self.moc_probability}
        return tuple(name for name, share in shares.items() if share > 0)

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
        _check_rows(
            rows, ("image_id", "caption", "row_index", "epoch", *mismatch), "PairsWithMismatches(pairs, seed=0)"
        )
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
        records = _fetch(self.store, [image_id for image_id, _ in pairs])
        regions = self.processor.feature_extractor(records, return_tensors="np", return_kept_indices=True)

        input_ids, features = text["input_ids"], regions["region_features"]
        is_word = text["special_tokens_mask"] == 0
        for index in np.flatnonzero(~is_word.any(axis=1)).tolist():
            raise ValueError(
                f"{self._whose(rows, index)} has no token besides [CLS] and [SEP], with max_length={self.max_length}; "
                "expected at least one."
            )
        object_ids = self._object_ids(records, regions["kept_indices"])
        labels = np.full_like(input_ids, IGNORED)
        region_labels = np.full_like(object_ids, IGNORED)
        for index in range(len(pairs)):
            slot, row = divmod(index, len(rows))  # slot 0: the match, 1: the mismatch
            rng = np.random.default_rng([self.seed, rows[row]["epoch"], rows[row]["row_index"], slot, SALT])
            if self.mlm_probability > 0:
                word_ids = text.word_ids(index) if self.whole_word_mask else None
                self._mask_tokens(rng, input_ids[index], labels[index], np.flatnonzero(is_word[index]), word_ids)
            if self.moc_probability > 0:
                self._mask_regions(rng, features[index], region_labels[index], object_ids[index])

        matching_labels = np.full(len(pairs), IGNORED)
        if with_mismatches:
            matching_labels[: len(rows)], matching_labels[len(rows) :] = 1, 0
        batch = {
            "input_ids": input_ids,
            "token_type_ids": text["token_type_ids"],
            "attention_mask": text["attention_mask"],
            "region_features": features,
            "region_locations": regions["region_locations"],
            "region_attention_mask": regions["region_attention_mask"],
            "labels": labels,
            "region_labels": region_labels,
            "matching_labels": matching_labels,
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    @staticmethod
    def _whose(rows: Sequence[Mapping[str, Any]], index: int) -> str:
        """Names the caption of a batch for a message: that of a mismatch may be the row's own, or another image's."""
        row = rows[index % len(rows)]
        if index < len(rows) or row["mismatch_caption"] == row["caption"]:
            return f"Image {row['image_id']!r}: its caption {row['caption']!r}"
        return f"Image {row['image_id']!r}: {row['mismatch_caption']!r}, the caption of another that is its mismatch,"

    def _object_ids(self, records: Sequence[RegionRecord], kept: np.ndarray) -> np.ndarray:
        """The object class of each region as batched, `(B, R)`; -1 for none and for padding."""
        object_ids = np.full_like(kept, -1)
        if self.moc_probability == 0:
            return object_ids
        for record, ids, rows in zip(records, object_ids, kept, strict=True):
            if record.object_ids is None:
                raise ValueError(
                    f"Image {record.image_id!r}: object_ids is None, but masked object classification predicts them. "
                    "Add them to the store with `unicoder-vl label`, or train without (moc_probability=0, --no-moc)."
                )
            rows = rows[rows >= 0]
            ids[: len(rows)] = record.object_ids[rows]
            if self.num_region_classes is not None and ids.max() >= self.num_region_classes:
                raise ValueError(
                    f"Image {record.image_id!r}: object_ids holds {ids.max()}, expected at most "
                    f"{self.num_region_classes - 1} as num_region_classes={self.num_region_classes}. Ids count from 0, "
                    "without background: is the store of another detector?"
                )
        return object_ids

    def _mask_tokens(self, rng, input_ids, labels, words: np.ndarray, word_ids: Sequence[int | None] | None):
        if word_ids is None:
            chosen = words[_choose(rng, len(words), self.mlm_probability)]
        else:
            # Position of each token's word among the words of the caption, which an id may skip.
            _, word = np.unique([word_ids[position] for position in words], return_inverse=True)
            chosen = words[_choose(rng, word.max() + 1, self.mlm_probability)[word]]
        labels[chosen] = input_ids[chosen]
        fate = rng.random(len(chosen))
        masked = fate < self.mask_replace_prob
        random = ~masked & (fate < self.mask_replace_prob + self.random_replace_prob)
        input_ids[chosen[masked]] = self.processor.tokenizer.mask_token_id
        input_ids[chosen[random]] = rng.integers(len(self.processor.tokenizer), size=random.sum())

    def _mask_regions(self, rng, features, labels, object_ids):
        known = np.flatnonzero(object_ids >= 0)
        if len(known) == 0:
            return
        chosen = known[_choose(rng, len(known), self.moc_probability)]
        labels[chosen] = object_ids[chosen]
        features[chosen[rng.random(len(chosen)) < self.region_zero_prob]] = 0


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
            Tokens of a caption with `[CLS]` and `[SEP]`; longer ones are cut (paper: 144 less 100 regions).
        in_batch_negatives (`bool`, *optional*, defaults to `False`):
            Pair the captions and images of different rows too, where they do not match, and make the batch one group:
            N * N pairs, beside the negatives that the rows carry. What a row meets then depends on its batch.
        contrastive (`bool`, *optional*, defaults to `False`):
            Add `mismatches`, which tells the contrastive loss what captions and images of different rows mismatch.
        mask_probability (`float`, *optional*, defaults to 0.0):
            Share of the tokens that become `[MASK]`, and of the regions whose feature is set to zero, as the model
            knows them from pre-training, in `[0, 1)`: so that it does not learn few photos by heart. Drawn for each
            caption, and for each image, of `seed`, the epoch, and the caption's text or the image id: pairs share what
            they share hidden alike, whatever the micro-batch.
        seed (`int`, *optional*, defaults to 0):
            At least 0.

    Rows are those of [`PairsWithNegatives`].

    Returns:
        `dict` of `input_ids`, `token_type_ids`, `attention_mask`, `region_features`, `region_locations`,
        `region_attention_mask`, `caption_index`, `image_index`, `group_ids` and `labels`: the arguments of
        [`UnicoderVLForImageTextRetrieval`], and nothing else. The pairs of a row follow one another, its match first.

    Raises:
        `ValueError`: an empty caption, a row that lacks something, or an option out of range. `KeyError`: an image that
        the store lacks.

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
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.mask_probability < 1:
            raise ValueError(f"mask_probability={self.mask_probability}, expected a share in 0..1, below 1.")
        if self.mask_probability > 0 and self.processor.tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token, which mask_probability needs: use BERT's.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        _check_rows(rows, self._needed(), "PairsWithNegatives(pairs, seed=0)")
        captions: dict[str, int] = {}  # caption -> its row of input_ids
        images: dict[str, int] = {}
        pairs: list[tuple[int, int, int, int]] = []  # caption, image, group, label

        def add(group: int, caption: str, image_id: str, label: int) -> None:
            caption_index = captions.setdefault(caption, len(captions))
            pairs.append((caption_index, images.setdefault(image_id, len(images)), group, label))

        for group, row in enumerate(rows):
            add(group, row["caption"], row["image_id"], 1)
            for caption in row["negative_captions"]:
                add(group, caption, row["image_id"], 0)
            for image_id in row["negative_image_ids"]:
                add(group, row["caption"], image_id, 0)
        if self.in_batch_negatives:
            for row in rows:
                for other in rows:
                    if _mismatch(row, other):
                        add(0, row["caption"], other["image_id"], 0)
            # A pair that two rows have in common counts once in the one group that is left.
            pairs = list(dict.fromkeys((caption, image, 0, label) for caption, image, _, label in pairs))

        index = torch.tensor(pairs).unbind(1)
        inputs = self.processor(text=list(captions), padding=True, max_length=self.max_length, return_tensors="pt")
        inputs |= self.processor.feature_extractor(_fetch(self.store, list(images)), return_tensors="pt")
        if self.mask_probability > 0:
            self._hide(inputs, list(captions), list(images), epoch=rows[0]["epoch"])
        batch = {**inputs, **dict(zip(("caption_index", "image_index", "group_ids", "labels"), index, strict=True))}
        if self.contrastive:
            matches = rows
            if self.in_batch_negatives:  # where a match counts once, as above
                matches = list({(row["caption"], row["image_id"]): row for row in rows}.values())
            batch["mismatches"] = torch.tensor([[_mismatch(row, other) for other in matches] for row in matches])
        return batch

    def _needed(self) -> tuple[str, ...]:
        """The names that a row must hold."""
        epoch = ("epoch",) if self.mask_probability > 0 else ()
        codes = ("image_code", "codes_of_caption") if self.in_batch_negatives or self.contrastive else ()
        return ("image_id", "caption", "negative_captions", "negative_image_ids", *epoch, *codes)

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


@dataclass
class DataCollatorForUnicoderVLMultipleChoice:
    """
    Batches N examples of visual commonsense reasoning, each of C choices that share the regions of one image, at whose
    rows `token_region_ids` point.

    Args:
        processor ([`UnicoderVLProcessor`]):
            Makes the tensors. Of a record, what its feature extractor would select are the detections.
        store (`Mapping[str, RegionRecord]`):
            The detections of every image.
        max_length (`int`, *optional*, defaults to 156):
            Tokens of a choice with `[CLS]` and `[SEP]`. Longer ones lose the last words of their longest segment, of
            equally long ones the later, but never a word of a reference.
        max_regions (`int`, *optional*, defaults to 100):
            Ground-truth boxes and detections of an image; more only where a text refers to more.
        gt_features (`Mapping[str, RegionRecord]`, *optional*):
            Features pooled in the ground-truth boxes (`unicoder-vl extract --boxes`), a row an object, to be taken
            instead of those of the detections that overlap the boxes most.

    Rows are those of [`VCRExamples`].

    Returns:
        `dict` of `input_ids`, `token_type_ids`, `attention_mask` and `token_region_ids`, each `(B, C, T)`,
        `region_features`, `region_locations` and `region_attention_mask`, each `(B, R, ...)`, and `labels (B,)`, -100
        where there is none: the arguments of [`UnicoderVLForMultipleChoice`], and nothing else.

    Raises:
        `ValueError`: references that do not fit into `max_length`, or an image whose ground-truth boxes are unknown;
        the message names the annot_id. `KeyError`: an image that a store lacks.

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
        _check_rows(rows, ("annot_id", "image_id", "objects", "choices", "label"), "VCRExamples(rows, task)")
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
        """How many choices of `rows` have more than `max_length` tokens, and are cut."""
        return sum(is_cut for row in rows for texts in self._texts([row]) for _, is_cut in texts)

    def count_low_ious(self, rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
        """How many ground-truth boxes meet no detection with an IoU of 0.1, and how many there are, of all images."""
        images = {row["image_id"]: row for row in rows}
        low = total = 0
        for row in images.values():
            detections = self._detections(self.store[row["image_id"]])
            _, ious = match_boxes(ground_truth_boxes(row, detections), detections)
            low, total = low + int((ious < LOW_IOU).sum()), total + len(ious)
        return low, total

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[list[Token], bool]]]:
        """For each choice of each row its tokens, and whether they were cut."""
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
        """For each row the regions that it is shown, and the one of each of its objects."""
        image_ids = [row["image_id"] for row in rows]
        found = _fetch(self.store, image_ids)
        given = [None] * len(rows) if self.gt_features is None else _fetch(self.gt_features, image_ids)
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


def _check_rows(rows: Sequence[Mapping[str, Any]], names: Sequence[str], wrapper: str):
    """
    Raises:
        `ValueError`: a row lacks one of the names, as whoever does not make them by `wrapper` finds out.
    """
    for row in rows:
        if lacking := [name for name in names if name not in row]:
            raise ValueError(
                f"A row holds {', '.join(row) or 'nothing'}, but no {', '.join(lacking)}. Train on {wrapper}, whose "
                "rows hold all that is needed. Of rows of another kind Trainer leaves out what the model's forward "
                "does not name, unless TrainingArguments(remove_unused_columns=False)."
            )


def _mismatch(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the caption of one row is a mismatch with the image of another."""
    return other["image_code"] not in row["codes_of_caption"]


def _fetch(store: Mapping[str, RegionRecord], image_ids: Sequence[str]) -> list[RegionRecord]:
    """One read for each image, however many times it is named."""
    unique = list(dict.fromkeys(image_ids))
    if isinstance(store, RegionStore):
        records = dict(zip(unique, store.get_many(unique), strict=True))
    else:
        records = {image_id: store[image_id] for image_id in unique}
    return [records[image_id] for image_id in image_ids]


def _choose(rng: np.random.Generator, count: int, probability: float) -> np.ndarray:
    """Each of `count` with `probability`, and one of them where none came up."""
    chosen = rng.random(count) < probability
    if not chosen.any():
        chosen[rng.integers(count)] = True
    return chosen
