"""
Regions by the Faster R-CNN of bottom-up attention (Anderson et al., arXiv 1707.07998), trained on Visual Genome.

It is read from a folder, or a repository of the Hub, with `config.yaml` and `model.safetensors` or `pytorch_model.bin`.
The weights may have either layout of `visual_genome_network`.
"""

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from huggingface_hub import snapshot_download
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from ...name_lists import did_you_mean, read_names
from ...records_unicoder_vl import RegionRecord
from ..shards import CLASS_FIELDS
from . import selection
from ._computing import DTYPES, Prepared, box_tensor, check_counts, fetching, file_revision, make_record
from .visual_genome_network import STRIDE, Config, FasterRCNN, module_state

CONFIG, NAMES = "config.yaml", "objects_vocab.txt"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CAFFE_SIZES = (600, 1000)  # pixels of the shorter side, and the most of the longer one
RULES = {"caffe": "proposal", "max-nms": "regressed"}  # rule -> kind of its boxes
# Ids and scores of objects, then of attributes (or None), `(n,)` each.
Classes = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class Prepare:
    """
    Scales a photo by its shorter side, and puts its channels into the network's order. The mean is subtracted later.
    """

    min_size: int
    max_size: int
    channels: str

    def __call__(self, image: Image) -> Prepared:
        width, height = image.size
        scale = min(self.min_size / min(width, height), self.max_size / max(width, height))
        # A photo of one row must give a cell, too.
        size = [max(int(side * scale + 0.5), STRIDE) for side in (height, width)]
        planes = pil_to_tensor(image)
        if self.channels == "BGR":
            planes = planes.flip(0)
        # One channel after the other: a photo of 100 megapixels is 1.2 GB in float32.
        scaled = [F.interpolate(plane[None, None].float(), size, mode="bilinear")[0, 0] for plane in planes]
        pixels = torch.stack([plane.round().to(torch.uint8) for plane in scaled])
        return Prepared(pixels, (width, height), (size[0], size[1]))


