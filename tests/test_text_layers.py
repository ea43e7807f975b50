"""The first layers that read words alone: what they read, what they cost, and what they refuse."""

import datasets
import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_matching_head import similarity_model
from transformers import TrainingArguments

from unicoder_vl_hf import ImageTextScorer, UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining, UnicoderVLModel
from unicoder_vl_hf.data.negatives import PairsWithNegatives
from unicoder_vl_hf.runs.arguments import parse_arguments
from unicoder_vl_hf.scoring.checkpoints import scoring_settings
from unicoder_vl_hf.scoring.explanation import explain
from unicoder_vl_hf.tasks.retrieval.losses import GroupSoftmaxLoss, HardNegativeLoss, contrastive_loss
from unicoder_vl_hf.tasks.retrieval.run import RetrievalTrainer
from unicoder_vl_hf.tasks.retrieval.training import RetrievalArguments, RetrievalSetup


def paired(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each caption with each image but the last, which no pair has."""
    index = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    return batch | {"caption_index": index[:, 0], "image_index": index[:, 1]}


@pytest.mark.parametrize("num_text_layers", [1, 2])
def test_words_read_no_region_before_the_joint_layers(num_text_layers):
    model = tiny.model(UnicoderVLModel, num_hidden_layers=3, num_text_layers=num_text_layers)
    batch = tiny.padded_batch()
    layers = model(**batch, output_hidden_states=True).hidden_states
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    alone = model(**text, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    assert [layer.shape[1] for layer in layers] == [7] * (1 + num_text_layers) + [11] * (3 - num_text_layers)
    for number, (together, apart) in enumerate(zip(layers, alone, strict=True)):
        difference = (together[:, :7] - apart)[real].abs().max()
        assert (difference < 1e-5) == (number <= num_text_layers), number


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pairs", [False, True])
@torch.no_grad()
def test_states_are_the_same_without_padding(implementation, pairs):
    model = tiny.model(UnicoderVLModel, num_hidden_layers=3, num_text_layers=2)
    batch = paired(tiny.padded_batch()) if pairs else tiny.padded_batch()
    model.config.padding_free = False
    model.set_attn_implementation("eager")
    padded = model(**batch)
    model.set_attn_implementation(implementation)
    model.config.padding_free = True
    packed = model(**batch)
    index = batch.get("caption_index", torch.arange(4)), batch.get("image_index", torch.arange(4))
    real = torch.cat((batch["attention_mask"][index[0]], batch["region_attention_mask"][index[1]]), dim=1).bool()
    torch.testing.assert_close(packed.last_hidden_state[real], padded.last_hidden_state[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.pooler_output, padded.pooler_output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_free", [False, True])
def test_the_score_begins_as_the_logit_of_the_first_stage(padding_free):
    model, batch = similarity_model(num_hidden_layers=3, num_text_layers=2), tiny.padded_batch()
    model.config.padding_free = padding_free
    with torch.no_grad():
        model.matching_head.weight.zero_()
    every = torch.arange(4)
    found = model(**paired(batch), first_stage_captions=every, first_stage_images=every)
    bias = model.matching_head.bias[1] - model.matching_head.bias[0]
    wanted = found.first_stage_logits[:, :3].flatten() + bias
    torch.testing.assert_close(found.scores, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.1


@pytest.mark.parametrize("padding_free", [False, True])
def test_cls_learns_to_score_by_itself(padding_free):
    every, batch = torch.arange(4), paired(tiny.padded_batch())
    changes = {"num_hidden_layers": 3, "num_text_layers": 2, "padding_free": padding_free}
    changes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with_it, alone = similarity_model(**changes), similarity_model(**changes, similarity_in_training=False)
    found = alone.train()(**batch, first_stage_captions=every, first_stage_images=every)
    wanted = with_it.train()(**batch, first_stage_captions=every, first_stage_images=every)
    logits = wanted.first_stage_logits[:, :3].flatten()
    torch.testing.assert_close(found.scores + logits, wanted.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.first_stage_logits, wanted.first_stage_logits)
    found.scores.sum().backward()
    assert (
        alone.first_stage.text_projection.weight.grad is None or not alone.first_stage.text_projection.weight.grad.any()
    )
    torch.testing.assert_close(alone.eval()(**batch).scores, with_it.eval()(**batch).scores, rtol=0, atol=1e-5)


def test_gradients_are_those_of_padded_sequences():
    gradients = []
    for padding_free in (False, True):
        model = similarity_model(num_hidden_layers=3, num_text_layers=2)
        model.config.padding_free = padding_free
        model(**paired(tiny.padded_batch())).scores.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    assert gradients[0]["bert.encoder.layer.0.attention.self.query.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("head", ["unicoder_vl", "similarity"])
@pytest.mark.parametrize("num_text_layers", [1, 2])
@pytest.mark.parametrize("max_tokens", [20, 10_000])
def test_the_scorer_gives_the_scores_of_the_model(head, num_text_layers, max_tokens):
    model = similarity_model(num_hidden_layers=3, num_text_layers=num_text_layers)
    model.config.matching_head = head
    processor = tiny.processor()
    captions = ["a dog runs .", "a cat sleeps on the grass .", "dog", "the cat runs on a dog ."]
    images = [tiny.record(f"photo{number}", 1 + number % 3) for number in range(5)]
    scorer = ImageTextScorer(model, processor, {image.image_id: image for image in images}, max_tokens=max_tokens)
    found = torch.from_numpy(scorer.score(captions, [image.image_id for image in images]))
    for row, caption in enumerate(captions):
        for column, image in enumerate(images):
            wanted = model(**processor(text=caption, regions=image, return_tensors="pt")).scores[0]
            torch.testing.assert_close(found[row, column], wanted, rtol=0, atol=2e-5)
    assert found.std() > 0.1


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_caption_passes_the_text_layers_once(padding_free):
    model, seen = similarity_model(num_hidden_layers=3, num_text_layers=2), []
    model.config.padding_free = padding_free
    for layer in model.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
    every = torch.arange(4)
    model(**paired(tiny.padded_batch()), first_stage_captions=every, first_stage_images=every)
    words, regions = sum(tiny.TEXT_LENGTHS), sum(tiny.NUM_REGIONS[:3])
    assert seen == ([words, words, 3 * words + 4 * regions] if padding_free else [4 * 7, 4 * 7, 12 * 11])


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_loss_of_both_stages_passes_them_once(padding_free):
    """And its gradients are those of one call that is told the pairs."""
    seen: list[int] = []
    batch = tiny.padded_batch()
    batch |= {"caption_index": torch.arange(3), "image_index": torch.arange(3), "group_ids": torch.arange(3)}
    batch |= {"labels": torch.ones(3, dtype=torch.long), "mismatches": ~torch.eye(3, dtype=torch.bool)}
    model = similarity_model(num_hidden_layers=3, num_text_layers=2, padding_free=padding_free)
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: seen.append(1))
    HardNegativeLoss(GroupSoftmaxLoss(), num_hard_negatives=2)(model, batch).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert seen == [1]
    model.zero_grad()
    index = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    # Of three matches, two mismatches each way: each group has a match's own row and column.
    pairs = torch.cat([index[(index[:, 0] == number) | (index[:, 1] == number)] for number in range(3)])
    groups = torch.arange(3).repeat_interleave(5)
    inputs = {name: batch[name] for name in tiny.padded_batch()}
    every = torch.arange(3)
    outputs = model(
        **inputs,
        caption_index=pairs[:, 0],
        image_index=pairs[:, 1],
        first_stage_captions=every,
        first_stage_images=every,
    )
    labels = (pairs[:, 0] == pairs[:, 1]).long()
    loss = GroupSoftmaxLoss().of_scores(outputs.scores, labels, groups, pairs[:, 0], pairs[:, 1])
    (loss + contrastive_loss(outputs.first_stage_logits, batch["mismatches"])).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-5)


def test_pretraining_reads_hidden_regions_by_them_too():
    model = tiny.model(UnicoderVLForPreTraining, num_text_layers=1)
    batch = tiny.padded_batch()
    hidden = torch.zeros_like(batch["region_attention_mask"])
    hidden[:, 0] = 1
    outputs = []
    for padding_free in (False, True):
        model.config.padding_free = padding_free
        outputs.append(model(**batch, masked_regions=hidden).region_logits[batch["region_attention_mask"].bool()])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused():
    for number in (-1, 2):
        with pytest.raises(StrictDataclassClassValidationError, match=f"num_text_layers={number} must be at least"):
            tiny.config(num_hidden_layers=2, num_text_layers=number)
    for wrong in ({"matching_head": "similarity", "projection_dim": 8}, {"num_text_layers": 1}):
        with pytest.raises(
            StrictDataclassClassValidationError, match="similarity_in_training=False needs matching_head"
        ):
            tiny.config(num_hidden_layers=2, similarity_in_training=False, **wrong)
    model = tiny.model(UnicoderVLForImageTextRetrieval, num_text_layers=1)
    with pytest.raises(ValueError, match="token_region_ids need num_text_layers=0"):
        model(**tiny.padded_batch(), token_region_ids=torch.zeros(4, 7, dtype=torch.long))


def test_a_scoring_job_knows_them():
    assert "num_text_layers" not in scoring_settings(tiny.config())
    assert scoring_settings(tiny.config(num_text_layers=1))["num_text_layers"] == 1


def test_explanations_reach_words_and_regions():
    model, processor = similarity_model(num_hidden_layers=3, num_text_layers=1), tiny.processor()
    with torch.no_grad():
        model.first_stage.region_attention.weight.normal_()
    found = explain(model, processor, tiny.record(), "a dog runs .")
    assert found.word_relevance.shape == (4,) and found.region_relevance.shape == (3,)
    assert found.relevance_to_words.shape == (4, 3)
    assert found.region_relevance.max() > 0 and found.word_relevance.max() > 0 and found.relevance_to_words.max() > 0


def test_what_a_bert_knows_may_have_a_learning_rate_of_its_own(tmp_path):
    """Each weight has one rate, and a second call makes no second optimizer."""
    options = ["--output_dir", str(tmp_path), "--bert_learning_rate", "3e-5", "--learning_rate", "1e-3"]
    data, training = parse_arguments(
        (RetrievalArguments, TrainingArguments), options, paper={}, scenes={"use_cpu": True}, recipes={}
    )
    model = similarity_model(num_hidden_layers=3, num_text_layers=2)
    rows = datasets.Dataset.from_dict({"image_id": ["1", "2"], "caption": ["a dog", "a cat"]})
    pairs = PairsWithNegatives(rows, seed=0)
    setup = RetrievalSetup(
        model=model, processor=tiny.processor(), collator=None, train=pairs, validation=None, data_name="none",
        bert_learning_rate=data.bert_learning_rate,
    )  # fmt: skip
    trainer = RetrievalTrainer(setup, training)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    name_of = {id(weight): name for name, weight in model.named_parameters()}
    rates = {name_of[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups) == len(name_of)
    low = {name for name, rate in rates.items() if rate == 3e-5}
    assert set(rates.values()) == {3e-5, 1e-3}
    assert {name.split(".")[1] for name in low} == {"embeddings", "encoder"}
    assert low == {
        name for name in rates if "layer.0." in name or "layer.1." in name or ("bert.embeddings." in name
        and "region" not in name and "image_token" not in name)
    }  # fmt: skip


def test_a_similarity_weight_is_folded_into_the_score():
    model, batch = similarity_model(num_hidden_layers=3, num_text_layers=2), paired(tiny.padded_batch())
    every = torch.arange(4)
    before = model(**batch, first_stage_captions=every, first_stage_images=every)
    scale = model.first_stage.logit_scale.exp()
    similarity = before.first_stage_logits[:, :3].flatten() / scale
    model.config.similarity_weight = 7.0
    model.fold_similarity_weight(7.0)
    wanted = (before.scores + 7 * similarity) * scale / (scale + 7)
    torch.testing.assert_close(model(**batch).scores, wanted)
    assert model.config.similarity_weight == 0 and wanted.argsort().tolist() != before.scores.argsort().tolist()
    for wrong in (tiny.model(UnicoderVLForImageTextRetrieval), similarity_model()):
        with pytest.raises(ValueError, match="expected a weight of at least 0 and a similarity after text layers"):
            wrong.fold_similarity_weight(7.0)
