"""The metrics of visual commonsense reasoning, and the file that VCR's leaderboard takes.

Q->A, QA->R and Q->AR are the paper's. The leaderboard knows the labels of the test split: it asks for the probabilities
of the four answers, and of the four rationales after each of them. Left out: scoring (`training.py`).
"""

import csv
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ...data.labelled_files import missing_items
from ...files import write_csv
from .data import NUM_CHOICES, read_vcr

GROUPS = ("answer", *(f"rationale_conditioned_on_a{answer}" for answer in range(NUM_CHOICES)))
HEADER = ["annot_id", *(f"{group}_{choice}" for group in GROUPS for choice in range(NUM_CHOICES))]
SUM_TOLERANCE = 1e-3


def vcr_metrics(
    answer_scores: ArrayLike, rationale_scores: ArrayLike, answer_labels: ArrayLike, rationale_labels: ArrayLike
) -> dict[str, float]:
    """
    Measures the accuracies of Q->A, QA->R, and Q->AR, which counts a question when both of its choices are right.

    Args:
        answer_scores, rationale_scores (arrays of shape `(num_questions, num_choices)`):
            Higher = better; logits or probabilities. Rationales are scored after the right answer.
        answer_labels, rationale_labels (arrays of shape `(num_questions,)`):
            The right choices, in `[0, num_choices)`.

    Returns:
        `dict` of `answer_accuracy`, `rationale_accuracy` and `joint_accuracy`, as fractions, and of `answer_ties` and
        `rationale_ties`: the questions whose right choice shares the highest score with another, which counts as wrong.

    Raises:
        `ValueError`: shapes do not fit, a score is NaN, or a label is no choice.
    """
    answers, answer_ties = judge_choices("answer", answer_scores, answer_labels)
    rationales, rationale_ties = judge_choices("rationale", rationale_scores, rationale_labels)
    if len(answers) != len(rationales):
        raise ValueError(f"{len(answers)} questions have answers, {len(rationales)} rationales; expected the same.")
    return {
        "answer_accuracy": float(answers.mean()),
        "rationale_accuracy": float(rationales.mean()),
        "joint_accuracy": float((answers & rationales).mean()),
        "answer_ties": answer_ties,
        "rationale_ties": rationale_ties,
    }


