"""Hypotheses about images, read from the files of SNLI-VE."""

from collections import Counter
from os import PathLike

import datasets

from ... import logging
from ...data.captions import rename_images
from ...data.labelled_files import name_field, read_items, table_of, text_field

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
    rows = []
    counts: Counter[str] = Counter()
    for where, pair_id, item in read_items(path, "pairID"):
        image_id = name_field(item, "Flickr30K_ID", where)
        text, label = (text_field(item, name, where) for name in ("sentence2", "gold_label"))
        counts[label] += 1
        if label == NO_GOLD:
            continue
        if label not in LABELS:
            raise ValueError(f"{where}: gold_label is {label!r}, expected one of {', '.join(LABELS)}, or {NO_GOLD!r}.")
        rows.append((pair_id, image_id, text, LABELS.index(label)))
    if counts[NO_GOLD]:
        logger.warning(f"{path}: {counts[NO_GOLD]:,} of {counts.total():,} lines have no gold label and are left out.")
    table = table_of(rows, FEATURES, f"{path} holds no hypothesis with a gold label; expected one a line.")
    return rename_images(table, path, ids)
