"""How a run computes: precision and threads by a rule of sizes and hardware, recorded; attention in bfloat16."""

import json
import os

import places
import pytest
import small_world
import tiny
import torch
from test_padding_free import (
    loss_and_gradients,
    loss_of,
    multiple_choice_batch,
    pretraining_batch,
    questions_batch,
    retrieval_batch,
    retrieval_model as new_retrieval_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from unicoder_vl_hf import (
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForPreTraining,
    UnicoderVLForQuestionAnswering,
    modeling_unicoder_vl,
    processes as training_module,
)
from unicoder_vl_hf.processes import Computing, fast_precision, resolve_precision
from unicoder_vl_hf.runs.model_card import TrainingRun

run_pretraining = places.script("run_pretraining")

AMX = {"amx_bf16": True, "avx512_bf16": True}


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(training_module.logger, "warning", said.append)
    return said


@pytest.fixture
def cpu(monkeypatch):
    """Sets what the CPU can do."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda **capabilities: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


# Precision


@pytest.mark.parametrize(
    "capabilities, fast",
    [
        ({}, "no"),
        ({"avx512_f": True}, "no"),
        ({"amx_bf16": False}, "no"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
    ],
)
def test_precision_of_a_cpu(cpu, warnings, capabilities, fast):
    cpu(**capabilities)
    assert fast_precision("cpu") == resolve_precision("auto", "cpu") == fast
    assert resolve_precision("no", "cpu") == "no" and not warnings
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert [("bf16" in text and "slower than fp32" in text) for text in warnings] == ([True] if fast == "no" else [])
    warnings.clear()
    assert resolve_precision("fp16", "cpu") == "fp16"
    assert len(warnings) == 1 and "fp16" in warnings[0]


@pytest.mark.parametrize(
    "capabilities, hidden_size, precision",
    [
        (AMX, 128, "no"),
        (AMX, 256, "bf16"),
        (AMX, 768, "bf16"),
        ({"avx512_bf16": True}, 32, "no"),
        ({"avx512_bf16": True}, 128, "bf16"),
        ({}, 768, "no"),
    ],
)
def test_small_models_train_in_what_pays(cpu, capabilities, hidden_size, precision):
    cpu(**capabilities)
    assert Computing.choose("auto", "cpu", hidden_size).mixed_precision == precision
    assert Computing.choose("bf16", "cpu", hidden_size).mixed_precision == "bf16"


@pytest.mark.parametrize("has_bf16, fast", [(True, "bf16"), (False, "fp16")])
def test_precision_of_a_gpu(monkeypatch, has_bf16, fast):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert Computing.choose("auto", "cuda", 32) == Computing(fast, num_threads=None)


def test_unknown_precision():
    with pytest.raises(ValueError, match="'fp8', expected auto, no, bf16 or fp16"):
        resolve_precision("fp8", "cpu")


# Threads


def test_small_models_train_on_one_thread(cpu, monkeypatch):
    cpu()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(training_module, "available_cpus", lambda: 4)
    assert Computing.choose("auto", "cpu", 128).num_threads == 1
    assert Computing.choose("auto", "cpu", 256).num_threads == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # said by the user
    assert Computing.choose("auto", "cpu", 128).num_threads is None


def test_threads_are_those_of_before_afterwards(monkeypatch):
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), Computing("no", before + 1).threads():
        assert torch.get_num_threads() == before + 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before
    with Computing("no", None).threads():
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("said", [None, "7"])
def test_few_kernels_are_kept_unless_the_environment_says_how_many(said, monkeypatch):
    for variable in training_module.KERNELS_KEPT:
        monkeypatch.setenv(variable, "7")  # restored afterwards
        if said is None:
            monkeypatch.delenv(variable)
    training_module.start_processes()
    kept = {variable: os.environ[variable] for variable in training_module.KERNELS_KEPT}
    assert kept == (training_module.KERNELS_KEPT if said is None else dict.fromkeys(kept, said))


# What a checkpoint records


def test_a_resumed_run_computes_as_it_began(cpu, monkeypatch, tmp_path):
    cpu(avx512_bf16=True)
    Computing.choose("auto", "cpu", 128).save(tmp_path)
    chosen = {"mixed_precision": "bf16", "num_threads": 1, "earlier": []}
    assert json.loads((tmp_path / "computing.json").read_text()) == chosen
    cpu()  # another machine
    assert Computing.choose("auto", "cpu", 128, tmp_path) == Computing("bf16", 1)
    Computing("no", 16).save(tmp_path)
    monkeypatch.setattr(training_module, "available_cpus", lambda: 2)
    assert Computing.choose("auto", "cpu", 768, tmp_path) == Computing("no", 2)  # there are no more
    monkeypatch.undo()
    assert Computing.choose("auto", "cpu", 768, tmp_path / "older").mixed_precision == fast_precision("cpu", 768)


def test_another_precision_is_recorded_with_the_step_and_said(cpu, warnings, tmp_path):
    cpu(avx512_bf16=True)
    (tmp_path / Computing.FILE).write_text('{"mixed_precision": "bf16", "num_threads": 1}')  # as 9bccc44 wrote it
    changed = Computing.choose("no", "cpu", 128, tmp_path, step=37)
    assert changed == Computing("no", 1, (("bf16", 37),))
    changed.warn_of_change(37)
    assert warnings == ["Until step 37 the precision was bfloat16 (mixed); from here on it is float32."]
    changed.save(tmp_path)
    for requested in ("auto", "no"):  # goes on as before
        assert Computing.choose(requested, "cpu", 128, tmp_path, step=50) == changed
    changed.warn_of_change(50)
    again = Computing.choose("bf16", "cpu", 128, tmp_path, step=1050)
    assert again == Computing("bf16", 1, (("bf16", 37), ("no", 1050)))
    again.warn_of_change(1050)
    assert warnings[1:] == ["Until step 1,050 the precision was float32; from here on it is bfloat16 (mixed)."]
    run = {"steps": 2000, "epochs": 1, "batch_size": 4, "learning_rate": 1, "seed": 0}
    card = str(TrainingRun(**run, mixed_precision="bf16", earlier_precisions=again.earlier)).splitlines()[-1]
    assert card == "- Precision: bfloat16 (mixed) until step 37, then float32 until step 1,050, then bfloat16 (mixed)"
    card = str(TrainingRun(**run | {"steps": 37}, mixed_precision="no", earlier_precisions=changed.earlier))
    assert card.endswith("- Precision: bfloat16 (mixed) until step 37")  # of a run that had no step left


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world.build(tmp_path_factory.mktemp("computing"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small_world.save_bert(tmp_path_factory.mktemp("bert"), dropout=0.0)


def test_a_checkpoint_records_it_and_a_resume_uses_it(world, bert, cpu, warnings, monkeypatch, tmp_path):
    """A run that began where bfloat16 pays, and goes on where it does not."""
    precisions, new_accelerator = [], training_module.new_accelerator

    def recording(computing, **options):
        precisions.append(computing.mixed_precision)
        return new_accelerator(computing, **options)

    monkeypatch.setattr(run_pretraining, "new_accelerator", recording)
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "max_validation_pairs": 0, "save_steps": 1}
    arguments = small_world.arguments(world, bert, tmp_path / "run", max_steps=2, **options)
    monkeypatch.setattr(training_module, "BF16_FROM_HIDDEN_SIZE", {"avx512_bf16": 32})
    cpu(avx512_bf16=True)

    def stopping(self, accelerator):
        self._is_set = True
        return True

    with monkeypatch.context() as patch:
        patch.setattr(training_module.StopSignal, "agreed", stopping)
        assert run_pretraining.main(arguments) is False
    assert (tmp_path / "run" / "checkpoint-1" / Computing.FILE).exists()
    cpu()
    assert run_pretraining.main([*arguments, "--resume_from_checkpoint", "latest"]) is True
    assert precisions == ["bf16", "bf16"]
    assert "- Precision: bfloat16 (mixed)\n" in (tmp_path / "run" / "README.md").read_text()
    assert not [warning for warning in warnings if warning.startswith("Until step")]
    longer = [*arguments, "--max_steps", "3", "--resume_from_checkpoint", "latest", "--mixed_precision", "no"]
    assert run_pretraining.main(longer) is True
    assert warnings[-1] == "Until step 2 the precision was bfloat16 (mixed); from here on it is float32."
    assert "- Precision: bfloat16 (mixed) until step 2, then float32\n" in (tmp_path / "run/README.md").read_text()


def test_trainer_chooses_by_the_model_records_it_and_a_resume_uses_it(
    world, bert, cpu, warnings, monkeypatch, tmp_path
):
    monkeypatch.setattr(training_module, "BF16_FROM_HIDDEN_SIZE", {"avx512_bf16": 32})
    main = places.script("run_retrieval").main
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_validation_images": 0}
    options |= {"num_negative_captions": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"eval_strategy": "no", "load_best_model_at_end": False}

    def trained(output, words=(), **changes):
        assert main([*small_world.arguments(world, bert, tmp_path / output, **options, **changes), *words]) is True
        (line,) = [line for line in (tmp_path / output / "README.md").read_text().splitlines() if "Precision" in line]
        return line

    cpu(avx512_bf16=True)
    assert trained("run", max_steps=1) == "- Precision: bfloat16 (mixed)"
    assert json.loads((tmp_path / "run" / "checkpoint-1" / Computing.FILE).read_text())["mixed_precision"] == "bf16"
    cpu()
    assert trained("run", ["--resume_from_checkpoint", "latest"], max_steps=2) == "- Precision: bfloat16 (mixed)"
    assert not [warning for warning in warnings if warning.startswith("Until step")]
    changed = trained("run", ["--resume_from_checkpoint", "latest"], max_steps=3, mixed_precision="no")
    assert changed == "- Precision: bfloat16 (mixed) until step 2, then float32"
    assert warnings[-1] == "Until step 2 the precision was bfloat16 (mixed); from here on it is float32."
    assert trained("other", max_steps=1) == "- Precision: float32"
    cpu(avx512_bf16=True)
    assert trained("asked", max_steps=1, mixed_precision="no") == "- Precision: float32"
    monkeypatch.setattr(training_module, "BF16_FROM_HIDDEN_SIZE", {"avx512_bf16": 33})
    assert trained("small", max_steps=1) == "- Precision: float32"


# One process, several runs


def test_runs_of_any_precision_in_one_process(world, bert, cpu, monkeypatch, tmp_path):
    """As in a notebook: `main` is called again with other settings, in any order, as is accelerate itself before."""
    cpu()
    monkeypatch.setattr(training_module, "BF16_FROM_HIDDEN_SIZE", {"avx512_bf16": 32})
    shared = {"gradient_accumulation_steps": 1, "max_steps": 1}
    loop = {**shared, "train_batch_size": 2, "max_validation_pairs": 0}
    trainer = {**shared, "per_device_train_batch_size": 2, "max_validation_images": 0, "num_negative_captions": 1}
    runs = [
        ("run_pretraining", loop | {"mixed_precision": "bf16"}),
        ("run_pretraining", loop | {"mixed_precision": "no"}),
        ("run_retrieval", trainer | {"bf16": True}),
        ("run_pretraining", loop),
        ("run_retrieval", trainer | {"bf16": False}),
        ("run_pretraining", loop | {"mixed_precision": "bf16"}),
    ]
    for number, (script, options) in enumerate(runs):
        output = tmp_path / str(number)
        assert places.script(script).main(small_world.arguments(world, bert, output, **options)) is True
        expected = "bfloat16" if options.get("mixed_precision") == "bf16" or options.get("bf16") else "float32"
        assert f"Precision: {expected}" in (output / "README.md").read_text()


# Attention in bfloat16


class Attended(TorchDispatchMode):
    """Takes down the dtypes that attention is computed in, forward and backward, below autocast."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def attended():
    with Attended() as mode:
        mode.dtypes = set()
        yield mode.dtypes


class Noted:
    """Calls a function, and remembers that it was called."""

    def __init__(self, function):
        self.function, self.called = function, False

    def __call__(self, *arguments):
        self.called = True
        return self.function(*arguments)


def slow_attention(module, hidden_states, lengths):
    """Each sequence of a padded batch on its own, in float64, from queries, keys and values in bfloat16."""
    outputs = torch.zeros(hidden_states.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        states = hidden_states[row, :length]
        query, key, value = (
            projection(states).double().unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
            for projection in (module.query, module.key, module.value)
        )
        weights = (query @ key.transpose(1, 2) * module.scaling).softmax(-1)
        outputs[row, :length] = (weights @ value).transpose(0, 1).flatten(1)
    return outputs


# What a call must be worth for groups of 1 x 3 and 2 x 5 tokens to go into one bucket of 3 x 16, with 2 heads.
OF_THE_GROUPS = 2 * (1 * 3**2 + 2 * 5**2)
TO_ONE_BUCKET = 2 * 3 * 16**2 - OF_THE_GROUPS


@pytest.mark.parametrize(
    "packed, by_products, in_buckets",
    [(False, False, True), (True, False, False), (True, True, False), (True, True, True)],
)
def test_attention_of_bfloat16(packed, by_products, in_buckets, attended, monkeypatch):
    """In float32, but for large groups, and many, which products of matrices do in bfloat16."""
    from_weights = OF_THE_GROUPS / 2 + (in_buckets or not by_products)
    monkeypatch.setattr(modeling_unicoder_vl, "BF16_PRODUCTS_FROM_WEIGHTS", from_weights)
    monkeypatch.setattr(modeling_unicoder_vl, "WEIGHTS_OF_A_CALL", TO_ONE_BUCKET + in_buckets)
    monkeypatch.setattr(modeling_unicoder_vl, "_lay_out", noted := Noted(modeling_unicoder_vl._lay_out))
    torch.manual_seed(0)
    module = tiny.model(UnicoderVLForPreTraining).bert.encoder.layer[0].attention.self.bfloat16()
    lengths = [3, 5, 5]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    states = torch.randn(3, 5, 16).bfloat16().requires_grad_()
    weight = torch.randn(3, 5, 16) * mask[..., None]
    expected = slow_attention(module, states, lengths)
    gradients = torch.autograd.grad((expected * weight).sum(), [states, *module.parameters()])
    if packed:
        found = torch.zeros(3, 5, 16, dtype=torch.bfloat16)
        found[mask] = module(states[mask][None], groups=[(1, 3), (2, 5)])[0][0]
    else:
        found = module(states, mask[:, None, None, :])[0]
    assert found.dtype == torch.bfloat16 and attended == (set() if by_products else {torch.float32})
    assert noted.called == (packed and in_buckets)
    found_gradients = torch.autograd.grad((found * weight).sum(), [states, *module.parameters()])
    rtol, atol = (0.02, 0.02) if by_products else (2**-8, 1e-3)  # which is rounded to bfloat16 once
    torch.testing.assert_close(found[mask].double(), expected[mask], rtol=rtol, atol=atol)
    for value, reference in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(value, reference, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    "model_class, build, batch",
    [
        (UnicoderVLForPreTraining, tiny.model, pretraining_batch),
        (UnicoderVLForImageTextRetrieval, new_retrieval_model, retrieval_batch),
        (UnicoderVLForMultipleChoice, tiny.model, multiple_choice_batch),
        (UnicoderVLForQuestionAnswering, tiny.model, questions_batch),
    ],
)
@pytest.mark.parametrize("by_products", [False, True, "in buckets"])
def test_training_in_bfloat16(model_class, build, batch, by_products, attended, monkeypatch):
    """Under autocast, which would take attention back to bfloat16; without gradients it may, and is as fast."""
    if by_products:
        monkeypatch.setattr(modeling_unicoder_vl, "BF16_PRODUCTS_FROM_WEIGHTS", 0)
    monkeypatch.setattr(modeling_unicoder_vl, "WEIGHTS_OF_A_CALL", 10**9 if by_products == "in buckets" else 0)
    model = build(model_class)
    model.config.padding_free = True
    loss, gradients = loss_and_gradients(model, batch())
    attended.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_gradients = loss_and_gradients(model, batch())
    assert attended == (set() if by_products else {torch.float32})
    attended.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        loss_of(model, batch())
    assert attended == {torch.bfloat16}
    torch.testing.assert_close(found, loss, rtol=0.05, atol=0.05)
    cosine = torch.nn.functional.cosine_similarity
    flat, reference = (torch.cat([of[name].flatten() for name in gradients]) for of in (found_gradients, gradients))
    assert cosine(flat, reference, dim=0) > 0.995
