"""What the models compute without padding is what they compute with it, in values and gradients."""

import pytest
import small_world
import tiny
import torch
from tiny import NUM_REGIONS, TEXT_LENGTHS, padded_batch, pretraining_batch

from unicoder_vl_hf import (
    RegionStore,
    UnicoderVLForGrounding,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForPreTraining,
    UnicoderVLForQuestionAnswering,
    UnicoderVLForVisualEntailment,
    UnicoderVLForVisualReasoning,
    UnicoderVLModel,
)
from unicoder_vl_hf.modeling_unicoder_vl import UnicoderVLEncoder, UnicoderVLLayer
from unicoder_vl_hf.runs.arguments import DataArguments
from unicoder_vl_hf.runs.setup import load_model
from unicoder_vl_hf.tasks.retrieval.losses import HardestNegativeLoss, TwoStageLoss


def retrieval_batch():
    """Two groups of a match, a caption negative and an image negative, for the contrastive loss beside."""
    return padded_batch() | {
        "caption_index": torch.tensor([0, 1, 0, 2, 3, 2]),
        "image_index": torch.tensor([0, 0, 1, 3, 3, 2]),
        "group_ids": torch.tensor([0, 0, 0, 1, 1, 1]),
        "labels": torch.tensor([1, 0, 0, 1, 0, 0]),
        "mismatches": torch.tensor([[False, True], [True, False]]),
    }


def multiple_choice_batch():
    batch = padded_batch()
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name].view(2, 2, -1)
    batch["token_region_ids"] = torch.where(torch.arange(7) == 1, 0, -1).expand(2, 2, -1)
    return {name: tensor[:2] if "region_" in name and name != "token_region_ids" else tensor
            for name, tensor in batch.items()} | {"labels": torch.tensor([1, 0])}  # fmt: skip


def questions_batch():
    """Five questions about four images, of which two share one."""
    batch = padded_batch()
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][[0, 1, 2, 3, 0]]
    return batch | {"image_index": torch.tensor([0, 1, 2, 3, 3]), "labels": (torch.arange(10) % 4 / 3).view(5, 2)}


def entailment_batch():
    return questions_batch() | {"labels": torch.tensor([0, 1, -100, 1, 0])}


def two_photos_batch():
    index = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 2]])
    return padded_batch() | {"image_index": index, "labels": torch.tensor([0, 1, 1, -100])}


def grounding_batch():
    return questions_batch() | {"labels": torch.tensor([3, 0, 1, -100, 2])}


def retrieval_model(model_class):
    torch.manual_seed(1)
    return model_class(tiny.config(projection_dim=8)).eval()


def model_with_similarity(model_class):
    return tiny.model(model_class, projection_dim=8, matching_head="similarity")


def loss_of(model, batch):
    return TwoStageLoss(HardestNegativeLoss(), 0.5)(model, batch) if "mismatches" in batch else model(**batch).loss


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "model_class, batch",
    [(UnicoderVLForPreTraining, pretraining_batch), (UnicoderVLForImageTextRetrieval, retrieval_batch)],
)
def test_gradient_checkpointing_gives_equal_gradients(model_class, batch, reentrant):
    """With dropout: what is computed once more drops the same."""
    model = retrieval_model(model_class).train()
    model.config.padding_free = True
    runs = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(0)
    loss, gradients = loss_and_gradients(model, batch())
    forward = len(runs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    found, found_gradients = loss_and_gradients(model, batch())
    assert len(runs) == forward + 2 * forward  # once forward, once more for backward
    assert torch.equal(found, loss) and found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def computed(monkeypatch):
    """How many positions each layer took, forward pass by forward pass."""
    counts, forward = [], UnicoderVLLayer.forward

    def counting(self, hidden_states, *arguments, **kwargs):
        counts.append(hidden_states.shape[:-1].numel())
        return forward(self, hidden_states, *arguments, **kwargs)

    monkeypatch.setattr(UnicoderVLLayer, "forward", counting)
    return counts


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "model_class, build, batch",
    [
        (UnicoderVLForPreTraining, tiny.model, pretraining_batch),
        (UnicoderVLForImageTextRetrieval, retrieval_model, retrieval_batch),
        (UnicoderVLForImageTextRetrieval, model_with_similarity, retrieval_batch),
        (UnicoderVLForMultipleChoice, tiny.model, multiple_choice_batch),
        (UnicoderVLForQuestionAnswering, tiny.model, questions_batch),
        (UnicoderVLForVisualEntailment, tiny.model, entailment_batch),
        (UnicoderVLForVisualReasoning, tiny.model, two_photos_batch),
        (UnicoderVLForGrounding, tiny.model, grounding_batch),
    ],
)
def test_same_loss_and_gradients(model_class, build, batch, implementation, computed):
    model = build(model_class)
    model.set_attn_implementation(implementation)
    loss, gradients = loss_and_gradients(model, batch())
    padded = list(computed)
    computed.clear()
    model.config.padding_free = True
    found, found_gradients = loss_and_gradients(model, batch())
    assert max(computed) < max(padded)
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-6)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("left", [False, True])
def test_same_states_and_no_padding_is_computed(left, computed):
    model, batch = tiny.model(UnicoderVLModel), padded_batch(left)
    wanted = model(**batch)
    computed.clear()
    model.config.padding_free = True
    found = model(**batch)
    attended = torch.cat((batch["attention_mask"], batch["region_attention_mask"]), dim=1).bool()
    assert computed == [sum(TEXT_LENGTHS) + sum(NUM_REGIONS)] * 2
    torch.testing.assert_close(found.last_hidden_state[attended], wanted.last_hidden_state[attended], rtol=0, atol=1e-5)
    assert not found.last_hidden_state[~attended].any()
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=0, atol=1e-5)


