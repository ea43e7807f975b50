"""
The Arrow stream of `extracting_data.py` (Hugging Face's research project on LXMERT), a row an image:

    img_id, preds_per_image, boxes (36, 4), obj_ids, obj_probs, attr_ids, attr_probs (36,), roi_features (36, D), sizes

Boxes are x1 y1 x2 y2 as fractions of the image; ids are 0-based floats without background. Rows from `preds_per_image`
on are padding. `sizes` is of the RESIZED photo, height first, so the size of the photo is unknown. Only a batch size of
1 gave right boxes: with 2 the tool divides by the size of the other photo, which shows where it makes a box inverted
or larger than the image.
"""

from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ._numbers import typed_features
from .items import Item, broken

NAME = "frcnn-arrow"
COLUMNS = ("img_id", "preds_per_image", "boxes", "obj_ids", "obj_probs", "attr_ids", "attr_probs", "roi_features")
MESSAGE = b"\xff\xff\xff\xff"  # the first bytes of each message of an Arrow stream
# The errors that pyarrow raises on damaged files, beside its own.
ERRORS = (OSError, EOFError, LookupError, ValueError, TypeError, OverflowError)
END = MESSAGE + bytes(4)  # an empty message: Arrow itself does not miss it in a stream that was cut short


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is an Arrow stream with these columns, or a folder in which the first .arrow is one."""
    file = next(iter(_files(path)), None)
    if file is None:
        return False
    with file.open("rb") as start:
        schema = start.read(2**16)
    return schema.startswith(MESSAGE) and all(name.encode() in schema for name in COLUMNS)


def items(path: str | PathLike, *, feature_dtype: str | None = None) -> Iterator[Item]:
    """
    Yields the images of a file, or of all .arrow files of a folder by name, from their memory map.

    Raises:
        ValueError: There is no such file.
    """
    import pyarrow as pa

    found = _files(path)
    if not found:
        raise ValueError(f"{path} is no Arrow stream, nor a folder with .arrow files.")
    for file in found:
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
                if source.read_at(len(END), source.size() - len(END)) != END:
                    raise ValueError("it does not end as an Arrow stream: it was cut short, or is not finished yet.")
                missing = [name for name in COLUMNS if name not in batches.schema.names]
                if missing:
                    raise ValueError(f"{missing} missing, expected {list(COLUMNS)} among {batches.schema.names}.")
                number = 0
                for batch in batches:
                    batch.validate(full=True)  # offsets beyond the data would crash, not raise
                    if batch.column("img_id").null_count:
                        raise ValueError("img_id is unknown for some rows, expected a number for each.")
                    columns = {name: _storage(batch.column(name)) for name in COLUMNS}
                    for row in range(batch.num_rows):
                        image_id = str(columns["img_id"][row])
                        yield Item(
                            str(file), f"row {number}", image_id, partial(_load, image_id, columns, row, feature_dtype)
                        )
                        number += 1
        except (pa.ArrowException, *ERRORS) as error:
            yield broken(str(file), file.name, error)


def _files(path: str | PathLike) -> list[Path]:
    path = Path(path)
    return sorted(path.glob("*.arrow")) if path.is_dir() else [path] if path.is_file() else []


def _storage(column: Any) -> Any:
    """Gives the lists of an `Array2D`, which has that type only where `datasets` was imported."""
    return getattr(column, "storage", column)


def _values(column: Any, row: int) -> np.ndarray:
    import pyarrow as pa

    values = column.slice(row, 1)
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


def _load(image_id: str, columns: dict[str, Any], row: int, feature_dtype: str | None) -> RegionRecord:
    import pyarrow as pa

    try:
        return _record(image_id, {name: _values(columns[name], row) for name in COLUMNS}, feature_dtype)
    except (pa.ArrowException, *ERRORS) as error:
        raise ValueError(str(error)) from error


def _record(image_id: str, values: dict[str, np.ndarray], feature_dtype: str | None) -> RegionRecord:
    slots, n = len(values["obj_ids"]), int(values["preds_per_image"].item())
    if not 0 < n <= slots:
        raise ValueError(f"Image {image_id!r}: preds_per_image is {n}, expected 1 to {slots}.")
    return RegionRecord(
        image_id,
        boxes=values["boxes"].reshape(slots, 4)[:n],
        features=typed_features(image_id, "roi_features", values["roi_features"].reshape(slots, -1)[:n], feature_dtype),
        object_ids=values["obj_ids"][:n],
        object_scores=values["obj_probs"][:n],
        attribute_ids=values["attr_ids"][:n],
        attribute_scores=values["attr_probs"][:n],
    )
