"""
Detectors of torchvision that have a box head: `fasterrcnn_resnet50_fpn_v2` and its relatives, Mask R-CNN included.

The feature of a region is the output of the box head (1024-d) for its box: the model finds its boxes as in its own
forward pass, then the head reads them once more. So a box has the same feature whether it is detected or given.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.models import WeightsEnum, detection, get_model, get_model_weights, list_models
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.transforms.functional import pil_to_tensor

from ...name_lists import did_you_mean
from ...records_unicoder_vl import RegionRecord
from ._computing import Prepared, autocast, box_tensor, check_counts, file_revision, in_groups_of_shape, make_record

NAMES = [name for name in list_models(module=detection) if "rcnn" in name]


@dataclass(frozen=True)
class Prepare:
    """Scales a photo as the model's own transform does, and pads it as if it were alone in its batch."""

    transform: GeneralizedRCNNTransform

    def __call__(self, image: Image) -> Prepared:
        scaled, _ = self.transform.resize(self.transform.normalize(pil_to_tensor(image) / 255))
        padded = self.transform.batch_images([scaled], self.transform.size_divisible)[0]
        return Prepared(padded, image.size, tuple(scaled.shape[-2:]))


class TorchvisionDetector:
    """
    A detector around a model of torchvision; see the module.

    Args:
        model (`GeneralizedRCNN`): Model with a box head and a box predictor.
        device (`torch.device`): Device to compute on.
        precision (`str`, defaults to `"no"`): Precision of the backbone and the box head: `"no"`, `"bf16"` or `"fp16"`.
        score_threshold (`float`, defaults to 0.05): Score (0 to 1) above which boxes are kept, within the next two
            limits.
        min_regions, max_regions (`int`, defaults to 10 and 100): Least and largest number of boxes to keep, by rank.
        provenance: Further provenance of the store: `detector`, `detector_revision`, `class_names`.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        device: torch.device,
        precision: str = "no",
        score_threshold: float = 0.05,
        min_regions: int = 10,
        max_regions: int = 100,
        **provenance: Any,
    ):
        check_counts(min_regions, max_regions)
        self.model = model.eval().to(device)
        self.prepare = Prepare(model.transform)
        self.device = device
        self.precision = precision
        self.score_threshold = score_threshold
        self.min_regions = min_regions
        self.model.roi_heads.detections_per_img = max_regions
        thresholds = {"score": score_threshold, "min_regions": min_regions, "max_regions": max_regions}
        num_classes = model.roi_heads.box_predictor.cls_score.out_features - 1
        known = {"box_type": "regressed", "thresholds": thresholds, "num_classes": num_classes}
        self.provenance = known | provenance

    @torch.inference_mode()
    def __call__(
        self, prepared: Sequence[Prepared], image_ids: Sequence[str], boxes: Sequence[np.ndarray] | None = None
    ) -> list[RegionRecord]:
        """
        Gives the records of photos; see `Detector`. Given boxes get the class that the box predictor finds likeliest,
        and its score.
        """
        return in_groups_of_shape(self._compute, prepared, image_ids, boxes)

    def _compute(
        self, photos: Sequence[Prepared], image_ids: Sequence[str], given: Sequence[np.ndarray] | None
    ) -> list[RegionRecord]:
        """Gives the records of photos whose pixels have equal shapes."""
        pixels = torch.stack([photo.pixels for photo in photos]).to(self.device)
        images = ImageList(pixels, [photo.content for photo in photos])
        with autocast(self.device, self.precision):
            levels = self.model.backbone(pixels)
        # From here in float32: anchors take the dtype of the features, and bf16 cannot tell neighbouring pixels above
        # 256 apart.
        levels = {name: level.float() for name, level in levels.items()}
        if given is None:
            found = self._detect(images, levels)
            inputs = [boxes for boxes, _, _ in found]
            outputs = [
                resize_boxes(boxes, list(photo.content), list(photo.size[::-1]))
                for boxes, photo in zip(inputs, photos, strict=True)
            ]
            features = self._features(levels, inputs, images)
        else:
            outputs = [
                box_tensor(image_id, boxes, self.device) for image_id, boxes in zip(image_ids, given, strict=True)
            ]
            inputs = [
                resize_boxes(boxes, list(photo.size[::-1]), list(photo.content))
                for boxes, photo in zip(outputs, photos, strict=True)
            ]
            features = self._features(levels, inputs, images)
            best = self.model.roi_heads.box_predictor(features)[0].softmax(-1)[:, 1:].max(-1)
            counts = [len(boxes) for boxes in outputs]
            found = list(zip(inputs, best.values.split(counts), (best.indices + 1).split(counts), strict=True))
        return [
            # Label 0 is the background.
            make_record(image_id, photo.size, boxes, rows, object_ids=labels - 1, object_scores=scores)
            for image_id, photo, boxes, rows, (_, scores, labels) in zip(
                image_ids, photos, outputs, features.split([len(boxes) for boxes in outputs]), found, strict=True
            )
        ]

    def _features(self, levels: dict[str, Tensor], boxes: list[Tensor], images: ImageList) -> Tensor:
        """Gives one row a box, photo after photo."""
        pooled = self.model.roi_heads.box_roi_pool(levels, boxes, images.image_sizes)
        with autocast(self.device, self.precision):
            return self.model.roi_heads.box_head(pooled).float()

    def _detect(self, images: ImageList, levels: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """
        Gives boxes in the scaled photo, scores and labels of each photo, best first, as torchvision's own forward pass
        does.
        """
        heads = self.model.roi_heads
        proposals, _ = self.model.rpn(images, levels)
        logits, regression = heads.box_predictor(self._features(levels, proposals, images))

        def kept(threshold: float, rows: slice, photos: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
            heads.score_thresh = threshold
            sizes = images.image_sizes[photos]
            columns = heads.postprocess_detections(logits[rows], regression[rows], proposals[photos], sizes)
            return list(zip(*columns, strict=True))

        found = kept(self.score_threshold, slice(None), slice(None))
        ends = np.cumsum([len(boxes) for boxes in proposals])
        for index, (_, scores, _) in enumerate(found):
            if len(scores) < self.min_regions:
                # NMS goes by rank, so boxes above the threshold come first here, too.
                rows = slice(ends[index] - len(proposals[index]), ends[index])
                ((boxes, scores, labels),) = kept(0.0, rows, slice(index, index + 1))
                found[index] = boxes[: self.min_regions], scores[: self.min_regions], labels[: self.min_regions]
        return found


def load(
    name: str,
    *,
    device: torch.device,
    precision: str = "no",
    weights: str = "DEFAULT",
    score_threshold: float = 0.05,
    min_regions: int = 10,
    max_regions: int = 100,
) -> TorchvisionDetector:
    """
    Loads a model of torchvision by name.

    Args:
        name (`str`): One of `NAMES`.
        device, precision, score_threshold, min_regions, max_regions: See `TorchvisionDetector`.
        weights (`str`, defaults to `"DEFAULT"`): A name of torchvision, such as `"COCO_V1"`, or a file that holds a
            state dict, of any number of classes. Class names are known only for the weights of torchvision.

    Raises:
        ValueError: There is no such model or weights, or the file does not fit the model.
        OSError: The weights are not here and cannot be downloaded; the message says where they were looked for.
    """
    if name not in NAMES:
        meant = did_you_mean(name, NAMES)
        raise ValueError(f"torchvision has no detector {name!r} with a box head, expected one of {NAMES}.{meant}")
    published = get_model_weights(name)
    if Path(weights).is_file():
        revision = file_revision(weights)
        model = _from_file(name, Path(weights))
        # The names of torchvision's files end with the beginning of their SHA-256.
        digest = revision.removeprefix("sha256:")[:8]
        known = next((one for one in published if Path(one.url).stem.endswith(digest)), None)
    elif weights in published.__members__:
        known = published[weights]
        revision = Path(known.url).name
        model = _download(name, known)
    else:
        raise ValueError(f"weights is {weights!r}, neither a file nor one of {list(published.__members__)}.")
    return TorchvisionDetector(
        model,
        device=device,
        precision=precision,
        score_threshold=score_threshold,
        min_regions=min_regions,
        max_regions=max_regions,
        detector=f"torchvision:{name}",
        detector_revision=revision,
        **_classes(known),
    )


def _classes(weights: WeightsEnum | None) -> dict[str, list[str]]:
    """
    Gives the names of the classes without the background, which is first. COCO's table of 90 has ten ids that are no
    class, each named N/A.
    """
    return {} if weights is None else {"class_names": list(weights.meta["categories"][1:])}


def _download(name: str, weights: WeightsEnum) -> GeneralizedRCNN:
    try:
        return get_model(name, weights=weights)
    except (OSError, HTTPException, RuntimeError) as error:  # no network, or a file that was cut off or damaged
        reason = error.reason if isinstance(error, URLError) else error
        file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        raise OSError(
            f"torchvision:{name} lacks its weights: they are not in {file}, and {weights.url} did not give them "
            f"({reason}). Fetch that file where it can be reached, put it there, or give it as "
            "weights=FILE (-o weights=FILE)."
        ) from error


def _from_file(name: str, path: Path) -> GeneralizedRCNN:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        num_classes = len(state["roi_heads.box_predictor.cls_score.bias"])
        model = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
        model.load_state_dict(state)
    except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} holds no state dict of {name}: {error}") from error
    return model
