"""The training of questions about images: its arguments, and the setup built of them.

Follows UNITER (Chen et al., ECCV 2020, section VQA): the answers that are frequent are classes, each learned by itself
from soft labels. Left out: Visual Genome's questions, which UNITER adds to the training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from ... import logging
from ...checkpoints.reading import read_answers
from ...configuration_unicoder_vl import UnicoderVLConfig
from ...data.rows import EpochOfExamples
from ...modeling_unicoder_vl import UnicoderVLForQuestionAnswering
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import option
from ...runs.batches import Collator, compute_logits
from ...runs.labelled import LabelledArguments, LabelledSetup, label_names, load_labelled, named_labels
from ...runs.setup import DATA_FOLDER, is_unicoder_vl
from .collator import DataCollatorForUnicoderVLQuestionAnswering
from .data import MIN_OCCURRENCES, AnswerVocabulary, read_questions
from .metrics import vqa_metrics

logger = logging.get_logger(__name__)

# UNITER's recipe for the base size, but for its batches of equal tokens, of about 100 questions.
PAPER = {"num_train_epochs": 7, "learning_rate": 8e-5, "train_batch_size": 96, "gradient_accumulation_steps": 1}


@dataclass
class VQAArguments(LabelledArguments):
    """Names the questions and the model of a run; without `questions` they are about rendered scenes."""

    given_together = ("questions", "validation_questions", "regions")
    column, texts = "question", "questions"

    questions: list[str] = option([], "Files of questions: VQA's, OK-VQA's or GQA's. Default: rendered scenes.")
    annotations: list[str] = option([], "Files of their answers, in the same order; none for GQA.")
    validation_questions: str | None = option(None, "File of validation questions.")
    validation_annotations: str | None = option(None, "File of their answers; none for GQA.")
    answers: str | None = option(
        None, "File of the answers to choose among, such as trainval_ans2label.pkl. Default: the frequent ones."
    )
    min_occurrences: int = option(
        MIN_OCCURRENCES,
        "Training questions of which an answer must be the most frequent one, to be chosen among.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.annotations and len(self.annotations) != len(self.questions):
            raise ValueError(
                f"{len(self.questions)} files of --questions, but {len(self.annotations)} of --annotations: give as "
                "many, in the same order."
            )


@dataclass
class VQASetup(LabelledSetup):
    """The setup of a run on questions, as [`prepare_vqa`] builds it."""

    task = "visual-question-answering"
    trained_by = "fine-tuned for questions about images"


def prepare_vqa(arguments: VQAArguments, output_dir: str | Path) -> VQASetup:
    """
    Reads questions and regions, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: an image has no regions, the checkpoint is of another kind, or a file has a fault.
        `FileNotFoundError`: a file is missing.
    """
    parts, validation, store, name = _open(arguments, output_dir)
    train = datasets.concatenate_datasets([arguments.with_regions(part, store) for part in parts])
    validation = _answered(arguments.with_regions(validation, store))
    vocabulary = _vocabulary(arguments, _answered(train))
    _report(vocabulary, train, validation)

    fields = named_labels(vocabulary.answers)
    model, processor = arguments.load(UnicoderVLForQuestionAnswering, store, train, **fields)
    collator = make_collator(model, processor, store, arguments.max_length)
    return VQASetup(
        model,
        processor,
        arguments.left_out(collator),
        EpochOfExamples([train]),
        validation,
        name,
        measure=partial(measure, vocabulary.answers),
    )


def _open(
    arguments: VQAArguments, output_dir: str | Path
) -> tuple[list[datasets.Dataset], datasets.Dataset, RegionStore, str]:
    if arguments.on_scenes:
        from ...scenes.answers import build_vqa_scenes

        folder = build_vqa_scenes(Path(output_dir, DATA_FOLDER, "vqa_scenes"))
        train, validation = (
            read_questions(folder / f"{split}_questions.json", folder / f"{split}_annotations.json")
            for split in ("train", "val")
        )
        return [train], validation, RegionStore(folder / "regions"), "questions about rendered scenes"
    annotations: list[Any] = [*arguments.annotations] or [None] * len(arguments.questions)
    files = zip(arguments.questions, annotations, strict=True)
    parts = [read_questions(questions, annotations, ids=arguments.image_ids) for questions, annotations in files]
    validation = read_questions(
        str(arguments.validation_questions), arguments.validation_annotations, ids=arguments.image_ids
    )
    return (
        parts,
        validation,
        arguments.open_store(output_dir),
        ", ".join(Path(path).stem for path in arguments.questions),
    )


def _answered(rows: datasets.Dataset) -> datasets.Dataset:
    """Checks that somebody answered every question. Raises ValueError, naming the first that nobody answered."""
    for question_id, given in zip(rows["question_id"], rows["answers"], strict=True):
        if not given:
            raise ValueError(
                f"question_id {question_id} has no answer, without which there is nothing to learn or to measure: give "
                "its --annotations (--validation_annotations). Is it a test split?"
            )
    return rows


def _vocabulary(arguments: VQAArguments, train: datasets.Dataset) -> AnswerVocabulary:
    """Gives the answers to choose among: those of a model that answers already, of the file, or the frequent ones."""
    given = None if arguments.answers is None else read_answers(arguments.answers)
    name = arguments.base_model
    if name is not None and is_unicoder_vl(name):
        config = UnicoderVLConfig.from_pretrained(name)
        if UnicoderVLForQuestionAnswering.__name__ in (config.architectures or ()):
            known = label_names(config)
            if given not in (None, known):
                raise ValueError(f"{name} chooses among answers of its own, which stay: leave out --answers.")
            return AnswerVocabulary(known)
    return AnswerVocabulary.build(train, arguments.min_occurrences) if given is None else AnswerVocabulary(given)


def _report(vocabulary: AnswerVocabulary, train: datasets.Dataset, validation: datasets.Dataset) -> None:
    """
    Logs how many questions have no answer among those that the model chooses among.

    Raises:
        `ValueError`: none of the training questions has one.
    """
    for name, rows in (("training", train), ("validation", validation)):
        unknown = [row for row, given in enumerate(rows["answers"]) if not vocabulary.targets(given)]
        some = f", such as {rows[unknown[0]]['question']!r}: {rows[unknown[0]]['answer']!r}" if unknown else ""
        logger.warning(
            f"Of {len(rows):,} {name} questions {len(unknown):,} have none of the {len(vocabulary):,} answers{some}."
        )
        if name == "training" and len(unknown) == len(rows):
            some = ", ".join(vocabulary.answers[:3])
            raise ValueError(
                f"none of the training questions has one of the {len(vocabulary):,} answers, {some}: give the file of "
                "the right ones, --answers, or leave it out."
            )


def make_collator(
    model: UnicoderVLForQuestionAnswering,
    processor: UnicoderVLProcessor,
    store: Mapping[str, RegionRecord],
    max_length: int = 44,
) -> DataCollatorForUnicoderVLQuestionAnswering:
    """Makes the collator of a model, whose answers are those of its configuration."""
    return DataCollatorForUnicoderVLQuestionAnswering(
        processor,
        store,
        AnswerVocabulary(answers_of(model)),
        max_length=max_length,
        with_mask_token=model.config.answer_head == "visual_bert",
    )


def answers_of(model: UnicoderVLForQuestionAnswering) -> list[str]:
    """Gives the answers that a model chooses among, in the order of its logits."""
    return label_names(model.config)


def measure(answers: Sequence[str], logits: np.ndarray, rows: datasets.Dataset) -> dict[str, float]:
    """Measures the answers of the highest logits, by the types of the answers, see [`vqa_metrics`]."""
    chosen = [answers[label] for label in logits.argmax(axis=1)]
    return vqa_metrics(chosen, rows["answers"][:], rows["answer_type"][:])


def answer_questions(
    model: UnicoderVLForQuestionAnswering, collator: Collator, rows: datasets.Dataset, **options: int
) -> tuple[list[str], np.ndarray]:
    """
    Answers questions. Every process calls it, and gets the answers to all.

    Args:
        model ([`UnicoderVLForQuestionAnswering`]), collator (callable): The model and its collator.
        rows (`datasets.Dataset`): Questions, as [`read_questions`] gives them.
        options: `batch_size` and `num_workers` of [`compute_logits`].

    Returns:
        The answer to each question, and the probabilities of all answers, each by itself in `[0, 1]`: float32,
        `(num_questions, num_answers)`.
    """
    logits = compute_logits(model, collator, rows, name="Answering", **options)
    answers = answers_of(model)
    return [answers[label] for label in logits.argmax(axis=1)], torch.from_numpy(logits).sigmoid().numpy()


def load_for_vqa(
    name: str | PathLike[str], store: Mapping[str, RegionRecord] | None = None
) -> tuple[UnicoderVLForQuestionAnswering, UnicoderVLProcessor]:
    """
    Loads a checkpoint that answers questions onto the device of this process, with its processor, and warns if it was
    trained on regions of another kind than the store's.

    Raises:
        `ValueError`: the checkpoint has no head for answers, or fewer rows of word embeddings than its tokenizer has
            tokens.
    """
    return load_labelled(UnicoderVLForQuestionAnswering, name, store, "run_vqa.py")
