"""What every training script needs around its loop: a dtype that the hardware is fast in, an end without loss,
checkpoints, a log, and the model card.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath
from types import FrameType
from typing import Any, ClassVar, Literal, cast

import huggingface_hub
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import parse_flag_from_env
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import ProcessorMixin

from . import logging
from .errors import USER_ERRORS, end_with, stopped

logger = logging.get_logger(__name__)

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS: dict[str, str] = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}  # in words

# The hidden size from which bfloat16 pays in training, by what of a CPU computes it. Measured: AVX512-BF16 makes steps
# 1.5 times as fast at 64, 2 at 128 and 3 at 384; AMX 1.75 at 384, and nothing yet at 128; the rest are taken for AMX.
BF16_FROM_HIDDEN_SIZE = {"amx_bf16": 256, "avx512_bf16": 64, "bf16": 256, "sve_bf16": 256}
# Smaller models train on one thread. Two gain a quarter on a quiet machine, and take five times as long on a busy one,
# where each waits at every operation for the other to be scheduled.
TWO_THREADS_FROM_HIDDEN_SIZE = 256


def fast_precision(device_type: str, hidden_size: int | None = None) -> Precision:
    """
    The mixed precision that a device is fast in: bf16 on GPUs and CPUs that compute it, else fp16 on GPUs, else none.

    A CPU without AMX or AVX512-BF16 emulates bf16, measured 150 times slower than fp32; none here is fast in fp16.

    Args:
        device_type (`str`): Such as `"cuda"` or `"cpu"`.
        hidden_size (`int`, *optional*): Of the model to be trained: one that is too small for bf16 to pay on a CPU gets
            none.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for name, pays_from in BF16_FROM_HIDDEN_SIZE.items():  # AMX first: its CPUs have the others, too
            if capabilities.get(name):
                return "bf16" if hidden_size is None or hidden_size >= pays_from else "no"
    return "no"


