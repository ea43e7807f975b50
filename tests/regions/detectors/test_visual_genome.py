"""
The Visual Genome detector against torchvision's own modules and slow loops, on files with random weights.

The public weights cannot be had here. What the files look like is in `visual_genome_files`.
"""

import dataclasses
import math
import pickle
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

pytest.importorskip("torchvision")

import yaml
from PIL import Image
from test_selection import greedy
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from visual_genome_files import (
    ATTRIBUTES,
    CLASSES,
    Reference,
    caffe_weights,
    caffe_yaml,
    cell_anchors,
    frcnn_weights,
    full_yaml,
    small_yaml,
    write_files,
)

from unicoder_vl_hf import RegionStore, RegionStoreWriter
from unicoder_vl_hf.regions.detectors import visual_genome
from unicoder_vl_hf.regions.detectors.visual_genome import Prepare, VisualGenomeDetector, load
from unicoder_vl_hf.regions.detectors.visual_genome_network import Config, FasterRCNN, module_state, parameter_shapes

CPU = torch.device("cpu")
MEAN = torch.tensor([102.9801, 115.9465, 122.7717])[:, None, None]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(small_yaml())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reference):
    return write_files(tmp_path_factory.mktemp("frcnn"), small_yaml(), frcnn_weights(reference))


@pytest.fixture(scope="module")
def caffe_folder(tmp_path_factory, reference):
    return write_files(tmp_path_factory.mktemp("caffe"), caffe_yaml(small_yaml()), {"model": caffe_weights(reference)})


def load_small(folder, **options) -> VisualGenomeDetector:
    return load(str(folder), device=CPU, **{"min_regions": 10, "max_regions": 20} | options)


@pytest.fixture(scope="module")
def detector(folder):
    return load_small(folder)


def network(config: dict) -> tuple[FasterRCNN, Reference]:
    reference = Reference(config)
    weights = frcnn_weights(reference)
    parsed = Config.from_yaml(config, weights)
    model = FasterRCNN(parsed)
    model.load_state_dict(module_state(weights, parsed))
    return model.eval().requires_grad_(False), reference


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise in blocks, as smooth as photos are."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# Names and shapes


def test_names_and_shapes_of_the_public_weights():
    rpn_of_512 = {"proposal_generator.rpn_head.conv.weight": torch.empty(512, 1024, 3, 3)}
    shapes = parameter_shapes(Config.from_yaml(full_yaml(), rpn_of_512))
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
    # 104 convolutions with 4 numbers of batch norm each, the anchors, three layers of the RPN, five heads.
    assert len(shapes) == 104 * 5 + 1 + 3 * 2 + 4 * 2 + 1


def test_names_and_shapes_of_weights_from_caffe():
    weights = {
        "proposal_generator.rpn_head.conv.weight": torch.empty(512, 1024, 3, 3),
        "roi_heads.box_predictor.cls_score.weight": torch.empty(1601, 1),
        "roi_heads.box_predictor.bbox_pred.weight": torch.empty(6404, 1),
    }
    shapes = parameter_shapes(Config.from_yaml(caffe_yaml(full_yaml()), weights))
    published = {
        "proposal_generator.rpn_head.objectness_logits.weight": (24, 512, 1, 1),
        "roi_heads.box_predictor.cls_score.weight": (1601, 2048),
        "roi_heads.box_predictor.bbox_pred.weight": (6404, 2048),
        "roi_heads.box_predictor.cls_embed.weight": (1601, 256),
        "roi_heads.box_predictor.attr_linear1.weight": (512, 2304),
        "roi_heads.box_predictor.attr_linear2.weight": (401, 512),
    }
    assert {name: shapes[name] for name in published} == published


