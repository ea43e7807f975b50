"""Pre-trains Unicoder-VL with transformers' Trainer and every option of TrainingArguments.

    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run_trainer --output_dir runs/scenes
    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run_trainer --output_dir runs/flickr8k \
        --captions dataset_flickr8k.json --regions regions/ --model_name_or_path google-bert/bert-base-uncased

`--per_device_train_batch_size` counts pairs (each is a match and a mismatch), and every micro-batch holds as many. The
defaults are the paper's for one process: 48 pairs, 4 micro-steps; on P processes divide one of the two by P.
"""

from functools import partial
from typing import Any

from transformers import TrainingArguments

from ...errors import run_script
from ...runs.arguments import parse_arguments
from ...runs.trainer import TaskTrainer, train, training_defaults
from .evaluation import evaluate_pretraining
from .loop import PAPER, SCENES, STRONG
from .setup import PretrainingArguments, PretrainingSetup, prepare_pretraining


class PretrainingTrainer(TaskTrainer):
    """Trains and evaluates the three tasks of pre-training."""

    setup: PretrainingSetup

    def __init__(self, setup: PretrainingSetup, args: TrainingArguments, **options: Any):
        sampler = setup.token_batches(
            micro_batches=args.gradient_accumulation_steps,
            seed=args.seed,
            process_index=args.process_index,
            num_processes=args.world_size,
        )
        super().__init__(setup, args, sampler=sampler, **options)

    def evaluate_task(self, rows):
        """Measures the three tasks on validation pairs, see [`evaluate_pretraining`]."""
        # Trainer's own loop keeps the logits of every token over the vocabulary: 30 GB for 5,000 pairs.
        return evaluate_pretraining(self.model_wrapped, rows, self.setup.collator, self.accelerator, **self.loading)


def main(argv: list[str] | None = None) -> bool:
    """Pre-trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    data_args, training_args = parse_arguments(
        (PretrainingArguments, TrainingArguments),
        argv,
        paper=training_defaults(PAPER),
        scenes=training_defaults(SCENES),
        recipes={"strong": STRONG},
    )
    if data_args.streaming:
        raise ValueError("Trainer cannot go on exactly in a stream: leave out --streaming, or use run_pretraining.py.")
    if training_args.metric_for_best_model in (None, "loss"):  # which is not measured
        training_args.metric_for_best_model, training_args.greater_is_better = "matching_auc", True
    return train(PretrainingTrainer, partial(prepare_pretraining, seed=training_args.seed), data_args, training_args)


if __name__ == "__main__":
    run_script(main)