def resolve_precision(requested: str, device_type: str, hidden_size: int | None = None) -> Precision:
    """
    `requested` (`"auto"`, `"no"`, `"bf16"` or `"fp16"`) as accelerate takes it; warns where the device emulates it.

    Args:
        requested (`str`): `"auto"` is [`fast_precision`] of the device and the size.
        device_type (`str`): Such as `"cuda"` or `"cpu"`.
        hidden_size (`int`, *optional*): Of the model to be trained.

    Raises:
        `ValueError`: another word.
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
    How a run computes: chosen once, by a rule of the model's size and the hardware, never by a clock or the load, and
    kept in every checkpoint, so that a resumed run computes as it began.

    Args:
        mixed_precision (`str`): As accelerate has it.
        num_threads (`int`, *optional*): Of PyTorch on a CPU; None leaves them as they are.
    """

    FILE: ClassVar[str] = "computing.json"  # in a checkpoint

    mixed_precision: Precision
    num_threads: int | None = None

    @classmethod
    def choose(cls, requested: str, device_type: str, hidden_size: int, checkpoint: Path | None = None) -> "Computing":
        """
        Args:
            requested (`str`): The precision as of [`resolve_precision`]. `"auto"` goes on as the checkpoint began.
            device_type (`str`): Such as `"cuda"` or `"cpu"`.
            hidden_size (`int`): Of the model to be trained.
            checkpoint (`Path`, *optional*): What is resumed; one without a record is of an older version.
        """
        recorded: dict[str, Any] = {}
        if checkpoint is not None and (checkpoint / cls.FILE).exists():
            recorded = json.loads((checkpoint / cls.FILE).read_text(encoding="utf-8"))
        if requested == "auto":
            requested = recorded.get("mixed_precision", "auto")
        precision = resolve_precision(requested, device_type, hidden_size)
        threads = None
        if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # which the user, or the launcher, has set
            small = hidden_size < TWO_THREADS_FROM_HIDDEN_SIZE
            threads = min(recorded.get("num_threads") or (1 if small else torch.get_num_threads()), available_cpus())
        return cls(precision, threads)

    def save(self, checkpoint: Path):
        (checkpoint / self.FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """PyTorch computes with this number of threads, and afterwards with as many as before."""
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
    """Those that this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def new_accelerator(computing: Computing, **options: Any) -> Accelerator:
    """An Accelerator for another run of this process, of any precision: accelerate itself knows one run a process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(mixed_precision=computing.mixed_precision, **options)


def start_processes() -> PartialState:
    """
    The processes of the launcher, on CPUs where ACCELERATE_USE_CPU says so.

    Raises:
        `ValueError`: accelerate takes each for a run of its own.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"The launcher started {os.environ['WORLD_SIZE']} processes, but accelerate takes each for a run of its "
            "own. On CPUs: ACCELERATE_USE_CPU=true torchrun --nproc_per_node …"
        )
    return state


class StopSignal:
    """
    Lets a loop end at its next safe point: Ctrl-C or SIGTERM set it, and say the message; a second one ends the loop at
    once.

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
        return self._is_set

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether it is set in any process, so that all end at the same step. Every process calls it."""
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


_CARD_FILE = "README.md"  # written last


class FinishedRun(ValueError):
    """There is nothing left to train."""


def run_script(main: Callable[[], bool | None], go_on: str = ""):
    """
    `main` as a command. What Ctrl-C stopped ends with 130, as the shell has it, so that what follows after `&&` does
    not take up half a model: a training that returned False, after a checkpoint, or anything else, at once; `go_on`
    then says what goes on. A training that was finished before ends well. An error that the user can mend is said in
    one line by each process that meets it, and ends with 1, whereupon the launcher ends the others.
    """
    rank = os.environ.get("RANK")
    program = Path(sys.argv[0]).name + (f" (process {rank})" if rank else "")
    try:
        trained = main()
    except FinishedRun as finished:
        _warn_once(str(finished))
        return
    except USER_ERRORS as error:
        sys.exit(end_with(error, program))
    except KeyboardInterrupt:
        sys.exit(stopped(program, go_on))
    if trained is False:
        _warn_once("Go on with the same command and --resume_from_checkpoint latest.")
        sys.exit(130)


def _warn_once(text: str):
    """In one of the launcher's processes."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)


class CheckpointFolder:
    """
    The checkpoints `checkpoint-<step>` of a run: written whole or not at all, the oldest removed, resumed exactly.

    Args:
        output_dir (`Path`): The run's folder.
        keep (`int`, *optional*, defaults to 1): How many checkpoints stay.
        state_file (`str`, *optional*): What is written last into a checkpoint, so that one without it is not whole.
    """

    def __init__(self, output_dir: Path, keep: int = 1, state_file: str = "training_state.json"):
        if keep < 1:
            raise ValueError(f"save_total_limit={keep}, expected at least 1 checkpoint to resume from.")
        self.output_dir = output_dir
        self.keep = keep
        self.state_file = state_file

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self.output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
        return sorted(filter(self._is_complete, found), key=lambda path: int(path.name[11:]))

    def is_finished(self) -> bool:
        """Whether the run came to its end: the model is here, and its card, which is written last."""
        return all((self.output_dir / name).exists() for name in ("model.safetensors", _CARD_FILE))

    def resolve(self, requested: str | None) -> Path | None:
        """
        The checkpoint to resume from: a folder, the newest for `"latest"`, None for None. Whether a finished run has
        steps left is for [`~CheckpointFolder.check_steps`] to say, once their number is known.

        Raises:
            `FinishedRun`: the run is finished, and has no checkpoint to go on from. `ValueError`: there is none, or one
                lies in the folder that is not to be resumed.
        """
        present = self.list()
        if requested is None:
            if self.is_finished():
                raise ValueError(self._finished(has_checkpoint=bool(present)))
            if present:
                raise ValueError(
                    f"{self.output_dir} holds a run, up to {present[-1].name}. Go on with --resume_from_checkpoint "
                    "latest, or take another --output_dir."
                )
            if (self.output_dir / "model.safetensors").exists():
                raise ValueError(f"{self.output_dir} holds a model: take another --output_dir.")
            return None
        if requested == "latest":
            if not present and self.is_finished():
                raise FinishedRun(self._finished(has_checkpoint=False))
            if not present:
                raise ValueError(
                    f"{self.output_dir} has no checkpoint yet: start the run without --resume_from_checkpoint."
                )
            return present[-1]
        if not self._is_complete(Path(requested)):
            raise ValueError(f"{requested} is no checkpoint of a run: it has no {self.state_file}.")
        return Path(requested)

    def check_steps(self, requested: str | None, checkpoint: Path, planned: int, before: int) -> bool:
        """
        Whether a resumed run is to take more steps than it was to take before: its schedule then changes.

        Args:
            requested (`str`, *optional*), checkpoint (`Path`): As [`~CheckpointFolder.resolve`] takes and gives it.
            planned, before (`int`): Steps of the whole run, as it is asked for now and as the checkpoint knows it.

        Raises:
            `FinishedRun`: `"latest"` of a finished run, of which no more is asked. `ValueError`: fewer steps are asked
                for.
        """
        if requested == "latest" and planned <= before and self.is_finished():
            raise FinishedRun(self._finished(has_checkpoint=True))
        if planned < before:
            raise ValueError(
                f"{checkpoint} is of a run of {before:,} steps, which cannot become one of {planned:,}: its learning "
                "rate has followed another schedule. Give the same arguments, or more steps."
            )
        if planned > before:
            logger.warning(
                f"{checkpoint} is of a run of {before:,} steps. From here on the learning rate is that of a run of "
                f"{planned:,}; the model and its card are written anew at the end."
            )
        return planned > before

    def reopen(self):
        """Makes a finished run an unfinished one, until its card is written again."""
        (self.output_dir / _CARD_FILE).unlink(missing_ok=True)

    def _finished(self, has_checkpoint: bool) -> str:
        more = (
            "Take another --output_dir, or ask for more steps: a larger --num_train_epochs or --max_steps, with "
            "--resume_from_checkpoint latest."
            if has_checkpoint
            else "It has no checkpoint from which more steps could go on. Take another --output_dir, with "
            f"--model_name_or_path {self.output_dir} to begin with its weights."
        )
        return f"{self.output_dir} holds a finished run, with its model: there is nothing left to train. {more}"

    def read(self, checkpoint: Path, identity: dict[str, Any]) -> dict[str, Any]:
        """
        What was saved as `state`, with the `total_steps` that the run was to take.

        Raises:
            `ValueError`: `identity` differs from that of the run, which then could not go on exactly; but for its
                `total_steps`, which [`~CheckpointFolder.check_steps`] looks at.
        """
        state = json.loads((checkpoint / self.state_file).read_text())
        saved = state.pop("identity")
        total_steps = saved.pop("total_steps", state["step"])
        changed = {
            name: (then, identity.get(name))
            for name, then in saved.items()
            if name not in identity or identity[name] != then
        }
        if changed:
            raise ValueError(
                f"{checkpoint} is of another run: (then, now) differ in {changed}. Give the same arguments."
            )
        return state | {"total_steps": total_steps}

    def save(
        self,
        state: dict[str, Any],
        identity: dict[str, Any],
        accelerator: Accelerator,
        processor: ProcessorMixin,
        computing: Computing,
    ):
        """
        Saves accelerate's state, the processor, how the run computes, and `state` with the `step`. Every process calls
        it.

        Args:
            state (`dict`): What else the loop needs to go on, as JSON; `step` names the checkpoint.
            identity (`dict`): What must be the same for a resumed run to be the same run, as JSON.
        """
        final = self.output_dir / f"checkpoint-{state['step']}"
        partial = self.output_dir / f"partial-{state['step']}"
        if accelerator.is_main_process:
            for leftover in self.output_dir.glob("partial-*"):  # of a save or a removal that was cut short
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            processor.save_pretrained(partial)
            computing.save(partial)
            (partial / self.state_file).write_text(json.dumps({**state, "identity": identity}))
            if final.exists():
                self._remove(final)
            os.replace(partial, final)
            for old in self.list()[: -self.keep]:
                self._remove(old)
        accelerator.wait_for_everyone()

    def _is_complete(self, checkpoint: Path) -> bool:
        return (checkpoint / self.state_file).is_file()

    def _remove(self, checkpoint: Path):
        """Under another name first: what has lost some of its files must not pass for a checkpoint."""
        doomed = self.output_dir / f"partial-old-{checkpoint.name}"
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)


