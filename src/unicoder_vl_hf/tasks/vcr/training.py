"""The training of visual commonsense reasoning: its arguments, the setup built of them, and the scores of a model.

Follows the paper's section of that name: Q->A and QA->R are choices among four, trained by cross-entropy. The paper is
silent on whether one model learns both; here one does, unless a run names a single task.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ... import logging
from ...data.rows import EpochOfExamples, Row
from ...modeling_unicoder_vl import UnicoderVLForMultipleChoice
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import ModelArguments, option
from ...runs.batches import Collator, WithoutInputs, compute_logits
from ...runs.labelled import load_labelled
from ...runs.setup import DATA_FOLDER, Model, TrainingSetup, load_model, open_or_convert, processor_for
from .collator import DataCollatorForUnicoderVLMultipleChoice
from .data import NUM_CHOICES, VCRExamples, read_vcr, require_labels
from .metrics import choice_metrics, vcr_metrics

logger = logging.get_logger(__name__)

# The accuracy of each task alone.
TASKS = {"qa": "answer_accuracy", "qar": "rationale_accuracy"}
# Inputs that a batch is left without, to see what the answers owe to them. References without regions point nowhere.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "references": ("token_region_ids",),
    "regions": ("token_region_ids", "region_features", "region_locations", "region_attention_mask"),
}
# The number of questions, drawn evenly, of which a run says before it begins how many texts are cut.
_LOOKED_AT = 2000


@dataclass
class VCRDataArguments(ModelArguments):
    """Names the data and the model of a run on VCR; without `annotations` its questions are about rendered scenes."""

    annotations: str | None = option(None, "Folder with VCR's train.jsonl and val.jsonl. Default: rendered scenes.")
    metadata: str | None = option(None, "Folder that metadata_fn starts from, such as vcr1images.")
    regions: str | None = option(
        None, "RegionStore, or feature files, which are converted to one in the output folder."
    )
    gt_features: str | None = option(
        None, "RegionStore of features pooled in the ground-truth boxes. Default: those of detections."
    )
    ids: str = option("stem", "Image ids: stem (of a photo's name) or path.")
    max_length: int = option(156, "Most tokens of a choice; longer ones are cut.")

    def __post_init__(self):
        if (self.annotations is None) != (self.regions is None):
            raise ValueError("Give both --annotations and --regions, or neither for the rendered scenes.")

    @property
    def on_scenes(self) -> bool:
        """Whether the run has no questions of its own, and so asks about rendered scenes."""
        return self.annotations is None


@dataclass
class VCRArguments(VCRDataArguments):
    """Names the data, the model and the tasks of a run on VCR."""

    tasks: list[str] = option([*TASKS], "Tasks to learn: qa (Q->A), qar (QA->R), or both in one model.")
    without: Literal["nothing", "references", "regions"] = option(
        "nothing", "Inputs that every batch is left without, to see what the answers owe to them."
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks or set(self.tasks) - TASKS.keys():
            raise ValueError(f"--tasks {' '.join(self.tasks)}: expected qa, qar, or both.")


# The paper's recipe, but for the warm-up, on which it is silent; and one for the scenes. A batch counts examples: a
# question of one task, with its four choices.
PAPER = {"num_train_epochs": 20, "learning_rate": 3e-5, "train_batch_size": 48, "gradient_accumulation_steps": 4}
SCENES = {
    "num_train_epochs": 5,
    "learning_rate": 1e-3,
    "train_batch_size": 32,
    "gradient_accumulation_steps": 1,
}
# Fields of its model, which has no more positions.
SCENES_FIELDS = {"max_length": 64, "num_hidden_layers": 2}
# New weights of the size that BERT begins with learn nothing from choices for a thousand steps, in a model so narrow.
SCENES_MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "initializer_range": 0.12,
}


@dataclass
class VCRData:
    """
    The questions of a run and the regions of their images.

    Args:
        store (`RegionStore`): The detections of every image.
        gt_features (`RegionStore`, *optional*): Features pooled in the ground-truth boxes.
        train, validation (`datasets.Dataset`): The questions of two splits, as [`read_vcr`] gives them.
        name (`str`): The data in words.
    """

    store: RegionStore
    gt_features: RegionStore | None
    train: datasets.Dataset
    validation: datasets.Dataset
    name: str

    def collator(self, processor: UnicoderVLProcessor, arguments: VCRDataArguments):
        """Makes the collator of these questions, see [`DataCollatorForUnicoderVLMultipleChoice`]."""
        return DataCollatorForUnicoderVLMultipleChoice(
            processor,
            self.store,
            max_length=arguments.max_length,
            max_regions=processor.feature_extractor.max_regions,
            gt_features=self.gt_features,
        )


def open_vcr(arguments: VCRDataArguments, output_dir: str | Path) -> VCRData:
    """
    Reads questions and regions. Scenes are rendered, and feature files converted, into the output folder.

    Raises:
        `ValueError`: an image has no regions, a question no label, or a file has a fault.
        `FileNotFoundError`: a file is missing.
    """
    own = Path(output_dir, DATA_FOLDER)
    metadata: Path | None
    if arguments.on_scenes:
        from ...scenes.questions import build_vcr_scenes

        folder = build_vcr_scenes(own / "vcr_scenes")
        metadata, store, name = folder / "images", RegionStore(folder / "regions"), "questions about rendered scenes"
    else:
        folder, name = Path(str(arguments.annotations)), "VCR"
        metadata = None if arguments.metadata is None else Path(arguments.metadata)
        store = open_or_convert(Path(str(arguments.regions)), own / "regions", arguments.num_region_classes)
    train, validation = (
        _labelled(folder / f"{split}.jsonl", metadata_dir=metadata, store=store, ids=arguments.ids)
        for split in ("train", "val")
    )
    gt_features = None if arguments.gt_features is None else RegionStore(arguments.gt_features)
    return VCRData(store, gt_features, train, validation, name)


def _labelled(path: Path, **options: Any) -> datasets.Dataset:
    rows = read_vcr(path, **options)
    try:
        require_labels(
            rows, "answer_label", "without which there is nothing to learn or to measure. Is it the test split?"
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return rows


def open_and_load(
    arguments: VCRDataArguments, output_dir: str | Path, model_class: type[Model]
) -> tuple[VCRData, Model, UnicoderVLProcessor]:
    """Opens the data as [`open_vcr`] does, and loads the model and processor of the arguments, with their errors."""
    data = open_vcr(arguments, output_dir)
    fields = SCENES_MODEL if arguments.base_model is None else {}
    model = load_model(arguments, data.store, model_class, **fields)
    return data, model, processor_for(arguments, data.store, data.train.unique("image_id"))


@dataclass
class VCRSetup(TrainingSetup):
    """The setup of a run on VCR, as [`prepare_vcr`] builds it."""

    model: UnicoderVLForMultipleChoice
    train: EpochOfExamples
    validation: datasets.Dataset
    tasks: Sequence[str] = tuple(TASKS)

    task = "visual-commonsense-reasoning"
    rows = "examples"
    trained_by = "fine-tuned for visual commonsense reasoning"

    @property
    def measured_on(self) -> str:
        """The number of validation questions, in words."""
        return f"{len(self.validation):,} questions"


def prepare_vcr(arguments: VCRArguments, output_dir: str | Path) -> VCRSetup:
    """
    Reads questions and regions, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: an image has no regions, the checkpoint is of another kind, or a file has a fault.
    """
    data, model, processor = open_and_load(arguments, output_dir, UnicoderVLForMultipleChoice)
    collator = data.collator(processor, arguments)
    _report(collator, data.train, arguments.tasks)
    return VCRSetup(
        model=model,
        processor=processor,
        collator=WithoutInputs(collator, LEFT_OUT[arguments.without]),
        train=EpochOfExamples([VCRExamples(data.train, task) for task in arguments.tasks]),
        validation=data.validation,
        data_name=data.name,
        tasks=arguments.tasks,
    )


def _report(collator: DataCollatorForUnicoderVLMultipleChoice, rows: datasets.Dataset, tasks: Sequence[str]):
    """Logs how many texts are cut, and how many ground-truth boxes take the feature of a region they hardly overlap."""
    rows = rows.select(range(0, len(rows), math.ceil(len(rows) / _LOOKED_AT)))
    for task in tasks:
        examples = VCRExamples(rows, task)
        cut = collator.count_truncated(examples[index] for index in range(len(examples)))
        logger.warning(
            f"{task}: {cut:,} of {len(rows) * NUM_CHOICES:,} texts exceed {collator.max_length} tokens and are cut."
        )
    if collator.gt_features is None:
        low, total = collator.count_low_ious(rows)
        logger.warning(f"{low:,} of {total:,} ground-truth boxes overlap no detection by an IoU of 0.1.")


def score_choices(
    model: UnicoderVLForMultipleChoice,
    collator: Collator,
    examples: Dataset[Row],
    batch_size: int = 32,
    num_workers: int = 0,
) -> np.ndarray:
    """
    Scores each choice of each example. Every process calls it, and gets the scores of all.

    Args:
        model ([`UnicoderVLForMultipleChoice`]): The model, on the device of this process.
        collator (callable): Makes the batches of examples.
        examples (`Dataset`): The examples, such as [`VCRExamples`].
        batch_size (`int`, *optional*, defaults to 32): Examples of a batch in each process.
        num_workers (`int`, *optional*, defaults to 0): Processes that make batches for each process.

    Returns:
        `np.ndarray` of shape `(num_examples, num_choices)`, float32; higher = better.
    """
    options = {"batch_size": batch_size, "num_workers": num_workers}
    return compute_logits(model, collator, examples, name="Scoring choices", **options)


def evaluate_vcr(
    model: UnicoderVLForMultipleChoice,
    collator: Collator,
    rows: datasets.Dataset,
    tasks: Sequence[str] = tuple(TASKS),
    **options: int,
) -> dict[str, float]:
    """
    Measures accuracies and ties on questions with labels, see [`vcr_metrics`], or [`choice_metrics`] for a single task.
    Every process calls it.

    Args:
        model ([`UnicoderVLForMultipleChoice`]), collator (callable): The model and the collator, see [`score_choices`].
        rows (`datasets.Dataset`): Questions, as [`read_vcr`] gives them.
        tasks (sequence of `str`, *optional*, defaults to both): `"qa"`, `"qar"`, or both.
        options: `batch_size` and `num_workers` of [`score_choices`].
    """
    scores = {task: score_choices(model, collator, VCRExamples(rows, task), **options) for task in tasks}
    labels = {"qa": rows["answer_label"][:], "qar": rows["rationale_label"][:]}
    if scores.keys() == TASKS.keys():
        return vcr_metrics(scores["qa"], scores["qar"], labels["qa"], labels["qar"])
    (task,) = scores
    return choice_metrics(TASKS[task].removesuffix("_accuracy"), scores[task], labels[task])


def choice_probabilities(
    model: UnicoderVLForMultipleChoice, collator: Collator, examples: VCRExamples, **options: int
) -> np.ndarray:
    """
    Computes the probabilities of choices, float64 of shape `(num_questions, 4)`, or of examples with `every_answer`
    `(num_questions, 4 answers, 4 rationales)`. The arguments are those of [`score_choices`].
    """
    scores = torch.from_numpy(score_choices(model, collator, examples, **options))
    shape = (-1, NUM_CHOICES, NUM_CHOICES) if examples.per_row > 1 else (-1, NUM_CHOICES)
    return scores.double().softmax(dim=-1).view(shape).numpy()


def load_for_vcr(
    name: str | PathLike[str], store: Mapping[str, RegionRecord]
) -> tuple[UnicoderVLForMultipleChoice, UnicoderVLProcessor]:
    """
    Loads a multiple-choice checkpoint onto the device of this process, with its processor, and warns if it was trained
    on regions of another kind.

    Raises:
        `ValueError`: the checkpoint has no head for choices, or fewer rows of word embeddings than its tokenizer has
            tokens.
    """
    return load_labelled(UnicoderVLForMultipleChoice, name, store, "run_vcr.py")
