"""
The precomputed regions of VL-BERT (Su et al., 2020; its `generate_tsv_v2.py`), a JSON file an image, in a folder or in
a .zip as VL-BERT reads it:

    image_id  image_w  image_h  num_boxes  boxes  features, for most datasets also  classes  attrs

The arrays are base64 of float32: (n, 4) x1 y1 x2 y2 in pixels, (n, D), and the probabilities of classes (n, 1601) and
attributes (n, 401), whose column 0 is background. The file's name is the image id, by which VL-BERT's lists of captions
find it; `image_id` within may be another.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ._numbers import coordinates, features, matrix
from ._parsing import MAX_BYTES, from_json
from ._pickled import foreground, known, whole_number
from .items import Item, broken

NAME = "vlbert-json"
SUFFIX = ".json"
REQUIRED = frozenset({"image_w", "image_h", "num_boxes", "boxes", "features"})
MAX_FIRST_BYTES = 2**24  # limit of the file that is read to detect the format
VG_CLASSES, VG_ATTRIBUTES = 1600, 400  # of Visual Genome, on which the detectors were trained
# The errors that zipfile raises on damaged archives.
ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


def matches(path: str | PathLike) -> bool:
    """
    Tells whether `path` is such a .json, or a .zip or folder whose first .json (in it, or in a folder of it) is one.
    """
    path = Path(path)
    try:
        if path.suffix == ".zip" and path.is_file():
            with zipfile.ZipFile(path) as archive:
                first = next((member for member in archive.infolist() if member.filename.endswith(SUFFIX)), None)
                return first is not None and first.file_size <= MAX_FIRST_BYTES and _is_ours(_read(archive, first))
        found = chain(path.glob(f"*{SUFFIX}"), path.glob(f"*/*{SUFFIX}")) if path.is_dir() else iter([path])
        file = next((file for file in found if file.suffix == SUFFIX and file.is_file()), None)
        return file is not None and file.stat().st_size <= MAX_FIRST_BYTES and _is_ours(file.read_bytes())
    except ERRORS:
        return False


def items(path: str | PathLike, *, background: bool | None = None, feature_dtype: str | None = None) -> Iterator[Item]:
    """
    Yields the images of one .json, of all in a folder and below by name, or of a .zip. The image_id is the path there
    without .json.

    Args:
        path (`str` or `os.PathLike`): The file, folder or .zip.
        background (`bool`, *optional*): Whether column 0 of `classes` and `attrs` is background; None takes it so where
            there is one column more than Visual Genome has classes, or attributes.
        feature_dtype (`str`, *optional*): Type of the features; None takes float32 if they look like it.

    Raises:
        ValueError: There is no such file.
    """
    path = Path(path)

    def load(image_id: str, read: Callable[[], bytes]) -> RegionRecord:
        try:
            data = read()
        except ERRORS as error:
            raise ValueError(f"Image {image_id!r} cannot be read: {error}.") from error
        return _record(image_id, from_json(f"Image {image_id!r}", data), background, feature_dtype)

    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if member.filename.endswith(SUFFIX):
                        image_id = member.filename.removesuffix(SUFFIX)
                        read = partial(_read, archive, member)
                        yield Item(str(path), f"member {member.filename!r}", image_id, partial(load, image_id, read))
        except ERRORS as error:
            yield broken(str(path), path.name, error)
        return
    files = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path] if path.suffix == SUFFIX else []
    if not files:
        raise ValueError(f"{path} is no .json or .zip, nor a folder of .json.")
    for file in files:
        image_id = file.relative_to(path if path.is_dir() else path.parent).as_posix().removesuffix(SUFFIX)
        yield Item(str(file), "", image_id, partial(load, image_id, partial(_read_file, file)))


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_BYTES:
        raise ValueError(f"it unpacks to {member.file_size} bytes, expected {MAX_BYTES} at most")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"it is packed by method {member.compress_type}, expected stored or deflated")
    return archive.read(member)


def _read_file(file: Path) -> bytes:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes, expected the regions of one image")
    return file.read_bytes()


def _is_ours(data: bytes) -> bool:
    if not all(f'"{name}"'.encode() in data for name in REQUIRED):
        return False
    fields = from_json("", data)
    return isinstance(fields, dict) and fields.keys() >= REQUIRED


def _record(image_id: str, fields: Any, background: bool | None, feature_dtype: str | None) -> RegionRecord:
    if not isinstance(fields, dict):
        raise ValueError(f"Image {image_id!r} is a JSON {type(fields).__name__}, expected an object of fields.")
    fields = known(fields)
    missing = sorted(REQUIRED - fields.keys())
    if missing:
        raise ValueError(f"Image {image_id!r}: {missing} missing among {list(fields)[:20]}.")
    n = whole_number(image_id, "num_boxes", fields["num_boxes"])
    if n < 1:
        raise ValueError(f"Image {image_id!r}: num_boxes is {n}, expected at least 1: take the image out.")

    def text(name: str) -> str:
        if not isinstance(fields[name], str):
            raise ValueError(f"Image {image_id!r}: {name} is a {type(fields[name]).__name__}, expected base64.")
        return fields[name]

    found: dict[str, np.ndarray] = {}
    for kind, name, number in (("object", "classes", VG_CLASSES), ("attribute", "attrs", VG_ATTRIBUTES)):
        if name in fields:
            rows, _ = foreground(image_id, name, matrix(image_id, name, text(name), n), background, number)
            found |= {f"{kind}_ids": rows.argmax(axis=1), f"{kind}_scores": rows.max(axis=1)}
            if kind == "object":
                found["class_probabilities"] = rows
    return RegionRecord(
        image_id,
        image_width=whole_number(image_id, "image_w", fields["image_w"]),
        image_height=whole_number(image_id, "image_h", fields["image_h"]),
        boxes=coordinates(image_id, "boxes", text("boxes"), n),
        features=features(image_id, "features", text("features"), n, feature_dtype),
        **found,
    )
