"""The file of answers that the servers of VQA and GQA take, and a look through it before it is sent."""

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import datasets

from ...data.labelled_files import missing_items
from ...files import write_json
from ...name_lists import read_json
from .data import read_questions

# The fields of an entry, by the layout of the questions.
FIELDS = {"vqa": ("question_id", "answer"), "gqa": ("questionId", "prediction")}


def write_submission(path: str | PathLike[str], rows: datasets.Dataset, answers: Sequence[str]) -> None:
    """
    Writes the json of answers that the evaluation of the questions takes, whole or not at all.

    Args:
        path (`str` or `os.PathLike`): The file; one that exists is replaced.
        rows (`datasets.Dataset`): All questions of the split, as [`read_questions`] gives them.
        answers (sequence of `str`): The answer to each.

    Raises:
        `ValueError`: there are not as many answers as questions.
    """
    if len(rows) != len(answers):
        raise ValueError(f"There are {len(answers):,} answers to {len(rows):,} questions; expected one each.")
    entries = []
    for question_id, layout, answer in zip(rows["question_id"], rows["layout"], answers, strict=True):
        name, field = FIELDS[layout]
        entries.append({name: _as_submitted(question_id, layout), field: answer})
    write_json(Path(path), entries)


def _as_submitted(question_id: str, layout: str) -> int | str:
    """Gives VQA's ids as numbers, which they are in its files, unless they are none."""
    is_number = layout == "vqa" and question_id.isdecimal() and str(int(question_id)) == question_id
    return int(question_id) if is_number else question_id


def check_submission(path: str | PathLike[str], questions: str | PathLike[str]) -> Iterator[str]:
    """
    Finds the problems for which the server would refuse the submission at `path`, one at a time: an entry of another
    form, or a question that is missing, unknown or answered twice.

    Raises:
        `ValueError`: `path` is no json, or `questions` no file of questions.
    """
    rows = read_questions(questions)
    name, field = FIELDS[rows[0]["layout"]]
    kinds = {type(_as_submitted(*pair)) for pair in zip(rows["question_id"], rows["layout"], strict=True)}
    kind = " or ".join(sorted(each.__name__ for each in kinds))
    left = set(rows["question_id"])
    known = set(left)
    entries = read_json(path)
    if not isinstance(entries, list):
        yield f"a {type(entries).__name__} at the top, expected a list of {{{name}, {field}}}."
        return
    for number, entry in enumerate(entries):
        where = f"entry {number}"
        if not isinstance(entry, dict) or type(entry.get(name)) not in kinds or not isinstance(entry.get(field), str):
            yield f"{where}: {entry!r:.80}, expected {name}, {kind}, and {field}, str."
            continue
        question_id = str(entry[name])
        if question_id not in known:
            yield f"{where}: {name} {question_id} is not among the {len(known):,} of {questions}."
        elif question_id not in left:
            yield f"{where}: {name} {question_id} is answered before."
        left.discard(question_id)
    missing = [question_id for question_id in rows["question_id"] if question_id in left]
    yield from missing_items([f"{name} {question_id}" for question_id in missing], len(known))
