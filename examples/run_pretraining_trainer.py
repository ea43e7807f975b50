"""Pre-trains Unicoder-VL with transformers' Trainer and every option of TrainingArguments.

    accelerate launch examples/run_pretraining_trainer.py --output_dir runs/scenes
    accelerate launch examples/run_pretraining_trainer.py --output_dir runs/flickr8k \
        --captions dataset_flickr8k.json --regions regions/ --model_name_or_path google-bert/bert-base-uncased

`--per_device_train_batch_size` counts pairs (each is a match and a mismatch), and every micro-batch holds so many. The
defaults are the paper's for one process: 48 pairs, 4 micro-steps; on P processes divide one of the two by P.
"""

import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed

from unicoder_vl_hf.pretraining import (
    PretrainingArguments,
    PretrainingSetup,
    evaluate_pretraining,
    prepare_pretraining,
    preset,
)
from unicoder_vl_hf.training import CheckpointFolder, StopSignal, fast_precision, write_model_card


class PretrainingTrainer(Trainer):
    """Evaluates the three tasks batch by batch, whatever the size of the split, and writes our model card."""

    def __init__(self, setup: PretrainingSetup, args: TrainingArguments, base_model: str | None):
        super().__init__(
            model=setup.model,
            args=args,
            data_collator=setup.collator,
            train_dataset=setup.train,
            eval_dataset=setup.validation,
            processing_class=setup.processor,
        )
        self.setup = setup
        self.base_model = base_model
        self.last_metrics: dict[str, float] = {}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        pairs = self.setup.validation if eval_dataset is None else eval_dataset
        if pairs is None:
            raise ValueError("There are no validation pairs: see --max_validation_pairs and --validation_split.")
        # Trainer's own loop keeps the logits of every token over the vocabulary: 30 GB for 5,000 pairs.
        metrics = evaluate_pretraining(
            self.model_wrapped,
            pairs,
            self.setup.collator,
            self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
        )
        self.last_metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(self.last_metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, self.last_metrics)
        return self.last_metrics

    def create_model_card(self, *args, **kwargs):
        if self.is_world_process_zero():
            write_model_card(
                Path(str(self.args.output_dir)),
                base_model=self.base_model,
                repo_id=self.hub_model_id,
                data_name=self.setup.data_name,
                provenance=self.setup.processor.feature_extractor.region_provenance,
                metrics=self.last_metrics,
            )


class EpochOfData(TrainerCallback):
    """Masks and mismatches follow the epoch, which accelerate tells to the data in a single process only."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))


class StopWithCheckpoint(TrainerCallback):
    """Ctrl-C or SIGTERM: a checkpoint after the step, the same one in every process, and the end."""

    def __init__(self, stop: StopSignal, trainer: Trainer):
        self.stop = stop
        self.accelerator = trainer.accelerator

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.is_set():
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            control.should_save = control.should_training_stop = True


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser((PretrainingArguments, TrainingArguments), allow_abbrev=False)  # type: ignore[arg-type]
    values = preset(argv)
    parser.set_defaults(
        num_train_epochs=values["num_train_epochs"],
        learning_rate=values["learning_rate"],
        per_device_train_batch_size=values["train_batch_size"] // values["gradient_accumulation_steps"],
        gradient_accumulation_steps=values["gradient_accumulation_steps"],
        warmup_steps=0.1,
        bf16=fast_precision("cuda" if torch.cuda.is_available() else "cpu") == "bf16",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="epoch",
        remove_unused_columns=False,
        dataloader_drop_last=True,  # every micro-batch holds the same number of pairs
        report_to="none",
    )
    data_args, training_args = parser.parse_args_into_dataclasses(argv)

    checkpoints = CheckpointFolder(Path(str(training_args.output_dir)), state_file="trainer_state.json")
    resume_from = checkpoints.resolve(training_args.resume_from_checkpoint)
    set_seed(training_args.seed)  # Trainer does so too late for the new weights
    with training_args.main_process_first():
        setup = prepare_pretraining(data_args, training_args.output_dir, seed=training_args.seed)
    if setup.validation is None:
        training_args.eval_strategy = "no"
    trainer = PretrainingTrainer(setup, training_args, base_model=data_args.base_model)
    trainer.add_callback(EpochOfData())
    with StopSignal() as stop:
        trainer.add_callback(StopWithCheckpoint(stop, trainer))
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    if trainer.state.global_step < trainer.state.max_steps:
        trainer.accelerator.print(
            f"Stopped after {trainer.state.global_step} of {trainer.state.max_steps} steps: "
            "go on with --resume_from_checkpoint latest."
        )
        return
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
