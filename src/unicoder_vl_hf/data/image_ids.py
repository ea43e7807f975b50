"""Ids that mean one image under several names, made one: what lets captions and features of different origin join.

A photo is `150367` in a TSV, `COCO_val2014_000000391895` with `cocoid` 391895 in Karpathy's file,
`coco_val_000000391895` in UNITER's, and a row number in SCAN's. The ids of features are renamed when they are
converted, to those that `read_captions` gives; captions stay as they are.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..regions.conversion import Rename, UnmappedId


def id_mapping(rule: str) -> Rename:
    """
    The function from an image id of a feature file to the one that it is stored under; it can be pickled.

    Args:
        rule (`str`): One of
            - `stem`: the file's name without folders and suffix, `train2014/a.jpg` → `a`;
            - `coco`: COCO's number, `COCO_val2014_000000391895.jpg` → `391895`;
            - a `.csv` with the columns `source_id` and `image_id`;
            - `<caption file>:<column>`: what that column holds becomes the `image_id` of the same row, for example
              `dataset_coco.json:cocoid` or `dataset_flickr8k.json:imgid`;
            - `<caption file>:row` or `<caption file>:row:<split>`: the number of the image among those of the file, or
              of its split, from 0, as SCAN counts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The rule or its file is malformed. The function raises `UnmappedId`, which is one.
    """
    if rule == "stem":
        return Rename(rule, _stem)
    if rule == "coco":
        return Rename(rule, _coco_number)
    if rule.endswith(".csv"):
        return _look_up(_read_pairs(Path(rule)), rule)
    path, _, column = rule.rpartition(":")
    split = None
    if path.endswith(":row"):
        path, column, split = path.removesuffix(":row"), "row", column
    if not path:
        raise ValueError(
            f"ids {rule!r} is no rule: expected stem, coco, a .csv with source_id and image_id, or CAPTIONS:COLUMN."
        )
    from .captions import read_captions

    captions = read_captions(path, split=split)
    if column == "row":
        return _look_up(((str(row), name) for row, name in enumerate(captions.unique("image_id"))), rule)
    if column not in captions.column_names:
        raise ValueError(f"{path} has no column {column!r}; its columns are {captions.column_names}.")
    return _look_up(zip(map(str, captions[column]), captions["image_id"], strict=True), rule)


def _stem(image_id: str) -> str:
    return PurePosixPath(image_id).stem


def _coco_number(image_id: str) -> str:
    number = re.search(r"(\d+)$", PurePosixPath(image_id).stem)
    if number is None:
        raise UnmappedId(f"Image {image_id!r} ends in no number, expected COCO's, as in COCO_val2014_000000391895.")
    return str(int(number[1]))


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = {"source_id", "image_id"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has the columns {rows.fieldnames}, expected source_id and image_id.")
        return [(row["source_id"], row["image_id"]) for row in rows]


def _look_up(pairs: Iterable[tuple[str, str]], rule: str) -> Rename:
    names: dict[str, str] = {}
    for source_id, image_id in pairs:
        if names.setdefault(source_id, image_id) != image_id:
            raise ValueError(f"{rule}: {source_id!r} stands for both {names[source_id]!r} and {image_id!r}.")
    return Rename(rule, _Names(rule, names))


@dataclass(frozen=True)
class _Names:
    """A class, because processes that share the work send it to each other, and a closure cannot be sent."""

    rule: str
    names: dict[str, str]

    def __call__(self, source_id: str) -> str:
        if source_id not in self.names:
            examples = ", ".join(map(repr, list(self.names)[:3]))
            raise UnmappedId(
                f"Image {source_id!r} is not in {self.rule}, whose {len(self.names):,} ids are like {examples}."
            )
        return self.names[source_id]