def test_missing_unused_and_misshapen_weights_are_named(tmp_path, reference):
    weights = frcnn_weights(reference)
    del weights["backbone.res3.1.conv2.norm.running_var"]
    weights["roi_heads.mask_head.weight"] = torch.zeros(1)
    weights["roi_heads.box_predictor.fc_attr.bias"] = torch.zeros(3)
    write_files(tmp_path, small_yaml(), weights)
    with pytest.raises(ValueError) as error:
        load_small(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in str(error.value)
    for problem in (
        "backbone.res3.1.conv2.norm.running_var is missing",
        "roi_heads.mask_head.weight has no use",
        "roi_heads.box_predictor.fc_attr.bias is (3,), expected (512,)",
    ):
        assert problem in str(error.value)


def test_what_config_lacks_or_has_wrong_is_named(tmp_path, folder):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for section, key, value, message in (
        ("input", "format", None, "input.format is missing"),
        ("roi_box_head", "res5halve", None, "roi_box_head.res5halve is missing"),
        ("input", "format", "YUV", "input.format is 'YUV', expected BGR or RGB"),
        ("resnets", "depth", 18, "resnets.depth is 18"),
    ):
        tree = small_yaml()
        tree[section].pop(key)
        if value is not None:
            tree[section][key] = value
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(ValueError, match=message) as error:
            load_small(tmp_path)
        assert str(tmp_path / "config.yaml") in str(error.value)
    for text in ("", "- a list", "model: 3", "a: [", yaml.safe_dump(small_yaml(model__pixel_mean=3))):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml: "):
            load_small(tmp_path)


# The network


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__max_pool": False},
        {"resnets__stride_in_1x1": False},
        {"roi_box_head__res5halve": True},
        {"resnets__depth": 101},
    ],
    ids=str,
)
def test_network_is_torchvisions(changes):
    model, reference = network(small_yaml(**changes))
    for height, width in ((97, 135), (96, 64)):
        x = torch.randn(1, 3, height, width) * 60
        expected = reference.features(x)
        (features,) = model.backbone([x[0]])
        assert features.shape == expected.shape
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)
    boxes = torch.tensor([[0.0, 0, 63, 95], [5, 40, 50, 60], [30, 3, 33, 6]])
    torch.testing.assert_close(model.pool(features, boxes), reference.pool(expected, boxes), rtol=1e-3, atol=1e-3)


def test_heads_are_the_plain_layers():
    model, reference = network(small_yaml())
    features = torch.randn(200, 2048)
    logits, attributes = reference.predict(features)
    # Background has an embedding for the attributes, too.
    assert (logits.argmax(1) == CLASSES).any()
    found = model.classify(features)
    torch.testing.assert_close(found[0], logits.softmax(1)[:, :-1])
    torch.testing.assert_close(found[1], attributes[:, :-1].softmax(1))


@pytest.mark.parametrize("changes", [{}, {"model__max_pool": False}, {"resnets__stride_in_1x1": False}], ids=str)
def test_padding_changes_nothing(changes):
    model, _ = network(small_yaml(**changes))
    sizes = [(97, 135), (120, 61), (33, 200), (98, 136), (16, 17)]
    photos = [torch.randn(3, *size) * 60 for size in sizes]
    for found, alone in zip(model.backbone(photos), photos, strict=True):
        torch.testing.assert_close(found, model.backbone([alone])[0], rtol=1e-4, atol=1e-4)


def test_anchors():
    model, _ = network(small_yaml())
    found = model.anchor_grid(3, 5)
    expected = []
    for row in range(3):
        for column in range(5):
            for size in (32, 64):
                for ratio in (0.5, 1, 2):
                    width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                    x, y = column * 16, row * 16
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(found, torch.tensor(expected))
    # torchvision centres anchors where Detectron2 does, too.
    generator = AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),))
    generator.cell_anchors = [cell_anchors(small_yaml())]
    (grid,) = generator(ImageList(torch.zeros(1, 3, 48, 80), [(48, 80)]), [torch.zeros(1, 8, 3, 5)])
    torch.testing.assert_close(found, grid)


def slow_decode(boxes: np.ndarray, deltas: np.ndarray, weights: list[float], extent: int) -> np.ndarray:
    decoded = []
    for (x1, y1, x2, y2), (dx, dy, dw, dh) in zip(boxes, deltas / np.array(weights), strict=True):
        width, height = x2 - x1 + extent, y2 - y1 + extent
        x, y = x1 + width / 2 + dx * width, y1 + height / 2 + dy * height
        width *= math.exp(min(dw, math.log(1000 / 16)))
        height *= math.exp(min(dh, math.log(1000 / 16)))
        decoded.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return np.array(decoded)


