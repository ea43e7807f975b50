"""The training of sentences about two photos: its arguments, and the setup built of them. Follows UNITER (section
NLVR2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import datasets
import numpy as np

from ...data.masking import IGNORED
from ...data.rows import EpochOfExamples
from ...modeling_unicoder_vl import UnicoderVLForVisualReasoning
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import option
from ...runs.labelled import LabelledArguments, LabelledSetup, load_labelled, named_labels
from ...runs.setup import DATA_FOLDER
from .collator import DataCollatorForUnicoderVLVisualReasoning
from .data import LABELS, read_nlvr2
from .metrics import nlvr2_metrics

# UNITER's learning rate for the base size, and about its number of steps.
PAPER = {"num_train_epochs": 9, "learning_rate": 3e-5, "train_batch_size": 96, "gradient_accumulation_steps": 1}


@dataclass
class NLVR2Arguments(LabelledArguments):
    """Names the sentences and the model of a run; without `annotations` they are about rendered scenes."""

    column, texts = "sentence", "sentences"

    annotations: str | None = option(None, "Training sentences: NLVR2's train.json. Default: rendered scenes.")
    validation_annotations: str | None = option(None, "Validation sentences: NLVR2's dev.json.")
    head: Literal["paired", "paired_attention"] = option(
        "paired", "Head of the two passes: on both outputs of the pooler, or after the passes asked each other."
    )

    def with_both(self, rows: datasets.Dataset, store: RegionStore) -> datasets.Dataset:
        """
        Keeps the sentences both of whose photos have regions, as [`~LabelledArguments.with_regions`] keeps rows, and
        gives each the photos of another where the run is without its own.

        Raises:
            `ValueError`: a photo has no regions.
        """
        second = rows.select_columns("second_id").rename_column("second_id", "image_id")
        photos = datasets.concatenate_datasets([rows.select_columns("image_id"), second])
        kept = set(self.joined(photos, store)["image_id"])
        pairs = zip(rows["image_id"], rows["second_id"], strict=True)
        rows = rows.select([number for number, pair in enumerate(pairs) if kept.issuperset(pair)])
        if self.without != "photo":
            return rows
        half = np.roll(np.arange(len(rows)), len(rows) // 2)
        others = rows.select_columns(["image_id", "second_id"]).select(half).flatten_indices()
        return datasets.concatenate_datasets([rows.remove_columns(others.column_names), others], axis=1)


@dataclass
class NLVR2Setup(LabelledSetup):
    """The setup of a run on sentences about two photos, as [`prepare_nlvr2`] builds it."""

    task = "visual-reasoning"
    rows = "sentences"
    trained_by = "fine-tuned for sentences about two photos"

    @property
    def measured_on(self) -> str:
        """The number of validation sentences, in words."""
        return f"{len(self.validation):,} sentences"


def prepare_nlvr2(arguments: NLVR2Arguments, output_dir: str | Path) -> NLVR2Setup:
    """
    Reads sentences and regions, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: a photo has no regions, a sentence no label, the checkpoint is of another kind, or a file has a
            fault.
        `FileNotFoundError`: a file is missing.
    """
    if arguments.on_scenes:
        from ...scenes.pairs import build_nlvr2_scenes

        folder = build_nlvr2_scenes(Path(output_dir, DATA_FOLDER, "nlvr2_scenes"))
        files = [folder / "train.json", folder / "dev.json"]
        store, name = RegionStore(folder / "regions"), "sentences about pairs of rendered scenes"
    else:
        files = [Path(str(arguments.annotations)), Path(str(arguments.validation_annotations))]
        store, name = arguments.open_store(output_dir), f"NLVR2, {files[0].stem}"
    train, validation = (arguments.with_both(_labelled(path, arguments.image_ids), store) for path in files)
    fields = named_labels(LABELS) | {"reasoning_head": arguments.head}
    model, processor = arguments.load(UnicoderVLForVisualReasoning, store, train, **fields)
    collator = DataCollatorForUnicoderVLVisualReasoning(processor, store, max_length=arguments.max_length)
    return NLVR2Setup(
        model, processor, arguments.left_out(collator), EpochOfExamples([train]), validation, name, measure=measure
    )


def _labelled(path: Path, ids: str | None) -> datasets.Dataset:
    rows = read_nlvr2(path, ids=ids)
    if IGNORED in rows["label"]:
        first = rows["identifier"][list(rows["label"]).index(IGNORED)]
        raise ValueError(f"{path}: {first} has no label, without which there is nothing to learn or to measure.")
    return rows


def measure(logits: np.ndarray, rows: datasets.Dataset) -> dict[str, float]:
    """Measures the judgements of the highest logits, see [`nlvr2_metrics`]."""
    return nlvr2_metrics(logits.argmax(axis=1), rows["label"][:], rows["identifier"][:])


def load_for_nlvr2(
    name: str | PathLike[str], store: Mapping[str, RegionRecord] | None = None
) -> tuple[UnicoderVLForVisualReasoning, UnicoderVLProcessor]:
    """
    Loads a checkpoint that judges sentences about two photos onto the device of this process, with its processor, and
    warns if it was trained on regions of another kind than the store's.

    Raises:
        `ValueError`: the checkpoint has no head for it.
    """
    return load_labelled(UnicoderVLForVisualReasoning, name, store, "run_nlvr2.py")
