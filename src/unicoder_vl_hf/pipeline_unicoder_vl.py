# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""
The pipeline `image-text-matching`: scores sentences with an image.

A checkpoint carries this file for `trust_remote_code`. Without the package `unicoder-vl-hf` an image is the record of
its regions; with it, a photo will do. Left out: many pairs at once, which are the work of an `ImageTextScorer`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers.pipelines.base import Pipeline

# Classes whose checkpoints have a trained matching head.
TRAINED = {"UnicoderVLForPreTraining", "UnicoderVLForImageTextRetrieval"}


class UnicoderVLPipeline(Pipeline):
    r"""
    Scores sentences with an image, the best first.

    Args:
        detector (`str` or detector, *optional*):
            The detector that finds the regions of photos. Defaults to that of the regions that the model was trained
            on. It takes the package `unicoder-vl-hf[detection]`.
        store (`Mapping[str, RegionRecord]`, *optional*):
            The store in which image ids are looked up.
        kwargs:
            See [`Pipeline`].

    Example:

    ```python
    >>> matcher = pipeline("image-text-matching", model="checkpoint")
    >>> matcher("photo.jpg", text=["a dog runs", "a cat sleeps"])
    [{'text': 'a dog runs', 'score': 2.71}, {'text': 'a cat sleeps', 'score': -3.14}]
    ```"""

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False

    # Makes a detector of `detector`, the provenance and the device, where the package is installed, which sets it.
    make_detector: ClassVar[Callable[..., Any] | None] = None

    def __init__(self, *args, detector: Any = None, store: Mapping[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if (heads := self.model.config.architectures) and not set(heads) & TRAINED:
            raise ValueError(
                f"{self.model.name_or_path} is a {heads[0]}, whose matching head was never trained: its scores "
                f"would be random. Expected a checkpoint of {' or '.join(sorted(TRAINED))}."
            )
        if store is not None:
            self.processor.set_store(store)
        if self.make_detector is not None:
            trained_on = self.processor.feature_extractor.region_provenance
            self.processor.set_detector(self.make_detector(detector, trained_on=trained_on, device=self.device))

    def __call__(self, images: Any, text: str | Sequence[str] | None = None, **kwargs) -> list[Any]:
        """
        Scores sentences with an image.

        Args:
            images: An image in any form that the processor takes (a photo or the record of its regions), a dict of
                `image` and `text`, or a list of either.
            text (`str` or sequence of `str`, *optional*): The sentences, unless each dict has its own.

        Returns:
            A list of dicts, the best first, for each image: `text`, `score` (the matching logit, higher = better match)
            and, of a calibrated checkpoint, `probability` and `match`.

        Raises:
            `ValueError`: there is no text, `batch_size` is above 1, or the processor raises it.
        """
        if (kwargs.get("batch_size") or self._batch_size or 1) > 1:
            raise ValueError(
                "This pipeline takes an image at a time, with all its sentences: leave batch_size out. For many images "
                "see ImageTextScorer of unicoder-vl-hf."
            )
        return super().__call__(images, **({} if text is None else {"text": text}), **kwargs)

    def _sanitize_parameters(self, text=None):
        return {} if text is None else {"text": text}, {}, {}

    def preprocess(self, image, text=None):
        """Makes the model's inputs of an image and its sentences."""
        if isinstance(image, dict) and "image" in image:
            image, text = image["image"], image.get("text", text)
        if text is None:
            raise ValueError("There is no text to match: give text=[…], or dicts of image and text.")
        texts = [text] if isinstance(text, str) else list(text)
        return {"texts": texts, "inputs": self.processor(text=texts, regions=image, return_tensors="pt")}

    def _forward(self, model_inputs):
        inputs = {name: value.to(self.device) for name, value in model_inputs["inputs"].items()}
        return {"texts": model_inputs["texts"], "scores": self.model(**inputs).scores}

    def postprocess(self, model_outputs):
        """Makes the list of dicts of scores, the best first."""
        found = [
            {"text": text, "score": score}
            for text, score in zip(model_outputs["texts"], model_outputs["scores"].float().tolist(), strict=True)
        ]
        if (known := self.model.config.calibration) is not None:
            for each in found:
                each["probability"] = torch.tensor(each["score"] / known["temperature"]).sigmoid().item()
                each["match"] = each["score"] >= known["threshold"]
        return sorted(found, key=lambda each: -each["score"])


__all__ = ["UnicoderVLPipeline"]
