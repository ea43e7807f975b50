"""
The TSV files of Oscar and VinVL (Li et al., 2020; Zhang et al., 2021), in either layout, without a header:

    features.tsv        key  num_boxes  features
    or                  key  {"num_boxes": n, "features": features}
    predictions.tsv     key  {"image_h": h, "image_w": w, "objects": [{"class": word, "rect": box, "conf": score}, …]}
    or                  key  [{"class": word, "rect": box, "conf": score}, …]

also as `<split>.feature.tsv` and `<split>.label.tsv`. Features are base64 of float32 (n, D + 6), whose last six columns
are x1 y1 x2 y2 as fractions of the image, and width and height, or height and width: a script that many used swaps
these, so they only prove the layout. `rect` is x1 y1 x2 y2 in pixels.

VinVL's own extraction writes (n, D) without these columns, and the boxes in `predictions.tsv` alone, of the same
regions in the same order: their number must agree.

Labels are a file of their own, often of another detector. Classes and scores are used where number and boxes prove that
they belong to these regions, and are None elsewhere. The image size is that of `predictions.tsv`; without it boxes stay
fractions. `features.lineidx`, the offset of each line, shows whether the file was cut short. Left out:
`imageid2idx.json`, the row of each key, and attributes, which are several words a region.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

from ... import logging
from ...records_unicoder_vl import PIXEL_TOLERANCE, RegionRecord
from . import _numbers
from ._parsing import MAX_BYTES, columns, files, first_column, first_fields, from_json, lines, num_boxes
from .items import Item, broken, text_id

NAME = "vinvl-tsv"
WIDTH_WITH_BOXES = 2054  # width of the published features; the order of their boxes is known
# The name of the file of labels beside each file of features.
LABELS = (("features", "predictions"), ("features", "predictions_gt"), ("feature", "label"))

logger = logging.get_logger(__name__)


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is a .tsv of features in either layout, or a folder with one."""
    return bool(_feature_files(path))


def items(
    path: str | PathLike, *, class_names: Sequence[str] | None = None, feature_dtype: str | None = None
) -> Iterator[Item]:
    """
    Yields the images of a file of features and the labels beside it, or of all in a folder by name, a line at a time.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        class_names (sequence of `str`, *optional*): Word of each object id. VinVL has 1,594 classes, others than the
            1,600 of bottom-up attention. Without the words object ids are None.
        feature_dtype (`str`, *optional*): Type of the features, and of the boxes behind them; None takes float32 if
            they look like it.

    Raises:
        ValueError: There is no such file.
    """
    found = _feature_files(path)
    if not found:
        raise ValueError(f"{path} is no .tsv of features in a layout of Oscar or VinVL, nor a folder with one.")
    class_ids = None if class_names is None else {name: class_id for class_id, name in enumerate(class_names)}
    for file in found:
        if problem := _cut(file):
            yield broken(str(file), file.name, ValueError(problem))
        record = partial(_record, class_ids=class_ids, feature_dtype=feature_dtype)
        labels = _label_file(file)
        if labels is None:
            yield from _items(file, record)
        else:
            with labels.open("rb") as label_lines:
                yield from _items(file, record, label_lines)


def _feature_files(path: str | PathLike) -> list[Path]:
    return [file for file in files(path, ".tsv") if _holds_features(first_fields(file))]


def _holds_features(fields: list[bytes]) -> bool:
    match fields:
        case [_, count, features]:
            start = features.removeprefix(b"b'")[:32]  # a box alone is 32 characters of base64
            return count.isdigit() and len(start) == 32 and start.replace(b"+", b"0").replace(b"/", b"0").isalnum()
        case [_, features]:
            return features.startswith(b"{") and b'"features": "' in features
    return False