def test_decoding(detector, caffe_folder):
    boxes = torch.tensor([[10.0, 20, 50, 30], [0, 0, 7, 99]])
    deltas = torch.tensor([[0.5, -1.0, 0.3, 2.0], [1.0, 2.0, -1.0, 60.0]])
    weights = [10.0, 10.0, 5.0, 5.0]
    found = detector.model.decode(boxes, deltas, weights)
    torch.testing.assert_close(found, BoxCoder(tuple(weights)).decode_single(deltas, boxes))
    np.testing.assert_allclose(found, slow_decode(boxes.numpy(), deltas.numpy(), weights, 0), rtol=1e-5)
    found = load_small(caffe_folder).model.decode(boxes, deltas, weights)
    np.testing.assert_allclose(found, slow_decode(boxes.numpy(), deltas.numpy(), weights, 1), rtol=1e-5)


@pytest.mark.parametrize("caffe", [False, True])
def test_proposals(caffe_folder, reference, caffe):
    if caffe:
        model = load_small(caffe_folder).model
    else:
        model, _ = network(small_yaml(proposal_generator__min_size=12))
    extent, (height, width), scale = int(caffe), (97, 135), 1.25
    features = reference.features(torch.randn(1, 3, height, width) * 60)
    hidden = torch.relu(reference.conv(features))
    scores = reference.objectness_logits(hidden)[0].permute(1, 2, 0).flatten().numpy()
    deltas = reference.anchor_deltas(hidden)[0].permute(1, 2, 0).reshape(-1, 4).numpy()

    boxes = slow_decode(model.anchor_grid(*features.shape[2:]).numpy(), deltas, [1, 1, 1, 1], extent)
    boxes = np.clip(boxes, 0, [width - extent, height - extent] * 2)
    smallest = 16 * scale if caffe else 12
    large = np.array([min(x2 - x1, y2 - y1) + extent > smallest for x1, y1, x2, y2 in boxes])
    assert not large.all()
    order = [index for index in np.argsort(-scores, kind="stable") if large[index] or not caffe][:200]
    assert caffe == large[order].all()  # frcnn drops small boxes after it has counted
    order = [index for index in order if large[index]]
    kept = greedy(boxes[order] + [0, 0, extent, extent], scores[order], 0.7)[:60]
    with torch.inference_mode():
        found = model.propose(features, (height, width), scale)
    assert len(found) > 10
    np.testing.assert_allclose(found, boxes[order][kept], rtol=1e-4, atol=1e-3)


def test_a_network_that_proposes_nothing_gives_the_whole_photo(reference):
    for config, weights, whole in (
        (small_yaml(proposal_generator__min_size=1000), frcnn_weights(reference), [0, 0, 50, 40]),
        (caffe_yaml(small_yaml()), caffe_weights(reference), [0, 0, 49, 39]),
    ):
        parsed = Config.from_yaml(config, weights)
        model = FasterRCNN(parsed)
        model.load_state_dict(module_state(weights, parsed))
        with torch.inference_mode():
            assert model.propose(torch.zeros(1, 1024, 3, 4), (40, 50), 1000).tolist() == [whole]


# Photos


def test_a_red_photo_is_red_in_the_last_channel(detector, folder, tmp_path):
    seen = []

    def note(module, inputs):
        seen.append(inputs[0])

    red = Image.new("RGB", (40, 30), (255, 0, 0))
    for channels, expected in (("BGR", [0, 0, 255]), ("RGB", [255, 0, 0])):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_yaml(input__format=channels)))
        detector = load_small(tmp_path)
        detector.model.stem["conv1"].register_forward_pre_hook(note)
        detector([detector.prepare(red)], ["red"])
        x = seen[-1]
        assert x.shape == (1, 3, 96, 128)
        torch.testing.assert_close(x, (torch.tensor(expected)[:, None, None] - MEAN).expand(1, 3, 96, 128))