def follow_schedule(scheduler: LRScheduler):
    """
    Sets the learning rates to what the schedule has at its step, in place of those of a checkpoint of another schedule,
    whose next step would still be taken with them. Of schedules that are no function of the step, none.
    """
    if isinstance(scheduler, LambdaLR):
        step = scheduler.last_epoch
        rates = [rate * shape(step) for rate, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def save_weights_as_pretrained(accelerator: Accelerator):
    """Makes the weights of accelerate's checkpoints the model's own files, so that `from_pretrained` reads them too."""

    def save(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str):
        accelerator.unwrap_model(models[0]).save_pretrained(folder, state_dict=weights.pop())

    def load(models: list[torch.nn.Module], folder: str):
        model = accelerator.unwrap_model(models.pop())
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class JsonLog:
    """
    One JSON object a line: `step` and the values of that step. The trackers of accelerate get them, too.

    Args:
        path (`Path`): The file, made if need be, and written by the main process.
        accelerator ([`~accelerate.Accelerator`]): Of the run.
        resume_step (`int`): Lines after this step are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resume_step: int = 0):
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process:
            lines = path.read_text().splitlines(keepends=True) if path.exists() and resume_step > 0 else []
            # A crash may have cut the last line short.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resume_step]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(kept))

    def write(self, step: int, values: dict[str, float]):
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(
                    json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}) + "\n"
                )


MASKED_LOSSES = ("mlm_loss", "moc_loss")  # of which the matches alone have one


class LossMeter:
    """
    The loss and its parts since the last line of the log, over all processes. A checkpoint keeps its `state`.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the run.
        parts (sequence of `str`): Parts of the loss that are trained, as the model's output names them.
    """

    def __init__(self, accelerator: Accelerator, parts: Sequence[str]):
        self.accelerator = accelerator
        self.losses = ("loss", *parts)
        # Of the losses, and of the share of rows whose tokens and regions count.
        self._sums = torch.zeros(len(self.losses) + 1, device=accelerator.device)
        self._of_process = torch.zeros_like(self._sums)
        self.start_clock()

    def start_clock(self):
        """Anew, so that an evaluation does not count as training."""
        self._since, self._rows = time.perf_counter(), 0

    def add(self, outputs: Mapping[str, torch.Tensor], matching_labels: torch.Tensor, weight: float):
        """Adds a micro-batch, of so much weight in its step; waits for no device."""
        losses = [outputs[name].detach().mean() for name in self.losses]  # one a GPU under DataParallel
        self._of_process += torch.stack([*losses, (matching_labels != 0).float().mean()]) * weight
        self._rows += len(matching_labels)

    def gather(self):
        """Adds up what the processes have had since the last time. Every process calls it, after whole steps."""
        self._sums += self.accelerator.reduce(self._of_process, reduction="sum")  # the same in every process
        self._of_process.zero_()

    def mean(self, steps: float) -> dict[str, float]:
        """Over the last steps, of masked tokens and regions over their matches, as in evaluation; begins anew."""
        *sums, counted = self._sums.tolist()
        rows = self._rows * self.accelerator.num_processes / (time.perf_counter() - self._since)
        self._sums.zero_()
        self.start_clock()
        means = {
            name: total / (counted if name in MASKED_LOSSES else steps)
            for name, total in zip(self.losses, sums, strict=True)
        }
        return means | {"rows_per_second": rows}

    def state(self) -> dict[str, float]:
        return dict(zip((*self.losses, "counted"), self._sums.tolist(), strict=True))

    def load(self, state: Mapping[str, float] | Sequence[float]):
        if not isinstance(state, Mapping):  # of a checkpoint without names
            state = dict(zip(("loss", *MASKED_LOSSES, "matching_loss", "counted"), state, strict=True))
        self._sums.copy_(torch.tensor([state[name] for name in (*self.losses, "counted")]))


def beside_the_bar(values: Mapping[str, float]) -> dict[str, str]:
    """The losses and the learning rate of a line of the log, short enough to stand beside a progress bar."""
    losses = {name.removesuffix("_loss"): f"{value:.3f}" for name, value in values.items() if name.endswith("loss")}
    return losses | {"lr": f"{values['learning_rate']:.1e}"}


def in_a_line(step: int, metrics: Mapping[str, float]) -> str:
    """The metrics of an evaluation for the terminal."""
    return f"step {step:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def create_hub_repository(repo_id: str) -> str:
    """Makes sure, before the training, that the repository can be written to; returns its full name."""
    return huggingface_hub.create_repo(repo_id, exist_ok=True).repo_id


def push_folder(repo_id: str, folder: Path):
    """Uploads a run's model, processor, card and log; not its checkpoints, regions or trackers."""
    huggingface_hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Upload Unicoder-VL",
        ignore_patterns=["_*", "checkpoint-*", "partial-*", "pretraining/**", "runs/**"],
    )


