"""
The Faster R-CNN of bottom-up attention (Anderson et al., arXiv 1707.07998), for inference: ResNet C4 and its heads.

Its weights come in two layouts, told apart by their shapes:

    frcnn   unc-nlp/frcnn-vg-finetuned: background is the last class, x2 - x1 is the width of a box
    caffe   as bottom-up-attention.pytorch converts Caffe's: background is the first, x2 - x1 + 1 is the width

`parameter_shapes` lists the tensors that the weights must hold, no more and no less. Left out: training, and reading
files.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_pool

ROIS_AT_ONCE = 100  # each intermediate result of a stage takes 0.3 GB for this many
STRIDE = 16  # pixels a cell of the C4 feature map
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
RPN = "proposal_generator.rpn_head"
HEADS = "roi_heads.box_predictor"
ATTRIBUTE_HEAD = ("cls_embedding", "fc_attr", "attr_score")
CAFFE_ATTRIBUTE_HEAD = ("cls_embed", "attr_linear1", "attr_linear2")


def _setting(key: str, default: Any = None) -> Any:
    """
    Makes a field that is a value of `config.yaml`. A config of Detectron2 holds only values that differ from `default`;
    the flat one of frcnn holds all.
    """
    return field(metadata={"key": key, "default": default})


@dataclass(frozen=True)
class Config:
    """The settings of `config.yaml`, and two that the weights tell: their layout and the width of the RPN."""

    caffe: bool
    rpn_channels: int
    num_anchors: int
    num_classes: int  # without background
    num_attributes: int  # without "none"; 0 where there is no attribute head
    ceil_mode_pool: bool
    halve_res5: bool
    nms_thresholds: tuple[float, ...]
    depth: int = _setting("resnets.depth")
    num_groups: int = _setting("resnets.num_groups", 1)
    width_per_group: int = _setting("resnets.width_per_group", 64)
    stem_channels: int = _setting("resnets.stem_out_channels", 64)
    res2_channels: int = _setting("resnets.res2_out_channels", 256)
    stride_in_1x1: bool = _setting("resnets.stride_in_1x1", True)
    anchor_offset: float = _setting("anchor_generator.offset", 0.0)
    rpn_box_weights: tuple[float, ...] = _setting("rpn.bbox_reg_weights", (1.0, 1.0, 1.0, 1.0))
    rpn_nms: float = _setting("rpn.nms_thresh", 0.7)
    rpn_min_size: float = _setting("proposal_generator.min_size", 0)
    rpn_before_nms: int = _setting("rpn.pre_nms_topk_test", 6000)
    rpn_after_nms: int = _setting("rpn.post_nms_topk_test", 1000)
    pool_size: int = _setting("roi_box_head.pooler_resolution", 14)
    box_weights: tuple[float, ...] = _setting("roi_box_head.bbox_reg_weights", (10.0, 10.0, 5.0, 5.0))
    channels: str = _setting("input.format", "BGR")
    pixel_mean: tuple[float, ...] = _setting("model.pixel_mean")
    pixel_std: tuple[float, ...] = _setting("model.pixel_std", (1.0, 1.0, 1.0))
    min_size: int = _setting("input.min_size_test", 800)
    max_size: int = _setting("input.max_size_test", 1333)

    @property
    def feature_dim(self) -> int:
        """The width D of a region's feature: 2048 unless the network is narrower."""
        return 8 * self.res2_channels

    @property
    def stages(self) -> list[tuple[str, int, int, int, int]]:
        """The stages of the network: name, number of blocks, and channels coming in, within and going out of each."""
        names = ("backbone.res2", "backbone.res3", "backbone.res4", "roi_heads.res5")
        width, incoming, stages = self.num_groups * self.width_per_group, self.stem_channels, []
        for number, (name, blocks) in enumerate(zip(names, BLOCKS[self.depth], strict=True)):
            outgoing = self.res2_channels * 2**number
            stages.append((name, blocks, incoming, width * 2**number, outgoing))
            incoming = outgoing
        return stages

    @classmethod
    def from_yaml(cls, yaml: Mapping[str, Any], weights: Mapping[str, Tensor]) -> "Config":
        """
        Reads the flat layout of frcnn and the nested one of Detectron2, in any case of letters.

        Raises:
            ValueError: A key is missing or has a value that this network cannot have; the message names it.
        """
        tree = _lower(yaml)
        model = tree.get("model") if isinstance(tree, dict) else None
        if not isinstance(model, dict):
            raise ValueError("model is missing.")
        nested = "resnets" in model
        sections = model | tree
        caffe = _is_caffe(weights)

        def value(key: str, default: Any = None) -> Any:
            node: Any = sections
            for part in key.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            if node is None and nested:
                node = default
            if node is None:
                raise ValueError(f"{key} is missing.")
            # Detectron2 writes tuples, and YAML reads them as text.
            return ast.literal_eval(node) if isinstance(node, str) and node.startswith("(") else node

        settings = {entry.name: value(**entry.metadata) for entry in fields(cls) if entry.metadata}
        for name in ("rpn_box_weights", "box_weights", "pixel_mean", "pixel_std"):
            settings[name] = tuple(settings[name])
        if settings["depth"] not in BLOCKS:
            raise ValueError(f"resnets.depth is {settings['depth']!r}, expected one of {list(BLOCKS)}.")
        if settings["channels"] not in ("BGR", "RGB"):
            raise ValueError(f"input.format is {settings['channels']!r}, expected BGR or RGB.")
        if "bua" in model:
            num_attributes = value("bua.attribute.num_classes", 401) - 1 if value("bua.attribute_on", False) else 0
        else:
            num_attributes = value("roi_box_head.num_attrs", 400) if value("roi_box_head.attr", False) else 0
        pool = "model.caffe_maxpool" if model.get("max_pool") is None else "model.max_pool"
        rpn_conv = weights.get(f"{RPN}.conv.weight")
        nms = value("roi_heads.nms_thresh_test", 0.5)
        anchors = value("anchor_generator.sizes")[0], value("anchor_generator.aspect_ratios", [[0.5, 1.0, 2.0]])[0]
        return cls(
            caffe=caffe,
            rpn_channels=4 * settings["res2_channels"] if rpn_conv is None else len(rpn_conv),
            num_anchors=len(anchors[0]) * len(anchors[1]),
            num_classes=value("roi_heads.num_classes") - caffe,
            num_attributes=num_attributes,
            ceil_mode_pool="bua" in model or value(pool, False),
            halve_res5=value("resnets.res5_dilation", 1) == 1 and value("roi_box_head.res5halve", True),
            nms_thresholds=tuple(nms) if isinstance(nms, list | tuple) else (nms,),
            **settings,
        )


