# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""Makes model inputs of captions and regions: tokens of the captions, tensors of the regions of their images.

Follows the paper's input section: WordPiece `[CLS] w_1 … w_T [SEP]`, at most 44 tokens beside 100 regions. Left out:
masking and mismatches, which are the collators' work.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .feature_extraction_unicoder_vl import RegionRecord, UnicoderVLFeatureExtractor, is_region_record
from .records_unicoder_vl import check_several

# A tokenizer passes over what it does not know: a misspelt argument would change nothing, and say nothing.
_TOKENIZER_ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.__call__).parameters, "split_special_tokens"}

# An image in any form that a call takes: its regions, or itself as a photo. A photo is a file or a PIL image.
RegionInput = RegionRecord | Mapping[str, Any] | str | os.PathLike[str] | Any
# A function from photos to records, such as a `RegionFinder`.
Detector = Callable[[Sequence[Any]], list[RegionRecord]]


_TEXT_DEFAULTS: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 44}


class UnicoderVLProcessorKwargs(ProcessingKwargs, total=False):
    """Groups of options, as transformers knows a processor's, with our defaults of the tokenizer's."""

    _defaults = {"text_kwargs": _TEXT_DEFAULTS}  # type: ignore[misc]


class UnicoderVLCallKwargs(UnicoderVLProcessorKwargs, TextKwargs, total=False):  # type: ignore[misc]
    """Options of a call. They are the tokenizer's, given by name or together as `text_kwargs`, which win."""

    split_special_tokens: bool