class VisualGenomeDetector:
    """
    A detector around the Faster R-CNN of bottom-up attention; see the module.

    Args:
        model (`FasterRCNN`): The network with its weights.
        device (`torch.device`): Device to compute on.
        precision (`str`, defaults to `"no"`): Precision of the convolutions: `"no"`, `"bf16"` or `"fp16"`.
        rule (`str`, defaults to `"caffe"`): Rule by which proposals become regions, `"caffe"` or `"max-nms"`, see
            `selection`.
        min_regions, max_regions (`int`, default to 100): Least and largest number of regions; 100/100 as in the paper,
            10/100 and 36/36 are common, too.
        preprocess (`str`, defaults to `"config"`): Scaling of photos: `"config"` as config.yaml says, `"caffe"` as in
            training (the shorter side to 600 pixels, the longer one to at most 1000).
        class_probabilities (`bool`, defaults to `False`): Whether records hold the probability of each class.
        provenance: Further provenance of the store: `detector`, `detector_revision`, `class_names`.
    """

    def __init__(
        self,
        model: FasterRCNN,
        *,
        device: torch.device,
        precision: str = "no",
        rule: str = "caffe",
        min_regions: int = 100,
        max_regions: int = 100,
        preprocess: str = "config",
        class_probabilities: bool = False,
        **provenance: Any,
    ):
        check_counts(min_regions, max_regions)
        for name, value, known in (("rule", rule, RULES), ("preprocess", preprocess, ("config", "caffe"))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {list(known)}.")
        config = model.config
        self.model = model.eval().to(device).to(memory_format=torch.channels_last)
        self.model.cast(DTYPES.get(precision, torch.float32))
        self.device = device
        self.rule = rule
        self.min_regions, self.max_regions = min_regions, max_regions
        self.class_probabilities = class_probabilities
        sizes = CAFFE_SIZES if preprocess == "caffe" else (config.min_size, config.max_size)
        self.prepare = Prepare(*sizes, config.channels)
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None] for values in (config.pixel_mean, config.pixel_std)
        )
        thresholds: dict[str, Any] = {"rule": rule, "min_regions": min_regions, "max_regions": max_regions}
        if rule == "caffe":
            thresholds |= {"score": selection.SCORE_THRESHOLD, "nms": selection.NMS_THRESHOLD}
        else:
            thresholds |= {"nms": list(config.nms_thresholds)}
        thresholds |= {"preprocess": preprocess, "min_size": sizes[0], "max_size": sizes[1]}
        settings: dict[str, Any] = {
            "box_type": RULES[rule],
            "thresholds": thresholds,
            "num_classes": config.num_classes,
        }
        self.provenance = settings | provenance

    @torch.inference_mode()
    def __call__(
        self, prepared: Sequence[Prepared], image_ids: Sequence[str], boxes: Sequence[np.ndarray] | None = None
    ) -> list[RegionRecord]:
        pixels = [(photo.pixels.to(self.device).float() - self.mean) / self.std for photo in prepared]
        maps = self.model.backbone([photo.to(self.model.dtype) for photo in pixels])
        records = []
        for row, (features, photo, image_id) in enumerate(zip(maps, prepared, image_ids, strict=True)):
            (width, height), (rows, columns) = photo.size, photo.content
            scale = torch.tensor((columns / width, rows / height) * 2, device=self.device)
            if boxes is None:
                found, pooled = self._detect(features, photo.content, columns / width)
                corners = found / scale
            else:
                corners = box_tensor(image_id, boxes[row], self.device)
                pooled = self.model.pool(features, corners * scale)
            probabilities, attributes = self.model.classify(pooled)
            labels: dict[str, Any] = dict(zip(CLASS_FIELDS, _best(probabilities, attributes), strict=True))
            if self.class_probabilities:
                labels["class_probabilities"] = probabilities
            records.append(make_record(image_id, photo.size, corners, pooled, **labels))
        return records

    def _detect(self, features: Tensor, size: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
        """Gives boxes in the scaled photo, and their features, of the regions that the rule keeps."""
        counts = {"min_regions": self.min_regions, "max_regions": self.max_regions}
        boxes = self.model.propose(features, size, scale)
        pooled = self.model.pool(features, boxes)
        probabilities, _ = self.model.classify(pooled)
        if self.rule == "caffe":
            kept = selection.caffe(self.model.with_extent(boxes), probabilities, **counts)
        else:
            scores, classes = probabilities.max(1)
            boxes = self.model.clip(self.model.regress(pooled, boxes, classes), size)
            thresholds = self.model.config.nms_thresholds
            kept = selection.max_nms(self.model.with_extent(boxes), scores, nms_thresholds=thresholds, **counts)
        return boxes[kept], pooled[kept]

    @torch.inference_mode()
    def classify(self, features: np.ndarray) -> Classes:
        """
        Classifies stored features `(n, D)` by the heads: gives object ids and scores, and attribute ids and scores or
        None, `(n,)` each. Raises ValueError on another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.model.config.feature_dim:
            raise ValueError(f"features have shape {features.shape}, expected (n, {self.model.config.feature_dim}).")
        return _best(*self.model.classify(torch.from_numpy(features.astype(np.float32)).to(self.device)))


def _best(probabilities: Tensor, attributes: Tensor | None) -> Classes:
    object_scores, object_ids = (x.cpu().numpy() for x in probabilities.max(1))
    if attributes is None:
        return object_ids, object_scores, None, None
    attribute_scores, attribute_ids = (x.cpu().numpy() for x in attributes.max(1))
    return object_ids, object_scores, attribute_ids, attribute_scores


def load(
    name: str,
    *,
    device: torch.device,
    precision: str = "no",
    rule: str = "caffe",
    min_regions: int = 100,
    max_regions: int = 100,
    preprocess: str = "config",
    class_probabilities: bool = False,
    class_names: str | PathLike | Sequence[str] | None = None,
    revision: str | None = None,
) -> VisualGenomeDetector:
    """
    Loads a detector from a folder or from the Hub. The other arguments are those of `VisualGenomeDetector`.

    Args:
        name (`str`): The folder or the repository, such as `"unc-nlp/frcnn-vg-finetuned"`.
        class_names (`str`, `os.PathLike` or sequence of `str`, *optional*): Names of the classes, or a file of one name
            a line, synonyms after commas; None takes `objects_vocab.txt` beside the weights if there is one.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        OSError: There is no such folder, it lacks a file, or the Hub does not have it.
        ValueError: A file is malformed; the message names the file and the key.
    """
    folder, commit = _fetch(name, revision)
    weights_file, weights = _read_weights(folder)
    try:
        config = Config.from_yaml(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")), weights)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        state = module_state(weights, config)
    except ValueError as error:
        raise ValueError(f"{weights_file}: {error}") from error
    with torch.device("meta"):
        model = FasterRCNN(config)
    model.load_state_dict(state, assign=True)
    return VisualGenomeDetector(
        model,
        device=device,
        precision=precision,
        rule=rule,
        min_regions=min_regions,
        max_regions=max_regions,
        preprocess=preprocess,
        class_probabilities=class_probabilities,
        class_names=_read_names(folder, class_names, config.num_classes),
        detector=f"visual-genome:{name if commit else folder.resolve().name}",
        detector_revision=commit or file_revision(weights_file),
    )


def _fetch(name: str, revision: str | None) -> tuple[Path, str | None]:
    """Gives the folder, and the commit if it is from the Hub."""
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder and has no revision {revision!r}: leave it out.")
        return folder, None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        meant = did_you_mean(name, (each.name for each in Path().iterdir()))
        raise FileNotFoundError(f"{name} is neither a folder nor a repository of the Hub, OWNER/NAME.{meant}")
    with fetching("visual-genome", name) as options:
        files = [CONFIG, NAMES, *WEIGHTS]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, **options))
    return folder, folder.name


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not files or not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} must hold {CONFIG} and {' or '.join(WEIGHTS)}.")
    path = files[0]
    try:
        if path.suffix == ".safetensors":
            return path, safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of weights that loads without running code: {error}") from error
    weights = weights.get("model", weights)  # Detectron2 stores them beside its optimizer
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds more than named tensors: save the state dict alone.")
    return path, weights


def _read_names(folder: Path, names: str | PathLike | Sequence[str] | None, count: int) -> list[str] | None:
    if names is None and not (folder / NAMES).is_file():
        return None
    if names is None or isinstance(names, str | PathLike):
        names = [line.split(",")[0].strip() for line in read_names(names or folder / NAMES)]
    if len(names) != count:
        raise ValueError(f"There are {len(names)} class names, expected {count}: one a class, without background.")
    return list(names)
