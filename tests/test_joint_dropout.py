"""Words and regions that the joint layers do not see in training: which, how many, and what that leaves as it is."""

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_matching_head import similarity_model
from test_text_layers import paired

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining, UnicoderVLModel


def scores_and_gradients(padding_free: bool, **changes):
    model = similarity_model(num_hidden_layers=3, **changes)
    model.config.padding_free = padding_free
    torch.manual_seed(0)
    scores = model.train()(**paired(tiny.padded_batch())).scores
    scores.square().sum().backward()
    return scores.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize("num_text_layers", [0, 2])
def test_it_is_the_same_with_and_without_padding(num_text_layers):
    found = [
        scores_and_gradients(padding_free, num_text_layers=num_text_layers, joint_dropout_prob=0.4, **NO_DROPOUT)
        for padding_free in (False, True)
    ]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    all_seen, _ = scores_and_gradients(True, num_text_layers=num_text_layers, **NO_DROPOUT)
    assert (found[1][0] - all_seen).abs().max() > 0.05


@pytest.mark.parametrize("left", [False, True])
def test_it_leaves_out_so_many_and_never_the_first(left):
    model = tiny.model(UnicoderVLForImageTextRetrieval, num_hidden_layers=3, num_text_layers=1, joint_dropout_prob=0.3)
    batch, seen = tiny.padded_batch(left), []
    rows = torch.arange(4).repeat(500)
    pairs = batch | {"caption_index": rows, "image_index": rows}

    def note(_, inputs):
        seen.append(inputs[0].shape[:2].numel())

    model.bert.encoder.layer[1].register_forward_pre_hook(note)
    model.train()(**pairs)
    others = sum(tiny.TEXT_LENGTHS) + sum(tiny.NUM_REGIONS) - 4
    share = 1 - (seen[0] / 500 - 4) / others
    assert abs(share - 0.3) < 0.02  # ten standard errors
    masks = batch | {"caption_index": rows, "image_index": rows, "inputs_embeds": None}
    drawn = model.bert._joint_dropout(masks).view(500, 4, -1)
    first = batch["attention_mask"].argmax(-1)
    assert first.tolist() == ([4, 0, 2, 0] if left else [0] * 4)
    assert drawn[:, torch.arange(4), first].all()
    mean = drawn.float().mean(0)  # each place alike, and not the same of a caption and its image in every pair
    mean[torch.arange(4), first] = 0.7
    assert (mean - 0.7).abs().max() < 0.09  # four standard errors
    without = {name: None if name == "attention_mask" else value for name, value in masks.items()}
    assert model.bert._joint_dropout(without)[:, 0].all()


@pytest.mark.parametrize("padding_free", [False, True])
def test_what_is_left_out_is_as_if_it_was_not_there(padding_free):
    model, batch = tiny.model(UnicoderVLModel, padding_free=padding_free), tiny.padded_batch()
    batch["position_ids"] = torch.arange(7)[None]  # or those behind a word that is not there would move up
    seen = torch.cat((batch["attention_mask"], batch["region_attention_mask"]), dim=1).bool()
    seen[1, 3] = seen[1, 7] = seen[0, 9] = False
    found = model(**batch, joint_attention_mask=seen).pooler_output
    masks = {"attention_mask": seen[:, :7].long(), "region_attention_mask": seen[:, 7:].long()}
    torch.testing.assert_close(found, model(**batch | masks).pooler_output, rtol=0, atol=1e-6)
    assert (found - model(**batch).pooler_output).abs().amax(1)[:2].min() > 1e-3
    only = {name: value for name, value in batch.items() if "attention_mask" not in name}
    torch.testing.assert_close(
        model(**only, joint_attention_mask=seen).pooler_output, model(**only | masks).pooler_output, rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"joint_attention_mask has shape \(4, 7\), expected \(4, 11\)"):
        model(**batch, joint_attention_mask=seen[:, :7])


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("num_text_layers", [0, 1])
def test_a_head_takes_the_mask_too_and_leaves_out_more_in_training(num_text_layers, share):
    batch, found = tiny.padded_batch(), []
    seen = torch.cat((batch["attention_mask"], batch["region_attention_mask"]), dim=1).bool()
    seen[:, 2] = seen[:, 7] = False
    for padding_free in (False, True):
        model = similarity_model(num_text_layers=num_text_layers, joint_dropout_prob=share, **NO_DROPOUT)
        model.config.padding_free = padding_free
        torch.manual_seed(0)
        found.append(model.train()(**batch, joint_attention_mask=seen).scores)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    assert (model(**batch).scores - found[1]).abs().max() > 0.01
    changed = batch | {"region_features": batch["region_features"].clone()}
    changed["region_features"][:, 0] += 1
    torch.manual_seed(0)
    if num_text_layers == 0:  # or the first stage would see it
        torch.testing.assert_close(model(**changed, joint_attention_mask=seen).scores, found[1], rtol=0, atol=1e-5)


def test_what_does_not_fit_is_told_in_training_too():
    model = tiny.model(UnicoderVLForImageTextRetrieval, joint_dropout_prob=0.3).train()
    batch = tiny.padded_batch()
    with pytest.raises(ValueError, match="Give exactly one of input_ids and inputs_embeds"):
        model(**batch | {"input_ids": None})
    with pytest.raises(ValueError, match=r"input_ids has shape \(7,\), expected"):
        model(**batch | {"input_ids": batch["input_ids"][0]})


def test_first_stage_evaluation_and_pretraining_see_all():
    every = torch.arange(4)
    stages = {"first_stage_captions": every, "first_stage_images": every}
    outputs = []
    for share in (0.0, 0.5):
        model = similarity_model(num_text_layers=1, joint_dropout_prob=share, **NO_DROPOUT)
        first = model.train()(**paired(tiny.padded_batch()), **stages).first_stage_logits
        scores = model.eval()(**paired(tiny.padded_batch())).scores
        pretrained = tiny.model(UnicoderVLForPreTraining, joint_dropout_prob=share, **NO_DROPOUT).train()
        outputs.append((first, scores, pretrained(**tiny.padded_batch()).prediction_logits))
    for found, wanted in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_what_is_no_share_is_refused():
    for share in (-0.1, 1):
        with pytest.raises(StrictDataclassClassValidationError, match=f"joint_dropout_prob={share} must be at least 0"):
            tiny.config(joint_dropout_prob=share)
