"""The files of examples/launching and examples/slurm start what they are for, on CPUs in place of GPUs."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import deepspeed_client
import launch_client
import pytest
import tiny
import torch
import two_machines
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from places import EXAMPLES
from two_processes import free_port

from unicoder_vl_hf import UnicoderVLForPreTraining

pytest.importorskip("accelerate", minversion="1.15")  # the first in which FSDP2 was tried

CONFIGS = sorted((EXAMPLES / "launching").glob("*.yaml"))
CLIENT = launch_client.__file__
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of torchrun and accelerate
SRUN = """\
#!/bin/bash
# Starts a command once for each node, at the same time, and fails where one of them does.
nodes=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & nodes+=($!); done
for node in "${nodes[@]}"; do wait "$node" || exit 1; done
"""


def started(words: list, **environment: str) -> list[str]:
    """What the two processes of a launch say, in their order."""
    variables = {**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    ran = subprocess.run(list(map(str, words)), env=variables, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    return sorted(line for line in ran.stdout.splitlines() if line.startswith("process "))


@pytest.fixture
def two_nodes(tmp_path):
    """Variables of a job of Slurm on two nodes of one process each, which are both this machine."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1"}
    return {"PATH": f"{tmp_path}{os.pathsep}{PATH}", "PROCESSES_PER_NODE": "1", "MASTER_PORT": str(free_port()), **job}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_each_setting(path):
    """It raises on an unknown one itself, but for those within, which it passes on as options of `launch`."""
    config = load_config_from_file(str(path))
    options = {action.dest for action in launch_command_parser()._actions}
    for name, values in (("fsdp_config", config.fsdp_config), ("deepspeed_config", config.deepspeed_config)):
        assert set(values) <= options, name
        assert bool(values) == (config.distributed_type == name.partition("_")[0].upper())


def test_there_is_one_of_each_kind():
    assert [path.stem for path in CONFIGS] == ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


def test_the_layer_that_is_sharded_is_the_models():
    settings = yaml.safe_load((EXAMPLES / "launching" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_transformer_layer_cls_to_wrap"] in UnicoderVLForPreTraining._no_split_modules


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("ddp", "plain"), ("fsdp2", "UnicoderVLLayer")])
def test_accelerate_starts(name, kind):
    """Its settings reach the processes. On CPUs accelerate then does without FSDP: see tests/runs/test_fsdp.py."""
    words = ["accelerate", "launch", "--config_file", EXAMPLES / "launching" / f"{name}.yaml", "--num_processes", "2"]
    said = started([*words, "--main_process_port", free_port(), CLIENT])
    assert said == [f"process {rank} of 2 on cpu, {kind}" for rank in range(2)]


@pytest.mark.slow
def test_slurm_starts_accelerate_on_two_nodes(two_nodes):
    words = [EXAMPLES / "slurm" / "train_accelerate.sh", EXAMPLES / "launching" / "ddp.yaml", CLIENT]
    assert started(words, **two_nodes) == [f"process {rank} of 2 on cpu, plain" for rank in range(2)]


@pytest.mark.slow
def test_slurm_starts_torchrun_on_two_nodes(two_nodes):
    words = [EXAMPLES / "slurm" / "train.sh", CLIENT]
    assert started(words, **two_nodes) == [f"process {rank} of 2 on cpu, plain" for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_what_one_process_trains(stage, tmp_path):
    """Two processes of half a batch each, from a file, to a plain checkpoint; gradients are clipped as it says."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed installs from source only: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    config = EXAMPLES / "launching" / f"deepspeed_zero{stage}.yaml"
    said = started([*torchrun, deepspeed_client.__file__, config, tmp_path], DS_ACCELERATOR="cpu")
    assert said == [f"process {rank} of 2, ZeRO-{stage}" for rank in range(2)]
    expected = tiny.model(UnicoderVLForPreTraining)
    before = {name: value.clone() for name, value in expected.state_dict().items()}
    optimizer = torch.optim.SGD(expected.parameters(), lr=deepspeed_client.RATE)
    for _ in range(deepspeed_client.STEPS):
        for rank in range(2):
            half = {name: value[rank::2] for name, value in tiny.pretraining_batch().items()}
            (expected(**half).loss / 2).backward()
        assert torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0) > 1
        optimizer.step()
        optimizer.zero_grad()
    found, report = UnicoderVLForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=2e-5)
    assert max((before[name] - value).abs().max() for name, value in expected.state_dict().items()) > 1e-2


@pytest.mark.slow
def test_a_line_of_the_page_trains_on_two_nodes(tmp_path):
    """By torchrun; `python tests/two_machines.py` runs all of them, in 15 seconds each."""
    line = next(line for line in two_machines.lines() if line.startswith("torchrun"))
    two_machines.build(tmp_path)
    with two_machines.two_machines() as nodes:
        printed = two_machines.start(line, tmp_path, nodes)
    assert "processes: 2," in printed and (tmp_path / "runs" / "cc" / "model.safetensors").exists()
