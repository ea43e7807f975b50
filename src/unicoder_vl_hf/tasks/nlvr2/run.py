"""Trains Unicoder-VL for sentences about two photos, with transformers' Trainer and every option of TrainingArguments.

    accelerate launch -m unicoder_vl_hf.tasks.nlvr2.run --output_dir runs/nlvr2-scenes
    accelerate launch -m unicoder_vl_hf.tasks.nlvr2.run --output_dir runs/nlvr2 --annotations train.json \
        --validation_annotations dev.json --regions nlvr2-regions --model_name_or_path runs/pretrained

Without --annotations it trains a small model on sentences about pairs of rendered scenes; with it, the defaults are
near UNITER's for NLVR2. The model of the highest validation accuracy is kept.
"""

from transformers import TrainingArguments

from ...errors import run_script
from ...runs.labelled import train_labelled
from .training import PAPER, NLVR2Arguments, prepare_nlvr2


def main(argv: list[str] | None = None) -> bool:
    """Trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    return train_labelled((NLVR2Arguments, TrainingArguments), prepare_nlvr2, argv, paper=PAPER, scenes={})


if __name__ == "__main__":
    run_script(main)
