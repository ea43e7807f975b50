"""torchvision's detectors against their own forward pass: boxes, classes and scores, and which feature is whose."""

import pickle
from http.client import IncompleteRead
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from photos import SIZES, photo
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_V2_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import to_tensor

from unicoder_vl_hf.regions.detectors import load_detector, torchvision_models
from unicoder_vl_hf.regions.detectors.torchvision_models import TorchvisionDetector

CPU = torch.device("cpu")
NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"


class Backbone(nn.Module):
    """One level of stride 8. Its convolutions have biases, so that it sees what lies beside a photo."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        )

    def forward(self, pixels):
        return {"0": self.layers(pixels)}


def tiny_model(num_classes: int = 6) -> FasterRCNN:
    torch.manual_seed(0)
    model = FasterRCNN(
        Backbone(),
        min_size=64,
        max_size=110,
        rpn_anchor_generator=AnchorGenerator(((12, 24, 40),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(8 * 9, 16),
        box_predictor=FastRCNNPredictor(16, num_classes),
    ).eval()
    for parameter in model.parameters():  # so that scores and boxes differ plainly
        nn.init.normal_(parameter, std=0.2)
    return model


def detect(detector, *images, boxes=None):
    prepared = [detector.prepare(image) for image in images]
    return detector(prepared, [f"photo_{index}" for index in range(len(images))], boxes)


@pytest.mark.parametrize("size", [(120, 80), (97, 61), (50, 200)])
def test_boxes_classes_and_scores_are_those_of_torchvisions_forward(size):
    model = tiny_model()
    (record,) = detect(TorchvisionDetector(model, device=CPU, max_regions=30), photo(*size))
    own = tiny_model()
    own.roi_heads.detections_per_img = 30
    with torch.inference_mode():
        (expected,) = own([to_tensor(photo(*size))])
    assert len(expected["scores"]) == record.num_regions == 30
    np.testing.assert_array_equal(record.boxes, expected["boxes"].numpy())
    np.testing.assert_array_equal(record.object_ids, expected["labels"].numpy() - 1)
    np.testing.assert_array_equal(record.object_scores, expected["scores"].numpy())
    assert (record.image_width, record.image_height) == size
    # In pixels of the photo: some box reaches beyond the shorter side.
    assert record.boxes[:, [0, 2] if size[0] > size[1] else [1, 3]].max() > min(size)


def test_each_feature_is_the_box_heads_of_its_own_box():
    image = photo(120, 80)
    model, own, seen = tiny_model(), tiny_model(), {}
    own.backbone.register_forward_hook(lambda module, inputs, output: seen.update(output))
    with torch.inference_mode():
        own([to_tensor(image)])
        (record,) = detect(TorchvisionDetector(model, device=CPU), image)
        # 120 x 80 is scaled by 64 / 80 to 96 x 64.
        boxes = [torch.from_numpy(record.boxes) * 0.8]
        pooled = MultiScaleRoIAlign(["0"], 3, 2)({"0": seen["0"]}, boxes, [(64, 96)])
        expected = own.roi_heads.box_head(pooled)
    np.testing.assert_allclose(record.features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(record.features - record.features[::-1], axis=1).max() > 0.1


def test_features_of_unmoved_proposals_are_those_of_torchvisions_own_pass():
    """Without regression a kept box is a proposal, and torchvision's own pass shows that proposal's feature."""
    image, seen = photo(120, 80), {}
    model = tiny_model()
    nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.bias)
    rpn = model.rpn.register_forward_hook(lambda module, inputs, output: seen.update(proposals=output[0][0]))
    head = model.roi_heads.box_head.register_forward_hook(lambda module, inputs, output: seen.update(features=output))
    with torch.inference_mode():
        model([to_tensor(image)])
    rpn.remove(), head.remove()
    (record,) = detect(TorchvisionDetector(model, device=CPU), image)
    distance = torch.cdist(torch.from_numpy(record.boxes) * 0.8, seen["proposals"], p=torch.inf)
    assert distance.amin(1).max() < 1e-3
    expected = seen["features"][distance.argmin(1)].numpy()
    np.testing.assert_allclose(record.features, expected, rtol=1e-3, atol=1e-4)


def test_found_boxes_given_again_have_the_same_features():
    detector = TorchvisionDetector(tiny_model(), device=CPU, max_regions=20)
    images = [photo(*size, seed=seed) for seed, size in enumerate(SIZES)]
    found = detect(detector, *images)
    assert len({*found[0].object_ids}) > 1
    given = detect(detector, *images, boxes=[record.boxes[::-1] for record in found])
    for first, second in zip(found, given, strict=True):
        np.testing.assert_array_equal(second.boxes, first.boxes[::-1])
        np.testing.assert_allclose(second.features, first.features[::-1], rtol=1e-3, atol=1e-4)
        # Their class is the one that the head predicts for them.
        logits = detector.model.roi_heads.box_predictor(torch.from_numpy(second.features))[0]
        probabilities = logits.softmax(-1)[:, 1:].detach().numpy()
        np.testing.assert_array_equal(second.object_ids, probabilities.argmax(1))
        np.testing.assert_allclose(second.object_scores, probabilities.max(1), rtol=1e-5)


def test_a_photo_gives_in_a_batch_what_it_gives_alone():
    detector = TorchvisionDetector(tiny_model(), device=CPU, max_regions=20)
    images = [photo(*size, seed=seed) for seed, size in enumerate(SIZES)]
    for index, together in enumerate(detect(detector, *images)):
        (alone,) = detect(detector, images[index])
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_array_equal(together.object_ids, alone.object_ids)
        np.testing.assert_allclose(together.features, alone.features, rtol=1e-3, atol=1e-4)
        assert together.image_id == f"photo_{index}"


def test_too_few_boxes_are_filled_up_by_rank():
    image = photo(120, 80)
    (all_of_them,) = detect(TorchvisionDetector(tiny_model(), device=CPU, score_threshold=0.0), image)
    scores = all_of_them.object_scores
    assert len(scores) == 100
    between = float(scores[2] + scores[3]) / 2  # three score above it
    for min_regions, expected in ((1, 3), (3, 3), (7, 7)):
        detector = TorchvisionDetector(tiny_model(), device=CPU, score_threshold=between, min_regions=min_regions)
        other = photo(96, 64, seed=3)
        record = detect(detector, other, image, other)[1]  # the rows of its neighbours are not its own
        assert record.num_regions == expected
        np.testing.assert_allclose(record.boxes, all_of_them.boxes[:expected], atol=1e-3)
        np.testing.assert_allclose(record.object_scores, scores[:expected], atol=1e-5)


def test_only_convolutions_and_the_box_head_compute_in_bfloat16():
    """Anchors in bfloat16 would be pixels off."""
    seen = {}
    model = tiny_model()
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: seen.update(anchors=output[0]))
    model.backbone.layers[0].register_forward_hook(lambda module, inputs, output: seen.update(first=output))
    (record,) = detect(TorchvisionDetector(model, device=CPU, precision="bf16"), photo(120, 80))
    assert (seen["first"].dtype, seen["anchors"].dtype) == (torch.bfloat16, torch.float32)
    (exact,) = detect(TorchvisionDetector(model, device=CPU), photo(120, 80), boxes=[record.boxes])
    assert record.features.dtype == np.float32
    np.testing.assert_allclose(record.features, exact.features, rtol=0.1, atol=0.1)


def test_class_names_of_coco():
    names = torchvision_models._classes(FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1)["class_names"]
    assert (names[0], names[89]) == ("person", "toothbrush")
    assert names.index("cat") == 16  # label 17 of 91, of which 0 is the background
    assert (len(names), names.count("N/A")) == (90, 10)
    assert names[11] == "N/A"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(get_model(NAME, weights=None, weights_backbone=None, num_classes=91).state_dict(), path)
    return path


def test_loads_a_file_of_weights(weights):
    detector = load_detector(f"torchvision:{NAME}", weights=str(weights), max_regions=12, device="cpu", precision="no")
    (record,) = detect(detector, photo(120, 80))
    assert record.features.shape == (10, 1024)  # random scores are below the threshold
    provenance = detector.provenance
    assert provenance["detector"] == f"torchvision:{NAME}"
    assert provenance["detector_revision"].startswith("sha256:")
    assert provenance["thresholds"] == {"score": 0.05, "min_regions": 10, "max_regions": 12}
    assert (provenance["num_classes"], provenance["box_type"]) == (90, "regressed")
    assert "class_names" not in provenance  # whose classes these are, the file does not say


def test_a_file_of_torchvisions_own_is_known_by_its_digest(weights, monkeypatch):
    monkeypatch.setattr(torchvision_models, "file_revision", lambda path: "sha256:907ea3f9ffffffff")
    provenance = load_detector(f"torchvision:{NAME}", weights=str(weights), device="cpu").provenance
    assert provenance["class_names"][0] == "person"


class Evil:
    def __reduce__(self):
        return pytest.fail, ("it was executed",)


@pytest.mark.parametrize(
    "content", [{"a": torch.zeros(1)}, {"roi_heads.box_predictor.cls_score.bias": torch.zeros(3)}, Evil()]
)
def test_refuses_other_files(content, tmp_path):
    path = tmp_path / "other.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"other\.pth holds no state dict"):
        load_detector(f"torchvision:{NAME}", weights=str(path), device="cpu")


@pytest.mark.parametrize("problem", ["no network", "cut off"])
def test_weights_that_cannot_be_had_are_named_with_the_place_and_the_option(tmp_path, monkeypatch, problem):
    def urlopen(*arguments, **options):
        raise URLError("Name or service not known") if problem == "no network" else IncompleteRead(b"")

    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"lacks its weights: .*-o weights=FILE") as caught:
        load_detector(f"torchvision:{NAME}", device="cpu")
    message = str(caught.value)
    assert str(tmp_path / "hub/checkpoints/fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth") in message
    assert "https://download.pytorch.org/models/" in message and "<urlopen" not in message


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision", {}, "expected FAMILY:NAME.*visual-genome.*torchvision.*transformers.*grid"),
        ("yolo:v8", {}, "expected FAMILY:NAME"),
        ("griid:x", {}, r" Did you mean 'grid'\?$"),
        ("grid", {}, r"names its folder\)\.$"),
        ("torchvision:fasterrcnn_resnet50", {}, r" Did you mean 'fasterrcnn_resnet50_fpn'\?$"),
        (f"torchvision:{NAME}", {"thresold": 0.2}, "no option thresold.*max_regions.*score_threshold"),
        ("torchvision:ssd300_vgg16", {}, "no detector 'ssd300_vgg16' with a box head.*fasterrcnn_resnet50_fpn_v2"),
        (f"torchvision:{NAME}", {"weights": "COCO_V9"}, "COCO_V9.*neither a file nor one of.*COCO_V1"),
        (f"torchvision:{NAME}", {"precision": "int8"}, "int8"),
    ],
)
def test_unknown_names_and_options_list_what_exists(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_detector(name, **options)


def test_counts_must_be_possible():
    with pytest.raises(ValueError, match="min_regions is 20 and max_regions 10"):
        TorchvisionDetector(tiny_model(), device=CPU, min_regions=20, max_regions=10)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"'\.\[detection\]'"):
        load_detector(f"torchvision:{NAME}")


def test_what_prepares_photos_travels_to_other_processes():
    detector = TorchvisionDetector(tiny_model(), device=CPU)
    assert len(pickle.dumps(detector.prepare)) < 5000  # no model
    again = pickle.loads(pickle.dumps(detector.prepare))
    assert torch.equal(again(photo(120, 80)).pixels, detector.prepare(photo(120, 80)).pixels)
