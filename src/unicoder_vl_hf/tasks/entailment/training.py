"""The training of visual entailment: its arguments, and the setup built of them. Follows UNITER (section Visual
Entailment)."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import datasets

from ...data.rows import EpochOfExamples
from ...modeling_unicoder_vl import UnicoderVLForVisualEntailment
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import option
from ...runs.labelled import LabelledArguments, LabelledSetup, class_metrics, load_labelled, named_labels
from ...runs.setup import DATA_FOLDER
from .collator import DataCollatorForUnicoderVLVisualEntailment
from .data import LABELS, read_entailment

# UNITER's recipe for the base size, but for its batches of equal tokens.
PAPER = {"num_train_epochs": 3, "learning_rate": 8e-5, "train_batch_size": 96, "gradient_accumulation_steps": 1}


@dataclass
class EntailmentArguments(LabelledArguments):
    """Names the hypotheses and the model of a run; without `annotations` they are about rendered scenes."""

    column, texts = "hypothesis", "hypotheses"

    annotations: str | None = option(None, "Training hypotheses: snli_ve_train.jsonl. Default: rendered scenes.")
    validation_annotations: str | None = option(None, "Validation hypotheses: snli_ve_dev.jsonl.")


@dataclass
class EntailmentSetup(LabelledSetup):
    """The setup of a run on hypotheses, as [`prepare_entailment`] builds it."""

    task = "visual-entailment"
    rows = "hypotheses"
    trained_by = "fine-tuned for visual entailment"


def prepare_entailment(arguments: EntailmentArguments, output_dir: str | Path) -> EntailmentSetup:
    """
    Reads hypotheses and regions, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: an image has no regions, the checkpoint is of another kind, or a file has a fault.
        `FileNotFoundError`: a file is missing.
    """
    if arguments.on_scenes:
        from ...scenes.hypotheses import build_entailment_scenes

        folder = build_entailment_scenes(Path(output_dir, DATA_FOLDER, "entailment_scenes"))
        files = [folder / "train.jsonl", folder / "val.jsonl"]
        store, name = RegionStore(folder / "regions"), "hypotheses about rendered scenes"
    else:
        files = [Path(str(arguments.annotations)), Path(str(arguments.validation_annotations))]
        store, name = arguments.open_store(output_dir), files[0].stem
    train, validation = (
        arguments.with_regions(read_entailment(path, ids=arguments.image_ids), store) for path in files
    )
    model, processor = arguments.load(UnicoderVLForVisualEntailment, store, train, **named_labels(LABELS))
    collator = DataCollatorForUnicoderVLVisualEntailment(processor, store, max_length=arguments.max_length)
    return EntailmentSetup(
        model, processor, arguments.left_out(collator), EpochOfExamples([train]), validation, name, measure=measure
    )


def measure(logits: Any, rows: datasets.Dataset) -> dict[str, float]:
    """Measures the classes of the highest logits, see [`class_metrics`]."""
    return class_metrics(logits, rows["label"][:], LABELS)


def load_for_entailment(
    name: str | PathLike[str], store: Mapping[str, RegionRecord] | None = None
) -> tuple[UnicoderVLForVisualEntailment, UnicoderVLProcessor]:
    """
    Loads a checkpoint that judges hypotheses onto the device of this process, with its processor, and warns if it was
    trained on regions of another kind than the store's.

    Raises:
        `ValueError`: the checkpoint has no head for it, or other classes than `LABELS`.
    """
    model, processor = load_labelled(UnicoderVLForVisualEntailment, name, store, "run_entailment.py")
    if model.config.id2label != dict(enumerate(LABELS)):
        raise ValueError(f"{name} has the classes {model.config.id2label}, expected {dict(enumerate(LABELS))}.")
    return model, processor
