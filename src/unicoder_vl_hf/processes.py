"""Devices, launcher, precision, threads and the stop signal of a run's processes."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import parse_flag_from_env

from . import logging

logger = logging.get_logger(__name__)

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS: dict[str, str] = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}  # in words

# The hidden size from which bfloat16 makes training faster, by the CPU's instructions for it. Measured: with
# AVX512-BF16 steps are 1.4 to 1.6 times as fast at sizes 128 to 384; with AMX 1.75 times at 384, and no faster at 128.
# Others, which were not measured, are treated like AMX.
BF16_FROM_HIDDEN_SIZE = {"amx_bf16": 256, "avx512_bf16": 64, "bf16": 256, "sve_bf16": 256}
# Smaller models train on one thread. A second thread makes them a quarter faster on an idle machine, and five times
# slower on a busy one, where each thread waits at every operation until the other is scheduled.
TWO_THREADS_FROM_HIDDEN_SIZE = 256
# oneDNN and PyTorch above it keep the kernels of the last 1,024 shapes each, of which sequences without padding bring a
# new one with nearly every batch: a process grew by 1.3 GB, at the same speed. A detector's convolutions, which do
# repeat, are fewer than this.
KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


def fast_precision(device_type: str, hidden_size: int | None = None) -> Precision:
    """
    Gives the mixed precision that a device is fast in: bf16 on GPUs and CPUs that compute it, else fp16 on GPUs, else
    "no".

    A CPU without AMX or AVX512-BF16 emulates bf16, which was measured 150 times slower than fp32. No CPU is
    fast in fp16.

    Args:
        device_type (`str`): Such as `"cuda"` or `"cpu"`.
        hidden_size (`int`, *optional*): Hidden size of the model to be trained; "no" where it is too small to gain by
            bf16 on a CPU.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for name, pays_from in BF16_FROM_HIDDEN_SIZE.items():  # AMX first: CPUs with AMX have the others, too
            if capabilities.get(name):
                return "bf16" if hidden_size is None or hidden_size >= pays_from else "no"
    return "no"


def resolve_precision(requested: str, device_type: str, hidden_size: int | None = None) -> Precision:
    """
    Gives the precision for accelerate that was `requested`, and warns where the device only emulates it.

    Args:
        requested (`str`): `"no"`, `"bf16"` or `"fp16"`; or `"auto"`, which asks [`fast_precision`].
        device_type (`str`): Such as `"cuda"` or `"cpu"`.
        hidden_size (`int`, *optional*): Hidden size of the model to be trained.

    Raises:
        `ValueError`: `requested` is another word.
    """
    if requested not in ("auto", "no", "bf16", "fp16"):
        raise ValueError(f"mixed precision is {requested!r}, expected auto, no, bf16 or fp16.")
    if requested == "auto":
        return fast_precision(device_type, hidden_size)
    precision = cast(Precision, requested)
    if device_type == "cpu" and precision not in ("no", fast_precision(device_type)):
        logger.warning(
            f"This CPU has no fast path for {requested}, it will be much slower than fp32: use 'no' or 'auto'."
        )
    return precision


