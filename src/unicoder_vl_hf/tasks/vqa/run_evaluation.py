"""Evaluates answers to questions about images, and writes the file that the servers of VQA and GQA take.

    python -m unicoder_vl_hf.tasks.vqa.run_evaluation --model runs/vqa --regions coco-regions --output val.json \
        --questions v2_OpenEnded_mscoco_val2014_questions.json --annotations v2_mscoco_val2014_annotations.json
    accelerate launch -m unicoder_vl_hf.tasks.vqa.run_evaluation --model runs/vqa --regions coco-regions \
        --questions v2_OpenEnded_mscoco_test2015_questions.json --submission submission.json

With answers of annotators it measures the official accuracy, by the types of the answers and of the questions.
`unicoder-vl vqa-check` looks a submission through.
"""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ...errors import run_script
from ...pictures import draw_answers
from ...processes import start_processes
from ...regions.store import RegionStore
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import (
    PictureArguments,
    TaskEvaluationArguments,
    evaluation_precision,
    evenly,
    write_metrics,
)
from ...search.encoders import Photos
from .data import read_questions
from .metrics import vqa_metrics
from .submission import write_submission
from .training import answer_questions, answers_of, load_for_vqa, make_collator


@dataclass(kw_only=True)
class VQAEvaluationArguments(PictureArguments, TaskEvaluationArguments):
    """Names a checkpoint, the questions that it is asked, and the files that its answers are written to."""

    questions: str = option(..., "File of questions: VQA's, OK-VQA's or GQA's.")
    annotations: str | None = option(None, "File of their answers; none for GQA, or for a test split.")
    submission: str | None = option(None, "JSON file to write for the server.")


def main(argv: list[str] | None = None) -> None:
    """
    Evaluates with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the checkpoint or the regions do not fit, or there are neither answers nor `--submission`.
    """
    args = parse_evaluation(VQAEvaluationArguments, argv)
    state = start_processes()
    store = RegionStore(args.regions)
    rows = args.joined(read_questions(args.questions, args.annotations, ids=args.image_ids), store, "questions")
    answered = all(rows["answers"])
    if not answered and args.submission is None:
        raise ValueError(f"{args.questions} has no answers: give --annotations, or --submission for the server's file.")
    model, processor = load_for_vqa(args.model, store)
    collator = make_collator(model, processor, store, args.length_for(model))
    with evaluation_precision(args.mixed_precision, model):
        answers, probabilities = answer_questions(model, collator, rows, batch_size=args.batch_size)
    if not state.is_main_process:
        return
    if args.submission is not None:
        write_submission(args.submission, rows, answers)
        print(f"{args.submission}: {len(rows):,} questions")
    if answered:
        report(args, rows, answers)
    if args.pictures is not None:
        draw(args, store, rows, answers_of(model), probabilities)


def report(args: VQAEvaluationArguments, rows: datasets.Dataset, answers: list[str]) -> None:
    """Prints the accuracies, by the types of answers and of questions, and writes them if it is asked for."""
    metrics = vqa_metrics(answers, rows["answers"][:], rows["answer_type"][:])
    by_question = vqa_metrics(answers, rows["answers"][:], rows["question_type"][:])
    for name, value in {**metrics, **by_question}.items():
        print(f"{name:32}{100 * value:6.2f} %")
    by_question.pop("accuracy")
    write_metrics(args, {**metrics, "question_types": by_question, "questions_asked": len(rows)})


def draw(
    args: VQAEvaluationArguments,
    store: RegionStore,
    rows: datasets.Dataset,
    answers: list[str],
    probabilities: np.ndarray,
) -> None:
    """Draws questions, evenly over the file, each with its five most probable answers."""
    folder, photos = Path(str(args.pictures)), Photos(str(args.photos), args.photo_ids)
    folder.mkdir(parents=True, exist_ok=True)
    for number in evenly(len(rows), args.num_pictures):
        row, of_question = rows[number], probabilities[number]
        best = [(answers[label], float(of_question[label])) for label in np.argsort(-of_question)[:5]]
        photo = photos.of(store[row["image_id"]])
        draw_answers(folder / f"{row['question_id']}.png", photo, row["question"], best, row["answer"])


if __name__ == "__main__":
    run_script(main)
