"""
The training of tasks whose rows are a text and an image, or two, with a label, and whose model gives logits: their
options, their setup, and the Trainer that measures them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainingArguments

from .. import logging
from ..configuration_unicoder_vl import UnicoderVLConfig
from ..data.captions import join
from ..data.rows import EpochOfExamples
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord
from ..regions.store import RegionStore
from ..scoring.checkpoints import load_complete
from .arguments import ModelArguments, option, parse_arguments
from .batches import Collator, WithoutInputs, compute_logits
from .setup import DATA_FOLDER, Model, TrainingSetup, load_model, open_or_convert, processor_for
from .trainer import KEEP_BEST, TaskTrainer, train, training_defaults

logger = logging.get_logger(__name__)

REGION_INPUTS = ("region_features", "region_locations", "region_attention_mask", "image_index")
# Fields and options of a model that learns the scenes in minutes, see docs/matching_head.md.
SCENES_INITIALIZER_RANGE = 0.08
KEEP_MOST_ACCURATE = KEEP_BEST | {"metric_for_best_model": "accuracy"}
SCENES = {"num_train_epochs": 8, "learning_rate": 1e-3, "train_batch_size": 64, "gradient_accumulation_steps": 1}


@dataclass
class LabelledArguments(ModelArguments):
    """
    Names the regions of a run on labelled rows, and the inputs that it is left without.

    Attributes:
        given_together (`tuple[str, ...]`): The options that name the data of a run, all or none of them: without them
            it is on rendered scenes.
        column (`str`): The column of the text of a row.
        texts (`str`): The word for these texts.
    """

    given_together: ClassVar[tuple[str, ...]] = ("annotations", "validation_annotations", "regions")
    column: ClassVar[str]
    texts: ClassVar[str]

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

    def __post_init__(self):
        if len({self._is_given(name) for name in self.given_together}) > 1:
            *others, last = (f"--{name}" for name in self.given_together)
            raise ValueError(f"Give {', '.join(others)} and {last} together, or none of them for the rendered scenes.")

    @property
    def on_scenes(self) -> bool:
        """Whether the run has no rows of its own, and so takes those about rendered scenes."""
        return not self._is_given(self.given_together[0])

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) not in (None, [])

    def open_store(self, output_dir: str | Path) -> RegionStore:
        """Opens the regions, converted into the output folder if need be; errors are those of [`open_or_convert`]."""
        return open_or_convert(
            Path(str(self.regions)), Path(output_dir, DATA_FOLDER, "regions"), self.num_region_classes
        )

    def with_regions(self, rows: datasets.Dataset, store: RegionStore) -> datasets.Dataset:
        """
        Keeps the rows whose image has regions, which all must have unless the run may skip them, and gives each the
        image of another where the run is without its photo.

        Raises:
            `ValueError`: an image has no regions.
        """
        rows = self.joined(rows, store)
        return elsewhere(rows) if self.without == "photo" else rows

    def joined(self, rows: datasets.Dataset, store: RegionStore) -> datasets.Dataset:
        """Keeps the rows whose image has regions; errors are those of [`~LabelledArguments.with_regions`]."""
        options: Any = {"skip_missing": self.skip_missing, "skip_option": "--skip_missing"}
        rows, report = join(rows, store, texts=self.texts, renamed_by="--image_ids", **options)
        logger.warning(f"{store}:\n{report}")
        return rows

    def load(
        self, model_class: type[Model], store: RegionStore, train: datasets.Dataset, **fields: Any
    ) -> tuple[Model, UnicoderVLProcessor]:
        """
        Loads the model, with fields of its configuration, and its processor, and logs how many training texts are cut.

        Raises:
            `ValueError`: the checkpoint is of another kind, or does not fit the regions or an option.
        """
        if self.base_model is None:
            fields["initializer_range"] = SCENES_INITIALIZER_RANGE
        model = load_model(self, store, model_class, **fields)
        processor = processor_for(self, store, train.unique("image_id"))
        if cut := processor.count_truncated(train[self.column][:], self.max_length):
            told = f"{cut:,} of {len(train):,} training {self.texts}"
            logger.warning(f"{told} exceed {self.max_length} tokens and are cut.")
        return model, processor

    def left_out(self, collator: Collator) -> Collator:
        """Leaves out of the batches what the run is without."""
        return WithoutInputs(collator, REGION_INPUTS) if self.without == "regions" else collator


def elsewhere(rows: datasets.Dataset) -> datasets.Dataset:
    """Gives each row the image of another: that which lies half of all images further on, in their order."""
    images = rows.unique("image_id")
    moved = dict(zip(images, np.roll(images, len(images) // 2).tolist(), strict=True))
    others = [moved[image_id] for image_id in rows["image_id"]]
    return rows.remove_columns("image_id").add_column("image_id", others)


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


def train_labelled(
    arguments: tuple[type[LabelledArguments], type[TrainingArguments]],
    prepare: Callable[[Any, str | Path], LabelledSetup],
    argv: list[str] | None,
    *,
    paper: dict[str, Any],
    scenes: dict[str, Any],
) -> bool:
    """
    Trains with the options of `argv`, and keeps the model of the highest validation accuracy.

    Args:
        arguments (`tuple[type, type]`): The options of the task, and those of the Trainer.
        prepare (callable): Builds the setup of these options in an output folder.
        argv (`list[str]`, *optional*): The options, by default those of the command line.
        paper (`dict`): A recipe as [`training_defaults`] takes it, for data of one's own.
        scenes (`dict`): Other defaults than those of [`SCENES`] on rendered scenes.

    Returns:
        `bool`: Whether it trained to the end; `False` if Ctrl-C stopped it.
    """
    data_args, training_args = parse_arguments(
        arguments,
        argv,
        paper=training_defaults(paper) | KEEP_MOST_ACCURATE,
        scenes=training_defaults(SCENES) | KEEP_MOST_ACCURATE | scenes,
        data=f"--{arguments[0].given_together[0]}",
    )
    return train(LabelledTrainer, prepare, data_args, training_args)


def named_labels(names: Sequence[str]) -> dict[str, Any]:
    """Gives the fields of a configuration that name the outputs of a head."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def label_names(config: UnicoderVLConfig) -> list[str]:
    """Gives the names of the outputs of a head, in their order."""
    names: Any = config.id2label
    return [names[label] for label in range(len(names))]


