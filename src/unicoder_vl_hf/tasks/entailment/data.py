"""Hypotheses about images, read from the files of SNLI-VE."""

from collections import Counter
from os import PathLike
from typing import Any

import datasets

from ... import logging
from ...data.captions import rename_images
from ...name_lists import read_jsonl

logger = logging.get_logger(__name__)

LABELS = ("contradiction", "entailment", "neutral")  # in the order of UNITER's logits
NO_GOLD = "-"  # of SNLI, where annotators had no majority
_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {"pair_id": _TEXT, "image_id": _TEXT, "hypothesis": _TEXT, "label": datasets.ClassLabel(names=list(LABELS))}
)


def read_entailment(path: str | PathLike[str], *, ids: str | None = None) -> datasets.Dataset:
    """
    Reads SNLI-VE's `snli_ve_train.jsonl`, `snli_ve_dev.jsonl` or `snli_ve_test.jsonl` into one row a hypothesis.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        ids (`str`, *optional*):
            Rule that gives the images other ids than Flickr30k's, as in `read_captions`.

    Returns:
        `datasets.Dataset` with the columns `pair_id`, `image_id`, `hypothesis` and `label`, an index of `LABELS`. Lines
        without a gold label (`"-"`) are left out, and counted in a warning.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: a line is malformed, a hypothesis is empty or stands twice, or a label is unknown. The message
            names the file, the line and the field.
    """
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    seen: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for number, item in read_jsonl(path):
        where = f"{path}, line {number}"
        pair_id, image_id, text, label = (
            _text(item, name, where) for name in ("pairID", "Flickr30K_ID", "sentence2", "gold_label")
        )
        if (other := seen.setdefault(pair_id, number)) != number:
            raise ValueError(f"{where}: pairID {pair_id!r} is that of line {other} too; expected one each.")
        counts[label] += 1
        if label == NO_GOLD:
            continue
        if label not in LABELS:
            raise ValueError(f"{where}: gold_label is {label!r}, expected one of {', '.join(LABELS)}, or {NO_GOLD!r}.")
        for name, value in zip(FEATURES, (pair_id, image_id, text, LABELS.index(label)), strict=True):
            columns[name].append(value)
    if counts[NO_GOLD]:
        logger.warning(f"{path}: {counts[NO_GOLD]:,} of {counts.total():,} lines have no gold label and are left out.")
    if not columns["label"]:
        raise ValueError(f"{path} holds no hypothesis with a gold label; expected one a line.")
    rows = datasets.Dataset.from_dict(columns, features=FEATURES)
    return rows if ids is None else rename_images(rows, path, ids)


def _text(item: Any, field: str, where: str) -> str:
    value = item.get(field) if isinstance(item, dict) else None
    if isinstance(value, int) and field == "Flickr30K_ID":
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field} is {value!r:.80}, expected a text that is not empty.")
    return value
