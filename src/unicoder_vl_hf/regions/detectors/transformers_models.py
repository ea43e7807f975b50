"""
Object detectors of transformers: DETR and its relatives, RT-DETR, D-FINE, YOLOS, and Grounding DINO with a text.

The feature of a region is the last decoder state of its query, from which the model predicts class and box. A query
gives one region, of its likeliest class; the models' own post-processing may list a query several times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_transforms import center_to_corners_format

from ...records_unicoder_vl import RegionRecord
from ._computing import (
    Prepared,
    autocast,
    check_counts,
    check_loaded,
    fetching,
    in_groups_of_shape,
    make_record,
    model_revision,
    select,
)

# These have one logit a token of the text.
GROUNDED = ("grounding-dino", "mm-grounding-dino")


@dataclass(frozen=True)
class Prepare:
    """Scales and normalises a photo as the model's image processor does for a single photo."""

    processor: BaseImageProcessor

    def __call__(self, image: Image) -> Prepared:
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return Prepared(pixels, image.size, tuple(pixels.shape[-2:]))


class Prompt:
    """The classes that a grounded detector looks for, and which tokens of the text belong to each."""

    def __init__(self, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        text, spans = "", []
        for name in classes:
            spans.append((len(text), len(text) + len(name)))
            text += f"{name}. "
        encoding = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        first, last = encoding.pop("offset_mapping")[0].unbind(-1)
        if len(first) > max_tokens:
            raise ValueError(f"The text has {len(first)} tokens, the model takes {max_tokens}: name fewer classes.")
        self.inputs = dict(encoding)
        # (classes, tokens); a special token has an empty span
        self.tokens_of_class = torch.stack([(first >= start) & (last <= end) & (first < last) for start, end in spans])

    def class_probabilities(self, logits: Tensor) -> Tensor:
        """
        Gives `(..., classes)` from logits `(..., max_tokens)`: for each class the probability of its likeliest token.
        """
        tokens = self.tokens_of_class.to(logits.device)
        of_class = logits[..., None, : tokens.shape[1]].masked_fill(~tokens, -torch.inf)
        return of_class.amax(-1).sigmoid()


def class_probabilities(logits: Tensor, num_labels: int) -> Tensor:
    """
    Gives probabilities `(..., num_labels)` from the logits of a detector without a text. DETR, YOLOS and Table
    Transformer have a last column for no object, and a softmax; the others, trained by a focal loss, have none, and a
    sigmoid.

    Raises:
        ValueError: The logits have another width than these labels.
    """
    if logits.shape[-1] == num_labels + 1:
        return logits.softmax(-1)[..., :-1]
    if logits.shape[-1] == num_labels:
        return logits.sigmoid()
    raise ValueError(f"The model gives {logits.shape[-1]} logits a query, expected those of {num_labels} labels.")


class TransformersDetector:
    """
    A detector around a model of transformers; see the module.

    Args:
        model (`PreTrainedModel`): Model for object detection.
        processor (`BaseImageProcessor`): Image processor of the model.
        device (`torch.device`): Device to compute on.
        precision (`str`, defaults to `"no"`): `"no"`, `"bf16"` or `"fp16"`.
        score_threshold (`float`, defaults to 0): Score (0 to 1) above which regions are kept, within the next two
            limits.
        min_regions, max_regions (`int`, defaults to 10 and 100): Least and largest number of regions to keep, by rank.
        prompt (`Prompt`, *optional*): The classes, where the model takes a text.
        provenance: Further provenance of the store: `detector`, `detector_revision`, `class_names`, `num_classes`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        *,
        device: torch.device,
        precision: str = "no",
        score_threshold: float = 0.0,
        min_regions: int = 10,
        max_regions: int = 100,
        prompt: Prompt | None = None,
        **provenance: Any,
    ):
        check_counts(min_regions, max_regions)
        self.model = model.eval().to(device)
        if precision != "no":
            _predict_boxes_in_float32(self.model, device)
        self.prepare = Prepare(processor)
        self.device = device
        self.precision = precision
        self.score_threshold = score_threshold
        self.min_regions = min_regions
        self.max_regions = max_regions
        self.prompt = prompt
        thresholds = {"score": score_threshold, "min_regions": min_regions, "max_regions": max_regions}
        self.provenance = {"box_type": "regressed", "thresholds": thresholds, **provenance}

    @torch.inference_mode()
    def __call__(
        self, prepared: Sequence[Prepared], image_ids: Sequence[str], boxes: Sequence[np.ndarray] | None = None
    ) -> list[RegionRecord]:
        """Gives the records of photos; see `Detector`. Raises ValueError where boxes are given."""
        if boxes is not None:
            raise ValueError(
                "Detectors of transformers choose their boxes themselves and cannot take given ones: use a "
                "visual-genome, torchvision or grid detector."
            )
        return in_groups_of_shape(self._compute, prepared, image_ids)

    def _compute(self, photos: Sequence[Prepared], image_ids: Sequence[str]) -> list[RegionRecord]:
        """Gives the records of photos whose pixels have equal shapes."""
        pixels = torch.stack([photo.pixels for photo in photos]).to(self.device)
        text = {} if self.prompt is None else self.prompt.inputs
        text = {name: ids.expand(len(photos), -1).to(self.device) for name, ids in text.items()}
        with autocast(self.device, self.precision):
            outputs = self.model(pixel_values=pixels, **text)
        logits = outputs.logits.float()
        if self.prompt is None:
            probabilities = class_probabilities(logits, self.model.config.num_labels)
        else:
            probabilities = self.prompt.class_probabilities(logits)
        scores, labels = probabilities.max(-1)
        # The last states of YOLOS begin with those of the patches.
        states = outputs.last_hidden_state[:, -scores.shape[1] :]
        corners: Any = center_to_corners_format(outputs.pred_boxes.float())
        records = []
        for row, (image_id, photo) in enumerate(zip(image_ids, photos, strict=True)):
            kept = select(scores[row], self.score_threshold, self.min_regions, self.max_regions)
            boxes = corners[row, kept] * corners.new_tensor([*photo.size, *photo.size])
            classes = {"object_ids": labels[row, kept], "object_scores": scores[row, kept]}
            records.append(make_record(image_id, photo.size, boxes, states[row, kept], **classes))
        return records


def _predict_boxes_in_float32(model: nn.Module, device: torch.device) -> None:
    """
    Has the last layers of boxes, named `bbox_…` in every model, compute in float32: in bfloat16 a box is up to three
    pixels off.
    """

    def forward(layer: nn.Linear, states: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return F.linear(states.float(), layer.weight, layer.bias)

    for name, layer in model.named_modules():
        if "bbox" in name and isinstance(layer, nn.Linear):
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]


def load(
    name: str,
    *,
    device: torch.device,
    precision: str = "no",
    revision: str | None = None,
    text: str | Sequence[str] | None = None,
    score_threshold: float = 0.0,
    min_regions: int = 10,
    max_regions: int = 100,
) -> TransformersDetector:
    """
    Loads a detector of transformers from a folder or the Hub.

    Args:
        name (`str`): Folder or repository.
        device, precision, score_threshold, min_regions, max_regions: See `TransformersDetector`.
        revision (`str`, *optional*): Commit, branch or tag on the Hub.
        text (`str` or sequence of `str`, *optional*): Classes that Grounding DINO looks for, as a list or as
            `"a cat. a dog."`. They become the classes of the store.

    Raises:
        ValueError: The model is no detector, weights are missing, or a text is missing or is given to a model that
            takes none.
        OSError: The model is neither here nor on the Hub; the message says where it was looked for.
    """
    with fetching("transformers", name) as options:
        model, parts = _load(name, text, revision=revision, **options)
    return TransformersDetector(
        model,
        device=device,
        precision=precision,
        score_threshold=score_threshold,
        min_regions=min_regions,
        max_regions=max_regions,
        detector=f"transformers:{name}",
        detector_revision=model_revision(name, model.config),
        **parts,
    )


def _load(name: str, text: str | Sequence[str] | None, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Gives a model, and its image processor, prompt and classes."""
    config = AutoConfig.from_pretrained(name, **options)
    grounded = config.model_type in GROUNDED
    if grounded != bool(text):
        problem = "needs `text`, the classes to look for" if grounded else "takes no `text`: its classes are its own"
        raise ValueError(f"{name} is a {config.model_type}, which {problem}.")
    if config.to_dict().get("eval_idx", -1) not in (-1, config.to_dict().get("decoder_layers", 0) - 1):
        raise ValueError(f"{name} predicts from decoder layer {config.eval_idx}, expected the last one (eval_idx -1).")
    auto_class = AutoModelForZeroShotObjectDetection if grounded else AutoModelForObjectDetection
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    check_loaded(name, info)
    parts: dict[str, Any] = {"processor": AutoImageProcessor.from_pretrained(name, **options)}
    if text:
        classes = [word.strip() for word in (text.split(".") if isinstance(text, str) else text) if word.strip()]
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        return model, parts | {"prompt": Prompt(classes, tokenizer, config.max_text_len), "class_names": classes}
    names = [config.id2label[index] for index in range(config.num_labels)]
    unnamed = names == [f"LABEL_{index}" for index in range(len(names))]
    return model, parts | ({"num_classes": len(names)} if unnamed else {"class_names": names})
