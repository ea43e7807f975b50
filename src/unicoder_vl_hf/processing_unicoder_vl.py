# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""Makes model inputs of captions and regions: tokens of the captions, tensors of the regions of their images.

Follows the paper's input section: WordPiece `[CLS] w_1 … w_T [SEP]`, at most 44 tokens beside 100 regions. Left out:
masking and mismatches, which are the collators' work.
"""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .feature_extraction_unicoder_vl import RegionRecord, UnicoderVLFeatureExtractor, is_region_record
from .records_unicoder_vl import check_several

# A tokenizer passes over what it does not know: a misspelt argument would change nothing, and say nothing.
_TOKENIZER_ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.__call__).parameters, "split_special_tokens"}

# The regions of one image in any form that a call takes.
RegionInput = RegionRecord | Mapping[str, Any] | str | os.PathLike[str]


_TEXT_DEFAULTS: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 44}


class UnicoderVLProcessorKwargs(ProcessingKwargs, TextKwargs, total=False):  # type: ignore[misc]
    """Options of a call. They are the tokenizer's, given by name or together as `text_kwargs`, which win."""

    split_special_tokens: bool
    _defaults = {"text_kwargs": _TEXT_DEFAULTS}  # type: ignore[misc]


class _Reference:
    """Holds stores without owning them: a copy of the processor shares them, and saving leaves them out."""

    def __init__(self, target: Any):
        self.target = target

    def __deepcopy__(self, memo):
        return self


