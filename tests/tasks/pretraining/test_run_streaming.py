"""Pre-training on a stream of captions: exact after any stop, on processes that share the shards, and from a Hub."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_world
import torch
from hub_stub import HubStub
from places import TESTS
from safetensors.torch import load_file
from test_streaming import opened, write_shards
from two_processes import Processes, examples_recorded, run

import unicoder_vl_hf
from unicoder_vl_hf import RegionStore, RegionStoreWriter
from unicoder_vl_hf.data import read_captions
from unicoder_vl_hf.data.streaming import StreamedPairs

SHARDS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world as shards, `captions` and `regions` of a few images each; a BERT with dropout."""
    folder = tmp_path_factory.mktemp("streaming")
    world = small_world.build(folder)
    rows = read_captions(world / "captions.jsonl").to_list()
    for split, shards in (("train", SHARDS), ("val", 2)):
        write_shards(folder / "captions", [row for row in rows if row["split"] == split], shards, split=split)
    with RegionStoreWriter(folder / "regions", shard_size=20_000, num_classes=13) as writer:
        for record in RegionStore(world / "regions").values():
            writer.write(record)
    small_world.save_bert(folder / "bert", dropout=0.1)
    return folder


@pytest.fixture(scope="module")
def command(folder):
    """A run of 24 steps of 4 pairs, which are more than the 80 of a pass; windows of 14 pairs."""

    def arguments(name, **options):
        shared = {"streaming": True, "shuffle_buffer_size": 14, "max_steps": 24, "train_batch_size": 4, "seed": 5}
        shared |= {"gradient_accumulation_steps": 1, "mixed_precision": "no", "learning_rate": 1e-3}
        shared |= {"max_validation_pairs": 6, "logging_steps": 4, "save_steps": 5, "save_total_limit": 9}
        shared |= {"captions": folder / "captions", "regions": folder / "regions"}
        return small_world.arguments(folder, folder / "bert", folder / name, **(shared | options))

    return arguments


@pytest.fixture(scope="module")
def straight(folder, command):
    """A run that was never stopped."""
    with examples_recorded(folder / "examples"):
        run("run_pretraining", command("straight"))
    return folder / "straight"


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


def examples_of(path):
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()]


