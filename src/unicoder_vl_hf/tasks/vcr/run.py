"""Trains Unicoder-VL for visual commonsense reasoning with transformers' Trainer and every option of TrainingArguments.

    accelerate launch -m unicoder_vl_hf.tasks.vcr.run --output_dir runs/vcr-scenes
    accelerate launch -m unicoder_vl_hf.tasks.vcr.run --output_dir runs/vcr \
        --annotations vcr1annots --metadata vcr1images --regions vcr-regions --model_name_or_path runs/pretrained

Without --annotations it trains a small model on questions about rendered scenes; with it, the defaults are the paper's
(section Visual Commonsense Reasoning): 20 epochs, learning rate 3e-5, 48 examples a step in 4 micro-steps, where an
example is a question with its four answers, or one with its right answer and four rationales. One model learns both;
`--tasks qa` or `--tasks qar` learns one. `--per_device_train_batch_size` counts examples; the defaults are for one
process: on P, divide one of the two counts by P. The model of the highest validation accuracy (Q->AR) is kept.
"""

from transformers import TrainingArguments, set_seed

from ...errors import run_script
from ...runs.arguments import parse_arguments
from ...runs.trainer import TaskTrainer, trainer_checkpoints, training_defaults
from .training import (
    PAPER,
    SCENES,
    SCENES_FIELDS,
    TASKS,
    VCRArguments,
    VCRSetup,
    evaluate_vcr,
    prepare_vcr,
)


class VCRTrainer(TaskTrainer):
    """Trains and evaluates visual commonsense reasoning, for one task or both."""

    setup: VCRSetup

    def __init__(self, tasks: list[str], *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tasks = tasks

    def evaluate_task(self, rows):
        """Measures the accuracies on validation questions, see [`evaluate_vcr`]."""
        with self.accelerator.autocast():
            return evaluate_vcr(
                self.setup.model,
                self.setup.collator,
                rows,
                self.tasks,
                batch_size=self.args.per_device_eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
            )


def main(argv: list[str] | None = None) -> bool:
    """Trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    shared = {
        "save_strategy": "epoch",
        "save_total_limit": 2,  # the best and the last
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }
    data_args, training_args = parse_arguments(
        (VCRArguments, TrainingArguments),
        argv,
        paper=training_defaults(PAPER) | shared,
        scenes=training_defaults(SCENES) | SCENES_FIELDS | shared,
        data="--annotations",
    )
    if training_args.metric_for_best_model in (None, "loss"):
        single = TASKS[data_args.tasks[0]] if len(data_args.tasks) == 1 else None
        training_args.metric_for_best_model = single or "joint_accuracy"

    resume_from = trainer_checkpoints(training_args).resolve(training_args.resume_from_checkpoint)
    set_seed(training_args.seed)  # Trainer does so too late for the new weights
    with training_args.main_process_first():
        setup = prepare_vcr(data_args, training_args.output_dir)
    trainer = VCRTrainer(
        data_args.tasks, setup, training_args, base_model=data_args.base_model, resume_from=resume_from
    )
    return trainer.run()


if __name__ == "__main__":
    run_script(main)