def load_labelled(
    model_class: type[Model], name: str | PathLike[str], store: Mapping[str, RegionRecord] | None, script: str
) -> tuple[Model, UnicoderVLProcessor]:
    """
    Loads a checkpoint of a task onto the device of this process, with its processor, and warns if it was trained on
    regions of another kind than the store's.

    Raises:
        `ValueError`: the checkpoint has no head of the task, which `script` trains, or fewer rows of word embeddings
            than its tokenizer has tokens.
    """
    expected = f"{model_class.__name__}, as {script} trains one"
    model, processor = load_complete(model_class, name, ("",), expected)
    torch.nn.Module.to(model, PartialState().device)
    processor.set_store(store)
    return model, processor


def class_metrics(logits: np.ndarray, labels: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """
    Measures the classes of the highest logits.

    Args:
        logits (`np.ndarray` of shape `(num_rows, num_classes)`): Higher = more probable.
        labels (sequence of `int`): The right class of each row.
        names (sequence of `str`): The names of the classes.

    Returns:
        `dict` of `accuracy`, in `[0, 1]`, and for each class that occurs of `{name}_accuracy`, the share of its rows
        that are found.
    """
    wanted = np.asarray(labels)
    right = logits.argmax(axis=1) == wanted
    by_class = {name: right[wanted == label] for label, name in enumerate(names)}
    of_classes = {f"{name}_accuracy": float(rows.mean()) for name, rows in by_class.items() if len(rows)}
    return {"accuracy": float(right.mean()), **of_classes}