# How a model was trained, for its card.
_IN_WORDS = {
    "mlm_loss": "masked language modelling",
    "moc_loss": "masked object classification",
    "matching_loss": "visual-linguistic matching",
}


def pretrained_by(losses: Sequence[str], by: str = "pre-trained by") -> str:
    """The tasks of these parts of the loss, in the words of the card."""
    *others, last = (_IN_WORDS[name] for name in losses)
    return f"{by} {', '.join(others)} and {last}" if others else f"{by} {last}"


PRETRAINED = pretrained_by(tuple(_IN_WORDS))
FIRST_STAGE = "given a first stage of search, trained by a contrastive loss with the encoder frozen"


def finish_run(output_dir: Path, metrics: dict[str, float], *, repo_id: str | None = None, **card: Any):
    """What follows the last evaluation: `metrics.json`, the model card, which `card` is for, and the push."""
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    write_model_card(output_dir, metrics=metrics, repo_id=repo_id, **card)
    if repo_id is not None:
        push_folder(repo_id, output_dir)


@dataclass
class TrainingRun:
    """
    A training as it really ran, for the card.

    Args:
        steps (`int`): Of the optimiser.
        epochs (`float`): Passes over the training data.
        batch_size (`int`): `rows` of a step over all processes and micro-steps.
        learning_rate (`float`): Its peak.
        seed (`int`): Of the run.
        mixed_precision (`str`): As accelerate has it.
        rows (`str`, *optional*): What a batch counts.
        kept_step (`int`, *optional*): The step whose model was kept, where it is not the last.
    """

    steps: int
    epochs: float
    batch_size: int
    learning_rate: float
    seed: int
    mixed_precision: str
    rows: str = "pairs"
    kept_step: int | None = None

    def __str__(self) -> str:
        kept = "" if self.kept_step in (None, self.steps) else f"; the model is that of step {self.kept_step:,}"
        return "\n".join([
            f"- Steps: {self.steps:,} of {self.batch_size:,} {self.rows} (over all processes){kept}",
            f"- Epochs: {round(self.epochs, 2):g}",
            f"- Learning rate: {self.learning_rate:g} at its peak",
            f"- Seed: {self.seed}",
            f"- Precision: {PRECISIONS.get(self.mixed_precision, self.mixed_precision)}",
        ])  # fmt: skip