class UnicoderVLProcessor(ProcessorMixin):
    r"""
    Makes model inputs of captions and of the regions of images, by a BERT tokenizer and a feature extractor.

    Args:
        feature_extractor ([`UnicoderVLFeatureExtractor`]):
            Makes tensors of region records, and knows the provenance of the regions that the model was trained on.
        tokenizer ([`PreTrainedTokenizerBase`]):
            A WordPiece tokenizer, such as [`BertTokenizer`].

    Example:

    ```python
    >>> tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
    >>> processor = UnicoderVLProcessor(UnicoderVLFeatureExtractor(), tokenizer)
    >>> processor.set_store(RegionStore("flickr30k-regions"))
    >>> inputs = processor(text=["A dog runs."], regions=["1000092795"], return_tensors="pt")
    ```"""

    _auto_class = "AutoProcessor"
    valid_processor_kwargs = UnicoderVLProcessorKwargs

    def __init__(self, feature_extractor: UnicoderVLFeatureExtractor, tokenizer):
        super().__init__(feature_extractor, tokenizer)
        self._store = _Reference(None)
        self._checked_stores = _Reference([])

    def set_store(self, store: Mapping[str, RegionRecord] | None) -> None:
        """
        Sets the store in which image ids are looked up by default; it is neither saved nor copied with the processor.

        Warns, naming both, where the store's regions are not of the kind that the model was trained on.
        """
        self._check_provenance(store)
        self._store = _Reference(store)

    @property
    def default_store(self) -> Mapping[str, RegionRecord] | None:
        """The store in which image ids are looked up by default, as [`~UnicoderVLProcessor.set_store`] took it."""
        return self._store.target

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        regions: RegionInput | Iterable[RegionInput] | None = None,
        images: ImageInput | None = None,
        store: Mapping[str, RegionRecord] | None = None,
        **kwargs: Unpack[UnicoderVLProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Makes the inputs of a batch: tokens of the captions, tensors of the regions of the images.

        Args:
            text (`str` or sequence of `str`, *optional*):
                The captions.
            regions (`RegionRecord`, `dict`, `str`, `os.PathLike`, or a sequence of these, *optional*):
                The regions of each image: a record; its fields as a dict of arrays; an image id, looked up in `store`;
                or the path of a record written by [`RegionRecord.save`]. A `str` is always an image id, never a path.
                The regions of a single image meet every text.
            images (*optional*):
                Photos, which are refused for now: their regions must be found first.
            store (`Mapping[str, RegionRecord]`, *optional*):
                The store in which image ids are looked up, such as a [`RegionStore`]. Defaults to that of
                [`~UnicoderVLProcessor.set_store`].
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"`; lists of tokens and arrays of regions by default.
            padding (`bool` or `str`, *optional*, defaults to `True`), truncation (`bool` or `str`, *optional*, defaults
                to `True`), max_length (`int`, *optional*, defaults to 44):
                Options of the tokenizer; 44 tokens are the paper's.
            text_kwargs (`dict`, *optional*):
                Options of the tokenizer, which win over those given by name. This is how transformers tells options of
                the tokenizer from others.
            kwargs:
                Further options of the tokenizer.

        Returns:
            [`BatchFeature`] with `input_ids`, `token_type_ids`, `attention_mask` of shape `(batch_size,
            sequence_length)` and `region_features`, `region_locations`, `region_attention_mask`, see
            [`UnicoderVLFeatureExtractor`].

        Raises:
            `ValueError`: neither text nor regions, an empty text, texts and images of different number, an image id
            without a store, a record with a fault, or photos.
            `KeyError`: an image id that the store lacks.
            `TypeError`: an option that neither this method nor the tokenizer has.
        """
        return_tensors = kwargs.get("return_tensors")
        text_kwargs: dict[str, Any] = {**kwargs, **(kwargs.get("text_kwargs") or {})}
        text_kwargs.pop("text_kwargs", None)
        unknown = sorted(text_kwargs.keys() - _TOKENIZER_ARGUMENTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(unknown)}, nor has its tokenizer.")
        if images is not None:
            raise ValueError(
                "images holds photos, which the processor does not read: find their regions with `unicoder-vl extract`,"
                " or unicoder_vl_hf.regions.extract, and give these as regions."
            )
        if text is None and regions is None:
            raise ValueError("The processor was given neither text nor regions: give text, regions, or both.")
        data = {}
        if text is not None:
            text = text if isinstance(text, str) else list(text)  # such as a column of a dataset
            _check_texts(text)
            # Not by _merge_kwargs, which before transformers 5.24 fails on options given by name and in a dict alike.
            data.update(self.tokenizer(text, **_TEXT_DEFAULTS | text_kwargs))
        if regions is not None:
            records = self.load_records(regions, store)
            num_texts = 1 if isinstance(text, str) else len(records) if text is None else len(text)
            if len(records) == 1:
                records *= num_texts
            if num_texts != len(records):
                raise ValueError(_numbers_differ(text, num_texts, len(records)))
            data.update(self.feature_extractor(records, return_tensors=return_tensors))
        return BatchFeature(data)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves like any processor, without the padding and truncation of the tokenizer's last call."""
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_padding()
            self.tokenizer.backend_tokenizer.no_truncation()
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def load_records(
        self, regions: RegionInput | Iterable[RegionInput], store: Mapping[str, RegionRecord] | None = None
    ) -> list[RegionRecord]:
        """
        Loads the records behind `regions`, in any form that a call of the processor takes, from `store` or the default
        store.

        Raises:
            `ValueError`: an image id without a store, or a record with a fault.
            `KeyError`: an image id that the store lacks.
        """
        if store is None:
            store = self.default_store
        else:
            self._check_provenance(store)
        if isinstance(regions, (str, os.PathLike, Mapping)) or not isinstance(regions, Iterable):
            regions = [regions]
        return [self._load_record(region, store) for region in regions]

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Counts the tokens of each text, `[CLS]` and `[SEP]` included, before it is cut: int64 `(len(texts),)`."""
        check_several("texts", texts)
        counts = []
        for start in range(0, len(texts), 10_000):
            batch = list(texts[start : start + 10_000])
            tokens = self.tokenizer(batch, truncation=False, return_attention_mask=False, verbose=False)
            counts += [len(ids) for ids in tokens["input_ids"]]
        return np.array(counts, dtype=np.int64)

    def count_truncated(self, texts: Sequence[str], max_length: int = 44) -> int:
        """Counts the texts that have more than `max_length` tokens, `[CLS]` and `[SEP]` included, and will be cut."""
        return int((self.count_tokens(texts) > max_length).sum())

    def check_model(self, model) -> None:
        """
        Checks that a model has an embedding for every token of the tokenizer. If it lacked one, some caption would end
        in an `IndexError`, perhaps days later.

        Args:
            model ([`PreTrainedModel`]):
                The model that is to read what this processor makes.

        Raises:
            `ValueError`: the model has fewer rows of word embeddings than the tokenizer has tokens.
        """
        tokens, rows = max(self.tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
        if tokens > rows:
            raise ValueError(
                f"{model.name_or_path or type(model).__name__}: the tokenizer has {tokens:,} tokens, the model "
                f"{rows:,} rows of word embeddings. Take the tokenizer that the model was trained with, or add rows "
                f"for the new tokens, model.resize_token_embeddings({tokens}), and save it."
            )

    def _load_record(self, region: RegionInput, store: Mapping[str, RegionRecord] | None) -> RegionRecord:
        if is_region_record(region):
            return region
        if isinstance(region, str):
            if store is None:
                raise ValueError(f"Image id {region!r} needs a store: pass store=… or call set_store first.")
            return store[region]
        if isinstance(region, os.PathLike):
            return RegionRecord.load(region)
        if isinstance(region, Mapping):
            return RegionRecord.from_dict(region)
        raise ValueError(
            f"regions holds a {type(region).__name__}, expected a RegionRecord, its fields as a dict, an image id (str)"
            " or the path of a saved record (os.PathLike)."
        )

    def _check_provenance(self, store: Mapping[str, RegionRecord] | None) -> None:
        if any(store is checked for checked in self._checked_stores.target):
            return
        # Any mapping of records may serve; only a RegionStore knows where its regions come from.
        provenance = getattr(store, "provenance", None)
        if provenance is not None:
            self._checked_stores.target.append(store)
            self.feature_extractor.check_provenance(provenance)


def _numbers_differ(text: Any, num_texts: int, num_images: int) -> str:
    if num_texts > 1:
        return f"{num_texts} texts but {num_images} images: give one image for each text, or one for all."
    caption = text if isinstance(text, str) else text[0]
    return (
        f"1 text but {num_images} images: give a text for each image, such as the same for all, [{caption!r}] * "
        f"{num_images}; for the scores of every text with every image see ImageTextScorer."
    )


def _check_texts(text: str | Sequence[str]) -> None:
    if len(text) == 0:
        raise ValueError(f"text is {text!r}: give at least one caption.")
    for position, caption in enumerate([text] if isinstance(text, str) else text):
        if not caption or (isinstance(caption, str) and caption.isspace()):
            raise ValueError(f"text[{position}] is {caption!r}: a caption needs at least one word.")


__all__ = ["UnicoderVLProcessor", "UnicoderVLProcessorKwargs"]