@pytest.mark.parametrize(
    ("size", "sizes", "expected"),
    [
        ((640, 480), (800, 1333), (800, 1067)),
        ((640, 480), (600, 1000), (600, 800)),
        ((480, 640), (600, 1000), (800, 600)),
        ((1000, 300), (600, 1000), (300, 1000)),
        ((333, 500), (600, 1000), (901, 600)),
        ((1, 1), (600, 1000), (600, 600)),
        ((5000, 1), (600, 1000), (16, 1000)),
    ],
)
def test_sizes(size, sizes, expected):
    prepared = Prepare(*sizes, "BGR")(Image.new("RGB", size))
    assert (prepared.pixels.shape[1:], prepared.content, prepared.size) == (expected, expected, size)


def test_scaling_is_bilinear_without_smoothing():
    """As cv2.resize and torch.nn.functional.interpolate do, which the two tools use. Rounded to whole grey levels."""
    for size in ((50, 40), (500, 300)):
        image = photo(*size)
        prepared = Prepare(96, 1000, "RGB")(image)
        exact = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()
        exact = torch.nn.functional.interpolate(exact, prepared.content, mode="bilinear", align_corners=False)[0]
        assert prepared.pixels.dtype == torch.uint8
        assert (prepared.pixels - exact).abs().max() < 0.501


def test_prepare_travels_between_processes(detector):
    assert pickle.loads(pickle.dumps(detector.prepare)) == detector.prepare
    assert len(pickle.dumps(detector.prepare)) < 1000
    assert pickle.loads(pickle.dumps(detector.prepare(photo(50, 40)))).size == (50, 40)


def test_preprocess_caffe_forces_its_sizes(folder):
    detector = load_small(folder, preprocess="caffe")
    assert (detector.prepare.min_size, detector.prepare.max_size) == (600, 1000)
    assert detector.provenance["thresholds"]["preprocess"] == "caffe"
    with pytest.raises(ValueError, match="preprocess is 'mmf', expected one of"):
        load_small(folder, preprocess="mmf")


# Records


@pytest.mark.parametrize("rule", ["caffe", "max-nms"])
def test_records_are_what_torchvisions_modules_give(folder, reference, rule):
    """A wide photo and a tall one in one batch: boxes in pixels of each, features of exactly these boxes."""
    detector = load_small(folder, rule=rule, class_probabilities=True)
    images = [photo(300, 130), photo(70, 100, 1)]
    prepared = [detector.prepare(image) for image in images]
    assert [p.content for p in prepared] == [(87, 200), (137, 96)]
    for record, image, scaled in zip(detector(prepared, ["wide", "tall"]), images, prepared, strict=True):
        assert (record.image_width, record.image_height) == image.size
        assert 10 <= len(record) <= 20
        assert record.features.shape == (len(record), 2048)
        rows, columns = scaled.content
        boxes = torch.tensor(record.boxes) * torch.tensor([columns / image.width, rows / image.height] * 2)
        if rule == "caffe":
            # Proposals reach the borders of the photo, which those of the scaled photo would miss or exceed.
            np.testing.assert_allclose(record.boxes.max(0)[2:], image.size, atol=0.01)
            pooled = reference.pool(reference.features((scaled.pixels - MEAN)[None]), boxes)
            np.testing.assert_allclose(record.features, pooled, rtol=1e-3, atol=1e-3)
        logits, attributes = reference.predict(torch.tensor(record.features))
        probabilities = logits.softmax(1)[:, :CLASSES]
        np.testing.assert_allclose(record.class_probabilities, probabilities, atol=1e-5)
        assert record.object_ids.tolist() == probabilities.argmax(1).tolist()
        np.testing.assert_allclose(record.object_scores, probabilities.amax(1), atol=1e-5)
        attributes = attributes[:, :ATTRIBUTES].softmax(1)
        assert record.attribute_ids.tolist() == attributes.argmax(1).tolist()
        np.testing.assert_allclose(record.attribute_scores, attributes.amax(1), atol=1e-5)