def write_model_card(
    folder: Path,
    *,
    data_name: str,
    metrics: dict[str, float],
    provenance: dict[str, Any] | None,
    measured_on: str | None = None,
    trained_by: str = PRETRAINED,
    task: Literal["image-text-retrieval", "visual-commonsense-reasoning"] = "image-text-retrieval",
    base_model: str | None = None,
    repo_id: str | None = None,
    training: TrainingRun | None = None,
    search: str | None = None,
) -> Path:
    """
    Writes `README.md`, the model card: tags, base model, data, training, where the regions come from, metrics and use.

    Args:
        folder (`Path`): The saved model's.
        data_name (`str`): What it was trained on, in words.
        metrics (`dict[str, float]`): On the validation split; may be empty.
        provenance (`dict`, *optional*): `RegionStore.provenance` of the training regions.
        measured_on (`str`, *optional*): How many captions and images of it, without which recall at K says little.
        trained_by (`str`, *optional*): How, in words that follow "Unicoder-VL, ".
        task (`str`, *optional*): What the model is used for.
        base_model (`str`, *optional*): What the training began with; the metadata name it where it is a repository,
            and the text a folder by its name alone, which may be published where its path may not.
        repo_id (`str`, *optional*): The repository that the folder is pushed to; without it the card loads the folder.
        training ([`TrainingRun`], *optional*): As it really ran.
        search (`str`, *optional*): How a search in two stages orders what the model's first stage proposes, in words.
    """
    name = repo_id or folder.resolve().name
    tag = "pre-training" if trained_by.startswith("pre-trained") else "fine-tuning"
    results = [
        huggingface_hub.EvalResult(
            task_type=_USES[task]["task_type"],
            task_name=tag.capitalize(),
            dataset_type="image-text",
            dataset_name=data_name,
            dataset_split="validation",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in metrics.items()
    ]
    on_hub = base_model is not None and _is_repository(base_model)
    metadata = huggingface_hub.ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        tags=["unicoder-vl", "unicoder-vl-hf", "vision-language", task, tag],
        base_model=base_model if on_hub else None,
        model_name=name,
        eval_results=results or None,
    )
    if base_model is not None and not on_hub:
        base_model = PureWindowsPath(os.path.abspath(base_model)).name  # of either kind of path
    known = {
        field: value
        for field, value in (provenance or {}).items()
        if value not in (None, [], {}) and field not in ("dtype", "package_version")  # which do not change the features
    }
    text = _CARD.format(
        name=name,
        base_model=base_model or "none, trained from scratch",
        data_name=data_name,
        trained_by=trained_by,
        training="" if training is None else f"\n## Training\n\n{training}\n",
        regions="\n".join(f"- {field}: {_shorten(value)}" for field, value in known.items()) or "- unknown",
        measured_on=f"validation: {measured_on}" if measured_on else "validation",
        metrics="\n".join(_metric_row(*item) for item in metrics.items()) or "| not evaluated | |",
        search="" if search is None else f"\n## Search\n\n{search}\n",
        location=repo_id or folder.as_posix(),
        **_USES[task],
    )
    path = folder / _CARD_FILE
    huggingface_hub.ModelCard(f"---\n{metadata}\n---\n\n{text}").save(path)
    return path


