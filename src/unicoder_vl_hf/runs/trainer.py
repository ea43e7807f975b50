"""The Trainer of transformers as all tasks use it: its evaluation keeps no logits, it can be stopped at any step
without loss, it writes our model card, and it shows the losses beside one quiet progress bar.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from transformers.utils import CONFIG_NAME

from .. import logging
from ..configuration_unicoder_vl import UnicoderVLConfig
from ..data.samplers import TokenBatchSampler
from ..files import full_disk_named
from ..processes import Computing, StopSignal
from .arguments import ModelArguments
from .checkpoints import CheckpointFolder, follow_schedule
from .log import LossMeter, beside_the_bar, in_a_line, in_a_table
from .model_card import TrainingRun, write_model_card
from .setup import TrainingSetup

logger = logging.get_logger(__name__)

_STATE_FILE = "trainer_state.json"


def trainer_checkpoints(args: TrainingArguments) -> CheckpointFolder:
    """Gives the checkpoints of a run of Trainer, to be found, resumed and limited in number."""
    return CheckpointFolder(Path(str(args.output_dir)), state_file=_STATE_FILE)


def training_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """
    Makes defaults of `TrainingArguments` from a recipe.

    Args:
        recipe (`dict`): `num_train_epochs`, `learning_rate`, `gradient_accumulation_steps`, and `train_batch_size`, the
            rows of a step of one process over all of its micro-steps.
    """
    on_gpu, micro_steps = torch.cuda.is_available(), recipe["gradient_accumulation_steps"]
    return {
        "num_train_epochs": recipe["num_train_epochs"],
        "learning_rate": recipe["learning_rate"],
        "per_device_train_batch_size": recipe["train_batch_size"] // micro_steps,
        "gradient_accumulation_steps": micro_steps,
        "warmup_steps": 0.1,
        "bf16": None,  # as pays for the model, once it is known
        "use_cpu": not on_gpu,
        "eval_strategy": "epoch",
        "remove_unused_columns": False,
        "dataloader_drop_last": True,  # every micro-batch holds the same number of pairs
        "logging_steps": 20,
        "logging_nan_inf_filter": False,  # which hides a loss that is NaN, and waits for the device at every step
        "report_to": "none",
    }


# Defaults of a task whose best model is kept.
KEEP_BEST = {
    "save_strategy": "epoch",
    "save_total_limit": 2,  # the best and the last
    "load_best_model_at_end": True,
    "greater_is_better": True,
}


class TaskTrainer(Trainer):
    """
    Trains and evaluates one of our tasks; a subclass says how a model is evaluated.

    Args:
        setup ([`TrainingSetup`]): The model, data and loss of the run, such as those of [`prepare_retrieval`].
        args ([`TrainingArguments`]): The arguments of the run. `bf16=None` trains in the precision that pays for the
            model.
        base_model (`str`, *optional*): The model that the training started from, for the card.
        callbacks (sequence of [`TrainerCallback`], *optional*): Further callbacks of Trainer.
        resume_from (`Path`, *optional*): The checkpoint to go on from, as [`trainer_checkpoints`] resolves it.
        sampler ([`TokenBatchSampler`], *optional*): The batches, for those of equal tokens.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        args: TrainingArguments,
        base_model: str | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        resume_from: Path | None = None,
        sampler: TokenBatchSampler | None = None,
    ):
        undecided = cast(bool | None, args.bf16) is None and not args.fp16
        asked = "auto" if undecided else args.mixed_precision
        step = trainer_checkpoints(args).step_of(resume_from)
        self.computing = Computing.choose(asked, args.device.type, setup.model.config.hidden_size, resume_from, step)
        args.mixed_precision = self.computing.mixed_precision
        args.bf16, args.fp16 = (args.mixed_precision == name for name in ("bf16", "fp16"))
        epoch_of_data = EpochOfData(sampler, setup.facts)
        super().__init__(
            model=setup.model,
            args=args,
            data_collator=setup.collator,
            train_dataset=setup.train,
            eval_dataset=setup.validation,
            processing_class=setup.processor,
            callbacks=[
                epoch_of_data,
                *callbacks,
            ],
        )
        if self.pop_callback(ProgressCallback) is not None:  # none under --disable_tqdm
            self.add_callback(_LossesBesideTheBar())
        self.setup = setup
        self.base_model = base_model
        self.last_metrics: dict[str, float] = {}
        self.meter = LossMeter(self.accelerator, setup.loss_parts)
        self.sampler = sampler
        self._facts = epoch_of_data.kept
        self._resumed_from = resume_from
        self._goes_further = False

    def get_train_dataloader(self) -> DataLoader:
        """Makes the loader of the training rows, each process its own where batches have equal tokens."""
        if self.sampler is None:
            return super().get_train_dataloader()
        return DataLoader(
            self.setup.train,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # or it would draw from the dropout's
        )

    def evaluate_task(self, rows: Any) -> dict[str, float]:
        """Measures the model on the validation rows, with the same result in every process; a subclass says how."""
        raise NotImplementedError

    @property
    def loading(self) -> dict[str, int]:
        """The `batch_size` and `num_workers` of an evaluation."""
        return {
            "batch_size": self.args.per_device_eval_batch_size,
            "num_workers": self.args.dataloader_num_workers,
        }

    def set_initial_training_values(self, args, dataloader):
        """
        Counts the steps of the run, and checks them against those of the checkpoint that is resumed.

        Raises:
            `ValueError`: the rows fill no micro-batch, or the run had other tokens a batch, other facts, another head
                or joint dropout, or more steps.
            `FinishedRun`: the latest checkpoint is that of a finished run, of which no more is asked.
        """
        if len(dataloader) == 0:
            raise ValueError(
                f"The {len(self.setup.train):,} {self.setup.rows} of training fill no micro-batch of "
                f"{args.train_batch_size} in each of {args.world_size} processes: give a smaller "
                "--per_device_train_batch_size."
            )
        values = super().set_initial_training_values(args, dataloader)
        if self._resumed_from is not None:
            before = TrainerState.load_from_json(str(self._resumed_from / _STATE_FILE))
            kept = before.stateful_callbacks.get("EpochOfData", {"attributes": {}})["attributes"]
            config, file = self.setup.model.config, self._resumed_from / CONFIG_NAME
            # Sharded weights have no configuration beside them.
            was = UnicoderVLConfig.from_json_file(file) if file.exists() else config
            for name, then, now in (
                *((name, kept.get(name), self._facts.get(name)) for name in kept | self._facts),
                ("matching_head", was.matching_head, config.matching_head),
                ("joint_dropout", was.joint_dropout_prob, config.joint_dropout_prob),
                ("similarity_in_training", was.similarity_in_training, config.similarity_in_training),
            ):
                if then != now:
                    raise ValueError(f"{self._resumed_from} is of a run with {name}={then}, not {now}: give that.")
            checkpoints, requested = trainer_checkpoints(args), args.resume_from_checkpoint
            self._goes_further = checkpoints.check_steps(requested, self._resumed_from, values[-1], before.max_steps)
            if self._goes_further:
                checkpoints.reopen()
            self.computing.warn_of_change(before.global_step)
        return values

    def _load_optimizer_and_scheduler(self, checkpoint):
        if self.args.device.type == "cpu":
            # Of several processes it is cpu:0, which torch.load does not know, and transformers 5.17 gives to it.
            self.args._setup_devices = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)
        rates = getattr(self.lr_scheduler, "base_lrs", None)  # which a checkpoint brings along
        if checkpoint is not None and rates and not any(math.isclose(self.args.learning_rate, rate) for rate in rates):
            logger.warning(
                f"{checkpoint} is of a run with --learning_rate {max(rates)}, which it goes on with, and not with "
                f"{self.args.learning_rate}."
            )
            self.args.learning_rate = max(rates)
        if self._goes_further:
            follow_schedule(cast(LRScheduler, self.lr_scheduler))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes the loss of the setup, or else of the model, whose parts it adds to the meter."""
        if self.setup.loss is not None:
            loss = self.setup.loss(model, inputs)
            return (loss, {}) if return_outputs else loss  # Trainer's own evaluation, which asks for them, is replaced
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        weight = 1.0
        if self.sampler is not None:  # which counts pairs, and each is two rows: a match and a mismatch
            weight = len(inputs["matching_labels"]) / (2 * self.sampler.mean_rows)
            loss = loss * weight
        if self.setup.loss_parts:
            self.meter.add(outputs, inputs["matching_labels"], weight / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Logs values as Trainer does, with the mean of each part of the loss."""
        if "loss" in logs and self.setup.loss_parts:
            self.meter.gather()
            parts = self.meter.mean()
            names = self.setup.loss_parts if self.sampler is None else self.meter.losses
            logs |= {name: parts[name] for name in names}
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir):
        """Saves all that a checkpoint needs before Trainer's state, which makes it whole: of every process, too."""
        super()._save_rng_state(output_dir)
        if self.is_world_process_zero():
            self.computing.save(Path(output_dir))
            # Trainer removes the oldest by their times, and clocks jump. This one is by that of the disk.
            newest = os.stat(output_dir).st_mtime
            for age, checkpoint in enumerate(reversed(trainer_checkpoints(self.args).list()), start=1):
                os.utime(checkpoint, (newest - age, newest - age))
        self.accelerator.wait_for_everyone()

    def conclude(self) -> None:
        """Measures values that are saved with the kept model, in every process; by default there are none."""

    def training_run(self) -> TrainingRun:
        """Describes the training as it really ran, for the card."""
        args, state = self.args, self.state
        batch_size, rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size, self.setup.rows
        if self.sampler is not None:
            batch_size, rows = self.sampler.tokens_per_batch, "tokens"
        return TrainingRun(
            steps=state.global_step,
            epochs=state.epoch or 0,
            batch_size=batch_size,
            learning_rate=args.learning_rate,
            seed=args.seed,
            mixed_precision=self.accelerator.mixed_precision,
            earlier_precisions=self.computing.earlier,
            rows=rows,
            kept_step=self._kept_step() if args.load_best_model_at_end else None,
        )

    def _kept_step(self) -> int:
        """Gives the step of the model that is kept, the best that was saved, which need not be the best there was."""
        best = self.state.best_model_checkpoint
        return self.state.global_step if best is None else int(Path(best).name.rpartition("-")[2])

    def _load_callback_state(self):
        """Restores the callbacks, but for ours, whose state follows from the command line, and is checked."""
        ours = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EpochOfData)]
        super()._load_callback_state()
        for callback in ours:
            self.remove_callback(type(callback))
            self.add_callback(callback)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """
        Evaluates by `evaluate_task`, on the validation rows of the setup by default, and logs the metrics. After the
        last step of a training it saves the model first.

        Raises:
            `ValueError`: there are no validation rows.
        """
        rows = self.setup.validation if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError(
                "There is nothing to validate on: give --validation_split, and --max_validation_… above 0."
            )
        if self.is_in_train and self.state.global_step >= self.state.max_steps:
            self.save_model(_internal_call=True)  # before the last evaluation, in which it would otherwise be lost
        metrics = self.evaluate_task(rows)
        self.last_metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(self.last_metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, self.last_metrics)
        return self.last_metrics

    def create_model_card(self, *args, **kwargs):
        """Writes our model card into the output folder, by the main process."""
        if self.is_world_process_zero():
            write_model_card(
                Path(str(self.args.output_dir)),
                base_model=self.base_model,
                repo_id=self.hub_model_id,
                metrics=self.last_metrics,
                training=self.training_run(),
                **self.setup.card,
            )

    def run(self) -> bool:
        """
        Trains, saves the model with its card, and pushes it if `push_to_hub` asks for it.

        Returns:
            Whether the training came to its end; if Ctrl-C or SIGTERM stopped it, a checkpoint to resume from is left.
        """
        self.accelerator.print(f"How it computes: {self.computing}")
        checkpoint = None if self._resumed_from is None else str(self._resumed_from)
        if checkpoint is not None:
            self.accelerator.print(f"Going on from {checkpoint}, whose weights replace those loaded before.")
        if self.is_world_process_zero():
            trainer_checkpoints(self.args).remove_leftovers()
            if self._resumed_from is not None:
                trainer_checkpoints(self.args).set_aside(self._resumed_from)
        with StopSignal() as stop, self.computing.threads():
            stopping = _StopWithCheckpoint(stop, self)
            self.add_callback(stopping)
            self.train(resume_from_checkpoint=checkpoint)
        if stopping.stopped:
            self.accelerator.print(f"Stopped after {self.state.global_step} of {self.state.max_steps} steps.")
            return False
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        best = [entry for entry in self.state.log_history if entry["step"] == self._kept_step() and name in entry]
        if self.args.load_best_model_at_end and best:  # which may not be the last
            self.last_metrics = {name: value for name, value in best[-1].items() if name.startswith("eval_")}
        self.conclude()
        self.save_model(_internal_call=True)  # it is pushed at the end, with its card
        if self.args.eval_strategy != "no" and not self.last_metrics:  # all that the run we resumed had left to do
            self.evaluate()
        self.save_state()
        if self.last_metrics:
            self.save_metrics("eval", self.last_metrics)
        self.create_model_card()
        if self.args.push_to_hub:
            self.push_to_hub()
        self.accelerator.print(in_a_table(self.args.output_dir, self.training_run(), self.last_metrics))
        return True


