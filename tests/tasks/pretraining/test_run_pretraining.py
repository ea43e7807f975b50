"""The two pre-training scripts: however a run is cut (steps, processes, workers, Ctrl-C), it is the same run."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import places
import pytest
import small_world
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoProcessor, Trainer
from two_processes import Processes, examples_recorded, plain_descent, run

from unicoder_vl_hf import RegionStore, RegionStoreWriter
from unicoder_vl_hf.errors import FinishedRun
from unicoder_vl_hf.processes import fast_precision
from unicoder_vl_hf.tasks.pretraining import loop

STEPS_PER_EPOCH = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world.build(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module", params=["run_pretraining", "run_pretraining_trainer"])
def script(request):
    return request.param


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("berts")
    return {dropout: small_world.save_bert(folder / str(dropout), dropout=dropout) for dropout in (0.0, 0.1)}


@pytest.fixture(scope="module")
def command(world, berts):
    """The arguments of a run: 4 pairs a step, 20 steps an epoch; `pairs` of them a micro-batch."""

    def arguments(script, output_dir, *, dropout=0.0, pairs=4, accumulation=1, processes=1, plain=False, **options):
        shared = {"learning_rate": 1e-3, "num_train_epochs": 2, "max_validation_pairs": 6, "seed": 5}
        shared |= {"gradient_accumulation_steps": accumulation, "logging_steps": 7}
        if plain:  # see plain_descent
            shared |= {"learning_rate": 0.5, "max_grad_norm": 0}
            shared |= {"optim": "sgd"} if script == "run_pretraining_trainer" else {}
        if script == "run_pretraining":
            shared |= {"train_batch_size": pairs * accumulation * processes, "mixed_precision": "no"}
        else:
            shared |= {"per_device_train_batch_size": pairs, "bf16": False, "disable_tqdm": "true"}
            shared |= {"save_strategy": "steps" if "save_steps" in options else "no"}
        return small_world.arguments(world, berts[dropout], output_dir, **(shared | options))

    return arguments


@pytest.fixture(scope="module")
def straight(script, command, tmp_path_factory):
    """A run that was never stopped, with dropout, and all of its checkpoints."""
    folder = tmp_path_factory.mktemp("straight") / script
    with examples_recorded(folder.parent / "examples"):
        run(script, command(script, folder, dropout=0.1, save_steps=8, save_total_limit=9))
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other, tolerance=0.0):
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance == 0:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def assert_trained(folder, start):
    """Far more than the tolerance of what is compared has changed."""
    before, after = weights(start), weights(folder)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (after[name] - before[name]).abs().max() > 1e-3


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


def examples_of(path):
    """(epoch, row) in the order of training."""
    return [tuple(map(int, line.split())) for line in Path(path).read_text().splitlines()]


# What a run leaves


def test_what_a_run_leaves(script, straight, berts, world):
    assert_trained(straight, berts[0.1])
    names = [path.name for path in straight.glob("checkpoint-*")]
    assert {"checkpoint-8", "checkpoint-16", "checkpoint-24", "checkpoint-32", "checkpoint-40"} == set(names)
    assert not list(straight.glob("partial-*"))
    for folder in (straight, *straight.glob("checkpoint-*")):
        model, processor = AutoModelForPreTraining.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert type(model).__name__ == "UnicoderVLForPreTraining"
        provenance = RegionStore(world / "regions").provenance
        assert processor.feature_extractor.region_provenance == provenance
        assert processor(text="a red circle")["input_ids"]
    card = (straight / "README.md").read_text()
    assert "Unicoder-VL" in card and "matching_accuracy" in card and "drawing boxes" in card
    for line in (
        "Steps: 40 of 4 pairs",
        "Epochs: 2",
        "Learning rate: 0.001 at its peak",
        "Seed: 5",
        "Precision: float32",
    ):
        assert f"\n- {line}" in card
    assert_same_weights(straight / "checkpoint-40", straight)


def test_every_pair_once_an_epoch_and_the_data_know_the_epoch(script, straight):
    examples = examples_of(straight.parent / "examples-0")
    for epoch in range(2):
        of_epoch = examples[epoch * 80 : (epoch + 1) * 80]
        assert {number for number, _ in of_epoch} == {epoch}  # masks and mismatches follow from it
        assert sorted(row for _, row in of_epoch) == list(range(80))
    assert [row for _, row in examples[:80]] != [row for _, row in examples[80:]]


def test_log_of_the_loop(straight, script):
    if script != "run_pretraining":
        pytest.skip("Trainer writes its own log")
    log = log_of(straight)
    losses = [line for line in log if "loss" in line]
    assert [line["step"] for line in losses] == [7, 14, 21, 28, 35]
    for line in losses:
        # Half of the rows are matches, over which the log takes the mean.
        parts = (line["mlm_loss"] + line["moc_loss"]) / 2 + line["matching_loss"]
        assert line["loss"] == pytest.approx(parts, abs=5e-6)
        assert line["epoch"] == pytest.approx(line["step"] / STEPS_PER_EPOCH)
    # 10 % of 40 steps of warm-up, then down to 0.
    assert [line["learning_rate"] for line in losses] == pytest.approx(
        [1e-3 * (40 - step) / 36 for step in (7, 14, 21, 28, 35)], abs=1e-6
    )
    evaluations = [line for line in log if "eval_matching_accuracy" in line]
    assert [line["step"] for line in evaluations] == [20, 40]
    metrics = json.loads((straight / "metrics.json").read_text())
    assert {f"eval_{name}": round(value, 6) for name, value in metrics.items()} == {
        name: value for name, value in evaluations[-1].items() if name != "step"
    }


@pytest.fixture
def lines(script):
    """The lines of the log of a run in which there are losses."""

    def read(folder):
        state = folder / "trainer_state.json"
        log = log_of(folder) if script == "run_pretraining" else json.loads(state.read_text())["log_history"]
        return [line for line in log if "loss" in line]

    return read


@pytest.mark.parametrize("options, absent", [({}, []), ({"no_moc": True}, ["moc"]), ({"mlm_probability": 0}, ["mlm"])])
def test_the_losses_of_what_is_trained_stand_beside_the_bar(script, command, lines, tmp_path, capsys, options, absent):
    arguments = command(script, tmp_path, max_steps=3, accumulation=2, pairs=2, logging_steps=1, **options)
    run(script, arguments if script == "run_pretraining" else [*arguments, "--disable_tqdm", "false"])
    out, bar = capsys.readouterr()
    present = [name for name in ("mlm", "moc", "matching") if name not in absent]
    parts = {f"{name}_loss" for name in present}
    assert len(lines(tmp_path)) == 3
    for line in lines(tmp_path):
        assert {name for name in line if name.endswith("_loss")} == parts
        masked = sum(line[name] for name in parts - {"matching_loss"}) / 2  # half of the rows are matches
        assert line["loss"] == pytest.approx(masked + line["matching_loss"], rel=1e-4)
    last = lines(tmp_path)[-1]
    shown = ", ".join(f"{name}={last[f'{name}_loss']:.3f}" for name in present)
    assert f"loss={last['loss']:.3f}, {shown}, lr=" in bar
    for name in absent:
        assert f"{name}=" not in bar and f"{name}_" not in out
        assert f"{name}_" not in (tmp_path / "README.md").read_text()
        for file in tmp_path.glob("*.json"):
            assert f"{name}_accuracy" not in file.read_text() and f'"eval_{name}' not in file.read_text()
    assert "{'loss'" not in out + bar  # which transformers prints beside its bar
    # In the table at the end; a Trainer's evaluation is a line before.
    assert out.count("matching_accuracy") == (1 if script == "run_pretraining" else 2)


# Stopped and resumed


@pytest.mark.parametrize("step", [8, 24, 40])
def test_resume_equals_never_stopped(script, command, straight, tmp_path, step):
    """From the middle of either epoch, between two lines of the log, and from the very end; with dropout."""
    folder = tmp_path / script
    shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("*.safetensors", "metrics.json", "checkpoint-*"))
    shutil.copytree(straight / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    with examples_recorded(tmp_path / "examples"):
        resumed = command(script, folder, dropout=0.1, save_steps=8, save_total_limit=9)
        run(script, [*resumed, "--resume_from_checkpoint", "latest"])
    assert_same_weights(folder, straight)
    if step < 40:
        assert examples_of(tmp_path / "examples-0") == examples_of(straight.parent / "examples-0")[4 * step :]
    if script == "run_pretraining":
        assert [line for line in log_of(folder) if "loss" in line] == [
            line for line in log_of(straight) if "loss" in line
        ]
        assert (folder / "metrics.json").read_text() == (straight / "metrics.json").read_text()
        if step < 40:
            assert log_of(folder) == log_of(straight)


def launch(tmp_path, *runs, processes=1):
    """Starts the runs, (script, arguments) or (script, arguments, True) for plain descent, one after another."""
    entries = [
        {
            "script": script,
            "arguments": arguments,
            "examples": str(tmp_path / f"examples{index}"),
            "plain_descent": bool(plain),
        }
        for index, (script, arguments, *plain) in enumerate(runs)
    ]
    return Processes(tmp_path, entries, processes)


def output_of(process, tmp_path):
    """What launched processes print to their end."""
    return process.output(timeout=150)


def stopped(process, tmp_path, folder, rank=0):
    """The step after which the run in `folder` stopped, with a checkpoint, after one of its processes got Ctrl-C."""
    trained = tmp_path / f"examples0-{rank}"
    deadline = time.monotonic() + 120
    while process.returncode is None and time.monotonic() < deadline:
        if trained.exists() and len(trained.read_text().splitlines()) >= 4 * 4:  # of 160 in all
            os.kill(int(Path(f"{trained}.pid").read_text()), signal.SIGINT)
            break
        time.sleep(0.002)
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name[11:])
    assert 2 <= step < 40 and step % STEPS_PER_EPOCH, output
    assert f"Stopped after {step} of 40 steps" in output
    assert not (folder / "model.safetensors").exists()  # an unfinished model is no result
    return step


def test_ctrl_c_leaves_a_checkpoint_that_resumes(script, command, straight, tmp_path):
    """A real signal to a real process, in the middle of an epoch; the resumed run equals one never stopped."""
    folder = tmp_path / script
    arguments = command(script, folder, dropout=0.1, save_steps=1000, save_total_limit=9)
    stopped(launch(tmp_path, (script, arguments)), tmp_path, folder)
    run(script, [*arguments, "--resume_from_checkpoint", "latest"])
    assert_same_weights(folder, straight)
    if script == "run_pretraining":
        assert log_of(folder) == log_of(straight)


def test_ctrl_c_in_one_process_stops_all_at_the_same_step(script, command, tmp_path):
    arguments = command(script, tmp_path / script, pairs=2, processes=2, save_steps=1000)
    process = launch(tmp_path, (script, arguments), processes=2)
    step = stopped(process, tmp_path, tmp_path / script, rank=1)
    for rank in range(2):  # Trainer reads one batch ahead
        assert step * 2 <= len(examples_of(tmp_path / f"examples0-{rank}")) <= (step + 1) * 2


def test_a_last_evaluation_that_fails_loses_nothing(script, command, straight, tmp_path, monkeypatch):
    """Not the run whose model it is either: the next one goes on from there, and ends."""
    module = loop if script == "run_pretraining" else places.script(script)
    evaluate, calls = module.evaluate_pretraining, []

    def fails_at_the_end(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate_pretraining", fails_at_the_end)
    folder = tmp_path / script
    arguments = command(script, folder, dropout=0.1, save_steps=16)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(script, arguments)
    assert_same_weights(folder, straight)
    assert AutoProcessor.from_pretrained(folder)(text="a red circle")["input_ids"]
    assert not (folder / "README.md").exists()
    run(script, [*arguments, "--resume_from_checkpoint", "latest"])
    assert_same_weights(folder, straight)
    assert "matching_accuracy" in (folder / "README.md").read_text()


def test_a_run_is_never_overwritten(script, command, straight):
    for resume in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ValueError, match="holds a finished run, with its model: there is nothing left to train"):
            run(script, command(script, straight, dropout=0.1, **resume))


def test_other_arguments_are_another_run(straight, script, command):
    if script != "run_pretraining":
        pytest.skip("Trainer goes on with other arguments, and warns")
    resumed = command(script, straight, dropout=0.1, save_steps=8, resume_from_checkpoint=straight / "checkpoint-40")
    changes = ["--learning_rate", "0.01", "--mlm_probability", "0.3", "--no_moc"]
    with pytest.raises(ValueError, match="another run") as error:
        run(script, resumed + changes)
    named = str(error.value)
    assert "'learning_rate': (0.001, 0.01)" in named and "'mlm_probability': (0.15, 0.3)" in named
    assert "'moc': (True, False)" in named and "logging_steps" not in named and "train_batch_size" not in named
    with pytest.raises(ValueError, match=r"'train_batch_size': \(4, None\)"):
        run(script, by_tokens(resumed, 160))


@pytest.fixture
def ends_at_rest(monkeypatch):
    """A learning rate that is the same all along, whatever the total, and 0 after the last step."""

    def schedule(optimizer, warmup_steps, total_steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step != total_steps))

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = schedule(optimizer or self.optimizer, 0, num_training_steps)
        return self.lr_scheduler

    monkeypatch.setattr(loop, "get_linear_schedule_with_warmup", schedule)
    monkeypatch.setattr(Trainer, "create_scheduler", create_scheduler)


def test_a_finished_run_goes_on_with_more_steps(script, command, ends_at_rest, tmp_path):
    """As one that was to take them from the start, where the schedule does not tell; and if stopped on its way, too."""
    options = {"dropout": 0.1, "save_steps": 8, "save_total_limit": 9}
    run(script, command(script, tmp_path / "long", **options))
    run(script, command(script, tmp_path / "run", **options, num_train_epochs=1))
    shorter = weights(tmp_path / "run")
    more = [*command(script, tmp_path / "run", **options), "--resume_from_checkpoint", "latest"]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(torch.optim.AdamW, "step", interrupted_after(15, torch.optim.AdamW.step))
        run(script, more)
    names = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert "checkpoint-32" in names and "checkpoint-40" not in names
    assert all(torch.equal(value, shorter[name]) for name, value in weights(tmp_path / "run").items())
    assert not (tmp_path / "run" / "README.md").exists()  # it is not finished, whatever model lies there
    run(script, more)
    assert_same_weights(tmp_path / "run", tmp_path / "long")
    assert "\n- Steps: 40 of 4 pairs" in (tmp_path / "run" / "README.md").read_text()
    if script == "run_pretraining":
        assert log_of(tmp_path / "run")[-1] == log_of(tmp_path / "long")[-1]
    with pytest.raises(FinishedRun):
        run(script, more)
    with pytest.raises(FinishedRun):  # fewer than there are
        run(script, [*more, "--num_train_epochs", "1"])


def interrupted_after(steps, step):
    count = iter(range(steps))

    def call(self, *args, **kwargs):
        if next(count, None) is None:
            raise InterruptedError
        return step(self, *args, **kwargs)

    return call


def test_more_steps_follow_the_schedule_of_all_of_them(script, command, straight, tmp_path):
    folder = tmp_path / script
    shutil.copytree(straight, folder)
    options = {"dropout": 0.1, "num_train_epochs": 3, "max_validation_pairs": 6, "resume_from_checkpoint": "latest"}
    with examples_recorded(tmp_path / "examples"):
        run(script, command(script, folder, **options, save_steps=8, save_total_limit=9))
    examples = examples_of(tmp_path / "examples-0")
    assert {epoch for epoch, _ in examples} == {2} and sorted(row for _, row in examples) == list(range(80))
    if script == "run_pretraining":
        log = log_of(folder)
    else:
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rates = {line["step"]: line["learning_rate"] for line in log if "learning_rate" in line}
    # Trainer logs the rate of the step that was taken, our loop that of the next.
    late = {step: 1e-3 * (60 - step + (script != "run_pretraining")) / 54 for step in (42, 49, 56)}
    assert {step: rate for step, rate in rates.items() if step > 40} == pytest.approx(late, abs=1e-6)


def test_fewer_steps_are_another_run(script, command, straight, tmp_path):
    folder = tmp_path / script
    shutil.copytree(straight / "checkpoint-24", folder / "checkpoint-24")
    with pytest.raises(ValueError, match=r"of a run of 40 steps, which cannot become one of 30"):
        run(script, command(script, folder, dropout=0.1, max_steps=30, resume_from_checkpoint="latest"))


def test_save_total_limit(script, command, tmp_path):
    run(script, command(script, tmp_path, save_steps=3, save_total_limit=2, max_steps=10, max_validation_pairs=0))
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-10", "checkpoint-9"]


# Cut into micro-batches, processes and workers


@pytest.fixture(scope="module")
def plain(script, command, berts, tmp_path_factory):
    """A run without dropout, by plain gradient descent, whose weights all the others must reach."""
    folder = tmp_path_factory.mktemp("plain") / script
    with plain_descent():
        run(script, command(script, folder, plain=True))
    assert_trained(folder, berts[0.0])
    return folder


def test_four_micro_batches_equal_one_batch(script, command, plain, tmp_path):
    with plain_descent():
        run(script, command(script, tmp_path, pairs=1, accumulation=4, plain=True))
    assert_same_weights(tmp_path, plain, tolerance=2e-5)


def test_unequal_micro_batches(command, berts, tmp_path):
    """80 pairs in steps of 7, the last of an epoch of 3: micro-batches of 2, 2, 2 and 1 pairs, then of 1, 1, 1, 0."""
    for name, accumulation in (("whole", 1), ("cut", 4)):
        arguments = command("run_pretraining", tmp_path / name, accumulation=accumulation, plain=True)
        with plain_descent():
            run("run_pretraining", [*arguments, "--train_batch_size", "7"])
    assert_trained(tmp_path / "whole", berts[0.0])
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", tolerance=2e-5)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(script, command, straight, tmp_path, num_workers):
    """Not even the dropout."""
    run(script, command(script, tmp_path, dropout=0.1, dataloader_num_workers=num_workers))
    assert_same_weights(tmp_path, straight)


def test_two_processes_equal_one(script, command, tmp_path, plain):
    """
    At the same global batch: accelerate deals whole batches in turn, so that a step of Trainer has the same pairs, too.
    And two that resume, with dropout, equal two that were never stopped.
    """
    wet = {"pairs": 2, "processes": 2, "dropout": 0.1, "save_steps": 8, "save_total_limit": 9}
    again = {"resume_from_checkpoint": tmp_path / "wet" / "checkpoint-24"}
    process = launch(
        tmp_path,
        (script, command(script, tmp_path / "dry", pairs=2, processes=2, plain=True), True),
        (script, command(script, tmp_path / "wet", **wet)),
        (script, command(script, tmp_path / "resumed", **wet, **again)),
        processes=2,
    )
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    assert output.count(f"{script}: world size 2") == 2 * 3, output
    if script == "run_pretraining":
        assert output.count("40 steps, 4 pairs each, of 80 pairs; processes: 2,") == 3
        # Losses and evaluation are over all processes.
        for line, other in zip(log_of(tmp_path / "dry"), log_of(plain), strict=True):
            assert line == pytest.approx(other, abs=2e-4)
    assert "\n- Steps: 40 of 4 pairs" in (tmp_path / "dry" / "README.md").read_text()
    assert_same_weights(tmp_path / "dry", plain, tolerance=2e-5)
    assert_same_weights(tmp_path / "resumed", tmp_path / "wet")
    for rank in range(2):
        dry, never_stopped, resumed = (examples_of(tmp_path / f"examples{index}-{rank}") for index in range(3))
        assert dry == never_stopped and resumed == dry[24 * 2 :]
    halves = [examples_of(tmp_path / f"examples0-{rank}") for rank in range(2)]
    for epoch in range(2):
        assert sorted(row for half in halves for number, row in half if number == epoch) == list(range(80))


def test_other_numbers_of_processes_take_the_same_rows_in_the_same_order(script, command, straight, tmp_path):
    """One process, two from step 8 on, and one again from step 24 on: all rows as those of one process to the end."""
    options = {"dropout": 0.1, "save_steps": 8, "save_total_limit": 9, "resume_from_checkpoint": "latest"}
    shutil.copytree(straight / "checkpoint-8", tmp_path / "two" / "checkpoint-8")
    process = launch(
        tmp_path, (script, command(script, tmp_path / "two", pairs=2, processes=2, **options)), processes=2
    )
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    assert output.count(f"{script}: world size 2") == 2, output
    shutil.copytree(tmp_path / "two" / "checkpoint-24", tmp_path / "one" / "checkpoint-24")
    with examples_recorded(tmp_path / "one-examples"):
        run(script, command(script, tmp_path / "one", **options))
    rows = examples_of(straight.parent / "examples-0")
    halves = [examples_of(tmp_path / f"examples0-{rank}") for rank in range(2)]
    of_two = [row for step in range(32) for half in halves for row in half[2 * step : 2 * step + 2]]
    assert of_two == rows[8 * 4 :]
    assert examples_of(tmp_path / "one-examples-0") == rows[24 * 4 :]


def by_tokens(arguments, tokens_per_batch):
    """The command line with a budget of tokens in place of a number of pairs."""
    words = list(arguments)
    at = next(place for place, word in enumerate(words) if word.endswith("train_batch_size"))
    words[at : at + 2] = ["--tokens_per_batch", str(tokens_per_batch)]
    return words


def test_batches_of_equal_tokens(script, command, berts, lines, tmp_path):
    """
    Two processes equal one with twice the micro-batches, by plain descent. With dropout, two that are resumed in the
    middle of an epoch equal two that were never stopped.
    """
    whole = command(script, tmp_path / "one", accumulation=4, plain=True, save_steps=8, save_total_limit=9)
    with plain_descent(), examples_recorded(tmp_path / "one-examples"):
        run(script, by_tokens(whole, 160))
    (checkpoint, *_) = (tmp_path / "one").glob("checkpoint-*")
    examples = examples_of(tmp_path / "one-examples-0")
    assert all(sorted(row for number, row in examples if number == epoch) == list(range(80)) for epoch in range(2))
    assert_trained(tmp_path / "one", berts[0.0])
    wet = {"accumulation": 2, "dropout": 0.1, "save_steps": 3, "save_total_limit": 99}
    again = {"resume_from_checkpoint": tmp_path / "wet" / "checkpoint-6"}
    process = launch(
        tmp_path,
        (script, by_tokens(command(script, tmp_path / "two", accumulation=2, plain=True), 160), True),
        (script, by_tokens(command(script, tmp_path / "wet", **wet), 160)),
        (script, by_tokens(command(script, tmp_path / "resumed", **wet, **again), 160)),
        processes=2,
    )
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    assert output.count(f"{script}: world size 2") == 2 * 3, output
    assert_same_weights(tmp_path / "two", tmp_path / "one", tolerance=2e-5)
    assert_same_weights(tmp_path / "resumed", tmp_path / "wet")
    for line, other in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        parts = (line["mlm_loss"] + line["moc_loss"]) / 2 + line["matching_loss"]
        assert line["loss"] == pytest.approx(parts, abs=1e-4) and line["loss"] == pytest.approx(other["loss"], abs=2e-4)
    assert " of 160 tokens (over all processes)" in (tmp_path / "two" / "README.md").read_text()
    halves = [examples_of(tmp_path / f"examples0-{rank}") for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(examples)
    resumed = [*command(script, tmp_path / "one", plain=True), "--resume_from_checkpoint", str(checkpoint)]
    with pytest.raises(ValueError, match=r"'tokens_per_batch': \(160, None\)|with tokens_per_batch=160, not None"):
        run(script, resumed)


def test_two_sizes_of_a_batch_are_refused(script, command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(script, [*command(script, tmp_path), "--tokens_per_batch", "99"])
    assert "--tokens_per_batch and --" in capsys.readouterr().err


def test_processes_that_do_not_know_each_other_are_refused(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes.*ACCELERATE_USE_CPU=true"):
        run("run_pretraining", command("run_pretraining", tmp_path))


# Options


def test_regions_without_classes(script, command, world, tmp_path):
    with RegionStoreWriter(tmp_path / "bare") as writer:
        for image_id, record in RegionStore(world / "regions").items():
            fields = {name: getattr(record, name) for name in ("image_width", "image_height", "boxes", "features")}
            writer.write(type(record)(image_id=image_id, **fields))
    options = {"regions": tmp_path / "bare", "max_steps": 2}
    with pytest.raises(ValueError, match=r"has no object_ids.*unicoder-vl label.*--no_moc"):
        run(script, command(script, tmp_path / "with", **options))
    with RegionStoreWriter(tmp_path / "cells", detector="grid:resnet", detector_revision="1") as writer:
        for record in RegionStore(tmp_path / "bare").values():
            writer.write(record)
    with pytest.raises(ValueError, match=r"has no object_ids, which masked object classification predicts\. Leave it"):
        run(script, command(script, tmp_path / "with", **options | {"regions": tmp_path / "cells"}))
    run(script, command(script, tmp_path / "without", no_moc=True, **options))
    assert (tmp_path / "without" / "model.safetensors").exists()


def test_bfloat16(script, command, tmp_path):
    if fast_precision("cpu") != "bf16":
        pytest.skip("this CPU emulates bfloat16; test_pretraining.py sees to the warning")
    precision = {"mixed_precision": "bf16"} if script == "run_pretraining" else {"bf16": True}
    run(script, command(script, tmp_path, max_steps=1, **precision))
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}


def test_evaluation_keeps_no_logits(command, world, tmp_path, monkeypatch):
    """Trainer's own loop would hold 20 x 30,522 logits for each of the 200 rows, of masked and of unmasked pairs."""
    status = Path("/proc/self/status")
    if not (status.exists() and os.access("/proc/self/clear_refs", os.W_OK)):
        pytest.skip("the peak of memory is read from /proc")
    bert = small_world.save_bert(tmp_path / "bert", dropout=0.0, vocab_size=30522)
    trainers = places.script("run_pretraining_trainer")
    growth = []
    evaluate = trainers.PretrainingTrainer.evaluate

    def measured(self, *args, **kwargs):
        before = peak_memory(status, reset=True)
        found = evaluate(self, *args, **kwargs)
        growth.append(peak_memory(status) - before)
        return found

    monkeypatch.setattr(trainers.PretrainingTrainer, "evaluate", measured)
    options = {"max_steps": 1, "max_validation_pairs": 1000, "validation_split": "train"}
    arguments = command("run_pretraining_trainer", tmp_path / "output", **options)
    run("run_pretraining_trainer", [*arguments, "--model_name_or_path", str(bert)])
    (bytes_grown,) = growth
    logits = 2 * small_world.NUM_TRAIN_PAIRS * 15 * 30522 * 4
    assert bytes_grown < logits / 3


def peak_memory(status, reset=False):
    """Bytes that this process has held at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
