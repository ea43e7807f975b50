"""transformers' detectors against the models' own outputs and their image processors' own post-processing."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from photos import SIZES, photo
from transformers import (
    BertConfig,
    BertTokenizer,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    DFineConfig,
    DFineForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from unicoder_vl_hf.regions.detectors import load_detector
from unicoder_vl_hf.regions.detectors.transformers_models import (
    Prompt,
    TransformersDetector,
    class_probabilities,
)

CPU = torch.device("cpu")
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
LEVELS = {"out_features": ["stage2", "stage3", "stage4"]}
DECODER = {
    "num_labels": 5,
    "num_queries": 12,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
HYBRID = {"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32, 32, 32]}
SHORTEST, SQUARE = {"shortest_edge": 64, "longest_edge": 120}, {"height": 64, "width": 64}


def resnet(config_class=ResNetConfig, **features):
    return config_class(**BACKBONE, **(features or {"out_features": ["stage4"]}))


def detr():
    config = DetrConfig(backbone_config=resnet(), **DECODER)
    model = DetrForObjectDetection(config)
    return model, DetrImageProcessor(size=SHORTEST), model.class_labels_classifier


def conditional_detr():
    model = ConditionalDetrForObjectDetection(ConditionalDetrConfig(backbone_config=resnet(), **DECODER))
    return model, ConditionalDetrImageProcessor(size=SHORTEST), model.class_labels_classifier


def deformable_detr():
    config = DeformableDetrConfig(backbone_config=resnet(**LEVELS), num_feature_levels=3, **DECODER)
    model = DeformableDetrForObjectDetection(config)
    return model, DeformableDetrImageProcessor(size=SHORTEST), model.class_embed[-1]


def rt_detr():
    config = RTDetrConfig(backbone_config=resnet(RTDetrResNetConfig, **LEVELS), num_denoising=0, **HYBRID, **DECODER)
    model = RTDetrForObjectDetection(config)
    return model, RTDetrImageProcessor(size=SQUARE), model.model.decoder.class_embed[-1]


def d_fine():
    config = DFineConfig(
        backbone_config=resnet(RTDetrResNetConfig, **LEVELS),
        num_denoising=0,
        max_num_bins=8,
        decoder_n_points=[2, 2, 2],
        **HYBRID,
        **DECODER,
    )
    model = DFineForObjectDetection(config)
    # Its logits are those of the class head plus what it reads off the boxes, which is taken out here.
    for layer in model.model.decoder.lqe_layers:
        layer.forward = lambda scores, corners: scores
    return model, RTDetrImageProcessor(size=SQUARE), model.model.decoder.class_embed[-1]


def yolos():
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=12,
        num_labels=5,
    )
    model = YolosForObjectDetection(config)
    nn.init.normal_(model.vit.embeddings.detection_tokens)  # all zeros else
    return model, YolosImageProcessor(size=SHORTEST), model.class_labels_classifier


FAMILIES = [detr, conditional_detr, deformable_detr, rt_detr, d_fine, yolos]


def build(family):
    torch.manual_seed(0)
    model, processor, head = family()
    for module in model.modules():  # so that scores and boxes differ plainly between queries
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.5)
    return model.eval(), processor, head


def detect(detector, *images, boxes=None):
    prepared = [detector.prepare(image) for image in images]
    return detector(prepared, [f"photo_{index}" for index in range(len(images))], boxes)


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_classes_and_scores_are_those_of_the_processor(family):
    model, processor, _ = build(family)
    image = photo(120, 80)
    (record,) = detect(TransformersDetector(model, processor, device=CPU), image)
    with torch.inference_mode():
        outputs = model(**processor(images=image, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(80, 120)])
    # The processor may list a query with several classes, best first: its first row is the query's likeliest.
    limits = np.array([120, 80, 120, 80])
    order = expected["scores"].argsort(descending=True, stable=True)
    first = {}
    for box, label, score in zip(
        *(expected[name][order].numpy() for name in ("boxes", "labels", "scores")), strict=True
    ):
        first.setdefault(tuple(np.round(box.clip(0, limits), 3)), (box.clip(0, limits), label, score))
    found = list(first.values())
    assert len(found) >= 3
    np.testing.assert_allclose(record.boxes[: len(found)], [box for box, _, _ in found], atol=1e-3)
    np.testing.assert_array_equal(record.object_ids[: len(found)], [label for _, label, _ in found])
    np.testing.assert_allclose(record.object_scores[: len(found)], [score for _, _, score in found], rtol=1e-5)
    assert record.num_regions == 12
    assert np.abs(record.boxes - record.boxes[:, [1, 0, 3, 2]]).max() > 5  # x and y are told apart


@pytest.mark.parametrize("family", FAMILIES)
def test_each_feature_gives_the_class_of_its_own_box(family):
    model, processor, head = build(family)
    (record,) = detect(TransformersDetector(model, processor, device=CPU), photo(120, 80))
    with torch.inference_mode():
        logits = head(torch.from_numpy(record.features))
    scores, labels = class_probabilities(logits, 5).max(-1)
    np.testing.assert_allclose(scores.numpy(), record.object_scores, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(labels.numpy(), record.object_ids)
    assert np.ptp(record.object_scores) > 1e-3
    assert (np.diff(record.object_scores) <= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_photo_gives_in_a_batch_what_it_gives_alone(family):
    model, processor, _ = build(family)
    detector = TransformersDetector(model, processor, device=CPU)
    images = [photo(*size, seed=seed) for seed, size in enumerate(SIZES)]
    for index, together in enumerate(detect(detector, *images)):
        (alone,) = detect(detector, images[index])
        assert (together.image_id, together.image_width, together.image_height) == (f"photo_{index}", *SIZES[index])
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=0.02)
        np.testing.assert_allclose(together.features, alone.features, rtol=1e-2, atol=1e-3)


def test_no_object_is_the_last_column_of_a_softmax_or_none_of_a_sigmoid():
    logits = torch.tensor([0.0, 1.0, 3.0])
    exponentials = np.exp([0.0, 1.0, 3.0])
    np.testing.assert_allclose(class_probabilities(logits, 2), exponentials[:2] / exponentials.sum(), rtol=1e-6)
    np.testing.assert_allclose(class_probabilities(logits, 3), exponentials / (1 + exponentials), rtol=1e-6)
    with pytest.raises(ValueError, match="3 logits a query, expected those of 7 labels"):
        class_probabilities(logits, 7)


def test_thresholds_keep_the_best():
    model, processor, _ = build(detr)
    (every,) = detect(TransformersDetector(model, processor, device=CPU), photo(120, 80))
    between = float(every.object_scores[4] + every.object_scores[5]) / 2
    for min_regions, max_regions, expected in ((1, 100, 5), (8, 100, 8), (1, 3, 3)):
        detector = TransformersDetector(
            model, processor, device=CPU, score_threshold=between, min_regions=min_regions, max_regions=max_regions
        )
        (record,) = detect(detector, photo(120, 80))
        np.testing.assert_array_equal(record.boxes, every.boxes[:expected])
        np.testing.assert_array_equal(record.features, every.features[:expected])


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision(family):
    model, processor, _ = build(family)
    (exact,) = detect(TransformersDetector(model, processor, device=CPU), photo(120, 80))
    seen = {}
    model.register_forward_hook(lambda module, inputs, output: seen.update(boxes=output.pred_boxes.dtype))
    (record,) = detect(TransformersDetector(model, processor, device=CPU, precision="bf16"), photo(120, 80))
    assert record.features.dtype == np.float32
    assert record.num_regions == 12
    assert not np.array_equal(record.features, exact.features)
    assert seen["boxes"] == torch.float32  # in bfloat16 they would be pixels off


def test_given_boxes_are_refused():
    model, processor, _ = build(detr)
    with pytest.raises(ValueError, match="cannot take given ones: use a visual-genome, torchvision or grid detector"):
        detect(TransformersDetector(model, processor, device=CPU), photo(120, 80), boxes=[np.array([[0, 0, 9, 9]])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("detr")
    model, processor, _ = build(detr)
    model.save_pretrained(path), processor.save_pretrained(path)
    return path


def test_loads_a_folder(folder):
    detector = load_detector(f"transformers:{folder}", max_regions=11, device="cpu", precision="no")
    (record,) = detect(detector, photo(120, 80))
    model, processor, _ = build(detr)
    (expected,) = detect(TransformersDetector(model, processor, device=CPU), photo(120, 80))
    np.testing.assert_array_equal(record.features, expected.features[:11])
    assert detector.provenance["num_classes"] == 5  # LABEL_0 is no name
    assert detector.provenance["thresholds"] == {"score": 0.0, "min_regions": 10, "max_regions": 11}


def test_class_names_are_those_of_the_config(tmp_path):
    model, processor, _ = build(detr)
    model.config.id2label = dict(enumerate(["N/A", "person", "bicycle", "car", "toothbrush"]))
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    names = load_detector(f"transformers:{tmp_path}", device="cpu").provenance["class_names"]
    assert names == ["N/A", "person", "bicycle", "car", "toothbrush"]


def test_missing_weights_are_no_random_weights(folder, tmp_path):
    model, processor, _ = build(detr)
    model.model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .* weights, such as"):
        load_detector(f"transformers:{tmp_path}", device="cpu")
    with pytest.raises(ValueError, match="is a detr, which takes no `text`"):
        load_detector(f"transformers:{folder}", text="a cat.", device="cpu")


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . a cat dog ##gy red fire ##truck".split()


@pytest.fixture(scope="module")
def grounded(tmp_path_factory):
    path = tmp_path_factory.mktemp("grounded")
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 2],
            window_size=4,
            **LEVELS,
        ),
        text_config=BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        num_feature_levels=3,
        max_text_len=32,
        **{name: value for name, value in DECODER.items() if name != "num_labels"},
    )
    model = GroundingDinoForObjectDetection(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    model.save_pretrained(path)
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=SHORTEST), tokenizer).save_pretrained(path)
    return path


def test_a_class_of_a_text_has_the_tokens_of_its_name(grounded):
    tokenizer = BertTokenizer.from_pretrained(grounded)
    prompt = Prompt(["a cat", "red firetruck", "dog"], tokenizer, 32)
    # [CLS] a cat . red fire ##truck . dog . [SEP]
    assert prompt.inputs["input_ids"][0].tolist() == [2, 6, 7, 5, 10, 11, 12, 5, 8, 5, 3]
    assert [row.nonzero().flatten().tolist() for row in prompt.tokens_of_class] == [[1, 2], [4, 5, 6], [8]]
    logits = torch.full((1, 32), -torch.inf)
    logits[0, :11] = torch.tensor([9.0, -1, 0.5, 9, -2, 2, 1, 9, -3, 9, 9])
    expected = torch.tensor([0.5, 2.0, -3.0]).sigmoid()
    torch.testing.assert_close(prompt.class_probabilities(logits)[0], expected)
    with pytest.raises(ValueError, match="11 tokens, the model takes 10"):
        Prompt(["a cat", "red firetruck", "dog"], tokenizer, 10)


def test_grounding_dino(grounded):
    detector = load_detector(f"transformers:{grounded}", text="a cat. dog.", device="cpu", precision="no")
    assert detector.provenance["class_names"] == ["a cat", "dog"]
    images = [photo(120, 80), photo(80, 120, seed=1), photo(120, 80, seed=2)]
    records = detect(detector, *images)
    processor = GroundingDinoProcessor.from_pretrained(grounded)
    for image, record in zip(images, records, strict=True):
        inputs = processor(images=image, text="a cat. dog.", return_tensors="pt")
        with torch.inference_mode():
            outputs = detector.model(**inputs)
            # The head on the features gives the logits: what a query is about is in its feature.
            logits = detector.model.class_embed[-1](
                vision_hidden_state=torch.from_numpy(record.features)[None],
                text_hidden_state=outputs.encoder_last_hidden_state_text,
                text_token_mask=inputs["attention_mask"].bool(),
            )
        # [CLS] a cat . dog . [SEP]
        cat, dog = logits[0, :, 1:3].amax(-1).sigmoid(), logits[0, :, 4].sigmoid()
        np.testing.assert_allclose(record.object_scores, cat.maximum(dog), rtol=1e-3)
        np.testing.assert_array_equal(record.object_ids, (dog > cat).int())
        (expected,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=[image.size[::-1]]
        )
        limits = np.array([*image.size, *image.size])
        distance = np.abs(record.boxes[:, None] - expected["boxes"].numpy().clip(0, limits)).max(-1)
        assert distance.min(1).max() < 0.01
        assert sorted(distance.argmin(1)) == list(range(12))


def test_a_text_is_needed(grounded):
    with pytest.raises(ValueError, match="is a grounding-dino, which needs `text`"):
        load_detector(f"transformers:{grounded}", device="cpu")
