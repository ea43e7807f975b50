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

from transformers import TrainingArguments

from ...errors import run_script
from ...runs.arguments import parse_arguments
from ...runs.trainer import KEEP_BEST, TaskTrainer, train, training_defaults
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

    def evaluate_task(self, rows):
        """Measures the accuracies on validation questions, see [`evaluate_vcr`]."""
        with self.accelerator.autocast():
            return evaluate_vcr(self.setup.model, self.setup.collator, rows, self.setup.tasks, **self.loading)


def main(argv: list[str] | None = None) -> bool:
    """Trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    data_args, training_args = parse_arguments(
        (VCRArguments, TrainingArguments),
        argv,
        paper=training_defaults(PAPER) | KEEP_BEST,
        scenes=training_defaults(SCENES) | SCENES_FIELDS | KEEP_BEST,
        data="--annotations",
    )
    if training_args.metric_for_best_model in (None, "loss"):
        single = TASKS[data_args.tasks[0]] if len(data_args.tasks) == 1 else None
        training_args.metric_for_best_model = single or "joint_accuracy"
    return train(VCRTrainer, prepare_vcr, data_args, training_args)


if __name__ == "__main__":
    run_script(main)
