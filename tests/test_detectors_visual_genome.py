"""The Visual Genome detector: its weights' names and shapes, then each piece against an independent reference."""

import pytest
import torch

pytest.importorskip("torchvision")

from unicoder_vl_hf.regions.detectors.visual_genome import Config, parameter_shapes


def frcnn_yaml(**changes) -> dict:
    """What the tool's own code reads of unc-nlp/frcnn-vg-finetuned's config.yaml; `section__key` changes one value."""
    tree = {
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
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return tree


RPN_512 = {"proposal_generator.rpn_head.conv.weight": torch.empty(512, 1024, 3, 3)}


def test_names_and_shapes_of_the_public_weights():
    shapes = parameter_shapes(Config.from_yaml(frcnn_yaml(), RPN_512))
    published = {
        "backbone.stem.conv1.weight": (64, 3, 7, 7),
        "backbone.stem.conv1.norm.running_mean": (64,),
        "backbone.res2.0.shortcut.weight": (256, 64, 1, 1),
        "backbone.res2.2.conv3.weight": (256, 64, 1, 1),
        "backbone.res3.0.conv1.weight": (128, 256, 1, 1),
        "backbone.res4.22.conv2.norm.running_var": (256,),
        "proposal_generator.anchor_generator.cell_anchors.0": (12, 4),
        "proposal_generator.rpn_head.conv.weight": (512, 1024, 3, 3),
        "proposal_generator.rpn_head.objectness_logits.weight": (12, 512, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas.bias": (48,),
        "roi_heads.res5.0.conv1.weight": (512, 1024, 1, 1),
        "roi_heads.res5.2.conv2.weight": (512, 512, 3, 3),
        "roi_heads.box_predictor.cls_score.weight": (1601, 2048),
        "roi_heads.box_predictor.bbox_pred.weight": (6400, 2048),
        "roi_heads.box_predictor.cls_embedding.weight": (1601, 256),
        "roi_heads.box_predictor.fc_attr.weight": (512, 2304),
        "roi_heads.box_predictor.attr_score.weight": (401, 512),
    }
    assert {name: shapes[name] for name in published} == published
    assert "backbone.stem.conv1.bias" not in shapes
    assert "backbone.res2.1.shortcut.weight" not in shapes
    # 104 convolutions with 4 numbers a batch norm, the anchors, three layers of the RPN and five heads.
    assert len(shapes) == 104 * 5 + 1 + 3 * 2 + 4 * 2 + 1
