"""The first stage: embeddings of one modality alone, the contrastive loss, and training it along or alone."""

import copy
import dataclasses
import math

import datasets
import numpy as np
import pytest
import small_world
import tiny
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLRetrieval,
    ImageTextScorer,
    RegionStore,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.data.caption_files import select_split
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.data.foils import Foil, write_foils
from unicoder_vl_hf.data.negatives import PairsWithNegatives
from unicoder_vl_hf.search.encoders import UnicoderVLDualEncoder, image_states, text_states
from unicoder_vl_hf.tasks.retrieval.first_stage import EncodedPairs, fit_first_stage, train_first_stage
from unicoder_vl_hf.tasks.retrieval.losses import (
    ContrastiveLoss,
    GroupSoftmaxLoss,
    HardestNegativeLoss,
    HardNegativeLoss,
    TwoStageLoss,
    contrastive_loss,
    hard_negatives,
)
from unicoder_vl_hf.tasks.retrieval.training import RetrievalArguments, evaluate_retrieval, prepare_retrieval
from unicoder_vl_hf.tasks.retrieval.two_stage_report import describe_weight, measure_similarity_weight


def model(**config):
    torch.manual_seed(1)
    return UnicoderVLForImageTextRetrieval(tiny.config(**{"projection_dim": 4} | config)).eval()


# What is embedded


def test_embeddings_are_unit_means_of_the_encoder_projected():
    encoder, processor = model(), tiny.processor()
    text = processor(text=["a dog", "a cat runs on the grass ."], return_tensors="pt")
    image = processor(regions=[tiny.record("a", 2), tiny.record("b", 5)], return_tensors="pt")
    with torch.no_grad():
        found = encoder.encode_text(**text), encoder.encode_image(**image)
        layers = encoder.bert(text["input_ids"][:1, :4], output_hidden_states=True).hidden_states
        assert len(layers) == 3 and not torch.equal(layers[0], layers[1])  # the embeddings and two layers
        expected_text = encoder.first_stage.text_projection(sum(layers)[0].mean(0) / 3)
        regions = encoder.bert.embeddings.region_embeddings(
            image["region_features"][:1, :2], image["region_locations"][:1, :2]
        )
        layers = [encoder.bert.embeddings.add_image_token(regions)]
        for layer in encoder.bert.encoder.layer:
            layers.append(layer(layers[-1]))
        expected_image = encoder.first_stage.image_projection(sum(layers)[0].mean(0) / 3)
    for embeddings, expected in zip(found, (expected_text, expected_image), strict=True):
        assert embeddings.shape == (2, 4) and embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(embeddings[0], expected / expected.norm(), atol=1e-6, rtol=1e-5)


def test_embeddings_of_a_half_precision_model_are_float32():
    encoder, processor = model().to(torch.bfloat16), tiny.processor()
    text = encoder.encode_text(**processor(text=["a dog"], return_tensors="pt"))
    image = encoder.encode_image(**processor(regions=[tiny.record("a", 2)], return_tensors="pt"))
    assert text.dtype == image.dtype == torch.float32
    torch.testing.assert_close(text.norm(dim=1), torch.ones(1))


def test_states_do_not_depend_on_order_or_batch(monkeypatch):
    encoder, processor = model(), tiny.processor()
    captions = ["a dog runs", "a", "a cat sleeps on the grass .", "the dog"]
    records = [tiny.record(f"image {i}", n) for i, n in enumerate((3, 1, 6, 2))]
    alone = [text_states(encoder, processor, [caption]) for caption in captions]
    alone_images = [image_states(encoder, processor, [record]) for record in records]
    monkeypatch.setattr("unicoder_vl_hf.search.encoders.BATCH_SIZE", 2)
    monkeypatch.setattr("unicoder_vl_hf.search.encoders.READ_AT_ONCE", 3)
    torch.testing.assert_close(text_states(encoder, processor, captions), torch.cat(alone), atol=1e-5, rtol=1e-5)
    store = {record.image_id: record for record in records}
    together = image_states(encoder, processor, list(store), store)
    torch.testing.assert_close(together, torch.cat(alone_images), atol=1e-5, rtol=1e-5)


# Checkpoints


def test_a_plain_model_has_no_first_stage():
    plain = tiny.model(UnicoderVLForImageTextRetrieval)
    assert not [name for name in plain.state_dict() if "first_stage" in name]
    assert plain.config.projection_dim is None and plain.config.first_stage_trained is False
    with pytest.raises(ValueError, match=r"no first stage.*projection_dim is None.*train-first-stage"):
        plain.encode_text(torch.tensor([[2, 5, 3]]))
    assert plain.config.similarity_weight is None
    with pytest.raises(StrictDataclassClassValidationError, match=r"projection_dim=0 must be at least 1"):
        tiny.config(projection_dim=0)
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(StrictDataclassClassValidationError, match=r"similarity_weight=.* must be at least 0"):
            tiny.config(similarity_weight=wrong)


@pytest.mark.parametrize("model_class", [UnicoderVLForPreTraining, UnicoderVLForImageTextRetrieval])
def test_a_checkpoint_without_projection_loads_as_untrained(model_class, tmp_path):
    tiny.model(model_class).save_pretrained(tmp_path)
    loaded = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path, projection_dim=4, first_stage_trained=True)
    assert loaded.first_stage is not None and loaded.config.first_stage_trained is False
    assert loaded.first_stage.logit_scale.item() == pytest.approx(np.log(1 / 0.07))
    assert UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path).first_stage is None


