"""Evaluates visual commonsense reasoning on questions with labels, and writes the leaderboard's file for those without.

    python -m unicoder_vl_hf.tasks.vcr.run_evaluation --model runs/vcr --annotations vcr1annots/val.jsonl \
        --metadata vcr1images --regions vcr-regions --output val.json --pictures pictures --photos vcr1images
    accelerate launch -m unicoder_vl_hf.tasks.vcr.run_evaluation --model runs/vcr --annotations vcr1annots/test.jsonl \
        --metadata vcr1images --regions vcr-regions --submission submission.csv

With labels it measures Q->A, QA->R after the right answer, and Q->AR. A submission takes 4 + 16 scores a question, for
the answers and for the rationales after each of them; `unicoder-vl vcr-check` looks it through. `--rationale_model`
scores the rationales if each task has a model of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from ...data.masking import IGNORED
from ...errors import run_script
from ...modeling_unicoder_vl import UnicoderVLForMultipleChoice
from ...processes import start_processes
from ...regions.store import RegionStore
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import evaluation_precision, evenly, precision_option, write_metrics
from .collator import DataCollatorForUnicoderVLMultipleChoice
from .data import VCRExamples, read_vcr
from .metrics import vcr_metrics, write_submission
from .pictures import draw_question
from .training import choice_probabilities, load_for_vcr


@dataclass
class VCREvaluationArguments:
    """Names a checkpoint, the questions that it is asked, and the files that its choices are written to."""

    model: str = option(..., "Checkpoint of run_vcr.py: a folder or a repository of the Hub.")
    annotations: str = option(..., "Questions: VCR's val.jsonl or test.jsonl.")
    regions: str = option(..., "RegionStore of the images.")
    metadata: str | None = option(None, "Folder that metadata_fn starts from.")
    gt_features: str | None = option(None, "RegionStore of features pooled in the ground-truth boxes.")
    ids: str = option("stem", "Image ids: stem (of a photo's name) or path.")
    rationale_model: str | None = option(None, "Checkpoint that scores the rationales. Default: --model.")
    mixed_precision: str = precision_option()
    max_length: int = option(156, "Most tokens of a choice; longer ones are cut.")
    batch_size: int = option(32, "Questions at a time, in each process.")
    submission: str | None = option(None, "CSV file to write for the leaderboard.")
    output: str | None = option(None, "JSON file that the metrics are written to.")
    pictures: str | None = option(None, "Folder for pictures of questions, with --photos.")
    photos: str | None = option(None, "Folder that img_fn starts from.")
    num_pictures: int = option(8, "Questions that are drawn, evenly over the file.")

    def __post_init__(self):
        if (self.pictures is None) != (self.photos is None):
            raise ValueError("Give both --pictures and --photos, or neither.")


def main(argv: list[str] | None = None) -> None:
    """
    Evaluates with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the checkpoint or the regions do not fit, or there are neither labels nor `--submission`.
    """
    args = parse_evaluation(VCREvaluationArguments, argv)
    state = start_processes()
    store = RegionStore(args.regions)
    rows = read_vcr(args.annotations, metadata_dir=args.metadata, store=store, ids=args.ids)
    labelled, every_answer = IGNORED not in rows["answer_label"], args.submission is not None
    if not labelled and not every_answer:
        raise ValueError(f"{args.annotations} has no labels: give --submission for the leaderboard's file.")

    answering = load_with_collator(args.model, store, args)
    reasoning = answering if args.rationale_model is None else load_with_collator(args.rationale_model, store, args)
    premises = VCRExamples(rows, "qar", every_answer=every_answer)
    with evaluation_precision(args.mixed_precision, answering[0]):
        answers = choice_probabilities(*answering, VCRExamples(rows, "qa"), batch_size=args.batch_size)
        rationales = choice_probabilities(*reasoning, premises, batch_size=args.batch_size)
    if not state.is_main_process:
        return
    if every_answer:
        write_submission(args.submission, rows["annot_id"][:], answers, rationales)
        print(f"{args.submission}: {len(rows):,} questions")
    if labelled:
        after_right_answer = rationales[np.arange(len(rows)), rows["answer_label"]] if every_answer else rationales
        report(args, rows, answers, after_right_answer)


def load_with_collator(
    name: str, store: RegionStore, args: VCREvaluationArguments
) -> tuple[UnicoderVLForMultipleChoice, DataCollatorForUnicoderVLMultipleChoice]:
    """Loads a checkpoint, and makes the collator of its processor; errors are those of [`load_for_vcr`]."""
    model, processor = load_for_vcr(name, store)
    collator = DataCollatorForUnicoderVLMultipleChoice(
        processor,
        store,
        max_length=min(args.max_length, model.config.max_position_embeddings),
        max_regions=processor.feature_extractor.max_regions,
        gt_features=None if args.gt_features is None else RegionStore(args.gt_features),
    )
    return model, collator


def report(args: VCREvaluationArguments, rows: Dataset, answers: np.ndarray, rationales: np.ndarray) -> None:
    """Prints the metrics of questions with labels, and writes them and the pictures if they are asked for."""
    metrics = vcr_metrics(answers, rationales, rows["answer_label"], rows["rationale_label"])
    for name, value in metrics.items():
        print(f"{name:20}{100 * value:6.1f} %" if name.endswith("_accuracy") else f"{name:20}{value:6,}")
    write_metrics(args, metrics | {"questions": len(rows)})
    if args.pictures is None or args.photos is None:
        return
    folder = Path(args.pictures)
    folder.mkdir(parents=True, exist_ok=True)
    for index in evenly(len(rows), args.num_pictures):
        row, photo = rows[index], Image.open(Path(args.photos, rows[index]["img_fn"]))
        draw_question(folder / f"{row['annot_id']}.png", photo, row, answers[index], rationales[index])


if __name__ == "__main__":
    run_script(main)
