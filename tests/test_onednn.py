"""Linear layers by oneDNN give what PyTorch's give, in values and gradients; what they cannot do, PyTorch does."""

import pytest
import tiny
import torch
from test_padding_free import padded_batch, pretraining_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unicoder_vl_hf import UnicoderVLForPreTraining, UnicoderVLModel, modeling_unicoder_vl
from unicoder_vl_hf.modeling_unicoder_vl import UnicoderVLLinear

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch lacks oneDNN here")


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Whatever CPU runs the tests."""
    monkeypatch.setattr(modeling_unicoder_vl, "onednn_beats_mkl", lambda: True)


def layer(inputs=48, outputs=33, **options) -> UnicoderVLLinear:
    torch.manual_seed(0)
    return UnicoderVLLinear(inputs, outputs, **options)


def taken(output: torch.Tensor) -> bool:
    return output.grad_fn.name() == "OneDNNLinearFunctionBackward"


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad])


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    return (found.double() - exact).abs().max().item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(700, 48),
        torch.randn(1, 1, 48),
        torch.randn(3, 48, 7).transpose(1, 2),  # another order in memory
        torch.randn(48).expand(2, 5, 48),
        torch.randn(9, 96)[::2, ::2],
    ],
    ids=lambda inputs: str(tuple(inputs.shape)),
)
def test_values_and_gradients_are_as_exact_as_pytorchs(inputs, bias):
    ours, plain = layer(bias=bias), nn.Linear(48, 33, bias=bias)
    plain.load_state_dict(ours.state_dict())
    exact = nn.Linear(48, 33, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    inputs = inputs.detach().requires_grad_()

    def found(module, inputs):
        output = module(inputs)
        weights = torch.linspace(-1, 1, 33, dtype=output.dtype).expand_as(output)  # a gradient that lies strided
        return output, *torch.autograd.grad(output, [inputs, *module.parameters()], weights)

    assert taken(ours(inputs))
    for value, other, reference in zip(
        found(ours, inputs), found(plain, inputs), found(exact, inputs.double()), strict=True
    ):
        assert value.shape == reference.shape and value.dtype == torch.float32
        assert worst(value, reference) <= 4 * worst(other, reference) + 1e-6 * reference.abs().max().item()


def test_a_training_step_is_the_same(monkeypatch):
    model = tiny.model(UnicoderVLForPreTraining, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()

    def step():
        loss = model(**pretraining_batch()).loss
        return [loss, *gradients(model, loss)]

    ours = step()
    assert all(torch.equal(value, again) for value, again in zip(ours, step(), strict=True))
    monkeypatch.setattr(modeling_unicoder_vl, "onednn_beats_mkl", lambda: False)
    for value, wanted in zip(ours, step(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)


def test_pytorch_computes_what_onednn_cannot():
    linear, inputs = layer(), torch.randn(4, 48)
    assert taken(linear(inputs))
    assert not taken(linear(inputs[0])) and not taken(linear(inputs[:0]))
    assert not taken(linear.double()(inputs.double())) and not taken(linear.bfloat16()(inputs.bfloat16()))
    linear.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(inputs).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not taken(linear(inputs))
    assert linear.to("meta")(inputs.to("meta")).shape == (4, 33)
    plain = nn.functional.linear(inputs, layer().weight, layer().bias)
    assert (torch.jit.trace(layer(), inputs)(inputs) == plain).all()
    with torch.inference_mode():
        torch.testing.assert_close(layer()(inputs), plain)


def test_onednn_is_for_cpus_of_amd(monkeypatch):
    monkeypatch.undo()
    asked = modeling_unicoder_vl.onednn_beats_mkl.__wrapped__
    for name, expected in (("AMD EPYC", torch.backends.mkl.is_available()), ("INTEL(R) XEON(R)", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name})
        assert asked() == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not asked()


def test_frozen_weights_get_no_gradient():
    linear = layer().requires_grad_(False)
    inputs = torch.randn(4, 48, requires_grad=True)
    linear(inputs).sum().backward()
    assert linear.weight.grad is None and linear.bias.grad is None
    torch.testing.assert_close(inputs.grad, linear.weight.sum(0).expand(4, 48))


def test_second_derivatives():
    """A penalty on gradients, as some regularisers have."""
    linear, inputs = layer(), torch.randn(4, 48, requires_grad=True)

    def penalty(module):
        (gradient,) = torch.autograd.grad(module(inputs).pow(3).sum(), inputs, create_graph=True)
        return gradients(module, gradient.pow(2).sum())

    plain = nn.Linear(48, 33)
    plain.load_state_dict(linear.state_dict())
    for found, wanted in zip(penalty(linear), penalty(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_each_row():
    linear, inputs = layer(), torch.randn(4, 48)
    parameters = dict(linear.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(linear, parameters, row[None]).pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    for row in range(4):
        wanted = gradients(linear, linear(inputs[row : row + 1]).pow(2).sum())
        torch.testing.assert_close([found["weight"][row], found["bias"][row]], list(wanted))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    linear, inputs = layer(), torch.randn(4, 48, requires_grad=True)
    linear(inputs).sum().backward()
    wanted, linear.weight.grad = linear.weight.grad, None
    checkpoint(linear, inputs, use_reentrant=reentrant).sum().backward()
    assert torch.equal(linear.weight.grad, wanted)


def test_exported_and_compiled_graphs_hold_pytorchs_operators():
    model, batch = tiny.model(UnicoderVLModel), padded_batch()
    expected = model(**batch).last_hidden_state
    exported = torch.export.export(model, (), batch)
    torch.testing.assert_close(exported.module()(**batch).last_hidden_state, expected, rtol=0, atol=1e-5)
    graphs = [exported.graph]
    torch.compile(layer(), fullgraph=True, backend=lambda module, _: graphs.append(module.graph) or module)(
        torch.randn(4, 48)
    )
    assert len(graphs) == 2
    for graph in graphs:
        assert any("linear" in str(node.target) for node in graph.nodes)
        assert not any("mkldnn" in str(node.target) or "function" in node.name for node in graph.nodes)


def test_a_layer_is_a_linear_layer_to_others():
    """Peft and quantizers look for the class, checkpoints for the names."""
    assert isinstance(layer(), nn.Linear)
    nn.Linear(48, 33).load_state_dict(layer().state_dict())
