"""The inputs that tasks share whose rows are a text and an image: texts, and each image once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..processing_unicoder_vl import UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord
from .rows import fetch


@dataclass
class TextsWithImages:
    """
    A collator of rows that are a text and images. A subclass picks these of the rows.

    Args:
        processor ([`UnicoderVLProcessor`]): Makes the tensors.
        store (`Mapping[str, RegionRecord]`): The regions of every image.
    """

    processor: UnicoderVLProcessor
    store: Mapping[str, RegionRecord]

    def inputs(self, texts: Sequence[str], image_ids: Sequence[str], max_length: int) -> dict[str, Any]:
        """
        Makes the inputs of texts with images, in which an image that several rows share is once.

        Args:
            texts (sequence of `str`): The text of each row.
            image_ids (sequence of `str`): The image of each row; there may be more rows of images than of texts.
            max_length (`int`): Most tokens of a text with `[CLS]` and `[SEP]`; longer ones are cut.

        Returns:
            `dict` of `input_ids`, `token_type_ids` and `attention_mask`, each `(B, T)`, `region_features`,
            `region_locations` and `region_attention_mask`, each `(num_images, R, …)`, and `image_index`,
            `(len(image_ids),)`.

        Raises:
            `ValueError`: a text is empty.
            `KeyError`: an image that the store lacks.
        """
        images = {image_id: number for number, image_id in enumerate(dict.fromkeys(image_ids))}
        inputs = self.processor(text=list(texts), max_length=max_length, return_tensors="pt")
        inputs |= self.processor.feature_extractor(fetch(self.store, list(images)), return_tensors="pt")
        return {**inputs, "image_index": torch.tensor([images[image_id] for image_id in image_ids])}
