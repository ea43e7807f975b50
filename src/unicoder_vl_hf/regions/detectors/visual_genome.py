"""
The Faster R-CNN of bottom-up attention (Anderson et al., arXiv 1707.07998): ResNet C4 on Visual Genome, inference only.

Reads a folder, or a repository of the Hub, of `config.yaml` and `model.safetensors` or `pytorch_model.bin`, in two layouts:

    frcnn   unc-nlp/frcnn-vg-finetuned: background is the last class, boxes end where the next pixel begins
    caffe   bottom-up-attention.pytorch's conversion: background first, boxes end on their last pixel

`parameter_shapes` lists what the weights must hold, no more and no less. Left out: training.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRIDE = 16  # pixels a cell of the C4 feature map
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
RPN = "proposal_generator.rpn_head"
HEADS = "roi_heads.box_predictor"
# A config of Detectron2 tells what differs from these; the flat one of frcnn tells everything.
DETECTRON2_DEFAULTS: dict[str, Any] = {
    "anchor_generator.aspect_ratios": [[0.5, 1.0, 2.0]],
    "anchor_generator.offset": 0.0,
    "bua.attribute_on": False,
    "bua.attribute.num_classes": 401,
    "input.format": "BGR",
    "input.max_size_test": 1333,
    "input.min_size_test": 800,
    "model.max_pool": False,
    "model.pixel_std": [1.0, 1.0, 1.0],
    "proposal_generator.min_size": 0,
    "resnets.num_groups": 1,
    "resnets.res2_out_channels": 256,
    "resnets.res5_dilation": 1,
    "resnets.stem_out_channels": 64,
    "resnets.stride_in_1x1": True,
    "resnets.width_per_group": 64,
    "roi_box_head.attr": False,
    "roi_box_head.bbox_reg_weights": [10.0, 10.0, 5.0, 5.0],
    "roi_box_head.num_attrs": 400,
    "roi_box_head.pooler_resolution": 14,
    "roi_box_head.res5halve": True,
    "roi_heads.nms_thresh_test": 0.5,
    "rpn.bbox_reg_weights": [1.0, 1.0, 1.0, 1.0],
    "rpn.nms_thresh": 0.7,
    "rpn.post_nms_topk_test": 1000,
    "rpn.pre_nms_topk_test": 6000,
}


@dataclass(frozen=True)
class Config:
    """What `config.yaml` says, and the two things that the weights say: their layout and the width of the RPN."""

    caffe: bool
    depth: int
    num_groups: int
    width_per_group: int
    stem_channels: int
    res2_channels: int
    stride_in_1x1: bool
    ceil_mode_pool: bool
    halve_res5: bool
    num_anchors: int
    anchor_offset: float
    rpn_channels: int
    rpn_box_weights: tuple[float, ...]
    rpn_nms: float
    rpn_min_size: float
    rpn_before_nms: int
    rpn_after_nms: int
    pool_size: int
    num_classes: int  # without background
    num_attributes: int  # without "none"; 0: no attribute head
    box_weights: tuple[float, ...]
    nms_thresholds: tuple[float, ...]
    channels: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    min_size: int
    max_size: int

    @property
    def feature_dim(self) -> int:
        """D, the width of a region's feature: 2048 unless the network is narrower."""
        return 8 * self.res2_channels

    @property
    def stages(self) -> list[tuple[str, int, int, int, int]]:
        """Of each stage: name, number of blocks, and channels coming in, within and going out."""
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
        model = tree.get("model", {})
        nested = "resnets" in model
        sections = model | tree
        caffe = _is_caffe(weights)

        def value(*names: str) -> Any:
            """Of the first of these names of one thing that is there."""
            for name in names:
                node: Any = sections
                for part in name.split("."):
                    node = node.get(part) if isinstance(node, dict) else None
                if node is not None:
                    # Detectron2 writes tuples, which YAML reads as text.
                    return ast.literal_eval(node) if isinstance(node, str) and node.startswith("(") else node
            if nested and names[0] in DETECTRON2_DEFAULTS:
                return DETECTRON2_DEFAULTS[names[0]]
            raise ValueError(f"{names[0]} is missing.")

        depth, channels = value("resnets.depth"), value("input.format")
        if depth not in BLOCKS:
            raise ValueError(f"resnets.depth is {depth!r}, expected one of {list(BLOCKS)}.")
        if channels not in ("BGR", "RGB"):
            raise ValueError(f"input.format is {channels!r}, expected BGR or RGB.")
        if "bua" in model:
            num_attributes = value("bua.attribute.num_classes") - 1 if value("bua.attribute_on") else 0
        else:
            num_attributes = value("roi_box_head.num_attrs") if value("roi_box_head.attr") else 0
        res2_channels = value("resnets.res2_out_channels")
        rpn_conv = weights.get(f"{RPN}.conv.weight")
        nms = value("roi_heads.nms_thresh_test")
        return cls(
            caffe=caffe,
            depth=depth,
            num_groups=value("resnets.num_groups"),
            width_per_group=value("resnets.width_per_group"),
            stem_channels=value("resnets.stem_out_channels"),
            res2_channels=res2_channels,
            stride_in_1x1=value("resnets.stride_in_1x1"),
            ceil_mode_pool="bua" in model or value("model.max_pool", "model.caffe_maxpool"),
            halve_res5=value("resnets.res5_dilation") == 1 and value("roi_box_head.res5halve"),
            num_anchors=len(value("anchor_generator.sizes")[0]) * len(value("anchor_generator.aspect_ratios")[0]),
            anchor_offset=value("anchor_generator.offset"),
            rpn_channels=4 * res2_channels if rpn_conv is None else len(rpn_conv),
            rpn_box_weights=tuple(value("rpn.bbox_reg_weights")),
            rpn_nms=value("rpn.nms_thresh"),
            rpn_min_size=value("proposal_generator.min_size"),
            rpn_before_nms=value("rpn.pre_nms_topk_test"),
            rpn_after_nms=value("rpn.post_nms_topk_test"),
            pool_size=value("roi_box_head.pooler_resolution"),
            num_classes=value("roi_heads.num_classes") - caffe,
            num_attributes=num_attributes,
            box_weights=tuple(value("roi_box_head.bbox_reg_weights")),
            nms_thresholds=tuple(nms) if isinstance(nms, list | tuple) else (nms,),
            channels=channels,
            pixel_mean=tuple(value("model.pixel_mean")),
            pixel_std=tuple(value("model.pixel_std")),
            min_size=value("input.min_size_test"),
            max_size=value("input.max_size_test"),
        )


def _lower(node: Any) -> Any:
    return {str(key).lower(): _lower(value) for key, value in node.items()} if isinstance(node, dict) else node


def _is_caffe(weights: Mapping[str, Tensor]) -> bool:
    """Only Caffe regresses a box for the background, too."""
    scores, boxes = weights.get(f"{HEADS}.cls_score.weight"), weights.get(f"{HEADS}.bbox_pred.weight")
    return scores is not None and boxes is not None and len(boxes) == 4 * len(scores)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything that the weights must hold. `norm.num_batches_tracked` may stand beside it."""
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


ATTRIBUTE_HEAD = ("cls_embedding", "fc_attr", "attr_score")
CAFFE_ATTRIBUTE_HEAD = ("cls_embed", "attr_linear1", "attr_linear2")