def train(
    trainer: type[TaskTrainer],
    prepare: Callable[..., TrainingSetup],
    arguments: ModelArguments,
    args: TrainingArguments,
    **options: Any,
) -> bool:
    """
    Trains as the command line of a script asks for, in a new run or from a checkpoint.

    Args:
        trainer (`type`): The [`TaskTrainer`] of the task.
        prepare (callable): Builds the setup of `arguments` in the output folder.
        arguments ([`ModelArguments`]), args ([`TrainingArguments`]): The command line.
        options: Further arguments of the trainer.

    Returns:
        Whether the training came to its end, see [`~TaskTrainer.run`].
    """
    resume_from = trainer_checkpoints(args).resolve(args.resume_from_checkpoint)
    set_seed(args.seed)  # Trainer does so too late for the new weights
    with args.main_process_first():
        setup = prepare(arguments, args.output_dir)
    if setup.validation is None:
        args.eval_strategy, args.load_best_model_at_end = "no", False
    if args.label_smoothing_factor and setup.rows == TrainingSetup.rows:
        raise ValueError(f"--label_smoothing_factor {args.label_smoothing_factor}: no loss of pairs has one, leave it.")
    if args.n_gpu > 1:  # which Trainer would split every batch over, and captions from their images
        logger.warning(f"One process uses one of the {args.n_gpu} GPUs: `accelerate launch` uses them all.")
        args._n_gpu = 1
    states = ("optimizer*", "global_step*")  # those of DeepSpeed
    if resume_from is not None and not any(path for name in states for path in Path(resume_from).glob(name)):
        raise ValueError(
            f"{resume_from} has no state of the optimizer (--save_only_model), so that no run goes on from it: begin "
            "a new one from its weights, --model_name_or_path, in another --output_dir."
        )
    with full_disk_named(Path(str(args.output_dir))):
        return trainer(setup, args, base_model=arguments.base_model, resume_from=resume_from, **options).run()


