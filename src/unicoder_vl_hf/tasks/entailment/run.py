"""Trains Unicoder-VL for visual entailment, with transformers' Trainer and every option of TrainingArguments.

    accelerate launch -m unicoder_vl_hf.tasks.entailment.run --output_dir runs/entailment-scenes
    accelerate launch -m unicoder_vl_hf.tasks.entailment.run --output_dir runs/snli-ve \
        --annotations snli_ve_train.jsonl --validation_annotations snli_ve_dev.jsonl --regions flickr30k-regions \
        --model_name_or_path runs/pretrained

Without --annotations it trains a small model on hypotheses about rendered scenes; with it, the defaults are UNITER's.
The model of the highest validation accuracy is kept.
"""

from transformers import TrainingArguments

from ...errors import run_script
from ...runs.labelled import train_labelled
from .training import PAPER, EntailmentArguments, prepare_entailment


def main(argv: list[str] | None = None) -> bool:
    """Trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    return train_labelled(
        (EntailmentArguments, TrainingArguments), prepare_entailment, argv, paper=PAPER, scenes={"num_train_epochs": 4}
    )


if __name__ == "__main__":
    run_script(main)
