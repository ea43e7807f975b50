"""The query bank: what is near to everything scores less, by whatever path a pair is scored."""

import datasets
import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_matching_head import similarity_model
from test_text_layers import paired

from unicoder_vl_hf import ImageTextScorer, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.modeling_unicoder_vl import UnicoderVLQueryBank
from unicoder_vl_hf.scoring.calibration import Calibration
from unicoder_vl_hf.scoring.checkpoints import scoring_digest
from unicoder_vl_hf.scoring.explanation import parts_of_similarity
from unicoder_vl_hf.scoring.packed import fingerprint
from unicoder_vl_hf.search.encoders import UnicoderVLDualEncoder
from unicoder_vl_hf.tasks.retrieval.two_stage_report import measure_similarity_weight


def banked(**changes):
    """A model of three layers, two of words, with a bank of five captions and three images."""
    model = similarity_model(num_hidden_layers=3, num_text_layers=2, **changes)
    width = model.config.projection_dim
    texts, images = (torch.nn.functional.normalize(torch.randn(count, width), dim=-1) for count in (5, 3))
    model.set_query_bank(texts, images)
    return model, texts, images


@pytest.mark.parametrize("padding_free", [False, True])
@torch.no_grad()
def test_a_score_is_less_by_how_near_caption_and_image_are_to_all(padding_free, monkeypatch):
    changes = {"padding_free": padding_free, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, texts, images = banked(**changes)
    plain = similarity_model(num_hidden_layers=3, num_text_layers=2, **changes)
    batch, names = tiny.padded_batch(), ("region_features", "region_locations", "region_attention_mask")
    pairs = paired(batch)
    captions = model.encode_text(batch["input_ids"], batch["attention_mask"])
    shown = model.encode_image(*(batch[name] for name in names))
    near_images = torch.tensor([(20 * images @ caption).exp().sum().log() / 20 for caption in captions])
    near_texts = torch.tensor([(20 * texts @ image).exp().sum().log() / 20 for image in shown])
    usual = torch.cat([(20 * text @ images.T).exp().sum().log()[None] / 20 for text in texts]).mean()
    usual += torch.cat([(20 * image @ texts.T).exp().sum().log()[None] / 20 for image in images]).mean()
    less = near_images[pairs["caption_index"]] + near_texts[pairs["image_index"]] - usual
    scale = model.first_stage.logit_scale.exp()
    found, without = model(**pairs).scores, plain(**pairs).scores
    torch.testing.assert_close(found, without - scale * less, rtol=0, atol=1e-4)
    assert near_images.std() > 1e-3 and near_texts.std() > 1e-3
    monkeypatch.setattr(UnicoderVLQueryBank, "similarities_at_once", 6)  # two rows at a time, or one
    torch.testing.assert_close(model(**pairs).scores, found)
    torch.testing.assert_close(model.train()(**pairs).scores, plain.train()(**pairs).scores)  # in training it rests
    model.eval()
    # The first stage proposes as it did.
    torch.testing.assert_close(captions, plain.encode_text(batch["input_ids"], batch["attention_mask"]))


@torch.no_grad()
def test_the_scorer_gives_the_scores_of_the_model():
    model, *_ = banked()
    processor, captions = tiny.processor(), ["a dog runs .", "a cat sleeps on the grass .", "dog"]
    records = [tiny.record(f"photo{number}", 1 + number) for number in range(3)]
    scorer = ImageTextScorer(model, processor, {record.image_id: record for record in records})
    found = torch.from_numpy(scorer.score(captions, [record.image_id for record in records]))
    wanted = torch.stack(
        [
            model(**processor(text=text, regions=record, return_tensors="pt")).scores[0]
            for text in captions
            for record in records
        ]
    )
    torch.testing.assert_close(found.flatten(), wanted, rtol=0, atol=2e-5)
    state, digest = fingerprint(model), scoring_digest(model)
    model.first_stage.query_bank.texts.neg_()
    assert fingerprint(model) != state and scoring_digest(model) != digest
    assert abs(scorer.score(captions, [record.image_id for record in records]) - found.numpy()).max() > 1e-3


def test_it_is_saved_with_the_model_and_left_by_another_training(tmp_path):
    model, texts, images = banked()
    model.save_pretrained(tmp_path)
    loaded, report = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(
        (loaded.first_stage.query_bank.texts, loaded.first_stage.query_bank.images), (texts, images)
    )
    batch = paired(tiny.padded_batch())
    torch.testing.assert_close(loaded(**batch).scores, model(**batch).scores)
    without, report = UnicoderVLForImageTextRetrieval.from_pretrained(
        tmp_path, query_bank_size=None, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert without.first_stage.query_bank is None and without.config.query_bank_size is None
    other = UnicoderVLForImageTextRetrieval.from_pretrained(
        tmp_path, query_bank_size=None, matching_head="unicoder_vl", projection_dim=None
    )
    assert other.first_stage is None


def test_the_weight_is_measured_by_the_similarity_that_is_folded():
    """So that the score, once it holds the weight, orders as the sum that was measured."""
    model, *_ = banked()
    model.config.first_stage_trained = True
    processor, words = tiny.processor(), ("a", "dog", "cat", "runs", "sleeps", "on", "the", "grass")
    records = {f"photo{number}": tiny.record(f"photo{number}", 1 + number) for number in range(12)}
    captions = [f"{first} {second} ." for first in words for second in words][:12]
    rows = datasets.Dataset.from_dict({"image_id": list(records), "caption": captions})
    encoder = UnicoderVLDualEncoder(model, processor, records, "model")
    scorer = ImageTextScorer(model, processor, records)
    report = measure_similarity_weight(encoder, scorer, rows)
    assert report.with_query_bank not in (None, report.rows[0].metrics)
    assert str(report).splitlines()[3].startswith("| first stage and query bank alone | 0 | | | ")
    measured = {row.similarity_weight: row.metrics for row in report.rows[1:]}
    model.fold_similarity_weight(30.0)
    by_score = measure_similarity_weight(encoder, scorer, rows).rows[1].metrics
    assert by_score == measured[30.0] != measured[0.0]
    known = encoder.identity()
    model.first_stage.query_bank = None
    assert encoder.identity() == known  # an index of what is embedded stays good
    assert measure_similarity_weight(encoder, scorer, rows).with_query_bank is None


def test_an_explanation_shares_out_the_score_that_it_explains():
    """What the positions add, by gradient x state, is that of the logit less what the bank takes."""
    model, *_ = banked()
    plain = similarity_model(num_hidden_layers=3, num_text_layers=2)
    states = torch.randn(7, model.config.hidden_size)
    found, without = (parts_of_similarity(each.first_stage, states, 4) for each in (model, plain))
    words, regions = states[:4].requires_grad_(), states[4:].requires_grad_()
    stage = model.first_stage
    weights = stage.weights_of_regions(regions[None], None)[0].detach()
    text, image = stage.embed_text(words.mean(0)[None]), stage.embed_image((weights @ regions)[None])
    scale, bank = stage.logit_scale.exp(), stage.query_bank
    logit = scale * (text * image).sum() - scale * (bank.nearness_to_images(text) + bank.nearness_to_texts(image)).sum()
    wanted = torch.cat(
        [of * grad for of, grad in zip((words, regions), torch.autograd.grad(logit, (words, regions)), strict=True)]
    )
    torch.testing.assert_close(found, wanted.sum(-1), rtol=1e-3, atol=1e-5)
    assert (found - without).abs().max() > 0.01


@torch.no_grad()
def test_without_the_bank_a_model_is_what_it_was_before(tmp_path):
    """For captions of one image, as foils are: also where pairs were scored with the bank before."""
    model, *_ = banked()
    plain = similarity_model(num_hidden_layers=3, num_text_layers=2)
    processor, images = tiny.processor(), {"photo": tiny.record("photo", 3)}
    captions = ["a dog runs .", "a cat runs .", "two dogs on the grass ."]
    scorer = ImageTextScorer(model, processor, images)
    with_bank = scorer.score(captions, ["photo"])
    wanted = ImageTextScorer(plain, processor, images).score(captions, ["photo"])
    assert abs(with_bank - wanted).max() > 1e-3
    model.config.calibration, model.config.similarity_weight = vars(Calibration(1.0, 0.0, 1.0, 1.0, 2)), 3.0
    assert scorer.match(captions, ["photo"]).matches.shape == (3, 1)
    model.remove_query_bank()
    with pytest.raises(ValueError, match="is not calibrated"):
        scorer.match(captions, ["photo"])
    assert model.config.calibration is None and model.config.similarity_weight is None
    torch.testing.assert_close(scorer.score(captions, ["photo"]), wanted)
    model.config.similarity_weight = 3.0
    model.remove_query_bank()  # of which there is none
    assert model.config.similarity_weight == 3.0
    model.save_pretrained(tmp_path)
    loaded, report = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and loaded.first_stage.query_bank is None


def test_scores_keep_their_zero():
    """Or sigmoid(score), by which calibration and mining read them, would say nothing."""
    model, texts, images = banked()
    bank = model.first_stage.query_bank
    for near in (bank.nearness_to_images(texts), bank.nearness_to_texts(images)):
        assert near.mean().abs() < 1e-6 < near.std()
    model.config.calibration, model.config.similarity_weight = {"temperature": 1.0}, 3.0
    model.set_query_bank(texts, images)
    assert model.config.calibration is None and model.config.similarity_weight is None
    model.config.calibration = {"temperature": 1.0}
    model.fold_similarity_weight(1.0)
    assert model.config.calibration is None


def test_what_does_not_fit_is_refused():
    for sizes in ([3], [0, 3]):
        with pytest.raises(StrictDataclassClassValidationError, match="must be two numbers of at least 1"):
            tiny.config(num_hidden_layers=2, query_bank_size=sizes)
    with pytest.raises(StrictDataclassClassValidationError, match=r"query_bank_size=\[3, 3\] needs matching_head"):
        tiny.config(num_hidden_layers=2, query_bank_size=[3, 3])
    model = similarity_model(num_hidden_layers=3, num_text_layers=2)
    width = model.config.projection_dim
    with pytest.raises(ValueError, match="expected a similarity after text layers"):
        similarity_model().set_query_bank(torch.ones(2, width), torch.ones(2, width))
    assert model.config.query_bank_size is None
    with pytest.raises(ValueError, match=r"images has shape \(0, "):
        model.set_query_bank(torch.ones(2, width), torch.ones(0, width))
