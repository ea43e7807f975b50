"""Questions about images, read from the files of VQA, OK-VQA and GQA, and the answers that a model chooses among.

Everything is a pure function of the files. Left out: batching (`collator.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import datasets

from ...data.captions import rename_images
from ...data.labelled_files import name_field
from ...name_lists import read_json
from .metrics import agreement, compared_answers, normalise_answer, of_one_mind

MIN_OCCURRENCES = 9  # by which VQA v2 has 3,129 answers in its training and validation splits
_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        **dict.fromkeys(("question_id", "image_id", "question", "layout", "question_type", "answer_type"), _TEXT),
        "answer": _TEXT,
        "answers": datasets.List(_TEXT),
    }
)


def read_questions(
    questions: str | PathLike[str], annotations: str | PathLike[str] | None = None, *, ids: str | None = None
) -> datasets.Dataset:
    """
    Reads a file of questions into one row a question, in the order of the file.

    Args:
        questions (`str` or `os.PathLike`):
            VQA's or OK-VQA's json of questions (v1 and v2), or GQA's, which has the answers in it.
        annotations (`str` or `os.PathLike`, *optional*):
            VQA's or OK-VQA's json of their answers. Without it, as for the test split, nobody has answered.
        ids (`str`, *optional*):
            Rule that gives the images other ids than their numbers, as in `read_captions`.

    Returns:
        `datasets.Dataset` with the columns `question_id`, `image_id` (text, also where the file has numbers),
        `question`, `layout` (`"vqa"` or `"gqa"`), `question_type`, `answer_type` (None where the file has none; of GQA
        the structural type, and `"binary"` or `"open"`), `answer` (the most frequent one, or None) and `answers` (those
        of all annotators; none of a test split).

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: a file is malformed, a question is empty or stands twice, or questions and annotations are not of
            one another. The message names the file, the question and the field.
    """
    content = read_json(questions)
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        rows = [_vqa_question(item, f"{questions}, questions[{i}]") for i, item in enumerate(content["questions"])]
    elif isinstance(content, dict) and content and all(isinstance(item, dict) for item in content.values()):
        if annotations is not None:
            raise ValueError(f"{questions} is GQA's, which has its answers in it: leave out {annotations}.")
        rows = [_gqa_question(name, item, f"{questions}, {name!r}") for name, item in content.items()]
    else:
        shape = f"the keys {list(content)[:5]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{questions} holds {shape} at its top; expected VQA's json of questions, or GQA's.")
    if not rows:
        raise ValueError(f"{questions} holds no question; expected at least one.")
    seen: set[str] = set()
    for row in rows:
        if row["question_id"] in seen:
            raise ValueError(f"{questions}: question_id {row['question_id']} stands twice; expected each once.")
        seen.add(row["question_id"])
    if annotations is not None:
        _add_annotations(rows, Path(questions), Path(annotations))
    found = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)
    return rename_images(found, questions, ids)


def _vqa_question(item: Any, where: str) -> dict[str, Any]:
    row = {name: name_field(item, name, where) for name in ("question_id", "image_id", "question")}
    nothing = dict.fromkeys(("question_type", "answer_type", "answer"))
    return {**row, "layout": "vqa", **nothing, "answers": []}


def _gqa_question(name: str, item: Mapping[str, Any], where: str) -> dict[str, Any]:
    answer = item.get("answer")  # none in a test split
    structure = (item.get("types") or {}).get("structural")
    return {
        "question_id": name,
        "image_id": name_field(item, "imageId", where),
        "question": name_field(item, "question", where),
        "layout": "gqa",
        "question_type": structure,
        "answer_type": structure and ("open" if structure == "query" else "binary"),
        "answer": answer,
        "answers": [] if answer is None else [name_field(item, "answer", where)],
    }


def _add_annotations(rows: Iterable[dict[str, Any]], questions: Path, annotations: Path) -> None:
    content = read_json(annotations)
    items = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ValueError(f"{annotations} has no list of annotations at its top; expected VQA's json of answers.")
    rows_by_id = {row["question_id"]: row for row in rows}
    for number, item in enumerate(items):
        where = f"{annotations}, annotations[{number}]"
        row = rows_by_id.pop(name_field(item, "question_id", where), None)
        if row is None:
            raise ValueError(
                f"{where}: question_id {item['question_id']} is not, or no more, among the questions of {questions}. "
                "Are both of one split?"
            )
        if (image_id := name_field(item, "image_id", where)) != row["image_id"]:
            raise ValueError(f"{where}: image_id is {image_id}, but {row['image_id']} in {questions}.")
        given = item.get("answers")
        if not isinstance(given, list) or not given:
            raise ValueError(f"{where}: answers are {given!r:.80}, expected a list of those of the annotators.")
        row["answers"] = [_answer(each, f"{where}.answers[{i}]") for i, each in enumerate(given)]
        most = Counter(row["answers"]).most_common(1)[0][0]
        row["answer"] = item.get("multiple_choice_answer", most)
        row |= {name: item.get(name) for name in ("question_type", "answer_type")}
    if rows_by_id:
        raise ValueError(
            f"{annotations} has no answer to {len(rows_by_id):,} of the questions of {questions}, such as question_id "
            f"{next(iter(rows_by_id))}. Are both of one split?"
        )


def _answer(item: Any, where: str) -> str:
    answer = item.get("answer") if isinstance(item, dict) else None
    if not isinstance(answer, str):
        raise ValueError(f"{where}: answer is {answer!r:.80}, expected a text.")
    return answer  # which annotators did leave empty


class AnswerVocabulary:
    """
    The answers that a model chooses among, in the order of its logits.

    Args:
        answers (sequence of `str`): The answers.

    Raises:
        `ValueError`: there are fewer than two, or one stands twice.
    """

    def __init__(self, answers: Sequence[str]):
        if len(answers) < 2 or len(set(answers)) < len(answers):
            twice = [answer for answer, count in Counter(answers).items() if count > 1]
            raise ValueError(f"There are {len(answers)} answers, twice {twice[:3]}; expected at least two, each once.")
        self.answers = list(answers)
        self._exact = {answer: [label] for label, answer in enumerate(answers)}
        self._spelled = defaultdict(list)  # for those that one spelling stands for
        for label, answer in enumerate(answers):
            self._spelled[normalise_answer(answer)].append(label)

    def __len__(self) -> int:
        return len(self.answers)

    @classmethod
    def build(cls, rows: datasets.Dataset, min_occurrences: int = MIN_OCCURRENCES) -> "AnswerVocabulary":
        """
        Takes the answers that are the most frequent one of at least `min_occurrences` questions, in the spelling in
        which the evaluation compares them, those of more questions first. GQA's stay as they are.
        """
        counts: Counter[str] = Counter()
        for answer, given in zip(rows["answer"], rows["answers"], strict=True):
            if given:
                counts[compared_answers([answer], given)[0]] += 1
        kept = [answer for answer, count in counts.items() if count >= min_occurrences and answer]
        return cls(sorted(kept, key=lambda answer: (-counts[answer], answer)))

    def targets(self, given: Sequence[str]) -> dict[int, float]:
        """Gives the answers that are right to some degree, by label: each with its accuracy, in `(0, 1]`."""
        counts = Counter(compared_answers(given, given))
        labels_of = self._exact if of_one_mind(given) else self._spelled
        targets: dict[int, float] = {}
        for answer, count in counts.items():
            for label in labels_of.get(answer, ()):
                targets[label] = agreement(count, len(given))
        return {label: accuracy for label, accuracy in targets.items() if accuracy > 0}
