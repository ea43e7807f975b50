"""The files of labelled rows: lines whose ids differ, fields that hold a text, and the table of what was read."""

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import datasets

from ..name_lists import read_jsonl

MISSING_SHOWN = 5  # of a file that was cut off, thousands are


def read_items(path: str | PathLike[str], key: str) -> Iterator[tuple[str, str, Any]]:
    """
    Yields the place, the id and the content of each line of a JSON lines file.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: a line is malformed, or its field `key` is no id, or that of another line. The message names the
            file and the line.
    """
    line_of: dict[str, int] = {}
    for number, item in read_jsonl(path):
        where = f"{path}, line {number}"
        name = text_field(item, key, where)
        if (other := line_of.setdefault(name, number)) != number:
            raise ValueError(f"{where}: {key} {name!r} is that of line {other} too; expected one each.")
        yield where, name, item


def text_field(item: Any, field: str, where: str) -> str:
    """Gives a field that holds a text. Raises ValueError, with the place, where it holds none, or an empty one."""
    value = item.get(field) if isinstance(item, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field} is {value!r:.80}, expected a text that is not empty.")
    return value


def name_field(item: Any, field: str, where: str) -> str:
    """Gives a field that holds a text or a number, as text. Raises ValueError, with the place, for anything else."""
    value = item.get(field) if isinstance(item, dict) else None
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not str(value).strip():
        raise ValueError(f"{where}: {field} is {value!r:.80}, expected a text that is not empty, or a number.")
    return str(value)


def missing_items(missing: Sequence[str], total: int) -> Iterator[str]:
    """Says what is missing in a file of so many items: the first ones, and how many more."""
    yield from (f"{name} is missing." for name in missing[:MISSING_SHOWN])
    if len(missing) > MISSING_SHOWN:
        yield f"{len(missing) - MISSING_SHOWN:,} more are missing, of {total:,}."


def table_of(rows: Sequence[Sequence[Any]], features: datasets.Features, nothing: str) -> datasets.Dataset:
    """Makes a table of rows, whose values are in the order of the features. Raises ValueError(nothing) without rows."""
    if not rows:
        raise ValueError(nothing)
    return datasets.Dataset.from_dict(dict(zip(features, zip(*rows, strict=True), strict=True)), features=features)
