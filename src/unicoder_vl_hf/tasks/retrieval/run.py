"""Fine-tunes Unicoder-VL for image-text retrieval with transformers' Trainer and every option of TrainingArguments.

    accelerate launch -m unicoder_vl_hf.tasks.retrieval.run --output_dir runs/retrieval
    accelerate launch -m unicoder_vl_hf.tasks.retrieval.run --output_dir runs/flickr8k-retrieval \
        --captions dataset_flickr8k.json --regions regions/ --model_name_or_path runs/flickr8k

Without --captions it trains a small model on the rendered scenes; with it, the defaults are the paper's (section
Image-Text Retrieval): for each positive pair 3 captions and 3 images that do not match, the hardest-negative triplet
loss of both directions on sigmoid(score), margin 0.2, learning rate 5e-5, 192 positive pairs a step in 4 micro-steps.
`--per_device_train_batch_size` counts positive pairs; the defaults are for one process: on P, divide one of the two
counts by P. The model that scores the highest sum of recalls on a part of the validation split is kept. With
`--contrastive_weight` a first stage of search is trained along, and the weight of its similarity measured at the end.
"""

from functools import partial

from transformers import EarlyStoppingCallback, TrainingArguments

from ...errors import run_script
from ...runs.arguments import parse_arguments
from ...runs.trainer import KEEP_BEST, TaskTrainer, train, training_defaults
from .training import (
    PAPER,
    RECIPES,
    SCENES,
    RetrievalArguments,
    RetrievalSetup,
    bert_weights,
    evaluate_retrieval,
    prepare_retrieval,
)


class RetrievalTrainer(TaskTrainer):
    """Trains and evaluates image-text retrieval."""

    setup: RetrievalSetup

    def create_optimizer(self, *args, **kwargs):
        """Makes the optimizer, in which what a BERT knows may have a learning rate of its own."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if (rate := self.setup.bert_learning_rate) is not None and not made:
            known = {id(weight) for weight in bert_weights(self.setup.model)}
            for group in list(optimizer.param_groups):
                weights = group["params"]
                group["params"] = [weight for weight in weights if id(weight) not in known]
                of_bert = [weight for weight in weights if id(weight) in known]
                if of_bert:
                    optimizer.add_param_group({**group, "params": of_bert, "lr": rate})
        return optimizer

    def conclude(self):
        """Measures the weight of the similarity in a search, if a first stage was trained."""
        self.setup.measure_similarity_weight()
        if self.setup.search is not None:
            self.accelerator.print(self.setup.search)

    def evaluate_task(self, rows):
        """Measures recall on validation captions, see [`evaluate_retrieval`]."""
        setup, collator = self.setup, self.setup.collator
        return evaluate_retrieval(
            setup.model, setup.processor, collator.store, rows, collator.max_length, setup.first_stage_alone
        )


def main(argv: list[str] | None = None) -> bool:
    """Trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    shared = KEEP_BEST | {
        "metric_for_best_model": "recall_sum",
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
    }
    data_args, training_args = parse_arguments(
        (RetrievalArguments, TrainingArguments),
        argv,
        paper=training_defaults(PAPER) | shared,
        scenes=training_defaults(SCENES) | shared,
        recipes=RECIPES,
    )
    patience = data_args.early_stopping_patience
    if patience is not None and training_args.eval_strategy == "no":
        raise ValueError("--early_stopping_patience needs a validation, which --eval_strategy no leaves out.")
    callbacks = [] if patience is None else [EarlyStoppingCallback(patience)]
    return train(
        RetrievalTrainer,
        partial(prepare_retrieval, seed=training_args.seed),
        data_args,
        training_args,
        callbacks=callbacks,
    )


if __name__ == "__main__":
    run_script(main)
