"""Makes a checkpoint a `CrossEncoder` of sentence-transformers: the module that its `modules.json` names.

Checkpoints name this class by its place, so it stays here. Needs the extra `[sentence-transformers]`.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sentence_transformers.base.modules import InputModule

from ..modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..regions.detectors import Detector
from ..regions.finding import RegionFinder
from ..regions.store import RegionStore
from .checkpoints import load_for_scoring
from .packed import PairEncoder
from .scorer import MAX_TOKENS, MAX_TOKENS_ELSEWHERE


class UnicoderVLModule(InputModule):
    """
    Scores pairs of a sentence and an image.

    Args:
        model ([`UnicoderVLForImageTextRetrieval`]): The model.
        processor ([`UnicoderVLProcessor`]): The processor of the model.
        detector (`str` or [`Detector`], *optional*): The detector that finds the regions of photos. Defaults to that of
            the regions that the model was trained on.
        max_seq_length (`int`, *optional*, defaults to 44): Most tokens of a sentence; longer ones are cut.
        cache (`str` or `os.PathLike`, *optional*): The folder that keeps the regions of photos, see [`RegionFinder`].

    Example:

    ```python
    >>> model = CrossEncoder("checkpoint", trust_remote_code=True, processor_kwargs={"store": "flickr30k-regions"})
    >>> model.predict([("Two dogs in the snow.", "1000268201"), ("A child climbs.", "photo.jpg")])
    >>> model.rank("Two dogs in the snow.", ["1000268201", "1001773457"])
    ```
    """

    def __init__(
        self,
        model: UnicoderVLForImageTextRetrieval,
        processor: UnicoderVLProcessor,
        detector: str | Detector | None = None,
        max_seq_length: int = 44,
        cache: str | PathLike[str] | None = None,
    ):
        super().__init__()
        self.model, self.processor, self.max_seq_length = model, processor, max_seq_length
        self.tokenizer = processor.tokenizer
        trained_on = processor.feature_extractor.region_provenance
        self.detector = RegionFinder(detector, trained_on=trained_on, cache=cache)
        processor.set_detector(self.detector)
        self._encoder: PairEncoder | None = None  # copies of the weights for inference, until they may have changed

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_encoder": None}

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, as every prediction does, too."""
        self._encoder = None
        return super().train(mode)

    @property
    def modalities(self) -> list[Any]:
        """The kinds of inputs, in the words of sentence-transformers."""
        return ["text", "image", ("image", "text")]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """
        Makes of pairs the tokens of sentences and the records of images, each once, and their places in the pairs.

        Args:
            inputs (sequence of pairs): Each a sentence and an image, in any form that the processor takes; or an image
                that is no `str`, and a sentence. Either may be named, `{"text": …}` and `{"image": …}`.
            prompt (`str`, *optional*): Text that is put before every sentence.

        Raises:
            `ValueError`: an input is no pair, or the processor raises it.
        """
        pairs = [_sentence_first(pair) for pair in inputs]
        sentences, caption_index = _distinct([(prompt or "") + sentence for sentence, _ in pairs])
        images, image_index = _distinct([image for _, image in pairs])
        self.detector.device = self.model.device
        tokens = self.processor(text=sentences, padding=False, max_length=self.max_seq_length)
        return {
            "token_ids": tokens["input_ids"],
            "records": self.processor.load_records(images),
            "caption_index": caption_index,
            "image_index": image_index,
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """
        Adds `scores`, `(num_pairs,)`, float32; higher = better match. They are computed as `ImageTextScorer` computes
        them, or, where gradients are, by the model.
        """
        extractor, device = self.processor.feature_extractor, self.model.device
        indices = [np.array(features[name]) for name in ("caption_index", "image_index")]
        if torch.is_grad_enabled():
            inputs = self.processor.tokenizer.pad({"input_ids": features["token_ids"]}, return_tensors="pt")
            inputs.update(extractor(features["records"], return_tensors="pt"))
            caption_index, image_index = (torch.from_numpy(index).to(device) for index in indices)
            inputs = inputs.to(device)
            scores = self.model(**inputs, caption_index=caption_index, image_index=image_index).scores
        else:
            if self._encoder is None:
                max_tokens = MAX_TOKENS.get(device.type, MAX_TOKENS_ELSEWHERE)
                self._encoder = PairEncoder(self.model, None, max_tokens)
            captions = self._encoder.embed_captions(features["token_ids"])
            images = self._encoder.embed_images(features["records"], extractor)
            scores = torch.from_numpy(self._encoder.score(captions, images, *indices)).to(device)
        return features | {"scores": scores}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Saves the model and its processor."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        Loads a checkpoint of retrieval or pre-training.

        Args:
            model_name_or_path (`str`): A folder or a repository of the Hub.
            token, cache_folder, revision, local_files_only: See [`InputModule`].
            model_kwargs (`dict`, *optional*): `dtype`, by default float32.
            processor_kwargs (`dict`, *optional*): `store`, a [`RegionStore`], its folder or any mapping of records;
                `detector` and `cache`, see the class; and `model_max_length`, `max_seq_length` in the class.

        Raises:
            `ValueError`: see [`load_for_scoring`].
            `TypeError`: an option is unknown.
        """
        model, processor = load_for_scoring(
            model_name_or_path,
            **{"dtype": torch.float32, **(model_kwargs or {})},
            token=token,
            cache_dir=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls(model, processor, **_options(**(processor_kwargs or {}), processor=processor))


def _options(
    processor: UnicoderVLProcessor,
    store: Mapping[str, Any] | str | PathLike[str] | None = None,
    detector: str | Detector | None = None,
    model_max_length: int = 44,
    cache: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """Sets the store of a processor, and gives the other options by the names that the class has for them."""
    processor.set_store(store if store is None or isinstance(store, Mapping) else RegionStore(store))
    return {"detector": detector, "max_seq_length": model_max_length, "cache": cache}


def _sentence_first(pair: Any) -> tuple[str, Any]:
    """Gives the sentence and the image of a pair. Raises ValueError where it is none."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(f"{pair!r} is no pair; expected a sentence and an image.")
    first, second = map(_unnamed, pair)
    if not isinstance(first, str):
        first, second = second, first
    if not isinstance(first, str):
        raise ValueError(f"The pair {pair!r} has no sentence; expected a sentence (str) and an image.")
    return first, second


def _unnamed(item: Any) -> Any:
    """Gives what an item of a pair holds, if it is named by its modality, as libraries on top of this one name it."""
    if isinstance(item, Mapping) and len(item) == 1 and next(iter(item)) in ("text", "image"):
        return next(iter(item.values()))
    return item


def _distinct(items: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Gives the items that differ, and for each item its place among these."""
    places: dict[Any, int] = {}
    index = [places.setdefault(item if isinstance(item, str | Path) else id(item), len(places)) for item in items]
    distinct = dict(zip(reversed(index), reversed(items), strict=True))
    return [distinct[place] for place in range(len(places))], index
