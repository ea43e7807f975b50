"""Pre-training under FSDP2: two processes that each hold a part of the weights train what one process trains."""

import json
import re

import pytest
import small_world
import torch
from accelerate.commands import accelerate_cli
from places import ROOT
from safetensors.torch import load_file
from two_processes import Processes, plain_descent, run

from unicoder_vl_hf import UnicoderVLForPreTraining, UnicoderVLProcessor

pytest.importorskip("accelerate", minversion="1.15")  # the first in which FSDP2 was tried


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    Runs of 6 steps: one of one process, `plain`; and of two, `sharded`; with AdamW and dropout `whole`, which `resumed`
    leaves at its third step; and `bf16`.
    """
    folder = tmp_path_factory.mktemp("fsdp")
    world = small_world.build(folder)
    shared = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 3, "seed": 5}
    shared |= {"save_total_limit": 9, "max_validation_pairs": 6, "logging_steps": 1, "mixed_precision": "no"}
    descent = {"learning_rate": 0.5, "max_grad_norm": 0}
    bert, wet = (small_world.save_bert(folder / f"bert-{rate}", dropout=rate) for rate in (0.0, 0.1))

    def words(name, bert, **options):
        return small_world.arguments(world, bert, folder / name, **(shared | options))

    resumed = {"resume_from_checkpoint": folder / "whole" / "checkpoint-3"}
    runs = [
        {"script": "fsdp_client", "arguments": ["run_pretraining", *arguments], "plain_descent": plain}
        for arguments, plain in (
            (words("sharded", bert, **descent), True),
            (words("whole", wet), False),
            (words("resumed", wet, **resumed), False),
            (words("bf16", wet, mixed_precision="bf16", max_steps=2), False),
        )
    ]
    processes = Processes(folder, runs, 2)
    with plain_descent():
        run("run_pretraining", words("plain", bert, **descent))
    output = processes.output(timeout=240)
    assert processes.returncode == 0, output
    assert output.count("fsdp_client: world size 2") == 2 * len(runs), output
    return folder


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_weights_are_sharded(folder):
    """Each process writes its part of the weights and of the moments."""
    for kind in ("pytorch_model_fsdp_0", "optimizer_0"):
        parts = sorted((folder / "whole" / "checkpoint-3" / kind).glob("*.distcp"))
        assert [part.name for part in parts] == ["__0_0.distcp", "__1_0.distcp"]
        sizes = [part.stat().st_size for part in parts]
        assert min(sizes) > 0.5 * max(sizes)


def test_two_processes_equal_one(folder):
    assert_same(weights(folder / "sharded"), weights(folder / "plain"), 2e-5)
    before = load_file(folder / "bert-0.0" / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (weights(folder / "plain")[name] - before[name]).abs().max() > 1e-3
    logs = [(folder / name / "log.jsonl").read_text().splitlines() for name in ("sharded", "plain")]
    for line, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        line.pop("rows_per_second", None), other.pop("rows_per_second", None)
        assert line == pytest.approx(other, abs=2e-4)


def test_a_resumed_run_equals_one_that_was_never_stopped(folder):
    assert_same(weights(folder / "resumed"), weights(folder / "whole"), 0.0)


def test_what_is_saved_is_a_plain_checkpoint(folder):
    names = {path.name for path in (folder / "plain").iterdir() if path.is_file()}
    for name in ("sharded", "bf16"):
        assert {path.name for path in (folder / name).iterdir() if path.is_file()} == names
        config = (folder / name / "config.json").read_text()
        assert "FSDP" not in config
        model, report = UnicoderVLForPreTraining.from_pretrained(folder / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert UnicoderVLProcessor.from_pretrained(folder / name)(text="a red circle")["input_ids"]


def test_sharded_checkpoints_load_into_plain_models(folder, monkeypatch):
    """By the command of docs/scale.md."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^accelerate merge-weights .*$", page, re.MULTILINE)
    checkpoint = folder / "whole" / "checkpoint-6"
    words = line.replace("runs/cc/checkpoint-1000", str(checkpoint)).split()
    assert "model.safetensors" not in {path.name for path in checkpoint.iterdir()}
    monkeypatch.setattr("sys.argv", words)
    accelerate_cli.main()
    model, report = UnicoderVLForPreTraining.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert UnicoderVLProcessor.from_pretrained(checkpoint)(text="a red circle")["input_ids"]
    whole = UnicoderVLForPreTraining.from_pretrained(folder / "whole")
    assert "FSDP" not in (checkpoint / "config.json").read_text()
    assert_same(model.state_dict(), whole.state_dict(), 0.0)