def test_a_trained_first_stage_stays_so_and_never_outlives_its_weights(tmp_path):
    trained = model(first_stage_trained=True, similarity_weight=30)
    trained.save_pretrained(tmp_path / "whole")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert loaded.config.first_stage_trained and not report["missing_keys"]
    assert loaded.config.similarity_weight == 30
    for name, weight in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # Pre-training goes on from it: the config passes through a class that has no first stage.
    UnicoderVLForPreTraining.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    again = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path / "again").config
    assert not again.first_stage_trained and again.similarity_weight is None
    dropped = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path / "whole", projection_dim=None)
    assert dropped.first_stage is None and not dropped.config.first_stage_trained


# The loss


# Captions 0 and 1 are of one image, whose duplicate is image 3; caption 2 is of its own.
MISMATCHES = torch.tensor(
    [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0]],
    dtype=torch.bool,
)


def slow_loss(logits, mismatches):
    total = 0.0
    for match in range(len(logits)):
        images = [logits[match][match]] + [logits[match][q] for q in range(len(logits)) if mismatches[match][q]]
        captions = [logits[match][match]] + [logits[p][match] for p in range(len(logits)) if mismatches[p][match]]
        total = total - torch.stack(images).log_softmax(0)[0] / 2 - torch.stack(captions).log_softmax(0)[0] / 2
    return total / len(logits)


def test_contrastive_loss_by_hand():
    logits = torch.tensor([[1.0, 0.0], [3.0, 2.0]]).log()  # -inf where a caption and an image have nothing in common
    mismatches = torch.tensor([[False, True], [True, False]])
    # Images of caption 0: 1 / (1 + 0); of caption 1: 2 / (3 + 2). Captions of image 0: 1 / (1 + 3); of image 1: 2 / 2.
    expected = -(np.log(1) + np.log(2 / 5) + np.log(1 / 4) + np.log(1)) / 4
    assert contrastive_loss(logits, mismatches).item() == pytest.approx(expected)
    # Caption 1 belongs to image 0, too: what it says of it is no error.
    mismatches[1, 0] = False
    assert contrastive_loss(logits, mismatches).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("mismatches", [MISMATCHES, ~torch.eye(4, dtype=torch.bool), torch.zeros(4, 4).bool()])
def test_contrastive_loss_equals_a_slow_loop_in_values_and_gradients(mismatches):
    torch.manual_seed(0)
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    loss, expected = contrastive_loss(logits, mismatches), slow_loss(logits, mismatches)
    assert loss.item() == pytest.approx(expected.item())
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient)
    left_out = ~(mismatches | torch.eye(4, dtype=torch.bool))
    assert (gradient[left_out] == 0).all()


def test_the_loss_wants_a_square_of_mismatches():
    with pytest.raises(ValueError, match=r"mismatches has shape \(3, 4\), expected \(3, 3\)"):
        contrastive_loss(torch.zeros(3, 3), torch.zeros(3, 4).bool())


# In fine-tuning


PAIRS = {
    "image_id": ["a", "a", "b", "c", "d"],
    "caption": ["a dog runs .", "the dog", "a cat", "a  DOG runs .", "a cat sleeps"],
}
STORE = {name: tiny.record(name, n) for name, n in zip("abcd", (3, 2, 5, 4), strict=True)}


def batch(rows=range(5), epoch=0, **collator):
    table = datasets.Dataset.from_dict(PAIRS)
    pairs = PairsWithNegatives(table, seed=0, num_captions=1, num_images=1, duplicates=["bd"])
    pairs.set_epoch(epoch)
    collate = DataCollatorForUnicoderVLRetrieval(tiny.processor(), STORE, contrastive=True, **collator)
    return collate([pairs[row] for row in rows])


