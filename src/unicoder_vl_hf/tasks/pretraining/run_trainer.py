"""Pre-trains Unicoder-VL with transformers' Trainer and every option of TrainingArguments.

    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run_trainer --output_dir runs/scenes
    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run_trainer --output_dir runs/flickr8k \
        --captions dataset_flickr8k.json --regions regions/ --model_name_or_path google-bert/bert-base-uncased

`--per_device_train_batch_size` counts pairs (each is a match and a mismatch), and every micro-batch holds as many. The
defaults are the paper's for one process: 48 pairs, 4 micro-steps; on P processes divide one of the two by P.
"""

from transformers import TrainingArguments, set_seed

from ...errors import run_script
from ...runs.arguments import parse_arguments
from ...runs.trainer import TaskTrainer, trainer_checkpoints, training_defaults
from .evaluation import evaluate_pretraining
from .loop import PAPER, SCENES
from .setup import PretrainingArguments, PretrainingSetup, prepare_pretraining


class PretrainingTrainer(TaskTrainer):
    """Trains and evaluates the three tasks of pre-training."""

    setup: PretrainingSetup

    def evaluate_task(self, rows):
        """Measures the three tasks on validation pairs, see [`evaluate_pretraining`]."""
        # Trainer's own loop keeps the logits of every token over the vocabulary: 30 GB for 5,000 pairs.
        return evaluate_pretraining(
            self.model_wrapped,
            rows,
            self.setup.collator,
            self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
        )


def main(argv: list[str] | None = None) -> bool:
    """Pre-trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    data_args, training_args = parse_arguments(
        (PretrainingArguments, TrainingArguments),
        argv,
        paper=training_defaults(PAPER),
        scenes=training_defaults(SCENES),
    )
    resume_from = trainer_checkpoints(training_args).resolve(training_args.resume_from_checkpoint)
    set_seed(training_args.seed)  # Trainer does so too late for the new weights
    with training_args.main_process_first():
        setup = prepare_pretraining(data_args, training_args.output_dir, seed=training_args.seed)
    if setup.validation is None:
        training_args.eval_strategy = "no"
    sampler = setup.token_batches(
        micro_batches=training_args.gradient_accumulation_steps,
        seed=training_args.seed,
        process_index=training_args.process_index,
        num_processes=training_args.world_size,
    )
    trainer = PretrainingTrainer(
        setup, training_args, base_model=data_args.base_model, resume_from=resume_from, sampler=sampler
    )
    return trainer.run()


if __name__ == "__main__":
    run_script(main)
