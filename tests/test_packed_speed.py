"""What makes packed sequences fast on CPUs: few shapes of products, buckets of attention, dropout of 16 bits."""

import pytest
import tiny
import torch
from torch import nn

from unicoder_vl_hf import UnicoderVLModel, modeling_unicoder_vl as modeling
from unicoder_vl_hf.modeling_unicoder_vl import PackedSequences
from unicoder_vl_hf.scoring import packed

GROUPS = [(20, 3), (2, 5), (1, 16), (3, 17), (2, 40)]  # number and length of sequences
NUM_TOKENS = sum(count * length for count, length in GROUPS)
NUM_SEQUENCES = sum(count for count, _ in GROUPS)


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("behind", [0, 7])
def test_buckets_compute_what_groups_do(first_only, behind):
    """Values and gradients, also where rows that fill up lie behind the sequences; and only these are 0."""
    torch.manual_seed(0)
    module = nn.Module().eval()
    rows = (NUM_SEQUENCES if first_only else NUM_TOKENS, NUM_TOKENS, NUM_TOKENS)
    states = [torch.randn(1, 2, number + behind, 4, dtype=torch.float64, requires_grad=True) for number in rows]
    weight = torch.randn(1, rows[0] + behind, 2, 4, dtype=torch.float64)
    weight[:, rows[0] :] = 0
    kwargs = {"attention_mask": None, "scaling": 0.5}
    eager = modeling.eager_attention_forward
    wanted, _ = modeling.attend_in_groups(eager, GROUPS, first_only, module, *states, **kwargs)
    found, _ = modeling.attend_in_buckets(GROUPS, first_only, module, *states, **kwargs)
    assert found.shape == wanted.shape and not found[:, rows[0] :].any() and found[:, : rows[0]].all()
    torch.testing.assert_close(found, wanted)
    for value, reference in zip(
        *(torch.autograd.grad((of * weight).sum(), states) for of in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(value, reference)


def test_second_derivatives_of_buckets():
    torch.manual_seed(0)
    groups = [(2, 2), (1, 3)]
    states = [torch.randn(1, 1, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attend(*states):
        return modeling.attend_in_buckets(groups, False, nn.Module().eval(), *states, None, scaling=0.5)[0]

    assert torch.autograd.gradgradcheck(attend, states)


def test_buckets_have_few_shapes():
    """Whatever the lengths are within a multiple, and how many sequences, the products are of the same shapes."""
    shapes = {
        tuple(modeling._lay_out(groups, 2, False)[0].shapes)
        for groups in [((5, 3), (8, 9), (26, 30)), ((1, 1), (12, 16), (25, 17)), ((14, 2), (3, 25), (25, 32))]
    }
    assert shapes == {((14, 2, 16), (28, 2, 32))}


@pytest.mark.parametrize("number, filled", [(1, 16), (16, 16), (17, 32), (2033, 2048), (2048, 2048), (2049, 2112)])
def test_rows_are_filled_up(number, filled):
    """In bfloat16 alone: float16 would divide by the variance of rows of zeros, and float32 gains nothing."""
    states = torch.ones(number, 2)
    sequences = PackedSequences([(number, 1)], torch.device("cpu"), "sdpa")
    for left in (states, states.half(), states.double()):
        assert sequences.fill_up(left) is left
    with torch.autocast("cpu", dtype=torch.float16):
        assert sequences.fill_up(states) is states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [sequences.fill_up(states), sequences.fill_up(states.bfloat16())]
    found.append(sequences.fill_up(states.bfloat16()))
    assert all(each.shape == (filled, 2) and each.float().sum() == 2 * number for each in found)
    for other in ("flex_attention", "flash_attention_2"):
        left = states.bfloat16()
        assert PackedSequences([(number, 1)], torch.device("cpu"), other).fill_up(left) is left


def test_layers_see_few_numbers_of_rows(monkeypatch):
    """All linear layers, the last layer's of first tokens, too; what fills up gets no gradient, and gives none."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)  # and yet it computes in float32
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    bert = tiny.model(UnicoderVLModel)
    seen = set()
    for layer in bert.encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, inputs, output: seen.add(inputs[0].shape[1]))
    for groups in ([(2, 3), (1, 5)], [(3, 4), (1, 1)], [(1, 7)]):
        lengths = [length for count, length in groups for _ in range(count)]
        states = torch.randn(sum(lengths), 16, requires_grad=True)
        found, _ = bert.encode_packed(states, groups)
        seen -= {16}
        assert not seen
        wanted = torch.stack([bert.encoder(part[None], None)[0, 0] for part in states.split(lengths)])
        seen.clear()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        weight, given = torch.randn_like(found), [states, *bert.encoder.parameters()]
        gradients = [torch.autograd.grad((of * weight).sum(), given) for of in (found, wanted)]
        for value, reference in zip(*gradients, strict=True):
            torch.testing.assert_close(value, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.99])
def test_dropout(probability):
    """Each value by itself with this probability; what is left is scaled, and the gradient dropped and scaled alike."""
    torch.manual_seed(0)
    values = torch.ones(3, 333_335, dtype=torch.bfloat16, requires_grad=True)
    found = modeling.drop_out(values, probability)
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert torch.equal(found, gradient)
    assert found.grad_fn.name() == "DropoutFunctionBackward"
    dropped = found.detach() == 0
    share, error = dropped.double().mean(), (probability * (1 - probability) / dropped.numel()) ** 0.5
    assert abs(share - probability) < 4 * error + 2**-17
    scale = torch.tensor([1 / (1 - probability)], dtype=torch.double)
    torch.testing.assert_close(found[~dropped].double().unique(), scale, rtol=0.004, atol=0)
    neighbours = (dropped[:, 1:] & dropped[:, :-1]).double().mean()
    assert abs(neighbours - probability**2) < 4 * (probability**2 / dropped.numel()) ** 0.5 + 1e-5


def test_dropout_keeps_the_mean():
    """To more digits than the factor has in bfloat16."""
    torch.manual_seed(0)
    values = torch.rand(10**7).bfloat16() + 1
    found = modeling.drop_out(values, 0.1).double().mean() / values.double().mean()
    assert abs(found - 1) < 4 * (0.11 / 10**7) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_by_its_seed_and_where_nothing_is_dropped_or_all(dtype):
    values, many = torch.ones(8, dtype=dtype), torch.ones(1000, dtype=dtype)
    assert torch.equal(modeling.drop_out(values, 0.5, training=False), values)
    assert torch.equal(modeling.drop_out(values, 0.0), values) and not modeling.drop_out(values, 1.0).any()
    torch.manual_seed(1)
    first = modeling.drop_out(many, 0.3)
    torch.manual_seed(1)
    assert torch.equal(modeling.drop_out(many, 0.3), first)
    torch.manual_seed(1)
    assert torch.equal(nn.functional.dropout(many, 0.3), first) == (dtype == torch.float32)
    layer = modeling.UnicoderVLDropout(0.5)
    assert torch.equal(layer.eval()(values), values) and (layer.train()(many) == 0).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_numbers_again(reentrant, monkeypatch):
    """A pass without a graph takes the same attention as the one that is for the gradients, and so the same numbers."""
    monkeypatch.setattr(modeling, "WEIGHTS_OF_A_CALL", 10**9)
    bert = tiny.model(UnicoderVLModel, attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2).train()
    states, results = torch.randn(NUM_TOKENS, 16).requires_grad_(), []
    for checkpoints in (False, True):
        if checkpoints:
            bert.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = bert.encode_packed(states, GROUPS)[0]
        states.grad = None
        found.square().sum().backward()
        results.append((found, states.grad.clone()))
    for value, reference in zip(*results, strict=True):
        torch.testing.assert_close(value, reference)


def test_masks_of_dropout_are_freed_as_other_saved_tensors_are():
    values = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    found = modeling.drop_out(values, 0.5)
    (kept,) = found.grad_fn.saved_tensors
    assert kept.element_size() == 2
    found.sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        found.grad_fn.saved_tensors  # noqa: B018


@pytest.mark.parametrize("shape", [(3, 8), (3, 7), (5,), (0, 4), (1,), (2, 3, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_bits_tell_each_change(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    before = packed._sums_of_bits(weight)
    assert torch.equal(packed._sums_of_bits(weight.clone()), before)
    for number in range(weight.numel()):
        changed = weight.clone()
        changed.view(-1)[number] *= 1.01
        assert not torch.equal(packed._sums_of_bits(changed), before)


def test_sums_of_bits_of_parts_of_others():
    whole, single = torch.randn(4, 6), torch.randn(1, 5)
    for part in (whole[:, :4], whole[1:, 1:5], whole.T, single[:, :4]):
        before = packed._sums_of_bits(part)
        part[-1, -1] += 1
        assert not torch.equal(packed._sums_of_bits(part), before)