def test_max_nms_regresses_the_boxes_of_the_top_class(folder, reference):
    detector = load_small(folder, rule="max-nms", min_regions=1, max_regions=100)
    prepared = detector.prepare(photo(200, 100))
    assert prepared.content == (96, 192)
    (record,) = detector([prepared], ["x"])
    features = reference.features((prepared.pixels - MEAN)[None])
    with torch.inference_mode():
        proposals = detector.model.propose(features, (96, 192), 1.0)
    pooled = reference.pool(features, proposals)
    scores, classes = reference.predict(pooled)[0].softmax(1)[:, :CLASSES].max(1)
    deltas = torch.stack(
        [reference.bbox_pred(row)[4 * c : 4 * c + 4] for row, c in zip(pooled, classes.tolist(), strict=True)]
    )
    regressed = slow_decode(proposals.numpy(), deltas.numpy(), [10, 10, 5, 5], 0)
    boxes = regressed.clip(0, [192, 96, 192, 96])
    assert not np.array_equal(boxes, regressed)
    kept = greedy(boxes, scores.numpy(), 0.6)
    np.testing.assert_allclose(record.boxes, boxes[kept] * ([200 / 192, 100 / 96] * 2), rtol=1e-3, atol=1e-2)
    assert record.object_ids.tolist() == classes[kept].tolist()


def test_a_batch_gives_what_each_photo_gives_alone(detector):
    prepared = [detector.prepare(photo(width, height, width)) for width, height in ((300, 130), (70, 100), (5, 400))]
    for record, alone in zip(detector(prepared, ["a", "b", "c"]), prepared, strict=True):
        (expected,) = detector([alone], [record.image_id])
        np.testing.assert_allclose(record.boxes, expected.boxes, atol=1e-2)
        np.testing.assert_allclose(record.features, expected.features, rtol=1e-3, atol=1e-3)
        assert record.object_ids.tolist() == expected.object_ids.tolist()


def test_given_boxes(detector):
    """Found boxes, given again in another order, have the same features, classes and attributes."""
    prepared = [detector.prepare(photo(300, 130)), detector.prepare(photo(70, 100, 1))]
    found = detector(prepared, ["a", "b"])
    given = [record.boxes[::-1][:7] for record in found]
    for record, again, boxes in zip(found, detector(prepared, ["a", "b"], boxes=given), given, strict=True):
        assert np.array_equal(again.boxes, boxes)
        np.testing.assert_allclose(again.features, record.features[::-1][:7], rtol=1e-3, atol=1e-3)
        assert again.object_ids.tolist() == record.object_ids[::-1][:7].tolist()
        assert again.attribute_ids.tolist() == record.attribute_ids[::-1][:7].tolist()
    with pytest.raises(ValueError, match=r"Image 'a': boxes have shape \(3, 5\), expected \(n, 4\)"):
        detector(prepared[:1], ["a"], boxes=[np.zeros((3, 5))])


def test_classify_says_of_stored_features_what_the_record_says(detector):
    (record,) = detector([detector.prepare(photo(120, 90))], ["x"])
    object_ids, object_scores, attribute_ids, attribute_scores = detector.classify(record.features)
    assert np.array_equal(object_ids, record.object_ids)
    np.testing.assert_allclose(object_scores, record.object_scores, rtol=1e-5)
    assert np.array_equal(attribute_ids, record.attribute_ids)
    np.testing.assert_allclose(attribute_scores, record.attribute_scores, rtol=1e-5)
    stored = record.features.astype(np.float16)  # as stores hold them: the scores change a little
    stored.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(detector.classify(stored)[1], object_scores, atol=0.02)
    with pytest.raises(ValueError, match=r"features have shape \(3, 7\), expected \(n, 2048\)"):
        detector.classify(np.zeros((3, 7)))


def test_without_attributes(tmp_path, reference):
    weights = {name: x for name, x in frcnn_weights(reference).items() if "attr" not in name and "embed" not in name}
    write_files(tmp_path, small_yaml(roi_box_head__attr=False), weights)
    detector = load_small(tmp_path)
    (record,) = detector([detector.prepare(photo(60, 50))], ["x"])
    assert record.attribute_ids is None and record.attribute_scores is None
    assert detector.classify(record.features)[2:] == (None, None)


@pytest.mark.parametrize("counts", [(36, 36), (10, 100), (100, 100)])
@pytest.mark.parametrize("rule", ["caffe", "max-nms"])
def test_few_proposals_are_no_crash(folder, rule, counts):
    detector = load_small(folder, rule=rule, min_regions=counts[0], max_regions=counts[1])
    for size in ((1, 1), (200, 1), (60, 50)):
        (record,) = detector([detector.prepare(Image.new("RGB", size, (9, 99, 199)))], ["x"])
        assert 1 <= len(record) <= counts[1]


