"""
Our own loop of pre-training (paper, section Pre-training) and its arguments. Micro-batches are weighed by their rows,
and a run is the same run however it is split into processes and pieces. `run.py` is its script.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ... import logging
from ...data.samplers import StepBatchSampler, StreamBatchSampler
from ...data.streaming import StreamedPairs
from ...files import full_disk_named
from ...processes import Computing, StopSignal
from ...runs.arguments import option, run_identity
from ...runs.checkpoints import CheckpointFolder, follow_schedule, save_weights_as_pretrained, save_whole
from ...runs.log import JsonLog, LossMeter, beside_the_bar, in_a_line, in_a_table
from ...runs.model_card import TrainingRun, finish_run
from .evaluation import evaluate_pretraining
from .setup import PretrainingArguments, PretrainingSetup

logger = logging.get_logger(__name__)

# The paper's recipe, and one that learns the scenes in minutes on two cores. A batch is counted in pairs.
PAPER = {"num_train_epochs": 10, "learning_rate": 1e-4, "train_batch_size": 192, "gradient_accumulation_steps": 4}
SCENES = {"num_train_epochs": 3, "learning_rate": 1e-3, "train_batch_size": 32, "gradient_accumulation_steps": 1}
# Options that end the plateau of a new, narrow model's matching loss, see docs/matching_head.md.
STRONG = {"initializer_range": 0.08}


@dataclass
class LoopArguments:
    """Says how our own loop of pre-training runs; the defaults are the paper's."""

    output_dir: str = option(..., "Folder for checkpoints, the log, and in the end the model.", may_change=True)
    num_train_epochs: int = option(10, "Passes over the training pairs.", may_change=True)
    learning_rate: float = option(1e-4, "Peak of the learning rate, after the warm-up.")
    train_batch_size: int = option(192, "Pairs of an optimiser step over ALL processes.")
    gradient_accumulation_steps: int = option(4, "Micro-steps of an optimiser step.", may_change=True)
    warmup_ratio: float = option(0.1, "Share of the steps with a rising learning rate.")
    weight_decay: float = option(0.0, "Weight decay of AdamW, which with 0 is the paper's Adam.")
    max_grad_norm: float = option(1.0, "Norm to which gradients are clipped; 0 clips none.")
    max_steps: int = option(
        -1, "Steps after which the run ends, whatever the epochs; -1 takes all epochs.", may_change=True
    )
    mixed_precision: str = option(
        "auto", "Precision: auto (what the hardware is fast in), no, bf16 or fp16.", may_change=True
    )
    gradient_checkpointing: bool = option(
        False, "Computes activations twice: less memory, a third more time.", may_change=True
    )
    seed: int = option(0, "Seed of masks, mismatches, order, dropout and new weights.")
    dataloader_num_workers: int = option(0, "Processes that read and mask.", may_change=True)
    logging_steps: int = option(20, "Steps between lines of the log.", may_change=True)
    save_steps: int = option(1000, "Steps between checkpoints.", may_change=True)
    save_total_limit: int = option(2, "Number of checkpoints to keep.", may_change=True)
    eval_steps: int | None = option(None, "Steps between evaluations. Default: every epoch.", may_change=True)
    eval_on_start: bool = option(False, "Evaluates before the first step, too.", may_change=True)
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint to go on from: its folder, or latest. More steps than before make the run longer.",
        may_change=True,
    )
    report_to: str = option("none", "Tracker of accelerate, such as tensorboard, or none.", may_change=True)
    push_to_hub: bool = option(False, "Uploads the model, processor and card in the end.", may_change=True)
    hub_model_id: str | None = option(
        None, "Repository of the Hub. Default: the output folder's name.", may_change=True
    )

    def __post_init__(self):
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps}, expected at least 1, or -1 for all epochs.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}, expected a share of the steps in 0..1, below 1.")

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The checkpoints of the run, in its output folder."""
        return CheckpointFolder(Path(self.output_dir), keep=self.save_total_limit)


class PretrainingLoop:
    """
    Runs a pre-training by Accelerate in one process or many, and resumes it exactly at any step.

    Args:
        data_args ([`PretrainingArguments`]), args ([`LoopArguments`]): The command line of the run.
        setup ([`PretrainingSetup`]): The model and data of the run, as [`prepare_pretraining`] builds them.
        accelerator ([`~accelerate.Accelerator`]), computing ([`Computing`]): The processes, devices and precision of
            the run.
    """

    def __init__(
        self,
        data_args: PretrainingArguments,
        args: LoopArguments,
        setup: PretrainingSetup,
        accelerator: Accelerator,
        computing: Computing,
    ):
        self.data_args, self.args, self.setup = data_args, args, setup
        self.accelerator, self.computing = accelerator, computing
        self.output_dir = Path(args.output_dir)
        self.checkpoints = args.checkpoints
        split: dict[str, Any] = {
            "micro_batches": args.gradient_accumulation_steps,
            "seed": args.seed,
            "process_index": accelerator.process_index,
            "num_processes": accelerator.num_processes,
        }
        self.sampler: StepBatchSampler
        self.batch = args.train_batch_size, "pairs"
        if isinstance(setup.train, StreamedPairs):
            self.sampler = StreamBatchSampler(args.max_steps, rows_per_step=args.train_batch_size, **split)
        elif (by_tokens := setup.token_batches(**split)) is not None:
            self.sampler, self.batch = by_tokens, (by_tokens.tokens_per_batch, "tokens")
        else:
            self.sampler = StepBatchSampler(len(setup.train), rows_per_step=args.train_batch_size, **split)
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.total_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * self.steps_per_epoch
        self.step = 0
        self.meter = LossMeter(accelerator, setup.loss_parts)

        if args.gradient_checkpointing:
            setup.model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(
            setup.model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
        self.scheduler = get_linear_schedule_with_warmup(
            optimizer, round(args.warmup_ratio * self.total_steps), self.total_steps
        )
        if accelerator.distributed_type == DistributedType.FSDP:
            # A second name of the decoder's bias: FSDP2 takes a weight in one group, and the decoder is in another one.
            del setup.model.cls.predictions.bias
        self.model, self.optimizer = accelerator.prepare(setup.model, optimizer)
        accelerator.register_for_checkpointing(self.scheduler)
        save_weights_as_pretrained(accelerator)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The values by which a resumed run is this run, see [`run_identity`]."""
        return run_identity(self.data_args, self.args, total_steps=self.total_steps) | self.setup.identity

    @property
    def epoch(self) -> float:
        """Passes over the training pairs that lie behind; of a stream those that are whole, in this process."""
        train = self.setup.train
        return train.passes(self._next_row) if isinstance(train, StreamedPairs) else self.step / self.steps_per_epoch

    @property
    def _next_row(self) -> int:
        """The row of a stream, in this process, that the next step begins with."""
        return self.step * self.args.train_batch_size // self.accelerator.num_processes

    def run(self, resume_from: Path | None) -> bool:
        """
        Trains from the beginning or from a checkpoint, and at the end evaluates and saves the model with its card.

        Returns:
            Whether the training came to its end; if Ctrl-C or SIGTERM stopped it, a checkpoint to resume from is left.
        """
        args, accelerator = self.args, self.accelerator
        if resume_from is None:
            set_seed(args.seed, device_specific=True)  # another dropout in every process
        else:
            self._resume(resume_from)
        self.log = JsonLog(self.output_dir / "log.jsonl", accelerator, resume_step=self.step)
        if args.report_to != "none":
            accelerator.init_trackers("pretraining", {**asdict(self.data_args), **asdict(args)})
        steps = "1 step" if self.total_steps == 1 else f"{self.total_steps:,} steps"
        accelerator.print(
            f"{steps}, {self.batch[0]:,} {self.batch[1]} each, of {self.setup.trained_on}; processes: "
            f"{accelerator.num_processes}, {self.computing}"
        )
        if args.eval_on_start and self.step == 0:
            self.evaluate()
        with full_disk_named(self.output_dir):
            self._train()
            finished = self.step == self.total_steps
            if finished:
                self._finish()
            else:
                accelerator.print(f"Stopped after {self.step} of {self.total_steps} steps.")
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return finished

    def evaluate(self) -> dict[str, float]:
        """Measures the three tasks on the validation pairs, if there are any, for the log and the terminal."""
        if self.setup.validation is None:
            return {}
        with self.computing.threads():
            metrics = evaluate_pretraining(
                self.model,
                self.setup.validation,
                self.setup.collator,
                self.accelerator,
                num_workers=self.args.dataloader_num_workers,
            )
        self.log.write(self.step, {f"eval_{name}": value for name, value in metrics.items()})
        if self.accelerator.is_main_process and self.step < self.total_steps:
            tqdm.write(in_a_line(self.step, metrics))
        return metrics

    def _resume(self, checkpoint: Path) -> None:
        saved = self.checkpoints.read(checkpoint, self.identity)
        goes_further = self.checkpoints.check_steps(
            self.args.resume_from_checkpoint, checkpoint, self.total_steps, saved["total_steps"]
        )
        self.step = saved["step"]
        self.meter.load(saved["losses"])
        if self.accelerator.is_main_process:
            self.checkpoints.remove_leftovers()
            self.checkpoints.set_aside(checkpoint)
        self.accelerator.load_state(str(checkpoint))
        if isinstance(self.setup.train, StreamedPairs):
            self.setup.train.load_state_dict(saved["stream"][self.accelerator.process_index])
        if goes_further:
            follow_schedule(self.scheduler)
            self.checkpoints.reopen()
        logger.warning(f"Resumed from {checkpoint} after {self.step:,} of {self.total_steps:,} steps.")
        self.computing.warn_of_change(self.step)

    def _train(self) -> None:
        """Takes the steps that are left, or as many as Ctrl-C lets it; a checkpoint follows the last."""
        args, is_shown = self.args, self.accelerator.is_local_main_process
        self.model.train()
        self.meter.start_clock()
        progress = logging.tqdm(
            total=self.total_steps, initial=self.step, unit="step", desc="Pre-training", disable=not is_shown
        )
        with StopSignal() as stop, progress, self.computing.threads():
            while self.step < self.total_steps and not stop.is_set():
                for _ in self._steps_of_epoch():
                    progress.update()
                    if self.step % args.logging_steps == 0:
                        progress.set_postfix(beside_the_bar(self._log_losses()))
                    if self.step % (args.eval_steps or self.steps_per_epoch) == 0 and self.step < self.total_steps:
                        self.evaluate()
                        self.meter.start_clock()
                    ends = stop.agreed(self.accelerator) or self.step == self.total_steps
                    if self.step % args.save_steps == 0 or ends:
                        self._save_checkpoint()
                    if ends:
                        break

    def _steps_of_epoch(self) -> Iterator[None]:
        """Trains from where the run stands to the end of its epoch, and pauses after each step."""
        accelerator, accumulation = self.accelerator, self.args.gradient_accumulation_steps
        epoch, start_step = divmod(self.step, self.steps_per_epoch)
        self.sampler.set_epoch(epoch, start_step=start_step)
        batches = self.setup.train_batches(
            self.sampler, accelerator.device, num_workers=self.args.dataloader_num_workers
        )
        for index, (batch, weight) in enumerate(batches, start=1):
            is_last = index % accumulation == 0
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                outputs = self.model(**batch)
                # Rows of this micro-batch over those of the step, or of the mean step; DDP divides by the processes.
                accelerator.backward(outputs.loss * (weight * accelerator.num_processes))
            self.meter.add(outputs, batch["matching_labels"], weight)
            if is_last:
                self._change_weights()
                yield

    def _change_weights(self) -> None:
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.meter.gather()
        self.step += 1

    def _log_losses(self) -> dict[str, float]:
        position = {"learning_rate": self.scheduler.get_last_lr()[0], "epoch": self.epoch}
        values = self.meter.mean() | position
        self.log.write(self.step, values)
        return values

    def _save_checkpoint(self) -> None:
        state: dict[str, Any] = {"step": self.step, "losses": self.meter.state()}
        if isinstance(self.setup.train, StreamedPairs):
            of_process = [self.setup.train.state_dict(self._next_row)]
            state["stream"] = gather_object(of_process) if self.accelerator.num_processes > 1 else of_process
        self.checkpoints.save(state, self.identity, self.accelerator, self.setup.processor, self.computing)

    def _finish(self) -> None:
        """Saves the model, evaluates it, and writes its metrics and card."""
        # Before the last evaluation: whatever happens there, the model is saved.
        save_whole(self.accelerator, self.model, self.output_dir)
        if self.accelerator.is_main_process:
            self.setup.processor.save_pretrained(self.output_dir)
        metrics = self.evaluate()
        if self.accelerator.is_main_process:
            training = TrainingRun(
                steps=self.step,
                epochs=None if isinstance(self.setup.train, StreamedPairs) else self.epoch,
                batch_size=self.batch[0],
                rows=self.batch[1],
                learning_rate=self.args.learning_rate,
                seed=self.args.seed,
                mixed_precision=self.accelerator.mixed_precision,
                earlier_precisions=self.computing.earlier,
            )
            finish_run(
                self.output_dir,
                metrics,
                repo_id=self.args.hub_model_id if self.args.push_to_hub else None,
                base_model=self.data_args.base_model,
                training=training,
                **self.setup.card,
            )
            tqdm.write(in_a_table(self.output_dir, training, metrics))
