"""The training of expressions that refer to a region: its arguments, and the setup built of them. Follows UNITER
(section Referring Expression Comprehension)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

import datasets
import numpy as np

from ... import logging
from ...data.rows import EpochOfExamples, fetch
from ...modeling_unicoder_vl import UnicoderVLForGrounding
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import option
from ...runs.labelled import LabelledArguments, LabelledSetup, load_labelled
from ...runs.setup import DATA_FOLDER
from .collator import DataCollatorForUnicoderVLGrounding
from .data import read_references
from .metrics import MIN_IOU, grounding_metrics, target_ious

logger = logging.get_logger(__name__)

# UNITER's learning rate for the base size, and about its number of steps.
PAPER = {"num_train_epochs": 10, "learning_rate": 5e-5, "train_batch_size": 128, "gradient_accumulation_steps": 1}


@dataclass
class GroundingArguments(LabelledArguments):
    """Names the expressions and the model of a run; without `refs` they refer to objects of rendered scenes."""

    given_together = ("refs", "instances", "regions")
    column, texts = "expression", "expressions"

    refs: str | None = option(None, "RefCOCO's refs(unc).p, or the same as json. Default: rendered scenes.")
    instances: str | None = option(None, "RefCOCO's instances.json, with the boxes.")
    train_split: str = option("train", "Split to train on.")
    validation_split: str = option("val", "Split to validate on, such as val, testA or testB.", may_change=True)
    layers: int = option(1, "Layers of the head, 1 or 2.")
    without: Literal["nothing", "expression", "photo"] = option(  # type: ignore[assignment]
        "nothing",
        "What every row is left without, to see what the choice owes to it: its expression, or the photo that its "
        "expression is about, in whose place it has another and the box that is meant there.",
    )


@dataclass
class GroundingSetup(LabelledSetup):
    """The setup of a run on expressions, as [`prepare_grounding`] builds it."""

    task = "visual-grounding"
    rows = "expressions"
    trained_by = "fine-tuned for expressions that refer to a region"


def prepare_grounding(arguments: GroundingArguments, output_dir: str | Path) -> GroundingSetup:
    """
    Reads expressions and regions, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: an image has no regions, no expression is met by a region, the checkpoint is of another kind, or a
            file has a fault.
        `FileNotFoundError`: a file is missing.
    """
    if arguments.on_scenes:
        from ...scenes.expressions import build_grounding_scenes

        folder = build_grounding_scenes(Path(output_dir, DATA_FOLDER, "grounding_scenes"))
        refs, instances, name = folder / "refs.json", folder / "instances.json", "objects of rendered scenes"
        store = RegionStore(folder / "regions")
    else:
        refs, instances = Path(str(arguments.refs)), Path(str(arguments.instances))
        store, name = arguments.open_store(output_dir), refs.stem
    train, validation = (
        _other_expressions(arguments, arguments.joined(rows, store))
        for rows in (
            read_references(refs, instances, split=split, ids=arguments.image_ids, skip_missing=arguments.skip_missing)
            for split in (arguments.train_split, arguments.validation_split)
        )
    )
    model, processor = arguments.load(UnicoderVLForGrounding, store, train, grounding_layers=arguments.layers)
    _report(processor, store, train)
    collator = DataCollatorForUnicoderVLGrounding(
        processor, store, max_length=arguments.max_length, without_text=arguments.without == "expression"
    )
    measuring = partial(measure, processor, store)
    return GroundingSetup(model, processor, collator, EpochOfExamples([train]), validation, name, measure=measuring)


def _other_expressions(arguments: GroundingArguments, rows: datasets.Dataset) -> datasets.Dataset:
    """Gives each row the expression of another, where the run is without its own photo."""
    if arguments.without != "photo":
        return rows
    others = np.roll(np.array(rows["expression"][:], dtype=object), len(rows) // 2).tolist()
    return rows.remove_columns("expression").add_column("expression", others)


def _report(processor: UnicoderVLProcessor, store: Mapping[str, RegionRecord], train: datasets.Dataset) -> None:
    """Logs how many expressions no region meets. Raises ValueError where none is met."""
    ious = overlaps(processor, store, train)
    unmet = [number for number, of_row in enumerate(ious) if of_row.max() < MIN_IOU]
    logger.warning(
        f"Of {len(train):,} training expressions {len(unmet):,} are met by no region (intersection over union of "
        f"{MIN_IOU}), and so teach nothing."
    )
    if len(unmet) == len(train):
        raise ValueError("No region meets any expression: are the boxes of the regions those of the same photos?")


def overlaps(
    processor: UnicoderVLProcessor, store: Mapping[str, RegionRecord], rows: datasets.Dataset
) -> list[np.ndarray]:
    """Measures how much each region that the model is shown overlaps the box that is meant, for each row."""
    found = []
    shown: dict[str, np.ndarray] = {}
    columns = (rows[name][:] for name in ("image_id", "box", "image_width", "image_height"))
    for image_id, box, width, height in zip(*columns, strict=True):
        if image_id not in shown:
            (record,) = fetch(store, [image_id])
            shown[image_id] = record.locations()[processor.feature_extractor.select(record), :4]
        found.append(target_ious(shown[image_id], box, width, height))
    return found


def measure(
    processor: UnicoderVLProcessor, store: Mapping[str, RegionRecord], logits: np.ndarray, rows: datasets.Dataset
) -> dict[str, float]:
    """Measures scores of regions, `(num_rows, num_regions)`, by where the regions lie, see [`grounding_metrics`]."""
    ious = overlaps(processor, store, rows)
    return grounding_metrics([scores[: len(of_row)] for scores, of_row in zip(logits, ious, strict=True)], ious)


def load_for_grounding(
    name: str | PathLike[str], store: Mapping[str, RegionRecord] | None = None
) -> tuple[UnicoderVLForGrounding, UnicoderVLProcessor]:
    """
    Loads a checkpoint that chooses regions onto the device of this process, with its processor, and warns if it was
    trained on regions of another kind than the store's.

    Raises:
        `ValueError`: the checkpoint has no head for it.
    """
    return load_labelled(UnicoderVLForGrounding, name, store, "run_grounding.py")
