"""Measures expressions that refer to a region: accuracy and recall, on RefCOCO's splits or on Flickr30k Entities.

    python -m unicoder_vl_hf.tasks.grounding.run_evaluation --model runs/refcoco --refs 'refcoco/refs(unc).p' \
        --instances refcoco/instances.json --splits val testA testB --regions coco-regions --output refcoco.json
    python -m unicoder_vl_hf.tasks.grounding.run_evaluation --model runs/refcoco --entities Flickr30kEntities \
        --images test.txt --regions flickr30k-regions

With regions of the ground-truth boxes (`unicoder-vl extract --boxes`) it is the protocol of ground truth, else that of
detected boxes. `--pictures` and `--photos` draw the region that is chosen.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...data.captions import join
from ...errors import run_script
from ...files import write_json
from ...pictures import draw_regions
from ...processes import start_processes
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import make_parser, option
from ...runs.batches import compute_logits
from ...runs.evaluation import PictureArguments, TaskEvaluationArguments, evaluation_precision, evenly
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
    (args,) = make_parser(GroundingEvaluationArguments).parse_args_into_dataclasses(argv)
    state = start_processes()
    store = RegionStore(args.regions)
    model, processor = load_for_grounding(args.model, store)
    length = min(args.max_length, model.config.max_position_embeddings)
    collator = DataCollatorForUnicoderVLGrounding(processor, store, max_length=length)
    found: dict[str, Any] = {}
    for split, rows in args.read().items():
        rows, _ = join(rows, store, skip_option=None, texts="expressions", renamed_by="--image_ids")
        with evaluation_precision(args.mixed_precision, model):
            scores = compute_logits(model, collator, rows, name=f"Grounding {split}", batch_size=args.batch_size)
        if not state.is_main_process:
            continue
        found[split] = {"expressions": len(rows), **measure(processor, store, scores, rows)}
        for name, value in found[split].items():
            print(f"{split:10}{name:12}" + (f"{value:9,}" if name == "expressions" else f"{100 * value:8.2f} %"))
        if args.pictures is not None:
            draw(args, processor, store, rows, scores)
    if state.is_main_process and args.output is not None:
        write_json(Path(args.output), {"splits_measured": found, **dataclasses.asdict(args)})


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
        width, height = row["image_width"], row["image_height"]
        kept = processor.feature_extractor.select(record)
        chosen = kept[scores[number][: len(kept)].argmax()]
        boxes = np.stack([record.locations()[chosen, :4] * (width, height, width, height), row["box"]])
        limits = np.array([width, height, width, height])
        shown = RegionRecord(
            record.image_id,
            features=np.zeros((2, 1)),
            boxes=np.clip(boxes, 0, limits).astype(np.float32),
            image_width=width,
            image_height=height,
        )
        photo = draw_regions(photos.of(record), shown, labels=[row["expression"], "meant"])
        photo.save(folder / f"{row['expression_id'].replace('#', '-')}.png")


if __name__ == "__main__":
    run_script(main)