@dataclass(frozen=True)
class Computing:
    """
    The precision and number of threads that a run computes with. They are chosen once, from the model's size and the
    hardware, never by a clock or the load, and kept in every checkpoint, so that a resumed run computes as it began.

    Args:
        mixed_precision (`str`): `"no"`, `"bf16"` or `"fp16"`, as accelerate takes it.
        num_threads (`int`, *optional*): Number of PyTorch's threads on a CPU; None leaves it as it is.
        earlier (sequence of `(str, int)`): Other precisions that the run began in, each with the step until which it
            had them, in their order.
    """

    FILE: ClassVar[str] = "computing.json"  # in a checkpoint

    mixed_precision: Precision
    num_threads: int | None = None
    earlier: tuple[tuple[Precision, int], ...] = ()

    @classmethod
    def choose(
        cls, requested: str, device_type: str, hidden_size: int, checkpoint: Path | None = None, step: int = 0
    ) -> "Computing":
        """
        Chooses how a run computes, or goes on as its checkpoint began.

        Args:
            requested (`str`): The precision, see [`resolve_precision`]; `"auto"` goes on as the checkpoint began.
            device_type (`str`): Such as `"cuda"` or `"cpu"`.
            hidden_size (`int`): Hidden size of the model to be trained.
            checkpoint (`Path`, *optional*): Folder of the checkpoint that is resumed; one of an older version has no
                record.
            step (`int`, *optional*, defaults to 0): Steps that the checkpoint has behind it.
        """
        recorded: dict[str, Any] = {}
        if checkpoint is not None and (checkpoint / cls.FILE).exists():
            recorded = json.loads((checkpoint / cls.FILE).read_text(encoding="utf-8"))
        if requested == "auto":
            requested = recorded.get("mixed_precision", "auto")
        precision = resolve_precision(requested, device_type, hidden_size)
        earlier = [(before, until) for before, until in recorded.get("earlier", [])]
        if recorded.get("mixed_precision", precision) != precision:
            earlier.append((recorded["mixed_precision"], step))
        threads = None
        if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # the user or the launcher may have set it
            small = hidden_size < TWO_THREADS_FROM_HIDDEN_SIZE
            threads = min(recorded.get("num_threads") or (1 if small else torch.get_num_threads()), available_cpus())
        return cls(precision, threads, tuple(earlier))

    def warn_of_change(self, step: int):
        """Warns where the run goes on from this step in another precision than it had."""
        if self.earlier and self.earlier[-1][1] == step:
            before, now = PRECISIONS[self.earlier[-1][0]], PRECISIONS[self.mixed_precision]
            logger.warning(f"Until step {step:,} the precision was {before}; from here on it is {now}.")

    def save(self, checkpoint: Path):
        """Writes the choice into the folder of a checkpoint."""
        (checkpoint / self.FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """Runs a block with this number of threads, and restores the number from before."""
        before = torch.get_num_threads()
        try:
            if self.num_threads is not None:
                torch.set_num_threads(self.num_threads)
            yield
        finally:
            torch.set_num_threads(before)

    def __str__(self) -> str:
        threads = "" if self.num_threads is None else f", threads: {self.num_threads}"
        return f"precision: {PRECISIONS[self.mixed_precision]}{threads}"


def available_cpus() -> int:
    """Counts the CPUs that this process may run on; where the system does not tell, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def new_accelerator(computing: Computing, **options: Any) -> Accelerator:
    """
    Makes an Accelerator for another run of this process, of any precision: accelerate itself allows one run a process.
    """
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(mixed_precision=computing.mixed_precision, **options)


def start_processes() -> PartialState:
    """
    Gives the state of the processes that the launcher started, on CPUs where ACCELERATE_USE_CPU says so. Unless the
    environment says another number, this process keeps few of oneDNN's kernels, if it has none yet.

    Raises:
        `ValueError`: accelerate takes each process for a run of its own.
    """
    for variable, number in KERNELS_KEPT.items():
        os.environ.setdefault(variable, number)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"The launcher started {os.environ['WORLD_SIZE']} processes, but accelerate takes each for a run of its "
            "own. On CPUs: ACCELERATE_USE_CPU=true torchrun --nproc_per_node …"
        )
    return state


class StopSignal:
    """
    Lets a loop end at its next safe point. Ctrl-C or SIGTERM sets the signal and logs the message; a second one ends
    the loop at once.

    ```python
    with StopSignal() as stop:
        for step in steps:
            ...
            if stop.agreed(accelerator):
                save_checkpoint()
                break
    ```
    """

    def __init__(
        self, message: str = "Stopping after this step, with a checkpoint. Once more to stop at once, without one."
    ):
        self._message = message

    def __enter__(self) -> "StopSignal":
        self._is_set = False
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        """Tells whether this process was told to stop."""
        return self._is_set

    def agreed(self, accelerator: Accelerator) -> bool:
        """Tells whether any process was told to stop, so that all end at the same step. Every process must call it."""
        if self._is_set:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            self._is_set = True
        return self._is_set

    def _handle(self, number: int, frame: FrameType | None):
        if self._is_set:
            raise KeyboardInterrupt
        self._is_set = True
        logger.warning(self._message)