def test_a_row_without_anything_is_zero_and_changes_no_other():
    model, batch = tiny.model(UnicoderVLModel), padded_batch()
    model.config.padding_free = True
    wanted = model(**batch).last_hidden_state
    batch["attention_mask"][1] = batch["region_attention_mask"][1] = 0
    found = model(**batch).last_hidden_state
    assert not found[1].any()
    torch.testing.assert_close(found[[0, 2, 3]], wanted[[0, 2, 3]], rtol=0, atol=1e-5)
    pooled = model.pooled(**batch).pooler_output
    torch.testing.assert_close(pooled, model(**batch).pooler_output, rtol=0, atol=1e-5)


def test_what_is_recorded_has_the_shape_of_the_batch():
    model, batch = tiny.model(UnicoderVLModel), padded_batch()
    model.config.padding_free = True
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(4, 11, 16)] * 3
    assert len(outputs.attentions) == 2 or model.config._attn_implementation == "sdpa"


def test_mean_states_by_a_slow_loop():
    model, batch = tiny.model(UnicoderVLModel), padded_batch()
    found = model.mean_states(**batch)
    layers = model(**batch, output_hidden_states=True).hidden_states
    attended = torch.cat((batch["attention_mask"], batch["region_attention_mask"]), dim=1).bool()
    for row in range(4):
        wanted = torch.stack([states[row][attended[row]].mean(0) for states in layers]).mean(0)
        torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-5)


def test_a_batch_without_masks_goes_through_the_encoder_as_it_is(monkeypatch):
    model, batch = tiny.model(UnicoderVLModel), padded_batch()
    model.config.padding_free = True
    shapes, forward = [], UnicoderVLEncoder.forward

    def noting(self, states, *arguments, **kwargs):
        shapes.append(states.shape)
        return forward(self, states, *arguments, **kwargs)

    monkeypatch.setattr(UnicoderVLEncoder, "forward", noting)
    model(**{name: tensor for name, tensor in batch.items() if not name.endswith("mask")})
    assert shapes == [(4, 11, 16)]


@pytest.mark.parametrize("model_class", [UnicoderVLForPreTraining, UnicoderVLForImageTextRetrieval])
def test_every_training_begins_without_padding(model_class, tmp_path):
    world = small_world.build(tmp_path)
    arguments = DataArguments(captions=str(world / "captions.jsonl"), regions=str(world / "regions"))
    arguments.model_name_or_path = str(small_world.save_bert(tmp_path / "bert", dropout=0.0))
    model = load_model(arguments, RegionStore(world / "regions"), model_class)
    assert model.config.padding_free is True and model.bert.packs() and not model.bert.packs(output_attentions=True)
    model.config.padding_free = False
    model.save_pretrained(tmp_path / "padded")
    arguments.model_name_or_path = str(tmp_path / "padded")
    again = load_model(arguments, RegionStore(world / "regions"), model_class)
    assert again.config.padding_free is False  # what a user has set stays


@pytest.mark.parametrize(
    "padding_free, training, packs",
    [(None, True, True), (None, False, False), (True, True, True), (True, False, True), (False, True, False)],
)
def test_it_is_set_once_and_saved(padding_free, training, packs, computed, tmp_path):
    tiny.model(UnicoderVLModel).save_pretrained(tmp_path / "before")
    UnicoderVLModel.from_pretrained(tmp_path / "before", padding_free=padding_free).save_pretrained(tmp_path / "set")
    model, batch = UnicoderVLModel.from_pretrained(tmp_path / "set").train(training), padded_batch()
    states = model(**batch).last_hidden_state
    attended = torch.cat((batch["attention_mask"], batch["region_attention_mask"]), dim=1).bool()
    assert computed == [int(attended.sum()) if packs else attended.numel()] * 2
    assert bool(states[~attended].any()) is not packs


@pytest.mark.parametrize("padding_free", [None, True])
def test_a_compiled_graph_keeps_its_padding(padding_free):
    torch._dynamo.reset()
    config = tiny.config(padding_free=padding_free, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(1)
    model, batch = UnicoderVLModel(config).train(), padded_batch()
    states = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).last_hidden_state
    attended = torch.cat((batch["attention_mask"], batch["region_attention_mask"]), dim=1).bool()
    assert states[~attended].any()
    torch.testing.assert_close(states[attended], model(**batch).last_hidden_state[attended], rtol=0, atol=1e-5)
