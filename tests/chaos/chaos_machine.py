"""Starts the commands of `chaos_commands.py` in forks of `fork_server.py`, kills them, and compares what they wrote."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain, count, pairwise
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
from chaos_commands import NOT_BYTES, PAIRS, Command
from safetensors.numpy import load, load_file

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NONE, KILL, RENAME, CLOCK = range(4)  # of faults.c
PATIENCE = 300  # seconds that a command may take, on a machine that is busy with others


class Run:
    """A started command: its folder, its processes, what they told, and the seconds until it was waited for."""

    def __init__(self, machine: "Machine", folder: Path, pids: list[int], output: Path):
        self.machine, self.folder, self.pids, self._output = machine, folder, pids, output
        self.began, self.seconds = time.monotonic(), 0.0

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Waits for its end and gives the exit code; None if it goes on. As a launcher, kills all where one fails."""
        codes = self.machine.ask(pids=self.pids, seconds=seconds)
        self.seconds = time.monotonic() - self.began
        code = min(filter(None, codes), default=None if None in codes else 0)  # a signal before what came of it
        if code and None in codes:
            self.kill(whole=True)
        return code

    def kill(self, whole: bool = False, rank: int = 0) -> None:
        """Kills a process as `kill -9` does; or all of them, with those that they started."""
        if not whole:
            os.kill(self.pids[rank], signal.SIGKILL)
            return
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.machine.ask(pids=self.pids, seconds=PATIENCE)

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def _lines(self, suffix: str) -> list[list[str]]:
        """Reads the lines that each process wrote to a file of its own."""
        files = sorted(self._output.parent.glob(f"{self._output.stem}.{suffix}-?"))
        return [file.read_text().splitlines() for file in files]

    @cached_property
    def told(self) -> list[str]:
        return list(chain.from_iterable(self._lines("units")))

    def numbers(self, name: str) -> list[int]:
        """The numbers that its processes told of something: the size of their world, or their events."""
        return [int(line.split()[1]) for line in self.told if line.startswith(f"{name} ")]

    @property
    def events(self) -> int:
        """The calls that change files."""
        return max(self.numbers("events"), default=0)

    @property
    def units(self) -> set[str]:
        return {line for line in self.told if not line.startswith(("world ", "events ", "renames "))}

    @cached_property
    def rows(self) -> dict[str, list[str]]:
        """The rows that each step of a training took, over all processes, in their order."""
        size, of_processes = PAIRS // len(self.pids), self._lines("examples")
        return {
            step: [row for rows in of_processes for row in rows[place * size : (place + 1) * size]]
            for place, step in enumerate(sorted(self.units, key=int))
        }


