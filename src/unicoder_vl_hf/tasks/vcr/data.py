"""The data of visual commonsense reasoning: VCR's files, read into rows of questions, and the inputs made of each.

Follows the paper's section of that name: Q->A reads question `;` answer, QA->R question `;` right answer `;` rationale;
the ground-truth boxes come first among the regions, each with the feature of the detection that overlaps it most.
Everything is a pure function of the files and the row. Left out: batching (`collator.py`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from ...data.masking import IGNORED
from ...data.rows import Row, Rows
from ...name_lists import read_jsonl
from ...records_unicoder_vl import RegionRecord
from ...regions.comparison import box_iou
from ...regions.photos import stem

# Gender-neutral, and distinct: the list in common use holds Peyton twice.
PERSON_NAMES = (
    "Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Skyler", "Frankie",
    "Pat", "Quinn",
)  # fmt: skip
NUM_CHOICES = 4
LOW_IOU = 0.1
FEATURES = datasets.Features(
    {
        **{name: datasets.Value("string") for name in ("annot_id", "image_id", "img_fn", "metadata_fn")},
        "objects": datasets.List(datasets.Value("string")),
        "boxes": datasets.List(datasets.List(datasets.Value("float32"))),
        **{name: datasets.Value("int64") for name in ("image_width", "image_height")},
        # A token is a text or a list of object indices, which Arrow has no type for.
        **{name: datasets.Json() for name in ("question", "answer_choices", "rationale_choices")},
        **{name: datasets.Value("int64") for name in ("answer_label", "rationale_label")},
    }
)

Segment = Sequence[str | Sequence[int]]  # the tokens of a question, an answer or a rationale
_CHUNK = 2_000


def read_vcr(
    path: str | PathLike[str],
    *,
    metadata_dir: str | PathLike[str] | None = None,
    store: Mapping[str, RegionRecord] | None = None,
    ids: str = "stem",
) -> datasets.Dataset:
    """
    Reads `train.jsonl`, `val.jsonl` or `test.jsonl` into one row a question, in the order of the file.

    Args:
        path (`str` or `os.PathLike`):
            The .jsonl file.
        metadata_dir (`str` or `os.PathLike`, *optional*):
            The folder that `metadata_fn` starts from. Without it boxes and sizes are None, which is enough for text,
            and for a store of features that were pooled in the ground-truth boxes.
        store (`Mapping[str, RegionRecord]`, *optional*):
            The regions of the images. With it an image that it lacks is an error here, and not in the middle of a run.
        ids (`str`, *optional*, defaults to `"stem"`):
            The source of image ids, as in `unicoder-vl extract`: the `"stem"` of the photo's name, or its whole
            `"path"`.

    Returns:
        `datasets.Dataset` with the columns `annot_id`, `image_id`, `img_fn`, `metadata_fn`, `objects` (the category of
        each object), `boxes` (x1 y1 x2 y2 of each object in pixels, as the file has them), `image_width`,
        `image_height` (None if the metadata has none), `question`, `answer_choices`, `rationale_choices` (tokens: a
        text, or a list of object indices), `answer_label` and `rationale_label` (in `[0, 4)`, or -100 for none).

    Raises:
        `FileNotFoundError`: the file or an image's metadata does not exist.
        `ValueError`: a line is malformed, which the message names with annot_id, field and value; two images have one
            id; or the store lacks images.
    """
    if ids not in ("stem", "path"):
        raise ValueError(f"ids is {ids!r}, expected 'stem' or 'path'.")
    path = Path(path)
    metadata = None if metadata_dir is None else _Metadata(Path(metadata_dir))
    rows = _rows(path, metadata, ids)
    chunks = []
    while chunk := list(islice(rows, _CHUNK)):
        chunks.append(datasets.Dataset.from_list(chunk, features=FEATURES))
    if not chunks:
        raise ValueError(f"{path} holds no question; expected one a line.")
    questions = datasets.concatenate_datasets(chunks)
    if store is not None:
        image_ids = dict.fromkeys(questions["image_id"])
        missing = [image_id for image_id in image_ids if image_id not in store]
        if missing:
            raise ValueError(
                f"{path}: the store lacks {len(missing):,} of {len(image_ids):,} images, such as {missing[:3]}; it has "
                f"{list(islice(store, 3))}. Extract them, or read with ids='path' (--ids path) where its ids are paths."
            )
    return questions


def _rows(path: Path, metadata: "_Metadata | None", ids: str) -> Iterator[dict[str, Any]]:
    annot_ids: dict[str, int] = {}
    photos: dict[str, str] = {}
    for number, item in read_jsonl(path):
        where = f"{path}, line {number}"
        row = _Line(where, item).row(ids)
        if (other := annot_ids.setdefault(row["annot_id"], number)) != number:
            raise ValueError(f"{where}: annot_id {row['annot_id']!r} is that of line {other} too; expected one each.")
        if (photo := photos.setdefault(row["image_id"], row["img_fn"])) != row["img_fn"]:
            raise ValueError(
                f"{where}: {photo} and {row['img_fn']} both have the id {row['image_id']!r}: with ids='path' (--ids "
                "path) the path is the id."
            )
        yield row if metadata is None else row | metadata.of(row)


class _Line:
    """Reads one line of the file; errors name the file and the line."""

    def __init__(self, where: str, item: Any):
        self.where, self.item = where, item
        if not isinstance(item, dict):
            raise self.error("the line", item, "an object")
        self.where += f", annot_id {self.text('annot_id')!r}"

    def error(self, field: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {field} is {value!r:.80}, expected {expected}.")

    def row(self, ids: str) -> dict[str, Any]:
        img_fn = self.text("img_fn")
        objects = self.item.get("objects")
        if not isinstance(objects, list) or not all(isinstance(name, str) and name for name in objects):
            raise self.error("objects", objects, "a list of category names")
        return {
            "annot_id": self.text("annot_id"),
            "image_id": stem(img_fn) if ids == "stem" else img_fn,
            "img_fn": img_fn,
            "metadata_fn": self.text("metadata_fn"),
            "objects": objects,
            "boxes": None,
            "image_width": None,
            "image_height": None,
            "question": self.segment("question", self.item.get("question"), len(objects)),
            "answer_choices": self.choices("answer_choices", len(objects)),
            "rationale_choices": self.choices("rationale_choices", len(objects)),
            "answer_label": self.label("answer_label"),
            "rationale_label": self.label("rationale_label"),
        }

    def text(self, field: str) -> str:
        value = self.item.get(field)
        if not isinstance(value, str) or not value:
            raise self.error(field, value, "a text that is not empty")
        return value

    def choices(self, field: str, num_objects: int) -> list[Segment]:
        value = self.item.get(field)
        if not isinstance(value, list) or len(value) != NUM_CHOICES:
            raise self.error(field, value, f"a list of {NUM_CHOICES}")
        return [self.segment(f"{field}[{index}]", choice, num_objects) for index, choice in enumerate(value)]

    def segment(self, field: str, tokens: Any, num_objects: int) -> Segment:
        if not isinstance(tokens, list) or not tokens:
            raise self.error(field, tokens, "a list of tokens that is not empty")
        for index, token in enumerate(tokens):
            if isinstance(token, str):
                continue
            if not isinstance(token, list) or not token:
                raise self.error(f"{field}[{index}]", token, "a text or a list of object indices")
            for reference in token:
                if type(reference) is not int or not 0 <= reference < num_objects:
                    raise self.error(f"{field}[{index}]", token, f"indices of the {num_objects} objects, from 0")
        return tokens

    def label(self, field: str) -> int:
        value = self.item.get(field)
        if value is None:
            return IGNORED
        if type(value) is not int or not 0 <= value < NUM_CHOICES:
            raise self.error(field, value, f"0..{NUM_CHOICES - 1}, or none as in the test split")
        return value


class _Metadata:
    """Reads boxes and sizes by image; a file is read once, however many questions share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, dict[str, Any]] = {}

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        name = row["metadata_fn"]
        if name not in self._read:
            self._read[name] = _read_metadata(self.folder / name, row["annot_id"])
        found = dict(self._read[name])
        names = found.pop("names")
        if len(found["boxes"]) != len(row["objects"]) or names not in (None, row["objects"]):
            raise ValueError(
                f"{self.folder / name}: {len(found['boxes'])} boxes of {names or 'unnamed objects'!r:.80}, but "
                f"annot_id {row['annot_id']!r} has {len(row['objects'])} objects, {row['objects']!r:.80}; "
                "expected the same. Is the metadata that of another release?"
            )
        return found