# With trust_remote_code the snippet needs no package of ours: it gives the regions as a dict.
_CARD = """# {name}

Unicoder-VL ([Li et al., AAAI 2020](https://arxiv.org/abs/1908.06066)), {trained_by}, with unicoder-vl-hf.

- Base model: {base_model}
- Training data: {data_name}
{training}
## Regions

The model reads region features of this kind, and no other:

{regions}

## Evaluation

| metric | {measured_on} |
|---|---|
{metrics}
{search}
## Use

```python
import numpy as np
from transformers import {auto_class}, AutoProcessor

name = "{location}"
model = {auto_class}.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

# The regions of one photo. Put what the detector found here: zeros stand in for its features.
regions = {{
    "image_id": "photo",
    "image_width": 640,
    "image_height": 480,
    "boxes": np.array([[0, 0, 640, 480], [64, 120, 320, 360]]),  # x1, y1, x2, y2 in pixels
    "features": np.zeros((2, model.config.region_feature_dim), dtype=np.float32),
}}
{use}
```
"""

_USES = {
    "image-text-retrieval": {
        "task_type": "image-text-matching",
        "auto_class": "AutoModelForSequenceClassification",
        "use": """captions = ["A dog runs.", "A cat sleeps."]
inputs = processor(text=captions, regions=[regions, regions], return_tensors="pt")
scores = model(**inputs).scores  # one for each caption; higher = better match""",
    },
    "visual-commonsense-reasoning": {
        "task_type": "multiple-choice",
        "auto_class": "AutoModelForMultipleChoice",
        "use": """texts = ["What does the dog do? ; It runs.", "What does the dog do? ; It sleeps."]
inputs = processor(text=texts, regions=[regions, regions], max_length=156, return_tensors="pt")
# The region that each token names, or -1. Here the fifth, "dog", names the second region.
inputs["token_region_ids"] = inputs["input_ids"] * 0 - 1
inputs["token_region_ids"][:, 4] = 1
choices = {name: tensor[None] for name, tensor in inputs.items()}
probabilities = model(**choices).logits.softmax(dim=-1)  # of the two answers to one question""",
    },
}


def _is_repository(name: str) -> bool:
    """Whether `name` is of the Hub, as from_pretrained takes it: a folder of that name comes first."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError:
        return False
    return not Path(name).exists()


def _metric_row(name: str, value: float) -> str:
    """Of the table: fractions and losses to four decimals; ranks count images or captions."""
    decimals = 0 if name.endswith(("_tied_ranks", "_ties")) else 1 if name.endswith("_rank") else 4
    return f"| {name} | {value:,.{decimals}f} |"


def _shorten(value: Any) -> str:
    """`value` as JSON; of a long list, such as 1600 class names, the beginning and the length."""
    if isinstance(value, list) and len(value) > 10:
        return f"{json.dumps(value[:5], ensure_ascii=False)[:-1]}, …] ({len(value)} in all)"
    return json.dumps(value, ensure_ascii=False)
