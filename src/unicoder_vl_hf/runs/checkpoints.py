"""The checkpoints of a run: written whole or not at all, limited in number, resumed exactly."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import ProcessorMixin

from .. import logging
from ..errors import FinishedRun
from ..files import check_writable
from ..processes import Computing

logger = logging.get_logger(__name__)


CARD_FILE = "README.md"  # written last


class CheckpointFolder:
    """
    Writes, finds and removes the checkpoints `checkpoint-<step>` of a run. They are written whole or not at all.

    Args:
        output_dir (`Path`): The output folder of the run.
        keep (`int`, *optional*, defaults to 1): Number of checkpoints that stay, at least 1; the oldest are removed.
        state_file (`str`, *optional*): The file that is written last into a checkpoint, which without it is not
            whole.

    Raises:
        `ValueError`: `keep` is below 1.
    """

    def __init__(self, output_dir: Path, keep: int = 1, state_file: str = "training_state.json"):
        if keep < 1:
            raise ValueError(f"save_total_limit={keep}, expected at least 1 checkpoint to resume from.")
        self.output_dir = output_dir
        self.keep = keep
        self.state_file = state_file

    def list(self) -> list[Path]:
        """Lists the complete checkpoints, oldest first."""
        return sorted(filter(self._is_complete, self._all()), key=lambda path: int(path.name[11:]))

    def remove_leftovers(self):
        """Removes checkpoints whose saving or removal was cut short."""
        unfinished = [path for path in self._all() if not self._is_complete(path)]
        for path in (*unfinished, *self.output_dir.glob("partial-*")):
            shutil.rmtree(path)

    def is_finished(self) -> bool:
        """Whether the run came to its end: its folder has the model and the card, which is written last."""
        return all((self.output_dir / name).exists() for name in ("model.safetensors", CARD_FILE))

    def resolve(self, requested: str | None) -> Path | None:
        """
        Finds the checkpoint to resume from. Whether a finished run has steps left is for
        [`~CheckpointFolder.check_steps`] to say, once their number is known.

        Args:
            requested (`str`, *optional*): A checkpoint's folder, `"latest"` for the newest one, or None to begin a run.

        Returns:
            The folder of the checkpoint, or None to begin a run.

        Raises:
            `FinishedRun`: the latest checkpoint is asked for, but the run is finished and has none.
            `ValueError`: the checkpoint does not exist or is not whole; or a run is to begin in a folder that holds
                one.
            `OSError`: nothing can be written into the folder.
        """
        if self.output_dir.exists():
            check_writable(self.output_dir)
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
                raise ValueError(
                    f"{self.output_dir} holds a model, which the run would replace: take another --output_dir."
                )
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

    def step_of(self, checkpoint: Path | None) -> int:
        """Reads how many steps a checkpoint has behind it; 0 for None, where a run begins."""
        if checkpoint is None:
            return 0
        state = json.loads((checkpoint / self.state_file).read_text(encoding="utf-8"))
        return state["step"] if "step" in state else state["global_step"]  # of our loop, or of Trainer

    def check_steps(self, requested: str | None, checkpoint: Path, planned: int, before: int) -> bool:
        """
        Tells whether a resumed run is to take more steps than it was to take before: its schedule then changes.

        Args:
            requested (`str`, *optional*), checkpoint (`Path`): The checkpoint as it was asked for, and as
                [`~CheckpointFolder.resolve`] found it.
            planned, before (`int`): Steps of the whole run, as it is asked for now and as the checkpoint knows it.

        Raises:
            `FinishedRun`: `"latest"` is the checkpoint of a finished run, and no more steps are asked for.
            `ValueError`: fewer steps are asked for than before.
        """
        if requested == "latest" and planned <= before and self.is_finished():
            fewer = f"It was a run of {before:,} steps; {planned:,} are fewer. " if planned < before else ""
            raise FinishedRun(self._finished(has_checkpoint=True, steps=fewer))
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

    def set_aside(self, checkpoint: Path):
        """
        Renames the checkpoints of more steps than the one that a run goes on from: `latest` is to be of this run, and
        the oldest are removed first.
        """
        if checkpoint.resolve().parent != self.output_dir.resolve():
            return
        for later in self.list():
            if self.step_of(later) > self.step_of(checkpoint):
                names = (self.output_dir / f"abandoned-{number}-{later.name}" for number in count(1))
                aside = next(path for path in names if not path.exists())
                os.replace(later, aside)
                logger.warning(f"{later} is of steps that are now taken anew: it is kept as {aside}.")

    def reopen(self):
        """Makes a finished run an unfinished one, by removing its card, until it is written again."""
        (self.output_dir / CARD_FILE).unlink(missing_ok=True)

    def _finished(self, has_checkpoint: bool, steps: str = "") -> str:
        more = (
            "Take another --output_dir, or ask for more steps: a larger --num_train_epochs or --max_steps, with "
            "--resume_from_checkpoint latest."
            if has_checkpoint
            else "It has no checkpoint from which more steps could go on. Take another --output_dir, with "
            f"--model_name_or_path {self.output_dir} to begin with its weights."
        )
        return f"{self.output_dir} holds a finished run, with its model: there is nothing left to train. {steps}{more}"

    def read(self, checkpoint: Path, identity: dict[str, Any]) -> dict[str, Any]:
        """
        Reads the `state` of a checkpoint, with the `total_steps` that the run was to take.

        Raises:
            `ValueError`: `identity` differs from that of the run, which then could not go on exactly. Its `total_steps`
                may differ: [`~CheckpointFolder.check_steps`] looks at them.
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
        Saves a checkpoint, and removes the oldest ones. Every process calls it.

        Args:
            state (`dict`): Values of JSON that the loop needs to go on, beside accelerate's; `step` names the
                checkpoint.
            identity (`dict`): Values of JSON by which a resumed run is the same run.
            accelerator ([`~accelerate.Accelerator`]): Saves model, optimiser, schedule and generators.
            processor ([`ProcessorMixin`]): The processor of the model.
            computing ([`Computing`]): The record of how the run computes, written into the checkpoint.
        """
        final = self.output_dir / f"checkpoint-{state['step']}"
        partial = self.output_dir / f"partial-{state['step']}"
        if accelerator.is_main_process:
            self.remove_leftovers()
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

    def _all(self) -> Iterator[Path]:
        return (path for path in self.output_dir.glob("checkpoint-*") if path.name[11:].isdigit())

    def _is_complete(self, checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / self.state_file).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is none, or a kill cut it short
            return False
        return True

    def _remove(self, checkpoint: Path):
        """Removes a checkpoint, renamed first: what has lost some of its files must not pass for one."""
        doomed = self.output_dir / f"partial-old-{checkpoint.name}"
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)


def follow_schedule(scheduler: LRScheduler):
    """
    Sets the learning rates to those of the schedule at its step. A checkpoint of another schedule would otherwise leave
    its own for the next step. A schedule that is no function of the step stays as it is.
    """
    if isinstance(scheduler, LambdaLR):
        step = scheduler.last_epoch
        rates = [rate * shape(step) for rate, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def save_weights_as_pretrained(accelerator: Accelerator):
    """
    Makes the weights of accelerate's checkpoints the model's own files, so that `from_pretrained` reads them too. Those
    of FSDP stay as accelerate writes them, each process its part, beside the configuration: `accelerate merge-weights`
    puts them together.
    """

    def save(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str):
        model: Any = accelerator.unwrap_model(models[0])
        if weights:
            model.save_pretrained(folder, state_dict=weights.pop())
        elif accelerator.is_main_process:  # of FSDP
            model.config.save_pretrained(folder)

    def load(models: list[torch.nn.Module], folder: str):
        if models:
            model = accelerator.unwrap_model(models.pop())
            model.load_state_dict(type(model).from_pretrained(folder).state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_whole(accelerator: Accelerator, model: torch.nn.Module, folder: Path):
    """Saves a prepared model as `from_pretrained` reads it. Every process calls it: FSDP gathers what each has."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        plain: Any = accelerator.unwrap_model(model)
        is_sharded = isinstance(plain, FSDPModule)
        if is_sharded:  # its class is FSDP's, and so would be the code that is saved along
            own: Any = next(each for each in type(plain).__mro__ if not issubclass(each, FSDPModule))
            plain = own.from_pretrained(None, config=plain.config, state_dict=weights)
        plain.save_pretrained(folder)
