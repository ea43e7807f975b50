"""Scores of N captions with M images by the matching head (paper, Image-Text Retrieval).

Captions and images are sorted by length over the whole job, and each is embedded once a block. Left out for now:
packing, the `[CLS]`-only last layer, blocks on disk and several processes, which a later issue brings.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from ..feature_extraction_unicoder_vl import RegionRecord
from ..modeling_unicoder_vl import UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining
from ..processing_unicoder_vl import UnicoderVLProcessor


class ImageTextScorer:
    """
    Args:
        model ([`UnicoderVLForImageTextRetrieval`] or [`UnicoderVLForPreTraining`]):
            Both hold the same matching head; it is left on its device and put into evaluation mode while scoring.
        processor ([`UnicoderVLProcessor`]):
            Its tokenizer and feature extractor.
        store (`Mapping[str, RegionRecord]`, *optional*):
            Where image ids are looked up. Defaults to the processor's.
        max_tokens (`int`, *optional*, defaults to 3072):
            Text tokens and regions of one forward pass.

    Example:

    ```python
    >>> scorer = ImageTextScorer(model, processor, store)
    >>> scores = scorer.score(["Two dogs in the snow.", "A child climbs."], ["1000268201", "1001773457"])
    ```
    """

    def __init__(
        self,
        model: UnicoderVLForImageTextRetrieval | UnicoderVLForPreTraining,
        processor: UnicoderVLProcessor,
        store: Mapping[str, RegionRecord] | None = None,
        max_tokens: int = 3072,
    ):
        self.model = model
        self.processor = processor
        self.store = store
        self.max_tokens = max_tokens

    @torch.inference_mode()
    def score(self, captions: Sequence[str], images: Sequence[str | RegionRecord], max_length: int = 44) -> np.ndarray:
        """
        The matching score of every caption with every image.

        Args:
            captions (sequence of `str`): C captions.
            images (sequence of image ids or `RegionRecord`): M images.
            max_length (`int`, *optional*, defaults to 44): tokens of a caption; longer ones are cut.

        Returns:
            `np.ndarray` of shape `(C, M)`, float32; higher = better match.
        """
        records = self.processor.load_records(images, self.store)
        tokens = self.processor(text=list(captions), padding=False, max_length=max_length)["input_ids"]
        by_length = np.argsort([len(ids) for ids in tokens], kind="stable")
        kept = self.processor.feature_extractor.select
        by_regions = np.argsort([len(kept(record)) for record in records], kind="stable")

        longest = len(tokens[by_length[-1]]) + len(kept(records[by_regions[-1]]))
        side = max(1, int((self.max_tokens / longest) ** 0.5))  # a square block embeds the fewest items a pair
        scores = np.empty((len(captions), len(images)), dtype=np.float32)
        was_training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=scores.size, unit="pair", unit_scale=True, desc="Scoring") as progress:
                for images_of_block in np.split(by_regions, range(side, len(records), side)):
                    regions = self.processor(regions=[records[i] for i in images_of_block], return_tensors="pt")
                    regions = regions.to(self.model.device)
                    for captions_of_block in np.split(by_length, range(side, len(tokens), side)):
                        text = self.processor.tokenizer.pad(
                            {"input_ids": [tokens[i] for i in captions_of_block]}, return_tensors="pt"
                        ).to(self.model.device)
                        block = np.ix_(captions_of_block, images_of_block)
                        scores[block] = self._score_block(text, regions)
                        progress.update(len(captions_of_block) * len(images_of_block))
        finally:
            self.model.train(was_training)
        return scores

    def _score_block(self, text: Mapping[str, torch.Tensor], regions: Mapping[str, torch.Tensor]) -> np.ndarray:
        num_captions, num_images = len(text["input_ids"]), len(regions["region_features"])
        index = torch.arange(num_captions * num_images, device=self.model.device)
        outputs = self.model.bert(**text, **regions, caption_index=index // num_images, image_index=index % num_images)
        logits = self.model.matching_head(outputs.pooler_output)
        return (logits[:, 1] - logits[:, 0]).view(num_captions, num_images).cpu().numpy()
