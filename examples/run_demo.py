"""The whole way on the rendered scenes: draw, store, pre-train, retrieve. `make demo` runs it.

    python examples/run_demo.py --output_dir demo

Writes `curves.png`, `gallery.html` (caption -> best five scenes) and `metrics.json`, and fails below 5 times chance.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import run_pretraining
from PIL import Image
from transformers import AutoModelForPreTraining, AutoProcessor, HfArgumentParser

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.pictures import GalleryItem, training_curves, write_gallery
from unicoder_vl_hf.preparation import DATA_FOLDER
from unicoder_vl_hf.pretraining import metrics_table, pretraining_chance, zero_shot_retrieval


@dataclass
class DemoArguments:
    output_dir: str = field(default="demo", metadata={"help": "Where everything goes."})
    seed: int = field(default=0, metadata={"help": "Of the training; the scenes stay the same."})
    num_queries: int = field(default=12, metadata={"help": "Captions in the gallery, drawn at random."})


def main() -> int:
    (args,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    started, output_dir = time.perf_counter(), Path(args.output_dir)
    for checkpoint in output_dir.glob("checkpoint-*"):  # of an earlier demo that was stopped
        shutil.rmtree(checkpoint)
    (output_dir / "model.safetensors").unlink(missing_ok=True)  # of one that was not
    run_pretraining.main(["--output_dir", str(output_dir), "--seed", str(args.seed)])

    model = AutoModelForPreTraining.from_pretrained(output_dir)
    processor = AutoProcessor.from_pretrained(output_dir)
    scenes = output_dir / DATA_FOLDER / "scenes"
    captions = read_captions(scenes / "captions.jsonl", split="test")
    retrieval = zero_shot_retrieval(model, processor, RegionStore(scenes / "regions"), captions)

    metrics = json.loads((output_dir / "metrics.json").read_text())
    chance = pretraining_chance(metrics)
    training_curves(
        output_dir / "log.jsonl", output_dir / "curves.png", chance=chance, title="Pre-training on the scenes"
    )
    rng = np.random.default_rng(args.seed)
    write_gallery(
        output_dir / "gallery.html",
        [
            GalleryItem.from_scores(
                retrieval.captions[row],
                retrieval.image_ids[retrieval.image_of_caption[row]],
                retrieval.image_ids,
                retrieval.scores[row],
            )
            for row in rng.permutation(len(retrieval.captions))[: args.num_queries]
        ],
        lambda image_id: Image.open(scenes / "photos" / f"{image_id}.png"),
        title="Zero-shot retrieval on rendered scenes",
        intro="Captions drawn at random from the test scenes, each of which holds a colour and shape that never meet "
        "in training, with the five scenes that the pre-trained matching head scores best.",
        metrics=retrieval.metrics,
        chance=retrieval.chance,
    )
    (output_dir / "metrics.json").write_text(json.dumps(metrics | retrieval.metrics, indent=2) + "\n")

    print(f"\nValidation scenes\n{metrics_table(metrics, chance)}")
    print(f"\nZero-shot retrieval on {len(retrieval.image_ids)} test scenes x {len(retrieval.captions)} captions")
    print(metrics_table(retrieval.metrics, retrieval.chance))
    print(f"\n{time.perf_counter() - started:.0f} s. Look at curves.png and gallery.html in {output_dir}.")
    name = "image_retrieval_recall@1"
    if retrieval.metrics[name] < 5 * retrieval.chance[name]:
        print(f"{name} is below 5 times chance: the model did not learn.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
