"""
The training of tasks whose rows are a text and an image, or two, with a label, and whose model gives logits: their
options, their setup, and the Trainer that measures them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np

from .. import logging
from ..data.captions import join
from ..data.rows import EpochOfExamples
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..regions.store import RegionStore
from .arguments import ModelArguments, option
from .batches import Collator, WithoutInputs, compute_logits
from .setup import DATA_FOLDER, TrainingSetup, open_or_convert
from .trainer import TaskTrainer

logger = logging.get_logger(__name__)

REGION_INPUTS = ("region_features", "region_locations", "region_attention_mask", "image_index")
# Fields and options of a model that learns the scenes in minutes, see docs/matching_head.md.
SCENES_INITIALIZER_RANGE = 0.08
SCENES = {"learning_rate": 1e-3, "train_batch_size": 64, "gradient_accumulation_steps": 1}


@dataclass
class LabelledArguments(ModelArguments):
    """Names the regions of a run on labelled rows, and the inputs that it is left without."""

    regions: str | None = option(
        None, "RegionStore, or feature files, which are converted to one in the output folder.", may_change=True
    )
    image_ids: str | None = option(
        None, "Other ids for the images of the files: stem, coco, a .csv, or CAPTIONS:COLUMN."
    )
    skip_missing: bool = option(False, "Leaves out rows whose image has no regions.", may_change=True)
    without: Literal["nothing", "regions", "photo"] = option(
        "nothing",
        "Inputs that every row is left without, to see what the answers owe to them: regions, or the photo, in whose "
        "place comes that of another row.",
    )

    def open_store(self, output_dir: str | Path) -> RegionStore:
        """Opens the regions, converted into the output folder if need be; errors are those of [`open_or_convert`]."""
        return open_or_convert(
            Path(str(self.regions)), Path(output_dir, DATA_FOLDER, "regions"), self.num_region_classes
        )

    def with_regions(self, rows: datasets.Dataset, store: RegionStore, texts: str) -> datasets.Dataset:
        """
        Keeps the rows whose image has regions, which all must have unless the run may skip them, and gives each the
        image of another where the run is without its photo.

        Raises:
            `ValueError`: an image has no regions.
        """
        options: Any = {"skip_missing": self.skip_missing, "skip_option": "--skip_missing"}
        rows, report = join(rows, store, texts=texts, renamed_by="--image_ids", **options)
        logger.warning(f"{store}:\n{report}")
        return elsewhere(rows) if self.without == "photo" else rows

    def left_out(self, collator: Collator) -> Collator:
        """Leaves out of the batches what the run is without."""
        return WithoutInputs(collator, REGION_INPUTS) if self.without == "regions" else collator


def elsewhere(rows: datasets.Dataset) -> datasets.Dataset:
    """Gives each row the image of another: that which lies half of all images further on, in their order."""
    images = rows.unique("image_id")
    moved = dict(zip(images, np.roll(images, len(images) // 2).tolist(), strict=True))
    others = [moved[image_id] for image_id in rows["image_id"]]
    return rows.remove_columns("image_id").add_column("image_id", others)  # type: ignore[call-arg]


@dataclass
class LabelledSetup(TrainingSetup):
    """
    The setup of a run on labelled rows.

    Args:
        model, processor, collator, train, validation, data_name, loss: See [`TrainingSetup`].
        measure (callable): Measures logits, `(num_rows, …)`, on rows, as metrics by name.
    """

    train: EpochOfExamples
    measure: Callable[[np.ndarray, Any], dict[str, float]] = lambda logits, rows: {}

    rows: ClassVar[str] = "questions"

    @property
    def measured_on(self) -> str:
        """The number of validation rows and images, in words."""
        return f"{len(self.validation):,} {self.rows} about {len(self.validation.unique('image_id')):,} images"


class LabelledTrainer(TaskTrainer):
    """Trains and evaluates a task of labelled rows."""

    setup: LabelledSetup

    def evaluate_task(self, rows):
        """Measures the logits of validation rows, as the setup does."""
        with self.accelerator.autocast():
            logits = compute_logits(self.setup.model, self.setup.collator, rows, name="Evaluating", **self.loading)
        return self.setup.measure(logits, rows)


def count_cut(processor: UnicoderVLProcessor, texts: Sequence[str], max_length: int, name: str) -> None:
    """Logs how many texts of training are cut."""
    if cut := processor.count_truncated(texts, max_length):
        logger.warning(f"{cut:,} of {len(texts):,} training {name} exceed {max_length} tokens and are cut.")