class Machine:
    """
    The fork server, the inputs, and undisturbed runs to compare with, in a folder.

    Raises:
        AssertionError: Inputs cannot be made, or a command fails that nobody disturbs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults = compiled(folder)
        self.inputs = folder / "inputs"
        self._numbers = count()
        self._undisturbed: dict[tuple[str, int], Run] = {}  # by command and number of processes
        paths = [ROOT / "src", HERE, HERE.parent, HERE.parent / "regions"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        environment |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
        if self.faults is not None:
            environment["LD_PRELOAD"] = str(self.faults)
        self._server = subprocess.Popen(
            [sys.executable, HERE / "fork_server.py", *filter(None, [self.faults])],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=(folder / "server").open("w"),
        )  # fmt: skip
        assert self._answer() == "ready", (folder / "server").read_text()
        made = self.start([str(HERE / "chaos_inputs.py"), str(self.inputs)], folder)
        assert made.wait() == 0, made.output

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *exception) -> None:
        self._server.kill()
        self._server.wait()

    def _answer(self) -> str:
        return self._server.stdout.readline().strip()

    def ask(self, **request: Any) -> Any:
        """Sends a request to the fork server, and gives its answer."""
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._answer())

    def start(
        self, words: list[str], folder: Path, processes: int = 1, unit: str = "", fault=(NONE, 0, 0), rank: int = 0
    ) -> Run:
        """Starts a command in a folder, the fault in one of its processes."""
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        output = logs / f"{next(self._numbers):04d}.txt"
        shared = {}
        if processes > 1:  # as torchrun sets it
            shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        pids = []
        for each in range(processes):
            own = {"RANK": str(each), "LOCAL_RANK": str(each)} if processes > 1 else {}
            pids.append(
                self.ask(
                    words=words, folder=str(folder), environment=shared | own, output=str(output),
                    units=str(output.with_suffix(f".units-{each}")), examples=str(output.with_suffix(".examples")),
                    unit=unit, fault=fault if each == rank else (NONE, 0, 0),
                )
            )  # fmt: skip
        return Run(self, folder, pids, output)

    def start_command(self, command: Command, folder: Path, processes: int = 1, **options: Any) -> Run:
        """Starts a command in its folder, from its last checkpoint if it trains and there is one."""
        words = [word.format(inputs=self.inputs, rows=PAIRS // processes) for word in command.words.split()]
        if words[0].endswith(".py"):
            words[0] = str(ROOT / words[0])
        if command.trains and any(folder.glob("out/checkpoint-*/train*_state.json")):
            words += ["--resume_from_checkpoint", "latest"]
        folder.mkdir(parents=True, exist_ok=True)
        return self.start(words, folder, processes, command.unit, **options)

    def work_folder(self) -> Path:
        """Names a new folder for a run."""
        return self.folder / "work" / f"{next(self._numbers):04d}"

    def undisturbed(self, command: Command, processes: int = 1) -> Run:
        """Runs a command without a fault, once."""
        key = command.words, processes
        if key not in self._undisturbed:
            folder = self.folder / "undisturbed" / f"{command.name}-{processes}-{next(self._numbers):04d}"
            run = self.start_command(command, folder, processes)
            assert run.wait() == 0, f"{command.name}: {run.output}"
            assert run.numbers("world") == ([processes] * processes if processes > 1 else []), run.told
            self._undisturbed[key] = run
        return self._undisturbed[key]


def compiled(folder: Path) -> Path | None:
    """Compiles faults.c; None where there is no gcc."""
    if shutil.which("gcc") is None:
        return None
    library = folder / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    return library


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def content(folder: Path) -> dict[str, Any]:
    """All files below a folder by their names: their bytes, or of `NOT_BYTES` what is no time."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        rules = [rule for pattern, rule in NOT_BYTES.items() if fnmatch(path.name, pattern)]
        found[str(path.relative_to(folder))] = (*rules, bytes)[0](path.read_bytes())
    return found


def records(folder: Path) -> dict[bytes, dict[str, bytes]]:
    """Reads what a store holds of each image, in whatever order."""
    found = {}
    for path in (folder / "out").glob("regions-*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(path).items() if name != "padding"}
        texts, regions = tensors.pop("image_id_offsets"), tensors.pop("region_offsets")
        text = tensors.pop("image_ids").tobytes()
        of_image = {name: tensors.pop(name) for name in ("image_sizes", "present", "checksums")}
        for row, (first, last) in enumerate(pairwise(texts)):
            own = {name: tensor[row].tobytes() for name, tensor in of_image.items()}
            own |= {name: tensor[regions[row] : regions[row + 1]].tobytes() for name, tensor in tensors.items()}
            found[text[first:last]] = own
    return found


def trained(folder: Path) -> dict[str, Any]:
    """
    Reads all weights that a training left, and the values of each step in its log, by their names.

    Left out are the biases of attention keys, which softmax does not see: their gradients are what rounding leaves of
    zero, and Adam makes steps of it. So are counts of operations, which are those of padding, too.
    """
    files = content(folder)
    log = files["out/log.jsonl"] if "out/log.jsonl" in files else files["out/trainer_state.json"]["log_history"]
    found = {f"step {line['step']}, {name}": value for line in log for name, value in line.items()}
    for file in (name for name in files if name.endswith("model.safetensors")):
        found |= {f"{file}, {name}": weights for name, weights in load(files[file]).items()}
    return {name: value for name, value in found.items() if not name.endswith(("key.bias", "total_flos"))}


def differing(found: dict[str, Any], expected: dict[str, Any], equal: Callable[[Any, Any], bool] = eq) -> list[str]:
    """Names the files, or whatever else, that differ or are there only once."""
    return [name for name in sorted(found | expected) if not equal(found.get(name, np.nan), expected.get(name, np.nan))]
