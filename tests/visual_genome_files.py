"""
Files like those of unc-nlp/frcnn-vg-finetuned and of bottom-up-attention.pytorch, with random weights, and the same
network in torchvision's own modules. Imports nothing of ours.
"""

import copy
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import roi_pool

CLASSES, ATTRIBUTES, HIDDEN, POOL = 30, 7, 24, 4
SIZES, RATIOS = [32, 64], [0.5, 1.0, 2.0]


def full_yaml() -> dict:
    """What the tool's own code reads of unc-nlp/frcnn-vg-finetuned's config.yaml."""
    return {
        "anchor_generator": {
            "sizes": [[64, 128, 256, 512]],
            "aspect_ratios": [[0.5, 1.0, 2.0]],
            "offset": 0.0,
        },
        "backbone": {"freeze_at": 0},
        "input": {"format": "BGR", "min_size_test": 800, "max_size_test": 1333},
        "max_detections": 36,
        "min_detections": 36,
        "model": {
            "device": "cpu",
            "max_pool": True,
            "pixel_mean": [102.9801, 115.9465, 122.7717],
            "pixel_std": [1.0, 1.0, 1.0],
        },
        "pad_value": 0,
        "proposal_generator": {"hidden_channels": 512, "min_size": 0},
        "resnets": {
            "depth": 101,
            "norm": "BN",
            "num_groups": 1,
            "out_features": ["res4"],
            "res2_out_channels": 256,
            "res5_dilation": 1,
            "stem_out_channels": 64,
            "stride_in_1x1": True,
            "width_per_group": 64,
        },
        "roi_box_head": {
            "attr": True,
            "bbox_reg_weights": [10.0, 10.0, 5.0, 5.0],
            "cls_agnostic_bbox_reg": False,
            "num_attrs": 400,
            "pooler_resolution": 14,
            "pooler_sampling_ratio": 0,
            "res5halve": False,
        },
        "roi_heads": {"in_features": ["res4"], "nms_thresh_test": [0.6], "num_classes": 1600, "score_thresh_test": 0.2},
        "rpn": {
            "bbox_reg_weights": [1.0, 1.0, 1.0, 1.0],
            "in_features": ["res4"],
            "nms_thresh": 0.7,
            "post_nms_topk_test": 300,
            "pre_nms_topk_test": 6000,
        },
        "size_divisibility": 0,
    }


def small_yaml(**changes) -> dict:
    """Of a network that is narrow within its blocks and takes small photos; `section__key` changes a value."""
    changes = {
        "anchor_generator__sizes": [SIZES],
        "input__min_size_test": 96,
        "input__max_size_test": 200,
        "proposal_generator__hidden_channels": 32,
        "resnets__depth": 50,
        "resnets__width_per_group": 4,
        "roi_box_head__num_attrs": ATTRIBUTES,
        "roi_box_head__pooler_resolution": POOL,
        "roi_heads__num_classes": CLASSES,
        "rpn__pre_nms_topk_test": 200,
        "rpn__post_nms_topk_test": 60,
    } | changes
    tree = full_yaml()
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return tree