class EpochOfData(TrainerCallback, ExportableState):
    """
    Tells the epoch to the training data, whose masks and negatives follow from it, which accelerate does in a single
    process only. Any Trainer takes it: `Trainer(…, callbacks=[EpochOfData()])`.

    Args:
        sampler ([`TokenBatchSampler`], *optional*): The sampler of the batches, which is told the epoch, too.
        facts (`dict`, *optional*): What every checkpoint keeps of the data, beside the tokens of a batch.
    """

    def __init__(self, sampler: TokenBatchSampler | None = None, facts: Mapping[str, Any] | None = None):
        self.sampler = sampler
        self.kept = {} if sampler is None else {"tokens_per_batch": sampler.tokens_per_batch}
        self.kept |= facts or {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Makes a place for what it keeps in the state of a run that is older than it."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Sets the epoch of the data, as Trainer counts it, from 0."""
        train_dataloader.dataset.set_epoch(int(state.epoch))
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch))

    def state(self) -> dict[str, Any]:
        """The tokens of a batch, nothing for batches of equal rows, and the facts, which every checkpoint keeps."""
        return {"args": {}, "attributes": self.kept}


class _LossesBesideTheBar(ProgressCallback):
    """Shows the latest losses beside one bar, where transformers prints a dict for every line of the log."""

    training_bar: tqdm | None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(beside_the_bar(logs))
        metrics = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if metrics:
            self.training_bar.write(in_a_line(state.global_step, metrics))


class _StopWithCheckpoint(TrainerCallback):
    """Ends a training at Ctrl-C or SIGTERM, with a checkpoint after the same step in every process."""

    def __init__(self, stop: StopSignal, trainer: Trainer):
        self.stop = stop
        self.accelerator = trainer.accelerator
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.agreed(self.accelerator) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # within the epoch, to which its evaluation and its checkpoint do not belong
            control.should_evaluate = control.should_save = False
