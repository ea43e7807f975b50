"""Questions about photos that are at hand, answered by a checkpoint, without files of questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import numpy as np
import torch

from ...modeling_unicoder_vl import UnicoderVLForQuestionAnswering
from ...processing_unicoder_vl import RegionInput, UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord, check_several
from ...regions.finding import RegionFinder
from ...regions.store import RegionStore
from .training import answers_of, load_for_vqa, make_collator


@dataclass
class QuestionAnswerer:
    """
    Answers questions about photos.

    Args:
        model ([`UnicoderVLForQuestionAnswering`]): The model.
        processor ([`UnicoderVLProcessor`]): Its processor; with a detector it takes photos, with a store image ids.

    Example:

    ```python
    >>> answerer = QuestionAnswerer.from_pretrained("runs/vqa")
    >>> answerer("photo.jpg", ["how many dogs are there?"])
    [[('2', 0.81), ('3', 0.07), ('1', 0.05), ('4', 0.02), ('many', 0.01)]]
    ```
    """

    model: UnicoderVLForQuestionAnswering
    processor: UnicoderVLProcessor

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        store: Mapping[str, RegionRecord] | str | PathLike[str] | None = None,
        *,
        detector: str | None = None,
        detector_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """
        Loads a checkpoint with its processor.

        Args:
            name_or_path (`str` or `os.PathLike`): A folder or a repository of the Hub.
            store (`Mapping[str, RegionRecord]`, `str` or `os.PathLike`, *optional*): Regions of images that are asked
                about by their ids.
            detector (`str`, *optional*): The detector of photos. Defaults to that of the regions of the training.
            detector_options (`dict`, *optional*): Options of a detector by name.

        Raises:
            `ValueError`: the checkpoint has no head for answers.
        """
        store = store if store is None or isinstance(store, Mapping) else RegionStore(store)
        model, processor = load_for_vqa(name_or_path, store)
        trained_on, options = processor.feature_extractor.region_provenance, detector_options or {}
        processor.set_detector(RegionFinder(detector, trained_on=trained_on, device=model.device, **options))
        return cls(model, processor)

    @torch.no_grad()
    def __call__(self, image: RegionInput, questions: Sequence[str], top_k: int = 5) -> list[list[tuple[str, float]]]:
        """
        Answers questions about one image.

        Args:
            image: The image in any form that the processor takes.
            questions (sequence of `str`): The questions.
            top_k (`int`, *optional*, defaults to 5): Number of answers to each, the most probable first.

        Returns:
            For each question its answers with their probabilities, each by itself in `[0, 1]`.

        Raises:
            `ValueError`: an empty question, one question that is in no list, several images, or one whose regions
                cannot be found.
        """
        check_several("questions", questions)
        records = self.processor.load_records(image)
        if len(records) != 1:
            raise ValueError(f"There are {len(records)} images; expected one, of which all questions are.")
        (record,) = records
        store = {record.image_id: record}
        rows = [{"question": question, "image_id": record.image_id, "answers": []} for question in questions]
        batch = make_collator(self.model, self.processor, store)(rows)
        del batch["labels"]
        logits = self.model(**{name: value.to(self.model.device) for name, value in batch.items()}).logits
        probabilities, answers = logits.sigmoid().cpu().numpy(), answers_of(self.model)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            [(answers[label], float(of_question[label])) for label in labels]
            for of_question, labels in zip(probabilities, best, strict=True)
        ]
