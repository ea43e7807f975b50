"""
Rules that rename images, so that captions and features of different origin share their ids and can be joined.

One photo is `391895` in a TSV, `COCO_val2014_000000391895` with `cocoid` 391895 in Karpathy's file,
`coco_val_000000391895` in UNITER's, and a row number in SCAN's. One rule may rename the ids of features when they are
converted, those of photos when regions are extracted, and those of captions when they are read.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..name_lists import numbered_lines
from ..regions.conversion import Rename, UnmappedId
from ..regions.photos import PHOTO_IDS, stem


def id_mapping(rule: str) -> Rename:
    """
    Gives the function that turns an image id of a file into the new id by a rule; it can be pickled.

    Args:
        rule (`str`): One of
            - `stem`: the file's name without folders and the suffix of a photo or of features, `train2014/a.jpg` → `a`;
            - `coco`: COCO's number, `COCO_val2014_000000391895.jpg` → `391895`;
            - a `.csv` with the columns `source_id` and `image_id`;
            - `<caption file>:<column>`: what that column holds becomes the `image_id` of the same row, for example
              `dataset_coco.json:cocoid` or `dataset_flickr8k.json:imgid`;
            - `<caption file>:row` or `<caption file>:row:<split>`: the number of the image among those of the file, or
              of its split, from 0, as SCAN counts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The rule or its file is malformed. The function that is returned raises `UnmappedId`, a ValueError,
            on an id that the rule does not cover.
    """
    if rule == "stem":
        return Rename(rule, stem)
    if rule == "coco":
        return Rename(rule, coco_number)
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
    from .caption_files import read_caption_file

    captions = read_caption_file(path, split=split)
    if column == "row":
        return _look_up(((str(row), name) for row, name in enumerate(captions.unique("image_id"))), rule)
    if column not in captions.column_names:
        raise ValueError(f"{path} has no column {column!r}; its columns are {captions.column_names}.")
    return _look_up(zip(map(str, captions[column]), captions["image_id"], strict=True), rule)


def photo_ids(rule: str) -> dict[str, Any]:
    """
    Gives the arguments of `extract` and `list_photos` by which photos get their ids from a rule.

    Args:
        rule (`str`): `stem`, `path` or `key`, see `extract`; or a rule of `id_mapping`.
    """
    return {"ids": rule} if rule in PHOTO_IDS else {"rename": id_mapping(rule)}


def coco_number(image_id: str) -> str:
    """
    Gives the number at the end of a name, without leading zeros, as COCO numbers images. Raises UnmappedId where there
    is none.
    """
    number = re.search(r"(\d+)$", stem(image_id))
    if number is None:
        raise UnmappedId(f"Image {image_id!r} ends in no number, expected COCO's, as in COCO_val2014_000000391895.")
    return str(int(number[1]))


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    rows = csv.DictReader(line.rstrip() for _, line in numbered_lines(path))
    if {"source_id", "image_id"} - set(rows.fieldnames or ()):
        raise ValueError(f"{path} has the columns {rows.fieldnames}, expected source_id and image_id.")
    pairs = [(row["source_id"], row["image_id"]) for row in rows]
    for pair in pairs:
        if not all(pair):
            raise ValueError(f"{path} pairs {pair[0]!r} with {pair[1]!r}, expected a source_id and an image_id.")
    return pairs


def _look_up(pairs: Iterable[tuple[str, str]], rule: str) -> Rename:
    names: dict[str, str] = {}
    for source_id, image_id in pairs:
        if names.setdefault(source_id, image_id) != image_id:
            raise ValueError(
                f"{rule}: {source_id!r} stands for both {names[source_id]!r} and {image_id!r}, expected one image_id."
            )
    return Rename(rule, _Names(rule, names))


@dataclass(frozen=True)
class _Names:
    """
    A table of ids as a function. It is a class, since a closure cannot be sent to the processes that share the work.
    """

    rule: str
    names: dict[str, str]

    def __call__(self, source_id: str) -> str:
        if source_id not in self.names:
            examples = ", ".join(map(repr, list(self.names)[:3]))
            raise UnmappedId(
                f"Image {source_id!r} is not in {self.rule}, whose {len(self.names):,} ids are like {examples}."
            )
        return self.names[source_id]