def test_weights_from_caffe_give_the_same_classes(detector, caffe_folder):
    """Background first, and 24 logits of objectness: after loading, the same heads."""
    ours, caffe = detector.model, load_small(caffe_folder).model
    state = caffe.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
    features = torch.randn(50, 2048)
    with torch.inference_mode():
        torch.testing.assert_close(caffe.classify(features)[0], ours.classify(features)[0])
        # Here "none" takes its share of the probability.
        assert caffe.classify(features)[1].sum(1).max() < 0.999
        assert torch.equal(caffe.classify(features)[1].argmax(1), ours.classify(features)[1].argmax(1))


@pytest.mark.parametrize("rule", ["caffe", "max-nms"])
def test_the_last_pixel_counts_in_the_layout_of_caffe(folder, caffe_folder, monkeypatch, rule):
    """Boxes of 10 x 10 pixels, 5 apart: IoU 5/15. By x2 - x1 they have 9 x 9, and 4/14."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 5, 9, 14]])
    for path, count in ((folder, 2), (caffe_folder, 1)):
        detector = load_small(path, rule=rule, min_regions=1)
        monkeypatch.setattr(detector.model, "propose", lambda *args: boxes)
        monkeypatch.setattr(detector.model, "pool", lambda *args: torch.zeros(2, 2048))
        monkeypatch.setattr(detector.model, "regress", lambda *args: boxes)
        monkeypatch.setattr(detector.model, "classify", lambda x: (torch.tensor([[0.9], [0.8]])[: len(x)], None))
        detector.model.config = dataclasses.replace(detector.model.config, nms_thresholds=(0.3,))
        (record,) = detector([detector.prepare(Image.new("RGB", (96, 96)))], ["x"])
        assert len(record) == count


@pytest.mark.parametrize("layout", ["frcnn", "caffe"])
def test_the_caffe_rule_from_photo_to_record(request, reference, layout):
    extent = int(layout == "caffe")
    folder = request.getfixturevalue("caffe_folder" if extent else "folder")
    detector = load_small(folder, min_regions=1, max_regions=60)
    image = photo(300, 130, 2)
    prepared = detector.prepare(image)
    features = reference.features((prepared.pixels - MEAN)[None])
    with torch.inference_mode():
        proposals = detector.model.propose(features, prepared.content, 200 / 300)
    scores = reference.predict(reference.pool(features, proposals))[0].softmax(1)[:, :CLASSES].numpy()
    confidence = np.zeros(len(scores), np.float32)
    for column in scores.T:
        kept = greedy(proposals.numpy() + np.array([0, 0, extent, extent]), column, 0.3)
        confidence[kept] = np.maximum(confidence[kept], column[kept])
    kept = [index for index in np.argsort(-confidence, kind="stable") if confidence[index] >= 0.2]
    assert 3 < len(kept) < len(proposals)
    (record,) = detector([prepared], ["x"])
    expected = proposals.numpy()[kept] * ([300 / 200, 130 / 87] * 2)
    np.testing.assert_allclose(record.boxes, expected, rtol=1e-3, atol=1e-2)
    # Caffe's last pixel is that of the scaled photo.
    assert proposals[:, 2].max() == 200 - extent
    assert record.object_ids.tolist() == scores[kept].argmax(1).tolist()


def test_mixed_precision(folder, detector):
    mixed = load_small(folder, precision="bf16")
    assert mixed.model.res4[0].conv1.weight.dtype == torch.bfloat16
    assert mixed.model.cls_score.weight.dtype == mixed.model.anchors.dtype == torch.float32
    prepared = [detector.prepare(photo(190, 96))]
    given = [np.array([[10.25, 20, 180, 90], [100, 3, 140, 60]])]
    (record,) = mixed(prepared, ["x"], boxes=given)
    (expected,) = detector(prepared, ["x"], boxes=given)
    assert record.features.dtype == record.boxes.dtype == np.float32
    cosine = torch.cosine_similarity(torch.tensor(record.features), torch.tensor(expected.features))
    assert cosine.min() > 0.99
    # bfloat16 would put what lies beyond 128 pixels on whole ones.
    (found,) = mixed(prepared, ["x"])
    far = found.boxes[(found.boxes > 128) & (found.boxes < 190)]
    assert (np.abs(far - far.round()) > 0.01).any()


# Files


def test_other_files_of_the_same_weights(folder, tmp_path, reference):
    weights = frcnn_weights(reference)
    expected = load_small(folder).model.state_dict()
    legacy = write_files(tmp_path / "legacy", small_yaml(), weights, _use_new_zipfile_serialization=False)
    tensors = tmp_path / "safetensors"
    write_files(tensors, small_yaml(), {})
    safetensors.torch.save_file(weights, tensors / "model.safetensors")
    upper = write_files(tmp_path / "upper", {k.upper(): v for k, v in small_yaml().items()}, {"model": weights})
    for path in (legacy, tensors, upper):
        state = load_small(path).model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_refused(folder, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository"):
        load("/nowhere/at/all", device=CPU)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_yaml()))
    with pytest.raises(FileNotFoundError, match=r"must hold config.yaml and model.safetensors or pytorch_model.bin"):
        load_small(tmp_path)
    for content in (pickle.dumps(Payload()), b"no weights", b""):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model.bin is no file of weights that loads without"):
            load_small(tmp_path)
    assert "executed" not in capsys.readouterr().out
    torch.save({"model": {"epoch": 3}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than named tensors"):
        load_small(tmp_path)
    with pytest.raises(ValueError, match="has no revision 'main'"):
        load_small(folder, revision="main")


def test_provenance_of_a_folder(folder, tmp_path, detector):
    provenance = detector.provenance
    assert provenance["detector"] == f"visual-genome:{folder.name}"
    assert provenance["detector_revision"].startswith("sha256:")
    assert provenance["box_type"] == "proposal"
    assert provenance["num_classes"] == CLASSES
    assert provenance["class_names"] is None
    assert provenance["thresholds"] == {
        "rule": "caffe",
        "min_regions": 10,
        "max_regions": 20,
        "score": 0.2,
        "nms": 0.3,
        "preprocess": "config",
        "min_size": 96,
        "max_size": 200,
    }
    regressed = load_small(folder, rule="max-nms").provenance
    assert (regressed["box_type"], regressed["thresholds"]["nms"]) == ("regressed", [0.6])
    assert load(str(folder), device=CPU).provenance["thresholds"]["min_regions"] == 100
    with RegionStoreWriter(tmp_path / "store", **provenance) as writer:
        for record in detector([detector.prepare(photo(60, 50))], ["x"]):
            writer.write(record)
    assert RegionStore(tmp_path / "store").provenance["thresholds"] == provenance["thresholds"]
    with pytest.raises(ValueError, match="rule is 'best', expected one of"):
        load_small(folder, rule="best")
    with pytest.raises(ValueError, match="expected 1 <= min <= max"):
        load_small(folder, min_regions=30)


def test_class_names(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    names = [f"thing {number}" for number in range(CLASSES)]
    (tmp_path / "objects_vocab.txt").write_text("".join(f"{name},synonym\n" for name in names))
    assert load_small(tmp_path).provenance["class_names"] == names
    assert load_small(folder, class_names=tmp_path / "objects_vocab.txt").provenance["class_names"] == names
    assert load_small(folder, class_names=names[::-1]).provenance["class_names"] == names[::-1]
    with pytest.raises(ValueError, match=f"There are 3 class names, expected {CLASSES}"):
        load_small(folder, class_names=names[:3])


def test_from_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked = {}

    def download(name, revision, allow_patterns, local_files_only=False):
        asked.update(name=name, revision=revision, files=allow_patterns)
        return str(shutil.copytree(folder, tmp_path / "snapshots" / commit))

    monkeypatch.setattr(visual_genome, "snapshot_download", download)
    provenance = load("unc-nlp/frcnn-vg-finetuned", device=CPU, revision="main").provenance
    assert provenance["detector"] == "visual-genome:unc-nlp/frcnn-vg-finetuned"
    assert provenance["detector_revision"] == commit
    assert (asked["name"], asked["revision"]) == ("unc-nlp/frcnn-vg-finetuned", "main")
    assert set(asked["files"]) == {"config.yaml", "model.safetensors", "pytorch_model.bin", "objects_vocab.txt"}
