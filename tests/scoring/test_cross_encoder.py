"""A checkpoint in sentence-transformers, by the real library: its scores are ours, whatever its form of input."""

import json
from pathlib import Path

import numpy as np
import photo_world
import pytest
import torch
from photo_world import CAPTIONS, IDS
from PIL import Image

pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

from unicoder_vl_hf import ImageTextScorer
from unicoder_vl_hf.scoring.cross_encoder import UnicoderVLModule


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return photo_world.build(tmp_path_factory.mktemp("cross_encoder"))


@pytest.fixture(scope="module")
def stored(world) -> np.ndarray:
    """Our scores, `(C, M)`."""
    return ImageTextScorer.from_pretrained(world / "model", world / "store", verbose=False).score(CAPTIONS, IDS)


@pytest.fixture(scope="module")
def encoder(world) -> CrossEncoder:
    options = {"store": world / "store"}
    return CrossEncoder(str(world / "model"), trust_remote_code=True, device="cpu", processor_kwargs=options)


def test_pairs_in_every_form_score_as_ours(world, stored, encoder, monkeypatch):
    monkeypatch.chdir(world / "photos")
    assert isinstance(encoder[0], UnicoderVLModule) and isinstance(encoder.activation_fn, torch.nn.Identity)
    assert encoder.modalities == ["text", "image", ("image", "text")] and encoder.max_seq_length == 44
    forms = [
        IDS[0],
        "photo_1.png",
        Path("photo_2.png"),
        Image.open("photo_3.png"),
        encoder.processor.default_store[IDS[4]],
    ]
    pairs = [(caption, image) for caption in CAPTIONS for image in forms]
    pairs[2] = pairs[2][::-1]  # an image that is no str may come first
    for batch_size in (1, 4, 32):
        found = encoder.predict(pairs, batch_size=batch_size)
        np.testing.assert_allclose(found, stored[:, :5].ravel(), rtol=0, atol=1e-5)
    assert abs(encoder.predict((CAPTIONS[1], IDS[5])) - stored[1, 5]) < 1e-5
    assert encoder.predict(pairs[:1], prompt="a cat ")[0] != pytest.approx(stored[0, 0], abs=1e-4)
    ranked = encoder.rank(CAPTIONS[0], IDS)
    assert [each["corpus_id"] for each in ranked] == np.argsort(-stored[0], kind="stable").tolist()
    ranked = encoder.rank(Path("photo_2.png"), CAPTIONS)
    assert [each["corpus_id"] for each in ranked] == np.argsort(-stored[:, 2], kind="stable").tolist()
    for wrong, message in (
        (["a dog"], "is no pair"),
        ([(Path("photo_2.png"), Path("photo_1.png"))], "has no sentence"),
        ([("a dog", "photo_9")], "has no image 'photo_9'"),
    ):
        with pytest.raises((ValueError, KeyError), match=message):
            encoder[0].preprocess(wrong)


def test_an_evaluator_and_a_pool(world, stored, encoder):
    right = stored.argmax(1)
    samples = [
        {"query": caption, "positive": [IDS[right[row]]], "negative": [name for name in IDS if name != IDS[right[row]]]}
        for row, caption in enumerate(CAPTIONS)
    ]
    assert CrossEncoderRerankingEvaluator(samples, at_k=1)(encoder)["mrr@1"] == 1.0
    pool = encoder.start_multi_process_pool(["cpu"])
    try:
        found = encoder.predict([(CAPTIONS[0], name) for name in IDS], pool=pool)
    finally:
        encoder.stop_multi_process_pool(pool)
    np.testing.assert_allclose(found, stored[0], rtol=0, atol=1e-5)


def test_it_is_saved_and_loads_by_both(world, stored, encoder, tmp_path):
    encoder.save_pretrained(str(tmp_path / "saved"))
    for folder in (world / "model", tmp_path / "saved"):
        (module,) = json.loads((folder / "modules.json").read_text())
        assert module["type"] == "unicoder_vl_hf.scoring.cross_encoder.UnicoderVLModule"
    assert json.loads((world / "model" / "config_sentence_transformers.json").read_text()) == {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.linear.Identity",
    }
    ours = ImageTextScorer.from_pretrained(tmp_path / "saved", world / "store", verbose=False)
    np.testing.assert_allclose(ours.score(CAPTIONS, IDS), stored, rtol=0, atol=1e-5)
    again = CrossEncoder(
        str(tmp_path / "saved"),
        trust_remote_code=True,
        device="cpu",
        max_length=3,
        model_kwargs={"dtype": torch.bfloat16},
        processor_kwargs={"store": str(world / "store"), "detector": f"grid:{world / 'encoder'}"},
    )
    assert again.max_seq_length == 3 and again.dtype == torch.bfloat16
    cut = again.predict([("a dog", IDS[0]), ("a cat", IDS[0])])  # [CLS] a [SEP]
    assert cut[0] == cut[1]
    with pytest.raises(TypeError, match="stroe"):
        CrossEncoder(str(world / "model"), trust_remote_code=True, processor_kwargs={"stroe": "x"})


def test_it_trains(world, encoder, stored):
    """Its scores have gradients."""
    module = encoder[0]
    features = module.preprocess([(CAPTIONS[0], IDS[0]), (CAPTIONS[1], IDS[0])])
    assert len(features["token_ids"]) == 2 and len(features["records"]) == 1  # each once
    scores = module.forward(features)["scores"]
    np.testing.assert_allclose(scores.detach(), stored[:2, 0], rtol=0, atol=1e-5)
    scores.sum().backward()
    assert module.model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    with torch.no_grad():  # what was trained is what predicts
        module.model.matching_head.weight[1] += 1
    assert np.abs(encoder.predict([(CAPTIONS[0], IDS[0])]) - stored[0, 0]).max() > 1e-3
    with torch.no_grad():
        module.model.matching_head.weight[1] -= 1