def _read_metadata(path: Path, annot_id: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}, the metadata of annot_id {annot_id!r}, does not exist. Is metadata_dir (--metadata) the folder "
            "that metadata_fn starts from, and complete?"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        boxes = [[float(corner) for corner in box[:4]] for box in content["boxes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected json with boxes [[x1, y1, x2, y2, score], …] ({error!r}).") from error
    for index, box in enumerate(boxes):
        if len(box) != 4 or not np.isfinite(box).all() or box[2] < box[0] or box[3] < box[1]:
            raise ValueError(f"{path}: boxes[{index}] is {box}, expected x1 y1 x2 y2 with x1 <= x2 and y1 <= y2.")
    size = {"image_width": content.get("width"), "image_height": content.get("height")}
    if None in size.values():
        size = dict.fromkeys(size)
    elif not all(type(side) is int and side > 0 for side in size.values()):
        raise ValueError(f"{path}: width and height are {list(size.values())}, expected pixels, or neither.")
    return {"boxes": boxes, **size, "names": content.get("names")}


def require_labels(rows: datasets.Dataset, field: str, otherwise: str) -> None:
    """
    Checks that every question has a label.

    Args:
        rows (`datasets.Dataset`): Questions, as [`read_vcr`] gives them.
        field (`str`): The label, `"answer_label"` or `"rationale_label"`.
        otherwise (`str`): The end of the message: what the label is for, and what to do.

    Raises:
        `ValueError`: a question has no label; the message names the first.
    """
    unknown = np.flatnonzero(np.asarray(rows[field]) == IGNORED)
    if len(unknown):
        raise ValueError(f"annot_id {rows[int(unknown[0])]['annot_id']!r} has no {field}, {otherwise}")


class VCRExamples(Rows):
    """
    Gives examples to be scored. There is one a question, which for QA->R has the right answer as its premise, or, with
    `every_answer`, there are four a question, one for each answer as the premise, which the test split needs.

    Args:
        rows (`datasets.Dataset`):
            The questions, as [`read_vcr`] gives them.
        task (`str`):
            `"qa"` (Q->A) or `"qar"` (QA->R).
        every_answer (`bool`, *optional*, defaults to `False`):
            Whether QA->R takes every answer: example `4 * i + a` is question `i` with answer `a`. An example with a
            wrong answer has no label.

    An example is a dict of the row's `annot_id`, `image_id`, `objects`, `boxes`, `image_width` and `image_height`,
    beside `choices`, for each choice its segments (question, answer, and for QA->R rationale), and `label`, in `[0, 4)`
    or -100 for none.

    Raises:
        `ValueError`: `task` is unknown, `every_answer` is for `"qa"`, or QA->R lacks a right answer.
    """

    def __init__(self, rows: datasets.Dataset, task: str, *, every_answer: bool = False):
        if task not in ("qa", "qar"):
            raise ValueError(f"task is {task!r}, expected 'qa' or 'qar'.")
        if every_answer and task == "qa":
            raise ValueError("every_answer is for task='qar': Q->A has no answer as its premise.")
        if task == "qar" and not every_answer:
            otherwise = "which QA->R takes as its premise: give a labelled split, or score every_answer=True."
            require_labels(rows, "answer_label", otherwise)
        self.rows, self.task = rows, task
        self.per_row = NUM_CHOICES if every_answer else 1

    def __len__(self) -> int:
        return len(self.rows) * self.per_row

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number, answer = divmod(index, self.per_row)
        row = self.rows[number]
        question, answers = row["question"], row["answer_choices"]
        if self.task == "qa":
            choices = [[question, choice] for choice in answers]
            label = row["answer_label"]
        else:
            if self.per_row == 1:
                answer = row["answer_label"]
            choices = [[question, answers[answer], rationale] for rationale in row["rationale_choices"]]
            label = row["rationale_label"] if answer == row["answer_label"] else IGNORED
        beside = ("annot_id", "image_id", "objects", "boxes", "image_width", "image_height")
        return Row({name: row[name] for name in beside}, choices=choices, label=label)


class Word(NamedTuple):
    """A word of a segment. `object_index` is the object that it names, or -1, as for "and" between two names."""

    text: str
    object_index: int
    in_reference: bool


def words_of(segment: Segment, objects: Sequence[str]) -> list[Word]:
    """
    Spells the references of a segment out. A person gets a name, chosen by the object's index, so that it is the same
    in every text and whatever regions are kept; any other object its category; and several have "and" between them.
    """
    words = []
    for token in segment:
        if isinstance(token, str):
            words.append(Word(token, -1, False))
            continue
        for position, index in enumerate(token):
            if position:
                words.append(Word("and", -1, True))
            person = objects[index] == "person"
            words.append(Word(PERSON_NAMES[index % len(PERSON_NAMES)] if person else objects[index], index, True))
    return words


class Token(NamedTuple):
    """A WordPiece token of a [`Word`]."""

    id: int
    object_index: int
    in_reference: bool


def truncate(parts: Sequence[list[Token]], max_tokens: int) -> bool:
    """
    Takes tokens from the end of the longest part, of equally long ones the later, until `max_tokens` are left in all.
    Tokens of references stay. The parts are changed in place.

    Returns:
        Whether any token was taken.

    Raises:
        `ValueError`: the references alone have more than `max_tokens`.
    """
    excess = sum(map(len, parts)) - max_tokens
    for _ in range(excess):
        cuttable = [part for part in reversed(parts) if not all(token.in_reference for token in part)]
        if not cuttable:
            raise ValueError(
                f"its references alone have {sum(map(len, parts))} tokens, expected at most {max_tokens}: raise "
                "max_length (--max_length)."
            )
        longest = max(cuttable, key=len)
        del longest[max(index for index, token in enumerate(longest) if not token.in_reference)]
    return excess > 0


def referenced_objects(choices: Iterable[Iterable[Segment]]) -> set[int]:
    """Gathers the objects that any segment of an example refers to."""
    return {
        index
        for segments in choices
        for segment in segments
        for token in segment
        if not isinstance(token, str)
        for index in token
    }


def ground_truth_boxes(row: Mapping[str, Any], record: RegionRecord) -> np.ndarray:
    """
    Scales the boxes of a row to the coordinates of `record` (pixels of its size, or fractions), `(n, 4)` float32, and
    cuts them at the border of the image: those of VCR reach beyond it.

    Raises:
        `ValueError`: the row has no boxes, or neither the row nor the record has a size.
    """
    where = f"annot_id {row['annot_id']!r}, image {row['image_id']!r}"
    if row["boxes"] is None:
        raise ValueError(
            f"{where}: boxes is None, expected one box an object: read with metadata_dir (--metadata), or give "
            "features of the ground-truth boxes (--gt_features)."
        )
    size = _size(row) or _size(vars(record))
    if size is None:
        raise ValueError(
            f"{where}: neither the metadata nor the store knows width and height, so that its boxes in pixels and the "
            "store's in fractions do not meet: add width and height to the metadata."
        )
    return _rescaled(row["boxes"], size, record)


def boxes_of_images(rows: datasets.Dataset) -> dict[str, np.ndarray]:
    """
    Gathers the boxes of each image, `(n, 4)` float32 in pixels, cut at its border if the metadata has its size. Give
    them to `extract(..., boxes=…)`, which pools features in them.
    """
    found = {}
    for row in rows.select_columns(["annot_id", "image_id", "boxes", "image_width", "image_height"]):
        if row["image_id"] not in found:
            corner = np.array(_size(row) or (np.inf, np.inf), dtype=np.float32)
            found[row["image_id"]] = np.array(row["boxes"], dtype=np.float32).reshape(-1, 4).clip(0, np.tile(corner, 2))
    return found


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    return None if image["image_width"] is None else (image["image_width"], image["image_height"])


def _rescaled(boxes: Any, size: tuple[int, int], record: RegionRecord) -> np.ndarray:
    """Scales boxes in an image of `size` to the coordinates of `record`, and cuts them at its border; float32."""
    fractions = np.array(boxes, dtype=np.float64).reshape(-1, 4) / (size * 2)
    return (fractions.clip(0, 1) * ((_size(vars(record)) or (1, 1)) * 2)).astype(np.float32)


def closest_regions(boxes: np.ndarray, record: RegionRecord) -> tuple[np.ndarray, np.ndarray]:
    """
    Finds for each of `boxes (n, 4)` the region of `record` of highest IoU, and that IoU, each of shape `(n,)`. Among
    equal ones the higher score counts, then the earlier row.

    Raises:
        `ValueError`: the record has no boxes.
    """
    if record.boxes is None:
        raise ValueError(f"Image {record.image_id!r}: boxes is None, expected boxes, which ground truth is matched by.")
    scores = np.zeros(len(record)) if record.object_scores is None else record.object_scores
    order = np.argsort(-scores, kind="stable")
    ious = box_iou(boxes, record.boxes[order])
    best = ious.argmax(axis=1)
    return order[best], ious[np.arange(len(boxes)), best]


def ground_truth_record(
    row: Mapping[str, Any],
    record: RegionRecord,
    max_regions: int = 100,
    *,
    referenced: Iterable[int] = (),
    given: RegionRecord | None = None,
) -> tuple[RegionRecord, np.ndarray]:
    """
    Makes the record that a model is shown for a row: the ground-truth boxes in the order of the objects, then the best
    of the detections that serve no box, by score but in record order, until there are `max_regions`.

    Args:
        row (`Mapping`): The question, as [`read_vcr`] or [`VCRExamples`] gives it.
        record (`RegionRecord`): The detections. Each box takes feature, object class and object score of the one that
            overlaps it most, however little; one may serve several boxes.
        max_regions (`int`, defaults to 100): The most regions. If there are more objects, those that are not referenced
            go, the last first; those that are referenced stay, even if there are more of them.
        referenced (iterable of `int`): The objects that the text refers to, see [`referenced_objects`].
        given (`RegionRecord`, *optional*): Features pooled in the ground-truth boxes themselves, a row an object. By
            default they are those of detections.

    Returns:
        The record, and the row in it of each object, `(num_objects,)` int64, -1 for one that was cut.

    Raises:
        `ValueError`: boxes are missing, or `given` does not have one row an object.
    """
    detections = np.arange(len(record))
    if given is None:
        boxes = ground_truth_boxes(row, record)
        source, (serving, _) = record, closest_regions(boxes, record)
        free = np.setdiff1d(detections, serving)
    else:
        boxes = _given_boxes(row, record, given)
        source, serving, free = given, np.arange(len(boxes)), detections
    kept = _kept_objects(len(boxes), set(referenced), max_regions)
    others = _best(record, free, max(0, max_regions - len(kept)))
    heads = _columns(source, serving[kept]) | {"boxes": boxes[kept]}
    rest = _columns(record, others)
    region_of_object = np.full(len(boxes), -1)
    region_of_object[kept] = np.arange(len(kept))
    columns = {name: np.concatenate([heads[name], rest[name]]) for name in heads if name in rest}
    return _record(record, columns), region_of_object


def _given_boxes(row: Mapping[str, Any], record: RegionRecord, given: RegionRecord) -> np.ndarray:
    """Scales the boxes of `given` to the coordinates of `record`."""
    where = f"annot_id {row['annot_id']!r}, image {row['image_id']!r}"
    if given.boxes is None or len(given) != len(row["objects"]):
        raise ValueError(
            f"{where}: the features of its ground truth have {len(given)} rows, {_has_boxes(given)}, expected a row "
            f"and a box for each of {len(row['objects'])} objects: extract with --boxes."
        )
    if record.boxes is None or record.features.shape[1] != given.features.shape[1]:
        raise ValueError(
            f"{where}: the detections have features of width {record.features.shape[1]} and {_has_boxes(record)}, the "
            f"ground truth features of width {given.features.shape[1]}; expected boxes, and features of one detector."
        )
    return _rescaled(given.boxes, _size(vars(given)) or (1, 1), record)


def _has_boxes(record: RegionRecord) -> str:
    return "no boxes" if record.boxes is None else "boxes"


def _kept_objects(count: int, referenced: set[int], max_regions: int) -> np.ndarray:
    if count <= max_regions:
        return np.arange(count)
    others = [index for index in range(count) if index not in referenced]
    return np.array(sorted([*referenced, *others[: max(0, max_regions - len(referenced))]]), dtype=np.int64)


def _best(record: RegionRecord, rows: np.ndarray, count: int) -> np.ndarray:
    """Chooses from `rows` the `count` of best score, or without scores the first ones, in record order."""
    if record.object_scores is not None:
        rows = rows[np.argsort(-record.object_scores[rows], kind="stable")]
    return np.sort(rows[:count])


def _columns(record: RegionRecord, rows: np.ndarray) -> dict[str, Any]:
    names = ("boxes", "features", "object_ids", "object_scores")
    return {name: value[rows] for name in names if (value := getattr(record, name)) is not None}


def _record(whole: RegionRecord, columns: dict[str, Any]) -> RegionRecord:
    """Makes a record of the image of `whole` with these columns alone, whose values were checked before."""
    kept = ("image_id", "image_width", "image_height")
    fields = {name: value if name in kept else None for name, value in vars(whole).items()}
    return RegionRecord.unchecked(fields | columns)


def take_regions(record: RegionRecord, rows: np.ndarray) -> RegionRecord:
    """Makes a record of these rows, with the fields that multiple choice and masked object classification need."""
    return _record(record, _columns(record, rows))
