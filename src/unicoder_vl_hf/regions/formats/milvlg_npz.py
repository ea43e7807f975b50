"""
The per-image .npz of MILVLG's bottom-up-attention.pytorch, `<image_id>.npz`:

    x (n, D), bbox (n, 4) x1 y1 x2 y2 in pixels, num_bbox, image_h, image_w, info

and, beside them in some variants, `objects_id`, `objects_conf`, `attrs_id`, `attrs_conf` (n,), 0-based and without
background. The original keeps these in `info`, a pickled dict. Unpickling would run whatever the file says, so `info`
is never read: classes and scores that are nowhere else are None.
"""

import zipfile
import zlib
from collections.abc import Container, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...feature_extraction_unicoder_vl import RegionRecord

NAME = "milvlg-npz"
REQUIRED = ("x", "bbox", "image_w", "image_h")
OPTIONAL = {
    "objects_id": "object_ids",
    "objects_conf": "object_scores",
    "attrs_id": "attribute_ids",
    "attrs_conf": "attribute_scores",
}


def matches(path: str | PathLike) -> bool:
    """Whether `path` is such an .npz, or a folder in which the first .npz is one."""
    first = next(_files(Path(path)), None)
    if first is None:
        return False
    try:
        with zipfile.ZipFile(first) as archive:
            return {f"{key}.npy" for key in REQUIRED} <= set(archive.namelist())
    except zipfile.BadZipFile:
        return False


def read(path: str | PathLike, skip: Container[str] = ()) -> Iterator[RegionRecord]:
    """
    Records of one file, or of all .npz files of a folder by name. The image_id is the file's name without `.npz`.

    Raises:
        ValueError: A file is malformed; the message names the file, the field and the value.
    """
    files = sorted(_files(Path(path)))
    if not files:
        raise ValueError(f"{path} is no .npz file, nor a folder of them.")
    for file in files:
        image_id = file.name.removesuffix(".npz")
        if image_id in skip:
            continue
        try:
            yield _record(image_id, file)
        except (ValueError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{file}: {error}") from error


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        return (file for file in path.iterdir() if file.suffix == ".npz")
    return iter([path] if path.suffix == ".npz" else [])


def _record(image_id: str, path: Path) -> RegionRecord:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        missing = [key for key in REQUIRED if key not in arrays]
        if missing:
            raise ValueError(f"Image {image_id!r}: {missing} missing, expected {list(REQUIRED)} among {list(arrays)}.")
        features = arrays["x"]
        if "num_bbox" in arrays and (found := _scalar(image_id, "num_bbox", arrays["num_bbox"])) != len(features):
            raise ValueError(f"Image {image_id!r}: num_bbox is {found}, but x has {len(features)} rows.")
        return RegionRecord(
            image_id,
            image_width=_scalar(image_id, "image_w", arrays["image_w"]),
            image_height=_scalar(image_id, "image_h", arrays["image_h"]),
            boxes=arrays["bbox"],
            features=features,
            **{field: arrays[key] for key, field in OPTIONAL.items() if key in arrays},
        )


def _scalar(image_id: str, key: str, value: np.ndarray) -> Any:
    if value.size != 1:
        raise ValueError(f"Image {image_id!r}: {key} has shape {value.shape}, expected one number.")
    return value.item()
