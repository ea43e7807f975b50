"""Runs scripts in this process, or in others: two share their runs as if torchrun had started them.

A run is {"script": …, "arguments": …}, of a script of examples/ or tests/. One that trains may have "examples", a path:
each process writes to `<examples>-<rank>` the epoch and the row of each example that it trains on, and to
`<examples>-<rank>.pid` its id; and "plain_descent", a bool.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import places
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from unicoder_vl_hf import DataCollatorForUnicoderVLPreTraining, DataCollatorForUnicoderVLRetrieval


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


def run(script: str, arguments):
    """The `main` of a script, as if in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    places.script(script).main(arguments)


class Processes:
    """One, or two that share the runs. What they print, the size of the world after each run too, goes to `folder`."""

    def __init__(self, folder: Path, runs: list[dict], count: int):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if count > 1:
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        server = multiprocessing.get_context("forkserver")
        self.outputs = [folder / f"output-{rank}" for rank in range(count)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            arguments = (runs, environment | ranks, output, torch.get_num_threads())
            process = server.Process(target=work, args=arguments)
            process.start()
            self.processes.append(process)

    @property
    def returncode(self) -> int | None:
        """The first that is not 0; None until all have ended."""
        codes = self.exitcodes
        return None if None in codes else next(filter(None, codes), 0)

    @property
    def exitcodes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def output(self, timeout: float) -> str:
        """All that they print to their end; one that fails, or hangs, takes the other with it."""
        deadline = time.monotonic() + timeout
        try:
            while None in (codes := self.exitcodes) and not any(codes) and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            self.kill()
        return "".join(path.read_text() for path in self.outputs)

    def kill(self):
        """With the workers that they started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # where it has no group yet
            process.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work(runs: list[dict], environment: dict[str, str], output: Path, num_threads: int):
    """What each of `Processes` does: the runs, one after another."""
    os.setpgid(0, 0)
    signal.alarm(300)  # the end of a process that hangs and whose test is gone
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as in a process that no server forked
    torch.set_num_threads(num_threads)
    # Between runs: a second group would look for its peers where the first one's were, and fail in connectFullMesh.
    PartialState.destroy_process_group = lambda self, group: None
    for entry in runs:
        with contextlib.ExitStack() as stack:
            if "examples" in entry:
                stack.enter_context(examples_recorded(entry["examples"]))
            if entry.get("plain_descent"):
                stack.enter_context(plain_descent())
            run(entry["script"], entry["arguments"])
        print(f"{entry['script']}: world size {PartialState().num_processes}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