def _cut(file: Path) -> str | None:
    """Says what shows that a file was cut short between two lines; None where nothing does."""
    index = file.with_suffix(".lineidx")
    if not index.is_file():
        return None
    with index.open("rb") as offsets:
        offsets.seek(max(0, index.stat().st_size - 32))
        last = offsets.read().split()[-1:]
    size = file.stat().st_size
    if not last or not last[0].isdigit() or int(last[0]) >= size:
        return f"{index} ends with {last}, but {file} has {size} bytes: one of them was cut short."
    return None


def _label_file(file: Path) -> Path | None:
    beside = (file.with_name(file.name.replace(old, new)) for old, new in LABELS if old in file.name)
    return next((labels for labels in beside if labels != file and labels.is_file()), None)


def _items(
    file: Path, record: Callable[[str, list[bytes], bytes | None], RegionRecord], label_lines: IO[bytes] | None = None
) -> Iterator[Item]:
    passed: dict[bytes, int] = {}

    def load(image_id: str, line: bytes, label: bytes | None) -> RegionRecord:
        return record(image_id, columns(line)[1:], label)

    for where, line in lines(file):
        # Labels of skipped images are looked up, too, or their lines would pile up in `passed`.
        key = first_column(line)
        label = None if label_lines is None else _find(label_lines, passed, key)
        image_id = text_id(key)
        yield Item(str(file), where, image_id, partial(load, image_id, line, label))


def _find(file: IO[bytes], passed: dict[bytes, int], key: bytes) -> bytes | None:
    """
    Finds the rest of the line that begins with `key` in a TSV, which is read only as far as needed; None if there is
    none. The offsets of lines on the way are kept in `passed`: none where keys are asked for in the order of the file.
    """
    end = None
    if key in passed:
        end = file.tell()
        file.seek(passed.pop(key))
    while line := file.readline(MAX_BYTES):
        found, _, rest = line.partition(b"\t")
        if found == key:
            if end is not None:
                file.seek(end)
            return rest
        passed[found] = file.tell() - len(line)
    return None


def _record(
    image_id: str,
    fields: list[bytes],
    label: bytes | None,
    class_ids: dict[str, int] | None,
    feature_dtype: str | None,
) -> RegionRecord:
    if len(fields) == 1:
        info = from_json(f"Image {image_id!r}: the second column", fields[0])
        if not isinstance(info, dict) or not {"num_boxes", "features"} <= info.keys():
            raise ValueError(
                f"Image {image_id!r}: the second column is {fields[0][:40]!r}, expected num_boxes and features."
            )
        fields = [str(info["num_boxes"]).encode(), str(info["features"]).encode()]
    if len(fields) != 2:
        raise ValueError(f"Image {image_id!r}: {1 + len(fields)} columns, expected key, num_boxes, features.")
    n = num_boxes(image_id, fields[0])
    rows = _numbers.features(image_id, "features", fields[1], n, feature_dtype)
    boxes, extents = rows[:, -6:-2], rows[:, -2:]
    with np.errstate(invalid="ignore", over="ignore"):  # of damaged files
        if rows.shape[1] > 6 and np.allclose(np.sort(boxes[:, 2:] - boxes[:, :2]), np.sort(extents), atol=1e-3):
            known = {"boxes": boxes} if label is None else _labels(image_id, label, boxes, class_ids)
            return RegionRecord(image_id, features=rows[:, :-6], **known)
    if label is not None and rows.shape[1] != WIDTH_WITH_BOXES:
        return RegionRecord(image_id, features=rows, **_regions(image_id, label, n, class_ids))
    raise ValueError(
        f"Image {image_id!r}: features end in {rows[0, -6:].tolist()}, expected x1, y1, x2, y2, width and height as "
        "fractions of the image: these features have no boxes, or other ones, and no predictions.tsv beside them has."
    )


