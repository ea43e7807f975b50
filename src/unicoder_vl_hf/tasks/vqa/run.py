"""Trains Unicoder-VL for questions about images, with transformers' Trainer and every option of TrainingArguments.

    accelerate launch -m unicoder_vl_hf.tasks.vqa.run --output_dir runs/vqa-scenes
    accelerate launch -m unicoder_vl_hf.tasks.vqa.run --output_dir runs/vqa \
        --questions v2_OpenEnded_mscoco_train2014_questions.json --annotations v2_mscoco_train2014_annotations.json \
        --validation_questions v2_OpenEnded_mscoco_val2014_questions.json \
        --validation_annotations v2_mscoco_val2014_annotations.json --regions coco-regions \
        --model_name_or_path runs/pretrained

Without --questions it trains a small model on questions about rendered scenes; with it, the defaults are UNITER's for
VQA. `--per_device_train_batch_size` counts questions of one process. The model of the highest validation accuracy is
kept; its answers are in the config.
"""

from transformers import TrainingArguments

from ...errors import run_script
from ...runs.labelled import train_labelled
from .training import PAPER, VQAArguments, prepare_vqa


def main(argv: list[str] | None = None) -> bool:
    """Trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    return train_labelled(
        (VQAArguments, TrainingArguments), prepare_vqa, argv, paper=PAPER, scenes={"num_train_epochs": 16}
    )


if __name__ == "__main__":
    run_script(main)