def choice_metrics(name: str, scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """
    Measures the accuracy and the ties of one task alone, with the names and errors of [`vcr_metrics`].

    Args:
        name (`str`):
            The task, `"answer"` or `"rationale"`.
        scores (array of shape `(num_questions, num_choices)`):
            Higher = better.
        labels (array of shape `(num_questions,)`):
            The right choices, in `[0, num_choices)`.
    """
    right, ties = judge_choices(name, scores, labels)
    return {f"{name}_accuracy": float(right.mean()), f"{name}_ties": ties}


def judge_choices(name: str, scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, int]:
    """
    Judges whether the right choice of each question scores above all others; the arguments are those of
    [`choice_metrics`].

    Returns:
        A bool array of shape `(num_questions,)`, and the number of questions that are wrong by a tie at the top alone.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or 0 in scores.shape or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"{name}_scores have shape {scores.shape} and {name}_labels {labels.shape}; expected (questions, choices) "
            "and (questions,)."
        )
    if np.isnan(scores).any():
        raise ValueError(f"{name}_scores[{np.isnan(scores).any(axis=1).argmax()}] hold NaN; expected numbers.")
    unknown = ~np.isin(labels, np.arange(scores.shape[1]))
    if unknown.any():
        raise ValueError(
            f"{name}_labels[{unknown.argmax()}] is {labels[unknown][0]}, expected a choice, 0..{scores.shape[1] - 1}: "
            "the test split has no labels, give a labelled one."
        )
    of_right = np.take_along_axis(scores, labels[:, None], axis=1)
    is_best = (scores <= of_right).all(axis=1)
    is_alone = (scores == of_right).sum(axis=1) == 1
    return is_best & is_alone, int((is_best & ~is_alone).sum())


def write_submission(
    path: str | PathLike[str],
    annot_ids: Sequence[str],
    answer_probabilities: ArrayLike,
    rationale_probabilities: ArrayLike,
) -> None:
    """
    Writes the CSV of the leaderboard, whole or not at all.

    Args:
        path (`str` or `os.PathLike`):
            The file; one that exists is replaced.
        annot_ids (sequence of `str`):
            All questions of the test split.
        answer_probabilities (array of shape `(num_questions, 4)`):
            Probabilities of each question's answers.
        rationale_probabilities (array of shape `(num_questions, 4, 4)`):
            Probabilities of the rationales: `[i, a, r]` is that of rationale `r` of question `i` after answer `a`.

    Raises:
        `ValueError`: shapes do not fit, an annot_id stands twice, or four values are no probabilities.
    """
    answers, rationales = np.asarray(answer_probabilities), np.asarray(rationale_probabilities)
    shapes = (len(annot_ids), NUM_CHOICES), (len(annot_ids), NUM_CHOICES, NUM_CHOICES)
    if (answers.shape, rationales.shape) != shapes:
        raise ValueError(
            f"probabilities of answers and rationales have shapes {answers.shape} and {rationales.shape}, expected "
            f"{shapes[0]} and {shapes[1]} for {len(annot_ids)} questions."
        )
    rows = np.concatenate([answers[:, None], rationales], axis=1)  # (num_questions, 5, 4)
    seen: set[str] = set()
    for annot_id, groups in zip(annot_ids, rows, strict=True):
        if annot_id in seen:
            raise ValueError(f"annot_id {annot_id!r} stands twice in annot_ids, expected one each.")
        seen.add(annot_id)
        for problem in _problems_of_values(groups):
            raise ValueError(f"annot_id {annot_id!r}: {problem}.")
    cells = rows.reshape(len(rows), -1).tolist()
    write_csv(Path(path), [HEADER, *([annot_id, *values] for annot_id, values in zip(annot_ids, cells, strict=True))])


def check_submission(path: str | PathLike[str], annotations: str | PathLike[str]) -> Iterator[str]:
    """
    Finds the problems for which the leaderboard would refuse the submission at `path`, one at a time, with its line. A
    problem is another header, an annot_id of `annotations` (`test.jsonl`) that is missing, one that is not in
    `annotations` or stands twice, a cell that is no probability, or four that do not sum to 1 within 0.001.

    Raises:
        `ValueError`: `path` is no CSV, or `annotations` no file of VCR.
    """
    expected = read_vcr(annotations, ids="path")["annot_id"]
    line_of = dict.fromkeys(expected, 0)  # 0: not found so far
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            if header != HEADER:
                yield f"line 1: {_problem_of_header(header)}."
                return
            for row in reader:
                annot_id, cells = "".join(row[:1]), row[1:]  # a blank line has no cell
                where = f"line {reader.line_num}, annot_id {annot_id!r}"
                if annot_id not in line_of:
                    yield f"{where}: not among the {len(expected):,} of {annotations}."
                elif line_of[annot_id]:
                    yield f"{where}: stands in line {line_of[annot_id]} too."
                line_of[annot_id] = reader.line_num
                for problem in _problems_of_cells(cells):
                    yield f"{where}: {problem}."
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: no CSV in UTF-8 ({error}).") from error
    missing = [annot_id for annot_id, line in line_of.items() if not line]
    yield from missing_items([f"annot_id {annot_id!r}" for annot_id in missing], len(expected))


def _problem_of_header(header: Sequence[str]) -> str:
    missing, unknown = (
        [name for name in names if name not in others] for names, others in ((HEADER, header), (header, HEADER))
    )
    problems = [f"{verb} {_some(names)}" for verb, names in (("lacks", missing), ("holds", unknown)) if names]
    found = " and ".join(problems) or "has its columns in another order, or twice"
    return f"the header {found}; expected {HEADER[0]}, {HEADER[1]}, … {HEADER[-1]}"


def _some(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(f"{name!r:.60}" for name in names[:3]) + more


def _problems_of_cells(cells: Sequence[str]) -> Iterator[str]:
    if len(cells) != len(HEADER) - 1:
        yield f"{len(cells) + 1} cells, expected {len(HEADER)}"
        return
    values = np.empty(len(cells))
    for index, cell in enumerate(cells):
        try:
            values[index] = float(cell)
        except ValueError:
            yield f"{HEADER[1 + index]} is {cell!r}, expected a number"
            return
    yield from _problems_of_values(values.reshape(-1, NUM_CHOICES))


def _problems_of_values(groups: np.ndarray) -> Iterator[str]:
    """Finds the groups of a question's `(5, 4)` values that are no probabilities."""
    for name, values in zip(GROUPS, groups.tolist(), strict=True):
        outside = [value for value in values if not -SUM_TOLERANCE <= value <= 1 + SUM_TOLERANCE]  # NaN is outside too
        if outside:
            yield f"{name}_0..3 hold {outside[0]}, expected probabilities in 0..1"
        elif abs(sum(values) - 1) > SUM_TOLERANCE:
            yield f"{name}_0..3 sum to {sum(values):.6g}, expected 1 within {SUM_TOLERANCE}"