class Reference(nn.Module):
    """torchvision's ResNet as the config bends it, and the heads as plain layers."""

    def __init__(self, config: dict, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        resnets, box_head = config["resnets"], config["roi_box_head"]
        blocks = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[resnets["depth"]]
        self.resnet = ResNet(Bottleneck, blocks, width_per_group=resnets["width_per_group"], num_classes=1)
        self.anchors = cell_anchors(config)
        hidden, count = config["proposal_generator"]["hidden_channels"], len(self.anchors)
        self.conv = nn.Conv2d(1024, hidden, 3, padding=1)
        self.objectness_logits = nn.Conv2d(hidden, count, 1)
        self.anchor_deltas = nn.Conv2d(hidden, 4 * count, 1)
        classes, attributes = config["roi_heads"]["num_classes"], box_head["num_attrs"]
        self.cls_score = nn.Linear(2048, classes + 1)
        self.bbox_pred = nn.Linear(2048, 4 * classes)
        self.cls_embedding = nn.Embedding(classes + 1, 256)
        self.fc_attr = nn.Linear(2048 + 256, 512)
        self.attr_score = nn.Linear(512, attributes + 1)
        self._randomise()

        if config["model"]["max_pool"]:
            self.resnet.maxpool = nn.MaxPool2d(3, 2, 0, ceil_mode=True)
        if resnets["stride_in_1x1"]:
            for stage in (self.resnet.layer2, self.resnet.layer3, self.resnet.layer4):
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        if not box_head["res5halve"]:
            first = self.resnet.layer4[0]
            first.conv1.stride = first.conv2.stride = first.downsample[0].stride = (1, 1)
            for block in self.resnet.layer4:
                block.conv2.dilation = block.conv2.padding = (2, 2)
        self.eval().requires_grad_(False)

    def _randomise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in ((module.weight, 0.3, 0.8), (module.running_var, 0.5, 1.5)):
                    nn.init.uniform_(tensor, low, high)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
        self.resnet.conv1.weight.data /= 64
        scales = ((self.objectness_logits, 8), (self.anchor_deltas, 2), (self.cls_score, 20), (self.bbox_pred, 10))
        for layer, scale in scales:
            layer.weight.data *= scale
            nn.init.normal_(layer.bias)
        self.bbox_pred.bias.data.view(-1, 4)[:, 2:] += 10  # boxes grow, some beyond the photo

    def features(self, x: Tensor) -> Tensor:
        net = self.resnet
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer3(net.layer2(net.layer1(x)))

    def pool(self, features: Tensor, boxes: Tensor) -> Tensor:
        return self.resnet.layer4(roi_pool(features, [boxes], POOL, 1 / 16)).mean((2, 3))

    def predict(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes, background last, and of the attributes, "none" last."""
        logits = self.cls_score(pooled)
        embedded = self.cls_embedding(logits.argmax(1))
        return logits, self.attr_score(torch.relu(self.fc_attr(torch.cat([pooled, embedded], 1))))


def cell_anchors(config: dict) -> Tensor:
    anchors = []
    for size in config["anchor_generator"]["sizes"][0]:
        for ratio in config["anchor_generator"]["aspect_ratios"][0]:
            width = (size**2 / ratio) ** 0.5
            anchors.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
    return torch.tensor(anchors)


def frcnn_weights(reference: Reference) -> dict[str, Tensor]:
    """The state dict by the names of unc-nlp/frcnn-vg-finetuned."""
    weights = {"proposal_generator.anchor_generator.cell_anchors.0": reference.anchors}
    for name, tensor in reference.state_dict().items():
        if name.startswith("resnet.fc"):
            continue
        if name.startswith("resnet."):
            name = (
                name.removeprefix("resnet.")
                .replace("downsample.0", "shortcut")
                .replace("downsample.1", "shortcut.norm")
            )
            for number in (1, 2, 3):
                name = name.replace(f"bn{number}", f"conv{number}.norm")
            if name.startswith("layer4"):
                name = name.replace("layer4", "roi_heads.res5")
            elif name.startswith("layer"):
                name = f"backbone.res{int(name[5]) + 1}{name[6:]}"
            else:
                name = f"backbone.stem.{name}"
        elif name.split(".")[0] in ("conv", "objectness_logits", "anchor_deltas"):
            name = f"proposal_generator.rpn_head.{name}"
        else:
            name = f"roi_heads.box_predictor.{name}"
        weights[name] = tensor.clone()
    return weights


def caffe_weights(reference: Reference) -> dict[str, Tensor]:
    """The same network by the names and orders of bottom-up-attention.pytorch: background and "none" come first."""
    weights = {}
    for name, tensor in frcnn_weights(reference).items():
        for old, new in (("cls_embedding", "cls_embed"), ("fc_attr", "attr_linear1"), ("attr_score", "attr_linear2")):
            name = name.replace(old, new)
        if "cls_score" in name or "cls_embed" in name or "attr_linear2" in name:
            tensor = torch.cat([tensor[-1:], tensor[:-1]])
        elif "bbox_pred" in name:
            tensor = torch.cat([torch.full_like(tensor[:4], 7), tensor])
        elif "objectness_logits" in name:
            # Logits of "nothing" for all anchors, then those of "something".
            nothing = torch.randn_like(tensor)
            tensor = torch.cat([nothing, tensor + nothing])
        weights[name] = tensor
    return weights


def caffe_yaml(config: dict) -> dict:
    """Detectron2's nested layout as bottom-up-attention.pytorch has it, without what is Detectron2's default."""
    return {
        "MODEL": {
            "PIXEL_MEAN": config["model"]["pixel_mean"],
            "ANCHOR_GENERATOR": {"SIZES": config["anchor_generator"]["sizes"]},
            "PROPOSAL_GENERATOR": {"NAME": "BUARPN", "MIN_SIZE": 16},
            "BUA": {
                "ATTRIBUTE_ON": True,
                "RPN": {"CONV_OUT_CHANNELS": config["proposal_generator"]["hidden_channels"]},
                "ATTRIBUTE": {"NUM_CLASSES": config["roi_box_head"]["num_attrs"] + 1},
            },
            "RESNETS": {
                "DEPTH": config["resnets"]["depth"],
                "WIDTH_PER_GROUP": config["resnets"]["width_per_group"],
                "RES5_DILATION": 2,
            },
            "RPN": {
                "PRE_NMS_TOPK_TEST": config["rpn"]["pre_nms_topk_test"],
                "POST_NMS_TOPK_TEST": config["rpn"]["post_nms_topk_test"],
            },
            "ROI_HEADS": {"NMS_THRESH_TEST": 0.3, "NUM_CLASSES": config["roi_heads"]["num_classes"] + 1},
            "ROI_BOX_HEAD": {
                "POOLER_RESOLUTION": config["roi_box_head"]["pooler_resolution"],
                "BBOX_REG_WEIGHTS": "(1.0, 1.0, 1.0, 1.0)",
            },
        },
        "INPUT": {
            "MIN_SIZE_TEST": config["input"]["min_size_test"],
            "MAX_SIZE_TEST": config["input"]["max_size_test"],
        },
    }


def write_files(folder: Path, config: dict, weights: dict[str, Tensor], **save_options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(copy.deepcopy(config)))
    torch.save(weights, folder / "pytorch_model.bin", **save_options)
    return folder
