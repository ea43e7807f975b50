"""
The files of MMF and Pythia (`extract_features_vmb.py`, `extract_features_frcnn.py`): `<id>.npy`, features (n, D), and
beside it `<id>_info.npy`, a pickled dict:

    bbox (n, 4)  num_boxes  objects (n,)  cls_prob (n, K)  image_width  image_height

`cls_prob` is without background, unless the tool ran with `--background`: then `objects` counts background as 0 and
`cls_prob` has a column more. The frcnn script writes one score a region as `cls_prob`, and the size of the RESIZED
photo beside boxes of the original. `num_boxes` counts what scored above 0, or repeats an option: the arrays tell n.
"""

from collections.abc import Container, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ... import logging
from ...records_unicoder_vl import RegionRecord
from . import restricted_pickle
from ._parsing import MAX_BYTES
from ._pickled import array, whole_number, without_background

logger = logging.get_logger(__name__)

NAME = "mmf-npy"
INFO = "_info.npy"
VG_CLASSES = 1600  # of Visual Genome, with which MMF's detectors were trained


def matches(path: str | PathLike) -> bool:
    """Whether `path` is an .npy with its `_info.npy` beside it, or a folder with such files in it or one below."""
    path = Path(path)
    if path.is_dir():
        return any(True for pattern in (f"*{INFO}", f"*/*{INFO}") for _ in path.glob(pattern))
    return path.suffix == ".npy" and _info_file(path).is_file()


def read(path: str | PathLike, skip: Container[str] = (), *, background: bool | None = None) -> Iterator[RegionRecord]:
    """
    Records of one .npy, or of all in a folder and below by name. The image_id is the path in that folder without .npy.

    Args:
        path (`str` or `os.PathLike`): The file of features, or the folder.
        skip (container of `str`): Ids to pass over.
        background (`bool`, *optional*): Whether `objects` and `cls_prob` count background as 0. None: where `cls_prob`
            has a column more than Visual Genome has classes.

    Raises:
        ValueError: A file is malformed; the message names the file, the field and the value.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    files = [path] if path.suffix == ".npy" else sorted(path.rglob("*.npy"))
    files = [file for file in files if not file.name.endswith(INFO)]
    if not files:
        raise ValueError(f"{path} is no .npy file of features, nor a folder of them.")
    for file in files:
        image_id = file.relative_to(root).as_posix().removesuffix(".npy")
        if image_id in skip:
            continue
        try:
            fields: dict[str, Any] = {"features": _load(file)}
            if _info_file(file).is_file():
                info = _load(_info_file(file))
                content = info.item() if info.dtype == object else None
                if not isinstance(content, dict):
                    raise ValueError(
                        f"{_info_file(file)} holds {restricted_pickle.brief(info)}, expected one pickled dict."
                    )
                fields |= {name: content[name] for name in content if name != "features"}
            yield record(image_id, fields, background)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def record(image_id: str, fields: dict[str, Any], background: bool | None) -> RegionRecord:
    """The record of MMF's fields, and of its features. Raises ValueError naming the image and the field."""

    def given(name: str) -> np.ndarray | None:
        return None if fields.get(name) is None else array(image_id, name, fields[name], None)

    ids, probabilities, scores = given("objects"), given("cls_prob"), None
    if probabilities is not None and probabilities.ndim == 1:
        probabilities, scores = None, probabilities
        logging.warn_once(
            logger,
            "MMF's frcnn script stores the size of the RESIZED photo beside boxes of the original: the locations of "
            "what it wrote are wrong by that scale.",
        )
    if probabilities is not None:
        columns = probabilities.shape[-1]
        if background is None:
            background = columns == VG_CLASSES + 1
        if columns == VG_CLASSES + (not background):
            raise ValueError(
                f"Image {image_id!r}: cls_prob has {columns} columns, but background is {background}: it is a class "
                f"where there are {VG_CLASSES + 1} columns."
            )
        if background:
            probabilities = without_background(image_id, "cls_prob", probabilities)
        if probabilities.ndim == 2 and probabilities.size:
            scores = probabilities.max(axis=1)
    sizes: dict[str, Any] = {
        field: whole_number(image_id, field, fields[field])
        for field in ("image_width", "image_height")
        if fields.get(field) is not None
    }
    return RegionRecord(
        image_id,
        boxes=given("bbox"),
        features=array(image_id, "features", fields.get("features"), None),
        object_ids=ids - 1 if background and ids is not None else ids,
        object_scores=scores,
        class_probabilities=probabilities,
        **sizes,
    )


def _info_file(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".npy") + INFO)


def _load(path: Path) -> np.ndarray:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes, expected the regions of one image.")
    return restricted_pickle.load_npy(path.read_bytes(), str(path))