class _Reference:
    """Holds a store or a detector without owning it: a copy of the processor shares it, and saving leaves it out."""

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
        self._detector = _Reference(None)
        self._checked_stores = _Reference([])

    def set_store(self, store: Mapping[str, RegionRecord] | None) -> None:
        """
        Sets the store in which image ids are looked up by default; it is neither saved nor copied with the processor.

        Warns, naming both, where the store's regions are not of the kind that the model was trained on.
        """
        self._check_provenance(store)
        self._store = _Reference(store)

    def set_detector(self, detector: Detector | None) -> None:
        """Sets the function that finds the regions of photos by default; it is neither saved nor copied."""
        self._detector = _Reference(detector)

    @property
    def default_store(self) -> Mapping[str, RegionRecord] | None:
        """The store in which image ids are looked up by default, as [`~UnicoderVLProcessor.set_store`] took it."""
        return self._store.target

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        regions: RegionInput | Iterable[RegionInput] | None = None,
        images: ImageInput | str | os.PathLike[str] | None = None,
        store: Mapping[str, RegionRecord] | None = None,
        detector: Detector | None = None,
        **kwargs: Unpack[UnicoderVLCallKwargs],
    ) -> BatchFeature:
        r"""
        Makes the inputs of a batch: tokens of the captions, tensors of the regions of the images.

        Args:
            text (`str` or sequence of `str`, *optional*):
                The captions.
            regions (`RegionRecord`, `dict`, `str`, `os.PathLike`, `PIL.Image.Image`, or a sequence of these,
                *optional*):
                Each image: a record of its regions; the fields of a record as a dict of arrays; an image id; or a
                photo. A `str` is an image id where the store holds it, else the file of a photo. An `os.PathLike` is
                the file of a record, written by [`RegionRecord.save`], if it ends in `.npz`, else that of a photo. A
                single image meets every text.
            images (*optional*):
                The same, in the words of transformers.
            store (`Mapping[str, RegionRecord]`, *optional*):
                The store in which image ids are looked up, such as a [`RegionStore`]. Defaults to that of
                [`~UnicoderVLProcessor.set_store`].
            detector (callable, *optional*):
                A function from a list of photos to their records, such as a [`RegionFinder`] of
                `unicoder_vl_hf.regions`. Defaults to that of [`~UnicoderVLProcessor.set_detector`].
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
            `ValueError`: neither text nor regions, an empty text, texts and images of different number, a name that is
            both an image id and a file, a photo without a detector, or a record with a fault.
            `KeyError`: a name that is neither an image id of the store nor a file.
            `TypeError`: an option that neither this method nor the tokenizer has.
        """
        return_tensors = kwargs.get("return_tensors")
        text_kwargs: dict[str, Any] = {**kwargs, **(kwargs.get("text_kwargs") or {})}
        text_kwargs.pop("text_kwargs", None)
        unknown = sorted(text_kwargs.keys() - _TOKENIZER_ARGUMENTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(unknown)}, nor has its tokenizer.")
        if images is not None and regions is not None:
            raise ValueError("The processor was given both regions and images, which are the same: give one of them.")
        regions = images if regions is None else regions
        if text is None and regions is None:
            raise ValueError("The processor was given neither text nor regions: give text, regions, or both.")
        data = {}
        if text is not None:
            if not isinstance(text, Iterable):
                raise ValueError(
                    f"text is {text!r:.80}, a {type(text).__name__}: give a caption, or a list of captions."
                )
            text = text if isinstance(text, str) else list(text)  # such as a column of a dataset
            _check_texts(text)
            # Not by _merge_kwargs, which before transformers 5.24 fails on options given by name and in a dict alike.
            data.update(self.tokenizer(text, **_TEXT_DEFAULTS | text_kwargs))
        if regions is not None:
            records = self.load_records(regions, store, detector)
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
        self,
        regions: RegionInput | Iterable[RegionInput],
        store: Mapping[str, RegionRecord] | None = None,
        detector: Detector | None = None,
    ) -> list[RegionRecord]:
        """
        Loads the records behind `regions`, in any form that a call of the processor takes, from `store` or the default
        store. Raises what a call raises.
        """
        store = self.default_store if store is None else store
        if isinstance(regions, (str, os.PathLike, Mapping)) or not isinstance(regions, Iterable):
            regions = [regions]
        found = self.find_regions(list(regions), store, detector)
        return [store[image] if isinstance(image, str) else image for image in found]  # type: ignore[index]

    def find_regions(
        self,
        images: Sequence[RegionInput],
        store: Mapping[str, RegionRecord] | None = None,
        detector: Detector | None = None,
    ) -> list[str | RegionRecord]:
        """
        Gives images in any form that a call of the processor takes as ids of the store and as records: files of records
        are read, and the regions of all photos found at once. Raises what a call raises.
        """
        check_several("images", images)
        if store is None:
            store = self.default_store
        else:
            self._check_provenance(store)
        detector = detector or self._detector.target
        found = [self._resolve(image, store, detector is not None) for image in images]
        is_photo = [not isinstance(image, str) and not is_region_record(image) for image in found]
        if places := [place for place, photo in enumerate(is_photo) if photo]:
            if detector is None:
                raise ValueError(
                    f"{found[places[0]]} is a photo, and there is no detector to find its regions: give one, "
                    "detector=RegionFinder(…) of unicoder_vl_hf.regions, in the package unicoder-vl-hf[detection]; or "
                    "an ImageTextScorer, which loads that of the training."
                )
            for place, record in zip(places, detector([found[place] for place in places]), strict=True):
                found[place] = record
        return found

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

    def _resolve(self, image: RegionInput, store: Mapping[str, RegionRecord] | None, takes_photos: bool) -> Any:
        """Gives image ids of the store and records as they are, a file of a record read, photos as files or images."""
        if is_region_record(image):
            return image
        if isinstance(image, str):
            return self._resolve_name(image, store, takes_photos)
        if isinstance(image, os.PathLike):
            return RegionRecord.load(image) if os.fspath(image).endswith(".npz") else image
        if isinstance(image, Mapping):
            return RegionRecord.from_dict(image)
        if is_pil_image(image):
            return image
        raise ValueError(
            f"regions holds a {type(image).__name__}, expected a RegionRecord, its fields as a dict, an image id (str),"
            " a photo (its file, or a PIL image) or the path of a saved record (os.PathLike)."
        )

    def _resolve_name(self, name: str, store: Mapping[str, RegionRecord] | None, takes_photos: bool) -> Any:
        is_id, is_file = store is not None and name in store, os.path.isfile(name)
        if is_id and is_file and takes_photos:
            raise ValueError(
                f"{name!r} is an image id of {_name(store)}, and a file, {os.path.abspath(name)}: give a Path, or "
                f"./{name}, for the file; for the image store[id], or work in another folder."
            )
        if is_file and not is_id:
            return Path(name)
        if store is None:
            raise ValueError(
                f"{name!r} is no file, and as an image id it needs a store: pass store=… (--regions) or call "
                "set_store first."
            )
        if not is_id:
            try:
                store[name]
            except KeyError as error:
                told = f"The store has no image {name!r}." if error.args == (name,) else error.args[0]  # of a dict
                raise KeyError(f"{told} Nor is it the file of a photo.") from None
        return name

    def _check_provenance(self, store: Mapping[str, RegionRecord] | None) -> None:
        if any(store is checked for checked in self._checked_stores.target):
            return
        # Any mapping of records may serve; only a RegionStore knows where its regions come from.
        provenance = getattr(store, "provenance", None)
        if provenance is not None:
            self._checked_stores.target.append(store)
            self.feature_extractor.check_provenance(provenance)


def _name(store: Any) -> str:
    """Names a store by its folder, if it has one."""
    return os.fspath(store) if isinstance(store, os.PathLike) else f"the {type(store).__name__} that is the store"


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
        if not isinstance(caption, str | list | tuple):
            raise ValueError(f"text[{position}] is {caption!r:.80}, a {type(caption).__name__}: expected a caption.")
        if not caption or (isinstance(caption, str) and caption.isspace()):
            raise ValueError(f"text[{position}] is {caption!r}: a caption needs at least one word.")


__all__ = ["UnicoderVLProcessor", "UnicoderVLProcessorKwargs"]
