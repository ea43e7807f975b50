"""Sentences about pairs of photos, read from the files of NLVR2."""

from os import PathLike
from typing import Any

import datasets

from ...data.captions import rename_images
from ...data.labelled_files import read_items, table_of, text_field
from ...data.masking import IGNORED

LABELS = ("false", "true")  # in the order of the logits
_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {"identifier": _TEXT, "image_id": _TEXT, "second_id": _TEXT, "sentence": _TEXT, "label": datasets.Value("int64")}
)


def read_nlvr2(path: str | PathLike[str], *, ids: str | None = None) -> datasets.Dataset:
    """
    Reads NLVR2's `train.json`, `dev.json` or `test1.json`, one json a line, into one row a sentence with two photos.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        ids (`str`, *optional*):
            Rule that gives the photos other ids, as in `read_captions`.

    Returns:
        `datasets.Dataset` with the columns `identifier`, `image_id` and `second_id` (the left and the right photo, by
        the names that NLVR2 gives its files: `dev-850-0-img0` and `dev-850-0-img1` of `dev-850-0-1`), `sentence` and
        `label` (1 = true, 0 = false, -100 where the file has none).

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: a line is malformed, a sentence is empty, or an identifier stands twice or has another form. The
            message names the file, the line and the field.
    """
    rows = []
    for where, identifier, item in read_items(path, "identifier"):
        parts = identifier.split("-")
        if len(parts) != 4 or not all(parts):
            raise ValueError(
                f"{where}: identifier is {identifier!r}, expected split-set-pair-sentence, as dev-850-0-1."
            )
        photos = [f"{'-'.join(parts[:3])}-img{side}" for side in (0, 1)]
        rows.append((identifier, *photos, text_field(item, "sentence", where), _label(item, where)))
    table = table_of(rows, FEATURES, f"{path} holds no sentence; expected one a line.")
    for _ in range(2):  # each side once in the column whose ids change
        table = rename_images(table, path, ids).rename_columns({"image_id": "second_id", "second_id": "image_id"})
    return table.select_columns(list(FEATURES))


def _label(item: dict[str, Any], where: str) -> int:
    value = item.get("label")
    if value is None:
        return IGNORED
    if not isinstance(value, (str, bool)) or str(value).lower() not in LABELS:
        raise ValueError(f"{where}: label is {value!r:.80}, expected 'True' or 'False', or none.")
    return LABELS.index(str(value).lower())
