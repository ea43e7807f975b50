"""Runs the training scripts in this process, or in others: two share their runs as if torchrun had started them.

A run is {"script": …, "arguments": […], "examples": file, "plain_descent": bool}. Each process writes to
`<examples>-<rank>` the epoch and the row of each example that it trains on, to `<examples>-<rank>.pid` its id, and
prints the size of the world.
"""

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from unicoder_vl_hf import DataCollatorForUnicoderVLPreTraining, DataCollatorForUnicoderVLRetrieval

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


@contextlib.contextmanager
def examples_recorded(path: str | Path):
    """Writes the epoch and the row of what is trained on: groups, or pairs with mismatches and masks."""
    recorded = Path(f"{path}-{os.environ.get('RANK', 0)}")

    def recording(collate):
        def call(self, rows):
            if "negative_captions" in rows[0] or ("mismatch_image_id" in rows[0] and self.mlm_probability > 0):
                with recorded.open("a") as file:
                    file.write("".join(f"{row['epoch']} {row['row_index']}\n" for row in rows))
            return collate(self, rows)

        return call

    Path(f"{recorded}.pid").write_text(str(os.getpid()))
    with pytest.MonkeyPatch.context() as patch:
        for collator in (DataCollatorForUnicoderVLPreTraining, DataCollatorForUnicoderVLRetrieval):
            patch.setattr(collator, "__call__", recording(collator.__call__))
        yield


@contextlib.contextmanager
def plain_descent():
    """Replaces AdamW, to which gradients that are too large by any factor look the same."""
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr)
    try:
        yield
    finally:
        torch.optim.AdamW = adamw


def run(script: str, arguments: list[str]):
    """The `main` of a script, as if in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    importlib.import_module(script).main(arguments)


class Processes:
    """One, or two of the same runs, with the interface of a `subprocess.Popen`; what they print goes to `folder`."""

    def __init__(self, folder: Path, runs: list[dict], count: int):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if count > 1:
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        context = multiprocessing.get_context("forkserver")
        self.outputs = [folder / f"output-{rank}" for rank in range(count)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            arguments = (runs, environment | ranks, output, torch.get_num_threads())
            self.processes.append(context.Process(target=work, args=arguments))
            self.processes[-1].start()

    @property
    def returncode(self) -> int | None:
        """The first that is not 0; None until all have ended."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def output(self, timeout: float) -> str:
        """All that they print until their end; one that fails, or hangs, takes the others with it."""
        deadline = time.monotonic() + timeout
        while self.returncode is None and time.monotonic() < deadline and not any(p.exitcode for p in self.processes):
            time.sleep(0.02)
        for process in self.processes:
            process.kill()
            process.join()
        return "".join(path.read_text() for path in self.outputs)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work(runs: list[dict], environment: dict[str, str], output: Path, num_threads: int):
    """What each of `Processes` does: the runs, one after another."""
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= environment
    torch.set_num_threads(num_threads)
    # Between runs: a second group would look for its peers where the first one's were, and fail in connectFullMesh.
    PartialState.destroy_process_group = lambda self, group: None
    for entry in runs:
        descent = plain_descent() if entry["plain_descent"] else contextlib.nullcontext()
        with examples_recorded(entry["examples"]), descent:
            run(entry["script"], entry["arguments"])
        print(f"{entry['script']}: world size {PartialState().num_processes}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
