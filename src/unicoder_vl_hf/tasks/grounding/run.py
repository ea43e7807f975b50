"""Trains Unicoder-VL for expressions that refer to a region, with transformers' Trainer and all its options.

    accelerate launch -m unicoder_vl_hf.tasks.grounding.run --output_dir runs/grounding-scenes
    accelerate launch -m unicoder_vl_hf.tasks.grounding.run --output_dir runs/refcoco --refs 'refcoco/refs(unc).p' \
        --instances refcoco/instances.json --regions coco-regions --model_name_or_path runs/pretrained

Without --refs it trains a small model on expressions about objects of rendered scenes; with it, the defaults are near
UNITER's for RefCOCO. The model of the highest validation accuracy is kept.
"""

from transformers import TrainingArguments

from ...errors import run_script
from ...runs.labelled import train_labelled
from .training import PAPER, GroundingArguments, prepare_grounding

# New weights of the usual size do not learn in minutes where things lie.
PLACES = {"location_initializer_range": 1.0}


def main(argv: list[str] | None = None) -> bool:
    """Trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    return train_labelled((GroundingArguments, TrainingArguments), prepare_grounding, argv, paper=PAPER, scenes=PLACES)


if __name__ == "__main__":
    run_script(main)