def _regions(image_id: str, label: bytes, n: int, class_ids: dict[str, int] | None) -> dict[str, Any]:
    """Gives the boxes, size, classes and scores of `n` regions whose features hold no boxes."""
    objects, size = _read_label(image_id, label)
    if len(objects) != n:
        raise ValueError(
            f"Image {image_id!r}: these features of {n} regions have no boxes, and the labels have {len(objects)} "
            "objects: which box is whose is unknown."
        )
    found = _classes(image_id, objects, class_ids)
    if not size:
        logging.warn_once(
            logger,
            "Some boxes are in pixels, and nothing tells the size of their image: they are left out.",
        )
        return found
    return {"boxes": [entry.get("rect") for entry in objects], **size, **found}


def _labels(image_id: str, label: bytes, boxes: np.ndarray, class_ids: dict[str, int] | None) -> dict[str, Any]:
    """
    Gives the boxes, in pixels if `predictions.tsv` tells the image size, and all else that it tells of these regions.
    """
    objects, size = _read_label(image_id, label)
    sides = np.array(list(size.values()), np.float64) if size else None
    found = {"boxes": boxes if sides is None else boxes * np.tile(sides, 2), **size}
    if not _same_boxes([entry.get("rect") for entry in objects], boxes, sides):
        logging.warn_once(logger, "Some labels are not of the regions of their image: they are left out.")
        return found
    return found | _classes(image_id, objects, class_ids)


def _read_label(image_id: str, label: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the objects of a line of labels, and the size of the image, or an empty dict where it is unknown."""
    info = from_json(f"Image {image_id!r}: the line of labels", label)
    objects = info.get("objects") if isinstance(info, dict) else info
    width, height = (info.get("image_w"), info.get("image_h")) if isinstance(info, dict) else (None, None)
    if not isinstance(objects, list) or not all(isinstance(entry, dict) for entry in objects):
        raise ValueError(f"Image {image_id!r}: the labels are {label[:40]!r}, expected a list of objects.")
    if (width, height) == (None, None):
        return objects, {}
    if not all(isinstance(side, (int, float)) and abs(side) < 2**31 for side in (width, height)):
        raise ValueError(f"Image {image_id!r}: image_w, image_h are {(width, height)!r:.80}, expected two numbers.")
    return objects, {"image_width": width, "image_height": height}


def _classes(image_id: str, objects: list[dict[str, Any]], class_ids: dict[str, int] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if class_ids is not None:
        found["object_ids"] = [_class_id(image_id, entry.get("class"), class_ids) for entry in objects]
    elif any(isinstance(entry.get("class"), str) for entry in objects):
        logging.warn_once(
            logger,
            "Classes are words and are left out: give their list, class_names (--class-names FILE), and they become "
            "object_ids.",
        )
    if all("conf" in entry for entry in objects):
        found["object_scores"] = [entry["conf"] for entry in objects]
    return found


def _same_boxes(rects: list[Any], boxes: np.ndarray, scale: np.ndarray | None) -> bool:
    """Tells whether rectangles in pixels are these boxes, in this order; in an image of any size if `scale` is None."""
    try:
        pixels = np.array(rects, np.float64)
    except (ValueError, TypeError, OverflowError):
        return False
    if pixels.shape != boxes.shape:
        return False
    # x and y are apart: (2 axes, 2n).
    pixels, fractions = (array.reshape(-1, 2).T for array in (pixels, boxes.astype(np.float64)))
    if scale is None:
        scale = (pixels * fractions).sum(axis=1) / np.maximum((fractions**2).sum(axis=1), 1e-12)  # of least squares
    scale = scale[:, None]
    # The fractions are clipped to the image, the rectangles not always.
    return bool((np.abs(pixels.clip(0, scale) - scale * fractions) <= PIXEL_TOLERANCE).all())


def _class_id(image_id: str, word: Any, class_ids: dict[str, int]) -> int:
    if not isinstance(word, str) or word not in class_ids:
        raise ValueError(
            f"Image {image_id!r}: class is {word!r:.80}, which is none of the {len(class_ids)} class_names: give the "
            "list of the detector that made the labels."
        )
    return class_ids[word]