def _lower(node: Any) -> Any:
    return {str(key).lower(): _lower(value) for key, value in node.items()} if isinstance(node, dict) else node


def _is_caffe(weights: Mapping[str, Tensor]) -> bool:
    """Tells whether weights are in the layout of Caffe, which alone regresses a box for the background, too."""
    scores, boxes = weights.get(f"{HEADS}.cls_score.weight"), weights.get(f"{HEADS}.bbox_pred.weight")
    return scores is not None and boxes is not None and len(boxes) == 4 * len(scores)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """
    Gives the name and shape of every tensor that the weights must hold. `norm.num_batches_tracked` may be there, too.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, outgoing: int, incoming: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outgoing, incoming, kernel, kernel)
        shapes.update({f"{name}.norm.{part}": (outgoing,) for part in BATCH_NORM})

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    convolution("backbone.stem.conv1", config.stem_channels, 3, 7)
    for stage, blocks, incoming, width, outgoing in config.stages:
        for block in range(blocks):
            if incoming != outgoing:
                convolution(f"{stage}.{block}.shortcut", outgoing, incoming, 1)
            convolution(f"{stage}.{block}.conv1", width, incoming, 1)
            convolution(f"{stage}.{block}.conv2", width, width // config.num_groups, 3)
            convolution(f"{stage}.{block}.conv3", outgoing, width, 1)
            incoming = outgoing

    shapes[ANCHORS] = (config.num_anchors, 4)
    layer(f"{RPN}.conv", config.rpn_channels, 4 * config.res2_channels, 3, 3)
    # Caffe has a logit for "no object", too.
    layer(f"{RPN}.objectness_logits", config.num_anchors * (1 + config.caffe), config.rpn_channels, 1, 1)
    layer(f"{RPN}.anchor_deltas", config.num_anchors * 4, config.rpn_channels, 1, 1)

    width, classes = config.feature_dim, config.num_classes
    layer(f"{HEADS}.cls_score", classes + 1, width)
    layer(f"{HEADS}.bbox_pred", 4 * (classes + config.caffe), width)
    if config.num_attributes:
        embedding, hidden, score = CAFFE_ATTRIBUTE_HEAD if config.caffe else ATTRIBUTE_HEAD
        shapes[f"{HEADS}.{embedding}.weight"] = (classes + 1, width // 8)
        layer(f"{HEADS}.{hidden}", width // 4, width + width // 8)
        layer(f"{HEADS}.{score}", config.num_attributes + 1, width // 4)
    return shapes


def module_state(weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """
    Gives the weights as `FasterRCNN` holds them: batch norm folded into the convolutions, background last.

    Raises:
        ValueError: A tensor is missing, unused or of another shape than `parameter_shapes` says; the message names it.
    """
    expected = parameter_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} has no use" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{'; '.join(sorted(problems)[:5])}{more}: are config.yaml and weights of one model?")

    tensors = {name: weights[name].float() for name in expected}
    state = {}
    for name, tensor in tensors.items():
        norm = f"{name.removesuffix('weight')}norm"
        if f"{norm}.weight" in tensors:
            weight, bias, mean, variance = (tensors[f"{norm}.{part}"] for part in BATCH_NORM)
            scale = weight / (variance + 1e-5).sqrt()
            state[name] = tensor * scale[:, None, None, None]
            state[f"{name.removesuffix('weight')}bias"] = bias - mean * scale
        elif ".norm." not in name:
            state[name] = tensor
    if config.caffe:
        state = _background_last(state)
    state["anchors"] = state.pop(ANCHORS)
    containers = re.compile(r"^(backbone|roi_heads|proposal_generator)\.(box_predictor\.)?")
    return {containers.sub("", name): tensor for name, tensor in state.items()}


def _background_last(caffe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in caffe.items():
        for old, new in zip(CAFFE_ATTRIBUTE_HEAD, ATTRIBUTE_HEAD, strict=True):
            name = name.replace(f".{old}.", f".{new}.")
        if re.search(r"\.(cls_score|cls_embedding|attr_score)\.", name):
            tensor = tensor.roll(-1, 0)
        elif ".bbox_pred." in name:
            tensor = tensor[4:]
        elif ".objectness_logits." in name:
            # The softmax of two logits is the sigmoid of their difference.
            nothing, something = tensor.chunk(2)
            tensor = something - nothing
        state[name] = tensor
    return state


class Bottleneck(nn.Module):
    """A residual block. Its batch norm is frozen and therefore part of the convolutions: see `module_state`."""

    def __init__(self, config: Config, incoming: int, width: int, outgoing: int, stride: int, dilation: int):
        super().__init__()
        first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.stride, self.first = stride, first
        self.shortcut = nn.Conv2d(incoming, outgoing, 1, stride) if incoming != outgoing else nn.Identity()
        self.conv1 = nn.Conv2d(incoming, width, 1, first)
        self.conv2 = nn.Conv2d(width, width, 3, second, dilation, dilation, config.num_groups)
        self.conv3 = nn.Conv2d(width, outgoing, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.conv1(x).relu_()
        if mask is not None:
            # Only the 3x3 convolution looks at its neighbours: outside the photo it must find zeros, as at a border.
            y = y * mask[:, :, :: self.first, :: self.first]
            mask = mask[:, :, :: self.stride, :: self.stride]
        y = self.conv3(self.conv2(y).relu_())
        return (y + self.shortcut(x)).relu_(), mask


class FasterRCNN(nn.Module):
    """The network. Coordinates are pixels of the scaled photo, in float32 whatever the dtype of the convolutions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.extent = float(config.caffe)  # the width of a box is x2 - x1 plus this
        self.stem = nn.ModuleDict({"conv1": nn.Conv2d(3, config.stem_channels, 7, 2, 3)})
        self.res2, self.res3, self.res4, self.res5 = (
            self._stage(incoming, width, outgoing, blocks, halve, dilate)
            for (_, blocks, incoming, width, outgoing), halve, dilate in zip(
                config.stages,
                (False, True, True, config.halve_res5),
                (False, False, False, not config.halve_res5),
                strict=True,
            )
        )
        hidden, anchors = config.rpn_channels, config.num_anchors
        self.rpn_head = nn.ModuleDict(
            {
                "conv": nn.Conv2d(4 * config.res2_channels, hidden, 3, padding=1),
                "objectness_logits": nn.Conv2d(hidden, anchors, 1),
                "anchor_deltas": nn.Conv2d(hidden, 4 * anchors, 1),
            }
        )
        self.anchors = nn.Buffer(torch.zeros(anchors, 4))
        width = config.feature_dim
        self.cls_score = nn.Linear(width, config.num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * config.num_classes)
        if config.num_attributes:
            self.cls_embedding = nn.Embedding(config.num_classes + 1, width // 8)
            self.fc_attr = nn.Linear(width + width // 8, width // 4)
            self.attr_score = nn.Linear(width // 4, config.num_attributes + 1)

    def _stage(self, incoming: int, width: int, outgoing: int, blocks: int, halve: bool, dilate: bool) -> nn.ModuleList:
        dilation = 2 if dilate else 1
        first = Bottleneck(self.config, incoming, width, outgoing, 2 if halve else 1, dilation)
        others = (Bottleneck(self.config, outgoing, width, outgoing, 1, dilation) for _ in range(blocks - 1))
        return nn.ModuleList([first, *others])

    def cast(self, dtype: torch.dtype) -> None:
        """Puts the heavy convolutions into `dtype`. The layers that decide about classes and boxes stay in float32."""
        self.dtype = dtype
        for module in (self.stem, self.res2, self.res3, self.res4, self.res5, self.rpn_head["conv"]):
            module.to(dtype)

    def grid_size(self, pixels: int) -> int:
        """Gives the number of cells of the feature map along a side of `pixels` pixels."""
        cells = (pixels + 1) // 2
        cells = cells // 2 if self.config.ceil_mode_pool else (cells + 1) // 2
        return math.ceil(cells / 4)

    def backbone(self, photos: Sequence[Tensor]) -> list[Tensor]:
        """
        Gives feature maps `(1, C, h, w)` of photos `(3, H, W)` of any sizes, each equal to that of the photo alone.
        """
        height, width = (max(photo.shape[side] for photo in photos) for side in (1, 2))
        x = photos[0].new_zeros(len(photos), 3, height, width)
        mask = x.new_zeros(len(photos), 1, height, width)
        for row, photo in enumerate(photos):
            x[row, :, : photo.shape[1], : photo.shape[2]] = photo
            mask[row, :, : photo.shape[1], : photo.shape[2]] = 1
        padded: Tensor | None = mask if len({photo.shape for photo in photos}) > 1 else None

        x = self.stem["conv1"](x).relu_()
        ceil = self.config.ceil_mode_pool
        if padded is not None:
            padded = padded[:, :, ::2, ::2]
            # After relu, zeros do not change a maximum.
            x = x * padded
            padded = padded[:, :, 1::2, 1::2] if ceil else padded[:, :, ::2, ::2]
        x = F.max_pool2d(x, 3, 2, 0 if ceil else 1, ceil_mode=ceil)
        for block in (*self.res2, *self.res3, *self.res4):
            x, padded = block(x, padded)
        return [
            x[row : row + 1, :, : self.grid_size(photo.shape[1]), : self.grid_size(photo.shape[2])]
            for row, photo in enumerate(photos)
        ]

    def propose(self, features: Tensor, size: tuple[int, int], scale: float) -> Tensor:
        """
        Gives proposals `(n, 4)` of one photo, best first. `size` is its height and width, `scale` the factor by which
        it was scaled.
        """
        config = self.config
        hidden = self.rpn_head["conv"](features).relu_().float()
        objectness = self.rpn_head["objectness_logits"](hidden)[0].permute(1, 2, 0).flatten()
        deltas = self.rpn_head["anchor_deltas"](hidden)[0].permute(1, 2, 0).reshape(-1, 4)
        boxes = self.decode(self.anchor_grid(*features.shape[2:]), deltas, config.rpn_box_weights)
        boxes = self.clip(boxes, size)
        # Caffe measures in pixels of the photo before scaling, and drops small boxes before it counts.
        smallest = config.rpn_min_size * (scale if config.caffe else 1)
        large = (boxes[:, 2:] - boxes[:, :2] + self.extent > smallest).all(1)
        rank = objectness.where(large, -math.inf) if config.caffe else objectness
        order = rank.argsort(descending=True, stable=True)[: config.rpn_before_nms]
        order = order[large[order]]
        boxes, objectness = boxes[order], objectness[order]
        boxes = boxes[nms(self.with_extent(boxes), objectness, config.rpn_nms)[: config.rpn_after_nms]]
        if len(boxes):
            return boxes
        # Odd photos or odd weights may give no proposal at all: then the whole photo is the region.
        whole = boxes.new_tensor([[0, 0, size[1], size[0]]])
        return self.clip(whole, size)

    def anchor_grid(self, height: int, width: int) -> Tensor:
        """Gives the anchors `(height * width * A, 4)`: rows, columns, then the A shapes."""
        y, x = torch.meshgrid(
            *(torch.arange(n, device=self.anchors.device) + self.config.anchor_offset for n in (height, width)),
            indexing="ij",
        )
        corners = torch.stack((x, y, x, y), 2) * STRIDE
        return (corners[:, :, None] + self.anchors).reshape(-1, 4)

    def decode(self, boxes: Tensor, deltas: Tensor, weights: Sequence[float]) -> Tensor:
        """Moves and scales boxes `(n, 4)` by the deltas that a head predicts, `(n, 4)`."""
        shift, growth = (deltas / deltas.new_tensor(weights)).split(2, 1)
        size = boxes[:, 2:] - boxes[:, :2] + self.extent
        center = boxes[:, :2] + size / 2 + shift * size
        size = size * growth.clamp(max=math.log(1000 / 16)).exp()
        return torch.cat((center - size / 2, center + size / 2), 1)

    def clip(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Clips boxes `(n, 4)` to a photo of this height and width."""
        height, width = (side - self.extent for side in size)
        return boxes.clamp(min=0).minimum(boxes.new_tensor((width, height, width, height)))

    def with_extent(self, boxes: Tensor) -> Tensor:
        """Gives boxes whose overlap, computed by torchvision, is the overlap that this layout defines."""
        return boxes + boxes.new_tensor((0, 0, self.extent, self.extent))

    def pool(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Gives the features `(n, D)` of boxes `(n, 4)`, in float32."""
        features = features.float()  # roi_pool does not take bfloat16
        pooled = []
        for some in boxes.split(ROIS_AT_ONCE):
            x = roi_pool(features, [some], self.config.pool_size, 1 / STRIDE).to(self.dtype)
            for block in self.res5:
                x, _ = block(x)
            pooled.append(x.mean((2, 3), dtype=torch.float32))
        return torch.cat(pooled)

    def classify(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Gives the probabilities of the classes `(n, K)` and attributes `(n, A)`, 0 to 1, without background and without
        "none".
        """
        logits = self.cls_score(features)
        probabilities = logits.softmax(1)[:, :-1]
        if not self.config.num_attributes:
            return probabilities, None
        embedded = self.cls_embedding(logits.argmax(1))
        logits = self.attr_score(self.fc_attr(torch.cat((features, embedded), 1)).relu())
        # In one of the two tools "none" takes part in the softmax, in the other not.
        return probabilities, logits.softmax(1)[:, :-1] if self.config.caffe else logits[:, :-1].softmax(1)

    def regress(self, features: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
        """Gives the boxes `(n, 4)` regressed for the classes `(n,)`."""
        deltas = self.bbox_pred(features).view(len(boxes), -1, 4)
        return self.decode(
            boxes, deltas[torch.arange(len(boxes), device=boxes.device), classes], self.config.box_weights
        )
