"""Pre-trains a Unicoder-VL further on the text of VCR, before run_vcr.py fine-tunes it: as UNITER did, not the paper.

    accelerate launch -m unicoder_vl_hf.tasks.vcr.run_pretraining --output_dir runs/vcr-second-stage \
        --annotations vcr1annots --metadata vcr1images --regions vcr-regions --model_name_or_path runs/pretrained
    accelerate launch -m unicoder_vl_hf.tasks.vcr.run --output_dir runs/vcr \
        --annotations vcr1annots --metadata vcr1images --regions vcr-regions --model_name_or_path runs/vcr-second-stage

It predicts masked tokens and masked object classes of each question with its right answer and rationale, whose
references point at their regions. The defaults are those of the fine-tuning.
"""

from functools import partial

from transformers import TrainingArguments

from ...errors import run_script
from ...runs.arguments import parse_arguments
from ...runs.masked_prediction import evaluate_masked_prediction
from ...runs.trainer import TaskTrainer, train, training_defaults
from .pretraining import (
    VCRPretrainingArguments,
    VCRPretrainingSetup,
    prepare_vcr_pretraining,
)
from .training import PAPER, SCENES, SCENES_FIELDS


class VCRPretrainingTrainer(TaskTrainer):
    """Trains and evaluates a second stage of pre-training on VCR."""

    setup: VCRPretrainingSetup

    def evaluate_task(self, rows):
        """Measures the masked tasks on validation questions, see [`evaluate_masked_prediction`]."""
        return evaluate_masked_prediction(self.setup.model, rows, self.setup.collator, self.accelerator, **self.loading)


def main(argv: list[str] | None = None) -> bool:
    """Pre-trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    data_args, training_args = parse_arguments(
        (VCRPretrainingArguments, TrainingArguments),
        argv,
        paper=training_defaults(PAPER),
        scenes=training_defaults(SCENES) | SCENES_FIELDS,
        data="--annotations",
    )
    return train(
        VCRPretrainingTrainer, partial(prepare_vcr_pretraining, seed=training_args.seed), data_args, training_args
    )


if __name__ == "__main__":
    run_script(main)