def test_a_run(folder, straight):
    before, after = load_file(folder / "bert" / "model.safetensors"), weights(straight)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (after[name] - before[name]).abs().max() > 1e-3
    windows = np.array(examples_of(folder / "examples-0"))
    assert len(windows) == 24 * 4 and windows[:, 0].tolist() == [number // 14 for number in range(24 * 4)]
    assert all(sorted(windows[windows[:, 0] == window, 1]) == list(range(14)) for window in range(6))
    card = (straight / "README.md").read_text()
    assert "\n- Steps: 24 of 4 pairs" in card and "Epochs" not in card and "Training data: captions" in card
    passes = {line["step"]: line["epoch"] for line in log_of(straight) if "loss" in line}
    assert passes == {4: 0, 8: 0, 12: 0, 16: 0, 20: 0, 24: 1}
    assert [line["step"] for line in log_of(straight) if "eval_matching_auc" in line] == [24]


@pytest.mark.parametrize("step", [5, 20])
def test_resume_equals_never_stopped(folder, command, straight, step, monkeypatch):
    """In the middle of a window, and where a pass ends; windows before are not read again."""
    read, read_window = [], StreamedPairs._read_window
    monkeypatch.setattr(StreamedPairs, "_read_window", lambda self: read.append(None) or read_window(self))
    shutil.copytree(straight / f"checkpoint-{step}", folder / f"resumed-{step}" / f"checkpoint-{step}")
    shutil.copy(straight / "log.jsonl", folder / f"resumed-{step}")
    run("run_pretraining", command(f"resumed-{step}", resume_from_checkpoint="latest"))
    assert_same_weights(folder / f"resumed-{step}", straight)
    assert log_of(folder / f"resumed-{step}") == log_of(straight)
    assert len(read) == 7 - step * 4 // 14


def test_workers_change_nothing(folder, command, straight):
    run("run_pretraining", command("workers", dataloader_num_workers=2))
    assert_same_weights(folder / "workers", straight)


def test_two_processes_share_the_shards(folder, command):
    options = {"gradient_accumulation_steps": 2}
    runs = [
        {"script": "run_pretraining", "arguments": words, "examples": str(folder / name)}
        for name, words in (
            ("whole-examples", command("whole", **options)),
            ("again-examples", command("again", **options, resume_from_checkpoint=folder / "whole" / "checkpoint-15")),
        )
    ]
    processes = Processes(folder, runs, 2)
    output = processes.output(timeout=120)
    assert processes.returncode == 0, output
    assert output.count("run_pretraining: world size 2") == 2 * 2, output
    assert output.count(f"24 steps, 4 pairs each, of a stream of {SHARDS} shards; processes: 2,") == 2
    assert_same_weights(folder / "again", folder / "whole")
    assert log_of(folder / "again") == [line for line in log_of(folder / "whole") if line["step"] > 15]
    for rank in range(2):
        whole, again = (examples_of(folder / f"{name}-examples-{rank}") for name in ("whole", "again"))
        assert len(whole) == 24 * 2 and again == whole[15 * 2 :]
    assert not set(examples_of(folder / "whole-examples-0")) & set(examples_of(folder / "whole-examples-1"))
    with pytest.raises(ValueError, match=r"of another run: \(then, now\) differ in {'num_processes': \(2, 1\)}"):
        run("run_pretraining", command("again", resume_from_checkpoint="latest"))


def test_the_first_step_opens_what_it_reads(folder, command, monkeypatch):
    """One shard of captions, and the region shards of its images; of the store else the tables."""

    def stops(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(torch.optim.AdamW, "step", stops)
    files = opened(folder / "captions"), opened(folder / "regions")
    with files[0] as captions, files[1] as regions, pytest.raises(InterruptedError):
        run("run_pretraining", command("first", max_validation_pairs=0, shuffle_buffer_size=8))
    assert len(list((folder / "captions").iterdir())) == SHARDS + 2 and len(captions) <= 2 + 1
    shards = {name for name in regions if name.startswith("regions-")}
    assert 0 < len(shards) <= len(list((folder / "regions").glob("regions-*"))) / 2


@pytest.mark.parametrize(
    "script, changes, says",
    [
        ("run_pretraining", {"max_steps": -1}, "give --max_steps in place of --num_train_epochs"),
        ("run_pretraining", {"train_batch_size": 4, "gradient_accumulation_steps": 5}, "a multiple of 1 from 5 on"),
        ("run_pretraining", {"validation_split": "dev"}, "no split 'dev'.*To do without.*--max_validation_pairs 0"),
        ("run_pretraining", {"regions": "nowhere"}, "nowhere"),
        ("run_pretraining_trainer", {}, "leave out --streaming, or use run_pretraining.py"),
    ],
)
def test_what_a_stream_cannot_do(command, script, changes, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        run(script, command("refused", **changes))


@pytest.mark.parametrize("name, value", [("scale_features", True), ("tokens_per_batch", 99), ("align_regions", True)])
def test_what_looks_at_all_captions_is_refused(command, capsys, name, value):
    words = command("refused", **{name: value})
    at = next(place for place, word in enumerate(words) if word.endswith("train_batch_size"))
    with pytest.raises(SystemExit):
        run("run_pretraining", words[:at] + words[at + 2 :])
    assert f"--{name} looks at all captions before it begins" in capsys.readouterr().err


def test_a_dataset_of_the_hub_is_streamed(folder, command, straight, tmp_path):
    """By the same names of files, and so in the same order: the same weights. A shard is asked for when it is read."""
    with HubStub() as hub:
        files = {path.name: path.read_bytes() for path in (folder / "captions").iterdir()}
        hub.repositories["datasets/someone/captions"] = [files]
        paths = [str(TESTS), os.path.dirname(os.path.dirname(unicoder_vl_hf.__file__))]
        environment = hub.environment(tmp_path) | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        words = command("hub", captions="someone/captions", max_steps=5)
        module = "unicoder_vl_hf.tasks.pretraining.run"
        done = subprocess.run(
            [sys.executable, "-m", module, *words], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{done.stderr}\n{hub.unknown}"
        assert hub.unknown == []
    run("run_pretraining", command("local", max_steps=5))
    assert_same_weights(folder / "hub", folder / "local")
    read = {request.split("/")[-1] for request in hub.requests if request.startswith("GET") and "/resolve/" in request}
    assert len({name for name in read if name.startswith("train-")}) <= 1 + 3  # 24 pairs of windows, 10 a shard