def test_false_negatives_are_masked():
    # Captions 0 and 3 are the same text but for case and spacing, so that each belongs to a and c; b and d are
    # duplicates; caption 1 is of a alone.
    expected = [
        # a  a  b  c  d
        [0, 0, 1, 0, 1],
        [0, 0, 1, 1, 1],
        [1, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [1, 1, 0, 1, 0],
    ]
    assert batch()["mismatches"].int().tolist() == expected
    assert "mismatches" not in DataCollatorForUnicoderVLRetrieval(tiny.processor(), STORE)(
        [PairsWithNegatives(datasets.Dataset.from_dict(PAIRS), seed=0, num_captions=1, num_images=1)[0]]
    )


@pytest.mark.parametrize("in_batch_negatives", [False, True])
@pytest.mark.parametrize("rows", [(0, 1, 2, 3, 4), (2, 0, 2, 1)])
def test_the_loss_beside_that_of_the_groups(rows, in_batch_negatives):
    """Whatever rows share, it is what the captions and images of the matches alone give."""
    encoder, inputs = model(), batch(rows, in_batch_negatives=in_batch_negatives)
    plain = HardestNegativeLoss()(encoder, inputs)
    loss = TwoStageLoss(HardestNegativeLoss(), 0.5)(encoder, inputs)

    rows = list(dict.fromkeys(rows) if in_batch_negatives else rows)
    processor = tiny.processor()
    text = processor(text=[PAIRS["caption"][row] for row in rows], return_tensors="pt")
    image = processor(regions=[PAIRS["image_id"][row] for row in rows], store=STORE, return_tensors="pt")
    similarities = encoder.encode_text(**text) @ encoder.encode_image(**image).T
    expected = slow_loss(similarities / 0.07, batch()["mismatches"][rows][:, rows])
    torch.testing.assert_close(loss - plain, 0.5 * expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.first_stage.parameters() if parameter.ndim == 2)


def test_the_temperature_is_bounded():
    encoder = model()
    nn.init.constant_(encoder.first_stage.logit_scale, 20.0)
    texts, images = nn.functional.normalize(torch.randn(2, 3, 4), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):  # which would tie many of them
        found = encoder.first_stage.logits(texts, images)
    torch.testing.assert_close(found, 100 * texts @ images.T)


def test_without_mismatches_the_loss_is_refused():
    inputs = batch()
    with pytest.raises(ValueError, match=r"mismatches are for a contrastive loss.*tasks\.retrieval\.losses"):
        model()(**inputs)
    inputs.pop("mismatches")
    for loss in (ContrastiveLoss(), TwoStageLoss(HardestNegativeLoss()), HardNegativeLoss(HardestNegativeLoss())):
        with pytest.raises(ValueError, match=r"lacks mismatches, which the loss needs: .*contrastive=True"):
            loss(model(), inputs)
    with pytest.raises(ValueError, match=r"no first stage.*projection_dim is None"):
        ContrastiveLoss()(tiny.model(UnicoderVLForImageTextRetrieval), batch())


def test_validation_of_the_first_stage_alone_knows_no_dropout(world, trained):
    store = RegionStore(world / "regions")
    captions = read_captions(world / "captions.jsonl", split="val")
    encoder = AutoModelForSequenceClassification.from_pretrained(trained[0], hidden_dropout_prob=0.5).train()
    processor = AutoProcessor.from_pretrained(trained[0])
    first, again = (evaluate_retrieval(encoder, processor, store, captions, by_first_stage=True) for _ in range(2))
    assert first == again and encoder.training
    encoder.eval()
    assert evaluate_retrieval(encoder, processor, store, captions, by_first_stage=True) == first
    texts = text_states(encoder, processor, captions["caption"][:])
    assert {"first_stage_image_retrieval_recall@1", "recall_sum"} <= set(
        first
    ) and "image_retrieval_recall@1" not in first
    encoder.train()
    torch.testing.assert_close(text_states(encoder, processor, captions["caption"][:]), texts)


# Hard negatives of the batch


def test_hard_negatives_by_hand():
    """Captions in rows, images in columns: 0 and 1 are of one image, 2 mismatches both, 3 mismatches all but 2."""
    logits = torch.tensor([[9.0, 8.0, 1.0, 2.0], [8.0, 9.0, 4.0, 3.0], [5.0, 6.0, 9.0, 7.0], [1.0, 0.0, 8.0, 9.0]])
    mismatches = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    match, caption, image, label = hard_negatives(logits, mismatches, 1)
    assert match.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert caption.tolist() == [0, 1, 2, 3, 2, 2, 1, 1]
    assert image.tolist() == [3, 2, 1, 0, 0, 1, 2, 3]
    assert label.tolist() == [0] * 8
    match, caption, image, label = hard_negatives(logits, mismatches, 9)  # but four matches, two mismatches each
    assert match.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + match[:16].tolist()
    assert label.tolist() == [0, 0, -100, -100] * 8
    real = label == 0
    assert mismatches[caption[real], image[real]].all() and ((caption == match) | (image == match)).all()


@pytest.mark.parametrize("config", [{}, {"num_text_layers": 1, "matching_head": "similarity"}])
@pytest.mark.parametrize("in_batch_negatives", [False, True])
def test_hard_negatives_join_the_group_of_their_match(in_batch_negatives, config):
    """The loss is that of the pairs given and chosen, as if the collator had made all of them."""
    encoder, inputs = model(**config), batch((3, 0, 2, 4), in_batch_negatives=in_batch_negatives)
    plain = TwoStageLoss(GroupSoftmaxLoss(), 0.5)(encoder, inputs)
    found = HardNegativeLoss(GroupSoftmaxLoss(), 0.5, num_hard_negatives=2)(encoder, inputs)

    matches = [row for row, label in enumerate(inputs["labels"].tolist()) if label == 1]
    captions, images = inputs["caption_index"][matches], inputs["image_index"][matches]
    assert in_batch_negatives or images.tolist() != list(range(4)) != captions.tolist()
    text, regions = ({name: value for name, value in inputs.items() if name.startswith(start)}
                     for start in (("input_ids", "token_type_ids", "attention_mask"), "region_"))  # fmt: skip
    similarities = encoder.encode_text(**text)[captions] @ encoder.encode_image(**regions)[images].T
    match, caption, image, label = hard_negatives(similarities, inputs["mismatches"], 2)
    index = {"caption_index": captions[caption], "image_index": images[image], "labels": label}
    index["group_ids"] = inputs["group_ids"][matches][match]
    given = {name: torch.cat((inputs[name], more)) for name, more in index.items()}
    groups, contrastive = GroupSoftmaxLoss()(encoder, inputs | given), ContrastiveLoss(0.5)(encoder, inputs)
    torch.testing.assert_close(found, groups + contrastive)
    assert found > plain
    gradients = [
        torch.autograd.grad(loss, [*encoder.first_stage.parameters(), *encoder.bert.encoder.parameters()])
        for loss in (found, groups + contrastive)
    ]
    torch.testing.assert_close(*gradients)

    # Of 0.6 of four matches, the first three are scored, with their negatives, and no other pair.
    scored = []
    encoder.matching_head.register_forward_hook(lambda module, arguments, output: scored.append(len(output)))
    some = HardNegativeLoss(GroupSoftmaxLoss(), 0.5, num_hard_negatives=2, scored_ratio=0.6)
    if in_batch_negatives:  # all pairs are of one group
        with pytest.raises(ValueError, match=r"scored_ratio=0\.6 takes batches .*leave out in_batch_negatives"):
            some(encoder, inputs)
        return
    found, of_three = some(encoder, inputs), inputs["group_ids"] < 3
    assert scored == [0, of_three.sum() + 3 * 4] and of_three.sum() > 3
    given = {name: torch.cat((inputs[name][of_three], more[match < 3])) for name, more in index.items()}
    torch.testing.assert_close(found, GroupSoftmaxLoss()(encoder, inputs | given) + contrastive)
    # The collator can leave the others out.
    fewer = batch((3, 0, 2, 4), scored_ratio=0.6)
    assert torch.equal(fewer["group_ids"], torch.cat((inputs["group_ids"][of_three], torch.tensor([3]))))
    torch.testing.assert_close(some(encoder, fewer), found)


def test_negatives_are_drawn_at_random_in_the_first_epochs():
    """By a hardness that the batch brings: a function of seed, epoch and rows, in place of the first stage's logits."""
    drawn = [batch((3, 0, 2, 4), epoch=epoch, random_epochs=2, seed=seed) for seed in (0, 1) for epoch in (0, 1, 2)]
    hardness = [inputs["hardness"] for inputs in drawn if "hardness" in inputs]
    assert [inputs.keys() - drawn[2].keys() for inputs in drawn] == [{"hardness"}, {"hardness"}, set()] * 2
    assert len({tensor.numpy().tobytes() for tensor in hardness}) == 4
    again, others = (batch(rows, epoch=0, random_epochs=2)["hardness"] for rows in ((3, 0, 2, 4), (0, 3, 2, 4)))
    assert torch.equal(hardness[0], again) and not torch.equal(again, others)

    encoder, loss, inputs = model(), HardNegativeLoss(GroupSoftmaxLoss(), 0.5), drawn[2]
    index = {"first_stage_captions": inputs["caption_index"][inputs["labels"] == 1]}
    index["first_stage_images"] = inputs["image_index"][inputs["labels"] == 1]
    plain = {name: tensor for name, tensor in inputs.items() if name not in ("labels", "group_ids", "mismatches")}
    logits = encoder(**plain, **index).first_stage_logits.detach()
    torch.testing.assert_close(loss(encoder, inputs | {"hardness": logits}), loss(encoder, inputs))
    assert loss(encoder, inputs | {"hardness": -logits}) != loss(encoder, inputs)


def test_without_a_loss_of_groups_the_first_stage_learns_alone():
    encoder, inputs = model(), batch()
    both = TwoStageLoss(HardestNegativeLoss(), 0.5)(encoder, inputs)
    alone = ContrastiveLoss(0.5)(encoder, inputs)
    torch.testing.assert_close(alone, both - HardestNegativeLoss()(encoder, inputs))
    scored = []
    encoder.matching_head.register_forward_hook(lambda module, arguments, output: scored.append(len(output)))
    ContrastiveLoss(0.5)(encoder, inputs).backward()
    assert scored == [0] and not encoder.matching_head.weight.grad.any()
    assert encoder.bert.encoder.layer[1].output.dense.weight.grad.any()


@pytest.mark.parametrize("padding_free", [None, True])
def test_first_stage_logits_are_of_the_captions_and_images_named_beside_the_scores(padding_free):
    encoder, inputs = model(padding_free=padding_free), batch()
    del inputs["mismatches"]
    text = {name: inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    regions = {name: value for name, value in inputs.items() if name.startswith("region_")}
    captions, images = torch.tensor([2, 0, 2]), torch.tensor([1, 0])
    rows = {"first_stage_captions": captions, "first_stage_images": images}
    plain, found = encoder(**inputs), encoder(**inputs, **rows)
    assert plain.first_stage_logits is None and torch.equal(found.scores, plain.scores)
    assert torch.equal(found.loss, plain.loss)
    similarities = encoder.encode_text(**text) @ encoder.encode_image(**regions).T
    torch.testing.assert_close(found.first_stage_logits, similarities[captions][:, images] / 0.07)
    none = torch.zeros(0, dtype=torch.long)
    alone = encoder(**text, **regions, caption_index=none, image_index=none, **rows)
    assert alone.scores.shape == (0,) and alone.matching_logits.shape == (0, 2)
    assert torch.equal(alone.first_stage_logits, found.first_stage_logits)
    positions = torch.arange(text["input_ids"].shape[1])[None]
    text["attention_mask"] = torch.ones_like(text["attention_mask"])
    index = {name: inputs[name] for name in ("caption_index", "image_index")}
    placed, default = (encoder(**text, **regions, **index, **rows, position_ids=each) for each in (positions, None))
    torch.testing.assert_close(placed.first_stage_logits, default.first_stage_logits)
    with pytest.raises(ValueError, match="region_features was given without region_locations"):
        encoder(**text, **index, region_features=regions["region_features"], **rows)
    with pytest.raises(ValueError, match="Give first_stage_captions and first_stage_images together"):
        encoder(**inputs, first_stage_images=images)


# With the encoder frozen


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, and a pre-training checkpoint that was not trained."""
    folder = tmp_path_factory.mktemp("first_stage")
    path = small_world.build(folder)
    bert = small_world.save_lively_bert(folder / "bert")
    store = RegionStore(path / "regions")
    untrained = UnicoderVLForPreTraining.from_bert(str(bert), region_feature_dim=store.feature_dim)
    untrained.save_pretrained(folder / "checkpoint")
    extractor = UnicoderVLFeatureExtractor(feature_dim=store.feature_dim, region_provenance=store.provenance)
    UnicoderVLProcessor(extractor, AutoTokenizer.from_pretrained(bert)).save_pretrained(folder / "checkpoint")
    return path


@pytest.fixture(scope="module")
def trained(world):
    output = world.parent / "trained"
    metrics = train_first_stage(
        str(world.parent / "checkpoint"),
        str(world / "captions.jsonl"),
        str(world / "regions"),
        str(output),
        projection_dim=16,
        epochs=20,
        batch_size=40,
    )
    return output, metrics


def test_training_alone_learns_and_leaves_the_scores(world, trained):
    output, metrics = trained
    before = UnicoderVLForImageTextRetrieval.from_pretrained(world.parent / "checkpoint")
    after, processor = AutoModelForSequenceClassification.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert after.config.projection_dim == 16 and after.config.first_stage_trained
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight), name
    store, captions = RegionStore(world / "regions"), read_captions(world / "captions.jsonl", split="val")
    pairs = EncodedPairs(after, processor, store, captions)
    assert pairs.recalls(after.first_stage) == pytest.approx(metrics)
    torch.manual_seed(0)
    fresh = type(after.first_stage)(after.config, 16)
    assert metrics["recall_sum"] > pairs.recalls(fresh)["recall_sum"] + 0.3
    card = (output / "README.md").read_text()
    assert "trained by a contrastive loss with the encoder frozen" in card
    assert f"| first_stage_recall_sum | {metrics['recall_sum']:.4f} |" in card
    # The weight that whoever loads it measures, too; the card says which and how.
    weight = after.config.similarity_weight
    after.config.similarity_weight = None
    encoder = UnicoderVLDualEncoder(after, processor, store, output)
    measured = measure_similarity_weight(encoder, ImageTextScorer(after, processor, store), captions)
    assert weight == after.config.similarity_weight == measured.best.similarity_weight
    assert f"\n## Search\n\n{describe_weight(measured)}\n\n## Use\n" in card
    assert measured.num_queries == {"image_retrieval": 20, "text_retrieval": 10}
    steps = 20 * math.ceil(len(read_captions(world / "captions.jsonl", split="train")) / 40)
    assert f"- Steps: {steps} of 40 pairs (over all processes)\n- Epochs: 20\n- Learning rate: 0.002 at" in card
    assert not list(output.parent.glob("*.partial"))


def test_the_best_epoch_stays(world, trained):
    after, processor = (
        AutoModelForSequenceClassification.from_pretrained(trained[0]),
        AutoProcessor.from_pretrained(trained[0]),
    )
    store, path = RegionStore(world / "regions"), world / "captions.jsonl"
    table = read_captions(path)
    train, validation = (
        EncodedPairs(after, processor, store, select_split(table, path, name)) for name in ("train", "val")
    )
    sums = iter([1.0, 3.0, 2.0])
    seen = []

    def recalls(first_stage):
        seen.append(first_stage.text_projection.weight.detach().clone())
        return {"recall_sum": next(sums)}

    validation.recalls = recalls
    assert fit_first_stage(after.first_stage, train, validation, epochs=3, batch_size=40) == {"recall_sum": 3.0}
    assert torch.equal(after.first_stage.text_projection.weight, seen[1]) and not torch.equal(seen[1], seen[2])


def test_pairs_mask_false_negatives_too():
    encoder, processor = model(), tiny.processor()
    # One pair comes twice, and what is equal is encoded once.
    table = {name: [values[2], *values] for name, values in PAIRS.items()}
    pairs = EncodedPairs(encoder, processor, STORE, datasets.Dataset.from_dict(table), duplicates=["bd"])
    assert len(pairs) == 6 and len(pairs.texts) == 5 and len(pairs.images) == 4
    rows = [4, 0, 3]
    texts, images, mismatches = pairs.batch(np.array(rows) + 1)
    assert torch.equal(mismatches, batch()["mismatches"][rows][:, rows])
    expected = text_states(encoder, processor, [PAIRS["caption"][row] for row in rows])
    torch.testing.assert_close(texts, expected, atol=1e-5, rtol=1e-5)
    expected = image_states(encoder, processor, [STORE[PAIRS["image_id"][row]] for row in rows])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"projection_dim": 0}, {"seed": -1}])
def test_training_alone_refuses_numbers_before_it_reads(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected"):
        train_first_stage("nowhere", "nothing", "none", "output", **wrong)


def test_training_alone_refuses_to_overwrite(world, trained):
    with pytest.raises(ValueError, match=r"trained exists: name another folder"):
        train_first_stage(str(trained[0]), str(world / "captions.jsonl"), str(world / "regions"), str(trained[0]))


def test_the_head_that_reads_it_is_trained_along_or_becomes_the_paper_s(world, trained, tmp_path):
    options = {"captions": str(world / "captions.jsonl"), "regions": str(world / "regions"), "max_validation_images": 0}
    start = options | {"model_name_or_path": str(world.parent / "checkpoint"), "matching_head": "similarity"}
    with pytest.raises(ValueError, match=r"matching_head=similarity reads a first stage.*--contrastive_weight"):
        prepare_retrieval(RetrievalArguments(**start), tmp_path, seed=0)
    hard = {"contrastive_weight": 1.0, "num_hard_negatives": 1, "loss": "softmax"}
    setup = prepare_retrieval(RetrievalArguments(**start, **hard), tmp_path, seed=0)
    assert setup.card["trained_by"].endswith("by a contrastive loss, by whose projections it scores pairs, too")
    setup.loss(setup.model, setup.collator([setup.train[row] for row in (0, 7)])).backward()
    assert all(parameter.grad is not None for parameter in setup.model.parameters())
    setup.model.save_pretrained(tmp_path / "along")
    setup.processor.save_pretrained(tmp_path / "along")
    options["model_name_or_path"] = str(tmp_path / "along")
    again = prepare_retrieval(RetrievalArguments(**options, **hard), tmp_path, seed=0).model
    assert again.config.matching_head == "similarity" and again.first_stage is not None
    dropped = prepare_retrieval(RetrievalArguments(**options), tmp_path, seed=0).model
    assert dropped.config.matching_head == "unicoder_vl" and dropped.first_stage is None
    with pytest.raises(ValueError, match=r"along scores pairs by its first stage, too.*would change its scores"):
        train_first_stage(
            options["model_name_or_path"], options["captions"], options["regions"], str(tmp_path / "alone")
        )
    assert not (tmp_path / "alone").exists()


def test_fine_tuning_trains_it_along_or_drops_it(world, trained, caplog):
    options = {"captions": str(world / "captions.jsonl"), "regions": str(world / "regions")}
    options |= {"model_name_or_path": str(trained[0]), "max_validation_images": 0}
    dropped = prepare_retrieval(RetrievalArguments(**options), world.parent / "run", seed=0)
    assert dropped.model.first_stage is None and not dropped.model.config.first_stage_trained
    assert not dropped.collator.contrastive and dropped.loss == HardestNegativeLoss()
    assert "would not fit the encoder after this training: it is left out" in caplog.text
    along = prepare_retrieval(RetrievalArguments(**options, contrastive_weight=0.5), world.parent / "run", seed=0)
    assert along.model.config.projection_dim == 16 and along.model.config.first_stage_trained
    # The weight was that of the encoder before; that of the new one is measured on the validation split at the end.
    before = AutoModelForSequenceClassification.from_pretrained(trained[0]).config.similarity_weight
    assert before is not None and along.model.config.similarity_weight is None and along.search is None
    assert len(along.weighing) == 20 and dropped.weighing is None
    lost = RetrievalArguments(**options, contrastive_weight=0.5, validation_split="dev")
    assert prepare_retrieval(lost, world.parent / "run", seed=0).weighing is None
    assert (
        "has no split 'dev'; its splits are train, val, test. The weight of the similarity in a search will not be"
        in (caplog.text)
    )
    with pytest.raises(ValueError, match=r"no split 'dev'.*--validation_split, or .*: --max_validation_images 0\.$"):
        prepare_retrieval(dataclasses.replace(lost, max_validation_images=5), world.parent / "run", seed=0)
    assert along.loss == TwoStageLoss(HardestNegativeLoss(), 0.5)
    assert along.loss(along.model, along.collator([along.train[row] for row in (0, 7)])).isfinite()
    options["model_name_or_path"] = str(world.parent / "checkpoint")
    new = prepare_retrieval(RetrievalArguments(**options, contrastive_weight=0.5), world.parent / "run", seed=0)
    assert new.model.config.projection_dim == 256
    alone = RetrievalArguments(**options, contrastive_weight=1.0, loss="none")
    setup = prepare_retrieval(alone, world.parent / "run", seed=0)
    assert setup.first_stage_alone and "leaves the matching head behind" in caplog.text
    caplog.clear()  # nothing is weighed: it does without the split
    without = dataclasses.replace(alone, max_validation_images=0, validation_split="lost")
    validated = dataclasses.replace(alone, max_validation_images=5)
    for each in (without, validated):
        assert prepare_retrieval(each, world.parent / "run", seed=0).weighing is setup.weighing is None
    assert "will not be measured" not in caplog.text
    setup.measure_similarity_weight()  # of no pair: a head that has not learned is not asked
    assert setup.model.config.similarity_weight == 1000 and setup.search.endswith("no pair was trained.")
    assert setup.card["trained_by"].startswith("fine-tuned as a first stage of image-text retrieval, by a contrastive")
    batch = setup.collator([setup.train[row] for row in (0, 7)])
    assert batch["labels"].tolist() == [1, 1]  # nothing is read that would not be scored
    setup.loss(setup.model, batch).backward()
    trained_ones = {name for name, parameter in setup.model.named_parameters() if parameter.requires_grad}
    assert trained_ones == {name for name, parameter in setup.model.named_parameters() if parameter.grad is not None}
    folder = world.parent / "words"
    UnicoderVLForImageTextRetrieval.from_pretrained(options["model_name_or_path"], num_text_layers=1).save_pretrained(
        folder
    )
    AutoProcessor.from_pretrained(options["model_name_or_path"]).save_pretrained(folder)
    words = RetrievalArguments(**options | {"model_name_or_path": folder}, contrastive_weight=1.0, loss="none")
    setup = prepare_retrieval(words, world.parent / "run", seed=0)
    setup.loss(setup.model, setup.collator([setup.train[row] for row in (0, 7)])).backward()
    trained_ones = {name for name, parameter in setup.model.named_parameters() if parameter.requires_grad}
    assert trained_ones == {name for name, parameter in setup.model.named_parameters() if parameter.grad is not None}
    assert not any("encoder.layer.1." in name for name in trained_ones) and any(
        "layer.0." in name for name in trained_ones
    )
    hard = RetrievalArguments(
        **options, contrastive_weight=1.0, num_hard_negatives=2, random_negative_epochs=1, in_batch_negatives=True
    )
    trained_by = prepare_retrieval(hard, world.parent / "run", seed=0).card["trained_by"]
    assert trained_by == (
        "fine-tuned for image-text retrieval on groups of a match and mismatches drawn at random and all mismatches of "
        "the batch and the mismatches of the batch that its first stage likes best (at random until the end of "
        "epoch 1), along with a first stage, by a contrastive loss"
    )
    none = {"num_negative_captions": 0, "num_negative_images": 0}
    quarter = RetrievalArguments(**options, **none, contrastive_weight=1.0, num_hard_negatives=1, scored_ratio=0.25)
    setup = prepare_retrieval(quarter, world.parent / "run", seed=0)
    assert isinstance(setup.loss, HardNegativeLoss) and setup.loss.scored_ratio == setup.collator.scored_ratio == 0.25
    assert "likes best, for 25 % of the matches of a batch, along with" in setup.card["trained_by"]
    assert setup.model.config.joint_dropout_prob == 0
    match = setup.train[7]
    foil = Foil(match["image_id"], "train", match["caption"], "none of it", "it", "none", "kind")
    write_foils(world.parent / "foils.jsonl", [foil])
    told = RetrievalArguments(**options, **none, foils=str(world.parent / "foils.jsonl"), joint_dropout=0.25)
    setup = prepare_retrieval(told, world.parent / "run", seed=0)
    assert setup.model.config.joint_dropout_prob == 0.25
    assert setup.card["trained_by"].endswith("groups of a match and captions made false by a word")
    assert setup.facts.keys() == {"foils"}
    batch = setup.collator([setup.train[row] for row in (0, 7)])
    assert batch["labels"].tolist() == [1, 1, 0] and batch["group_ids"].tolist() == [0, 1, 1]
    assert setup.processor.tokenizer.decode(batch["input_ids"][2], skip_special_tokens=True).endswith("of it")
    for wrong, message in (
        ({"contrastive_weight": -1.0}, r"contrastive_weight=-1\.0; expected at least 0"),
        ({"bert_learning_rate": -1e-5}, r"bert_learning_rate=-1e-05, expected at least 0"),
        ({"num_hard_negatives": -1}, r"num_hard_negatives=-1; expected at least 0"),
        ({"random_negative_epochs": -1}, r"random_negative_epochs=-1; expected at least 0"),
        ({"random_negative_epochs": 1}, r"random_negative_epochs=1 says how --num_hard_negatives are drawn"),
        ({"scored_ratio": 0.0}, r"scored_ratio=0\.0, expected a share of the matches: above 0, at most 1"),
        ({"scored_ratio": 0.5}, r"scored_ratio=0\.5 is of matches with .* their own: give --num_hard_negatives"),
        (
            {"scored_ratio": 0.5, "contrastive_weight": 1.0, "num_hard_negatives": 1, "in_batch_negatives": True},
            r"scored_ratio=0\.5 is of matches with negatives of their own: .*no --in_batch_negatives",
        ),
        ({"similarity_in_training": False}, r"similarity_in_training=False needs scores and a first stage that learn"),
        ({"joint_dropout": 1.0}, r"joint_dropout=1\.0, expected a share of at least 0, below 1"),
        ({"foils": "foils.jsonl", "loss": "none", "contrastive_weight": 1.0}, r"loss=none scores no pairs: .*foils"),
        ({"joint_dropout": 0.5, "loss": "none", "contrastive_weight": 1.0}, r"loss=none scores .*or joint_dropout"),
        ({"num_hard_negatives": 1}, r"num_hard_negatives=1 need a first stage.*--contrastive_weight"),
        ({"loss": "none"}, r"loss=none.*need a first stage.*--contrastive_weight"),
        (
            {"loss": "none", "contrastive_weight": 1.0, "num_hard_negatives": 1},
            r"loss=none scores no pairs: it takes no num_hard_negatives",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_retrieval(RetrievalArguments(**options, **wrong), world.parent / "run", seed=0)


def test_what_comes_behind_it_learns_while_it_stays(world, tmp_path, monkeypatch):
    """And the embeddings of training captions and images become the bank of queries at the end."""
    options = {"captions": str(world / "captions.jsonl"), "regions": str(world / "regions"), "contrastive_weight": 1.0}
    bert = str(world.parent / "bert")
    first = prepare_retrieval(
        RetrievalArguments(
            **options, model_name_or_path=bert, num_text_layers=1, loss="none", matching_head="similarity"
        ),
        tmp_path,
        seed=0,
    )
    head = first.model.matching_head.weight.clone()
    first.measure_similarity_weight()
    assert first.model.config.similarity_weight is not None and "holds that sum" not in first.search
    torch.testing.assert_close(first.model.matching_head.weight, head)  # all of which is yet to learn
    before = tmp_path / "first"
    first.model.save_pretrained(before)
    first.processor.save_pretrained(before)
    options |= {"model_name_or_path": str(before), "loss": "softmax", "num_hard_negatives": 1, "query_bank": 9}
    setup = prepare_retrieval(RetrievalArguments(**options, freeze_first_stage=True), tmp_path, seed=0)
    model, processor = setup.model, setup.processor
    assert (
        setup.card["trained_by"].endswith("by whose projections it scores pairs, too")
        and "best, behind a first stage that stayed as it was" in (setup.card["trained_by"])
    )
    learn = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[1] for name in learn} == {"encoder", "pooler", "weight", "bias"}
    assert all(".layer.1." in name for name in learn if "encoder" in name)
    encoder = UnicoderVLDualEncoder(model, processor, setup.collator.store, "model")
    captions = setup.train.pairs[:]["caption"].to_pylist()
    embeddings = encoder.embed_captions(captions)
    batch = setup.collator([setup.train[row] for row in (0, 7, 12)])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    scores = model.eval()(**{name: batch[name] for name in batch if name not in ("mismatches",)}).scores
    setup.loss(model.train(), batch).backward()
    assert learn == {name for name, weight in model.named_parameters() if weight.grad is not None}
    known = encoder.identity()
    optimizer.step()
    model.eval()
    assert (model(**{name: batch[name] for name in batch if name != "mismatches"}).scores - scores).abs().max() > 0.01
    assert encoder.identity() == known  # so that an index of the first stage serves what stands behind it
    whole = copy.deepcopy(model.state_dict())
    for embeds in ("bert.encoder.layer.0.output.dense.bias", "first_stage.text_projection.bias"):
        model.load_state_dict({**whole, embeds: whole[embeds] + 1})
        assert encoder.identity() != known
    model.load_state_dict(whole)
    np.testing.assert_array_equal(encoder.embed_captions(captions), embeddings)
    setup.measure_similarity_weight()
    assert model.config.query_bank_size == [9, 9] and model.config.similarity_weight == 0
    distinct = list(dict.fromkeys(captions))
    kept = encoder.embed_captions([distinct[i * len(distinct) // 9] for i in range(9)])
    np.testing.assert_allclose(model.first_stage.query_bank.texts.numpy(), kept, atol=1e-6)
    setup.query_bank = 1000
    setup.measure_similarity_weight()
    images = set(setup.train.pairs[:]["image_id"].to_pylist())
    assert model.config.query_bank_size == [len(distinct), len(images)] and len(images) < len(captions)
    assert "less what is near to a bank of 80 training captions and 40 images" in setup.card["trained_by"]
    assert "(similarity less the query bank's)" in setup.search and ", with the query bank " in setup.search
    assert setup.facts == {"freeze_first_stage": True}
    summed = []
    monkeypatch.setattr(
        UnicoderVLDualEncoder, "similarities_in_scores", lambda self, *of: summed.append(of) or np.zeros((20, 10))
    )
    evaluate_retrieval(model, processor, setup.collator.store, setup.weighing)
    assert len(summed) == 1  # and not the embeddings' product, which the scores do not hold
    monkeypatch.undo()
    model.config.similarity_weight = None
    setup.weighing = None
    model.first_stage.query_bank = None
    setup.measure_similarity_weight()  # no validation split: a bank all the same
    assert model.first_stage.query_bank is not None and model.config.similarity_weight is None
    model.save_pretrained(tmp_path / "after")
    processor.save_pretrained(tmp_path / "after")
    again = prepare_retrieval(
        RetrievalArguments(**options | {"model_name_or_path": str(tmp_path / "after")}), tmp_path, seed=0
    )
    assert again.model.config.query_bank_size is None and again.model.first_stage.query_bank is None
    assert all(weight.requires_grad for weight in again.model.parameters())
    for wrong, message in (
        ({"model_name_or_path": bert}, "freeze_first_stage keeps a trained first stage behind text layers, and .*bert"),
        ({"contrastive_weight": 0.0, "num_hard_negatives": 0}, "freeze_first_stage trains scores alone"),
        ({"bert_learning_rate": 1e-5}, "freeze_first_stage trains scores alone"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_retrieval(RetrievalArguments(**options | wrong, freeze_first_stage=True), tmp_path, seed=0)
    paper = options | {"loss": None, "num_hard_negatives": 0, "contrastive_weight": 0.0}
    with pytest.raises(ValueError, match=r"query_bank=9 .*matching_head=similarity"):
        prepare_retrieval(RetrievalArguments(**paper), tmp_path, seed=0)
    alone = options | {"loss": "none", "num_hard_negatives": 0}
    with pytest.raises(ValueError, match=r"query_bank=9 .*another --loss than none"):
        prepare_retrieval(RetrievalArguments(**alone), tmp_path, seed=0)
