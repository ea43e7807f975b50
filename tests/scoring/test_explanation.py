"""Explanations: against gradients by finite differences, what they say of words and regions, and two sanity checks."""

import dataclasses
import importlib
import re

import numpy as np
import pytest
import tiny
import torch
import trained_world
from PIL import Image
from places import ROOT
from test_pictures import Page
from transformers import BertTokenizer

from unicoder_vl_hf import (
    ImageTextScorer,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    UnicoderVLProcessor,
    cli,
    modeling_unicoder_vl,
)
from unicoder_vl_hf.pictures import blank_page, draw_relevance
from unicoder_vl_hf.scoring import Calibration, explain
from unicoder_vl_hf.search import explain_on_photo

CAPTION = "a dog runs on the grass ."
NUMBERED = r'class="number">(\d+)</span> (.+?) \d+%'


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return trained_world.build(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def model():
    return tiny.model(UnicoderVLForImageTextRetrieval)


def attentions_of(model, inputs, monkeypatch, place=None, change=0.0):
    """The score, and the weights of each layer, one of which, (layer, head, row, column), is changed by `change`."""
    attend, weights_of = modeling_unicoder_vl.eager_attention_forward, []

    def changed(module, query, key, value, attention_mask, **kwargs):
        _, weights = attend(module, query, key, value, attention_mask, **kwargs)
        if place is not None and len(weights_of) == place[0]:
            weights = weights.clone()
            weights[0][place[1:]] += change
        weights_of.append(weights[0].numpy().astype(np.float64))
        return (weights @ value).transpose(1, 2).contiguous(), weights

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(modeling_unicoder_vl, "eager_attention_forward", changed)
        return model(**inputs).scores.item(), weights_of


def test_relevance_is_that_of_gradients_by_finite_differences(model, monkeypatch):
    record, step = tiny.record(), 1e-2
    inputs = tiny.processor()(text=CAPTION, regions=record, return_tensors="pt")
    model.set_attn_implementation("eager")
    score, weights = attentions_of(model, inputs, monkeypatch)
    length = weights[0].shape[-1]
    expected = np.eye(length)
    for layer, of_heads in enumerate(weights):
        gradients = np.zeros_like(of_heads)
        for place in np.ndindex(*of_heads.shape):
            above, below = (attentions_of(model, inputs, monkeypatch, (layer, *place), by)[0] for by in (step, -step))
            gradients[place] = (above - below) / (2 * step)
        expected = expected + np.maximum(gradients * of_heads, 0).mean(0) @ expected
    found = explain(model, tiny.processor(), record, CAPTION)
    words = slice(1, 1 + len(found.words))  # after [CLS]; [SEP] and the regions follow
    assert found.words == tuple(CAPTION.split()) and abs(found.score - score) < 1e-5
    assert np.ptp(expected[0, length - 3 :]) > 1e-3
    np.testing.assert_allclose(found.word_relevance, expected[0, words], rtol=0.01, atol=1e-4)
    np.testing.assert_allclose(found.region_relevance, expected[0, length - 3 :], rtol=0.01, atol=1e-4)
    np.testing.assert_allclose(found.relevance_to_words, expected[words, length - 3 :], rtol=0.01, atol=1e-4)


def test_words_are_shown_not_their_pieces(model):
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog ##s run ##ning , ! red the ."
    vocabulary = {piece: index for index, piece in enumerate(pieces.split())}
    processor = UnicoderVLProcessor(UnicoderVLFeatureExtractor(), BertTokenizer(vocab=vocabulary))
    found = explain(model, processor, tiny.record(), " Dogs, red-red\n dogs running!")
    assert found.words == ("Dogs", ",", "red", "-", "red", "dogs", "running", "!")
    assert found.word_relevance.shape == (8,) and found.relevance_to_words.shape == (8, 3)
    split = "[PAD] [UNK] [CLS] [SEP] [MASK] a ##a".split()
    processor = UnicoderVLProcessor(
        UnicoderVLFeatureExtractor(), BertTokenizer(vocab={piece: index for index, piece in enumerate(split)})
    )
    whole = explain(model, processor, tiny.record(), "aa")
    separate = explain(model, tiny.processor(), tiny.record(), "a dog")  # ids 5 and 6, too
    assert whole.words == ("aa",) and separate.words == ("a", "dog")
    np.testing.assert_allclose(whole.word_relevance, [separate.word_relevance.sum()], rtol=1e-5)
    np.testing.assert_allclose(whole.relevance_to_words, separate.relevance_to_words.mean(0, keepdims=True), rtol=1e-5)
    assert explain(model, processor, tiny.record(), "aa aa", max_length=4).words == ("aa",)


@pytest.mark.parametrize("model_class", [UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining])
def test_the_model_is_left_as_it_was(model_class):
    model = tiny.model(model_class, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    model.config.padding_free = True
    processor = tiny.processor(max_regions=2)
    record = dataclasses.replace(tiny.record(), object_scores=np.array([0.9, 0.1, 0.8]))
    with torch.inference_mode(False), torch.no_grad():
        found = explain(model, processor, record, CAPTION)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.score == pytest.approx(
        ImageTextScorer(model, processor, verbose=False).score([CAPTION], [record]).item()
    )
    assert found.region_relevance[1] == 0 and (found.region_relevance[[0, 2]] > 0).any()  # [1] was not seen
    assert not found.relevance_to_words[:, 1].any()
    frozen = explain(model.requires_grad_(False), processor, record, CAPTION)
    np.testing.assert_array_equal(frozen.region_relevance, found.region_relevance)


def test_explanations_tell_what_a_trained_model_looked_at(world, monkeypatch):
    """Deleting what was relevant lowers the score soonest, and a model of new weights gives another picture."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measure = importlib.import_module("explanations").measure
    scorer = ImageTextScorer.from_pretrained(world / "model", world / "world" / "regions", verbose=False)
    pairs = trained_world.captions(world / "world")
    found = measure(scorer, pairs)
    top, random, least = (scores[1] for scores in found.scores.values())
    assert top < random < least and top < found.scores["at random"][0] - 0.3
    assert all(abs(correlation) < 0.5 for correlation in found.correlation.values())
    assert f"| most relevant first | {found.scores['at random'][0]:+.2f} | {top:+.2f} |" in str(found)


def test_the_command_draws_on_the_photo(world, tmp_path, capsys):
    image_id, caption = trained_world.captions(world / "world")[0]
    output, photo = tmp_path / "e.html", world / "world" / "photos" / f"{image_id}.png"
    words = ["explain", image_id, caption, "--model", world / "model", "--regions", world / "world" / "regions"]
    words += ["--output", output]
    scorer = ImageTextScorer.from_pretrained(world / "model", world / "world" / "regions", verbose=False)
    explanation = explain(scorer.model, scorer.processor, image_id, caption)
    names = scorer.store.provenance["class_names"]
    for photos in (["--photos", photo.parent], []):
        assert cli.main([*map(str, words), *map(str, photos)]) == 0
        assert capsys.readouterr().out == f"{explanation.score:+8.3f}  {caption}\nExplained in {output}\n"
        page = Page(output)
        assert page.captions == ["raised the score:", *explanation.words]
        whole, *of_words = (np.asarray(picture.convert("RGB"), dtype=int) for picture in page.pictures)
        assert len(of_words) == len(explanation.words)
        record, shares = explanation.record, explanation.relevance_to_words
        links = [[row.argmax()] if row.max() >= shares.max() / 100 else [] for row in shares]
        named = [np.argsort(-explanation.region_relevance)[:3], *links]
        listed = [re.findall(NUMBERED, figure) for figure in output.read_text().split("<figure")[1:]]
        assert listed == [[(str(index), names[record.object_ids[index]]) for index in indices] for indices in named]
        with Image.open(photo) as original:
            beneath = original.copy() if photos else blank_page(record)
        drawn = draw_relevance(beneath, record, explanation.region_relevance, numbered=named[0])
        np.testing.assert_array_equal(whole, drawn)
        for picture, row, numbered in zip(of_words, shares, links, strict=True):
            drawn = draw_relevance(beneath, record, row, most=shares.max(), numbered=numbered, min_width=240)
            np.testing.assert_array_equal(picture, drawn)
        is_grey = np.ptp(whole, axis=-1).max(axis=None) < 40
        strongest = int(explanation.region_relevance.argmax())
        x1, y1, x2, y2 = explanation.record.locations()[strongest, :4] * np.tile(whole.shape[1::-1], 2)
        inside = whole[int(y1) + 6 : int(y2) - 6, int(x1) + 6 : int(x2) - 6]
        with Image.open(photo) as original:
            resized = np.asarray(
                original.convert("RGB").resize(whole.shape[1::-1], Image.Resampling.LANCZOS), dtype=int
            )
        same = np.abs(inside - resized[int(y1) + 6 : int(y2) - 6, int(x1) + 6 : int(x2) - 6]).mean() < 3
        assert same == bool(photos) and not (photos and is_grey)
    assert cli.main([*map(str, words[:2]), " ", *map(str, words[3:])]) == 1
    assert "a caption needs at least one word" in capsys.readouterr().err


def test_photos_and_records_are_explained_too(world, tmp_path):
    image_id, caption = trained_world.captions(world / "world")[0]
    scorer = ImageTextScorer.from_pretrained(world / "model", world / "world" / "regions", verbose=False)
    record = scorer.store[image_id]
    scorer.processor.set_detector(lambda photos: [dataclasses.replace(record, image_id="found")] * len(photos))
    photo = world / "world" / "photos" / f"{image_id}.png"
    record.save(tmp_path / "record.npz")
    html = [explain_on_photo(scorer, image, caption)[1] for image in (photo, str(photo), Image.open(photo))]
    assert html[0] == html[1] == html[2] and "<html" not in html[0]
    names = scorer.store.provenance["class_names"]
    assert (
        names[record.object_ids[int(explain_on_photo(scorer, record, caption)[0].region_relevance.argmax())]] in html[0]
    )
    blank = [explain_on_photo(scorer, image, caption)[1] for image in (image_id, tmp_path / "record.npz", record)]
    assert blank[0] == blank[1] == blank[2] != html[0]
    scorer.model.config.calibration = vars(Calibration.fit(np.array([9.0, -9.0]), np.array([True, False])))
    explanation, shown = explain_on_photo(scorer, record, caption)
    assert f"score {explanation.score:+.2f}, a match with a probability of " in shown
    with pytest.raises(ValueError, match="boxes is None"):
        explain_on_photo(scorer, dataclasses.replace(record, boxes=None), caption)
