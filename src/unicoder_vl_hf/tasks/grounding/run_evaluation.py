"""Measures expressions that refer to a region: accuracy and recall, on RefCOCO's splits or on Flickr30k Entities.

    python -m unicoder_vl_hf.tasks.grounding.run_evaluation --model runs/refcoco --refs 'refcoco/refs(unc).p' \
        --instances refcoco/instances.json --splits val testA testB --regions coco-regions --output refcoco.json
    python -m unicoder_vl_hf.tasks.grounding.run_evaluation --model runs/refcoco --entities Flickr30kEntities \
        --images test.txt --regions flickr30k-regions

With regions of the ground-truth boxes (`unicoder-vl extract --boxes`) it is the protocol of ground truth, else that of
detected boxes. `--pictures` and `--photos` draw the region that is chosen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...errors import run_script
from ...pictures import draw_boxes
from ...processes import start_processes
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...regions.store import RegionStore
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import PictureArguments, TaskEvaluationArguments, evenly, write_metrics
from ...search.encoders import Photos
from .collator import DataCollatorForUnicoderVLGrounding
from .data import read_entities, read_references
from .training import load_for_grounding, measure


@dataclass(kw_only=True)
class GroundingEvaluationArguments(PictureArguments, TaskEvaluationArguments):
    """Names a checkpoint, and the expressions that it is measured on."""

    refs: str | None = option(None, "RefCOCO's refs(unc).p, or the same as json.")
    instances: str | None = option(None, "RefCOCO's instances.json.")
    splits: list[str] = option(["val"], "Splits of RefCOCO, such as val testA testB.")
    entities: str | None = option(None, "Folder of Flickr30k Entities, with Sentences and Annotations.")
    images: str | None = option(None, "File of the images of Flickr30k Entities, such as test.txt.")

    def __post_init__(self):
        super().__post_init__()
        if (self.refs is None, self.entities is None) not in ((True, False), (False, True)):
            raise ValueError("Give either --refs with --instances, or --entities with --images.")
        if (self.refs is None) != (self.instances is None) or (self.entities is None) != (self.images is None):
            raise ValueError("--refs needs --instances, and --entities needs --images.")

    def read(self) -> dict[str, datasets.Dataset]:
        """Reads the expressions of each split; errors are those of the readers."""
        if self.entities is not None:
            folder = Path(self.entities)
            rows = read_entities(folder / "Sentences", folder / "Annotations", str(self.images), ids=self.image_ids)
            return {"entities": rows}
        return {
            split: read_references(str(self.refs), str(self.instances), split=split, ids=self.image_ids)
            for split in self.splits
        }


def main(argv: list[str] | None = None) -> None:
    """
    Measures with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the checkpoint or the regions do not fit, or a file has a fault.
    """
    args = parse_evaluation(GroundingEvaluationArguments, argv)
    state = start_processes()
    store = RegionStore(args.regions)
    model, processor = load_for_grounding(args.model, store)
    collator = DataCollatorForUnicoderVLGrounding(processor, store, args.length_for(model))
    found: dict[str, Any] = {}
    for split, rows in args.read().items():
        rows = args.joined(rows, store, "expressions")
        scores = args.logits(model, collator, rows, f"Grounding {split}")
        if not state.is_main_process:
            continue
        found[split] = {"expressions": len(rows), **measure(processor, store, scores, rows)}
        for name, value in found[split].items():
            print(f"{split:10}{name:12}" + (f"{value:9,}" if name == "expressions" else f"{100 * value:8.2f} %"))
        if args.pictures is not None:
            draw(args, processor, store, rows, scores)
    if state.is_main_process:
        write_metrics(args, {"splits_measured": found})


def draw(
    args: GroundingEvaluationArguments,
    processor: UnicoderVLProcessor,
    store: RegionStore,
    rows: datasets.Dataset,
    scores: np.ndarray,
) -> None:
    """Draws the region that is chosen, with its expression, and the box that is meant."""
    folder, photos = Path(str(args.pictures)), Photos(str(args.photos), args.photo_ids)
    folder.mkdir(parents=True, exist_ok=True)
    for number in evenly(len(rows), args.num_pictures):
        row, record = rows[number], store[rows[number]["image_id"]]
        size = row["image_width"], row["image_height"]
        kept = processor.feature_extractor.select(record)
        chosen = record.locations()[kept[scores[number][: len(kept)].argmax()], :4] * (size * 2)
        photo = draw_boxes(photos.of(record), [chosen, row["box"]], size, [row["expression"], "meant"])
        photo.save(folder / f"{row['expression_id'].replace('#', '-')}.png")


if __name__ == "__main__":
    run_script(main)
