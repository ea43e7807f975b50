"""
The files of MMF and Pythia (`extract_features_vmb.py`, `extract_features_frcnn.py`): `<id>.npy`, features (n, D), and
beside it `<id>_info.npy`, a pickled dict:

    bbox (n, 4)  num_boxes  objects (n,)  cls_prob (n, K)  image_width  image_height

Pythia's own downloads are the arrays alone. `cls_prob` is without background, unless the tool ran with `--background`:
then `objects` counts background as 0 and `cls_prob` has a column more. The frcnn script writes one score a region as
`cls_prob`, and the size of the RESIZED photo beside boxes of the original. `num_boxes` counts what scored above 0, or
repeats an option: the arrays tell n.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ... import logging
from ...records_unicoder_vl import RegionRecord
from . import restricted_pickle
from ._parsing import MAX_BYTES
from ._pickled import array, feature_array, foreground, known, whole_number
from .items import Item

logger = logging.get_logger(__name__)

NAME = "mmf-npy"
INFO = "_info.npy"
VG_CLASSES = 1600  # of Visual Genome, on which MMF's detectors were trained
MOST_REGIONS = 1000  # of an array without `_info.npy`: with more rows it holds images, not regions
_MATRIX = re.compile(rb"'descr': '[<>|=]f\d', .*'shape': \((\d{1,9})L?, \d+L?\)")


def matches(path: str | PathLike) -> bool:
    """
    Tells whether `path` is an .npy with its `_info.npy` beside it, or a matrix of floats of `MOST_REGIONS` rows at
    most, or a folder whose first .npy (in it, or in a folder of it) is one of these.
    """
    path = Path(path)
    if not path.is_dir():
        return path.suffix == ".npy" and path.is_file() and (_info_file(path).is_file() or _is_matrix(path))
    found = (file for pattern in ("*.npy", "*/*.npy") for file in islice(path.glob(pattern), 1))
    return any(file.name.endswith(INFO) or matches(file) for file in found)


def _is_matrix(path: Path) -> bool:
    with path.open("rb") as file:
        shape = _MATRIX.search(file.read(256))
    return shape is not None and 0 < int(shape[1]) <= MOST_REGIONS


def items(path: str | PathLike, *, background: bool | None = None, feature_dtype: str | None = None) -> Iterator[Item]:
    """
    Yields the images of one .npy, or of all in a folder and below by name. The image_id is the path in that folder
    without .npy.

    Args:
        path (`str` or `os.PathLike`): The file of features, or the folder.
        background (`bool`, *optional*): Whether `objects` and `cls_prob` count background as 0; None takes it so where
            `cls_prob` has one column more than Visual Genome has classes.
        feature_dtype (`str`, *optional*): Type of the features where the files hold their bytes.

    Raises:
        ValueError: There is no .npy of features.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    files = [path] if path.suffix == ".npy" else sorted(path.rglob("*.npy"))
    files = [file for file in files if not file.name.endswith(INFO)]
    if not files:
        raise ValueError(f"{path} is no .npy file of features, nor a folder of them.")

    def load(file: Path, image_id: str) -> RegionRecord:
        fields: dict[str, Any] = {"features": _load(file)}
        if _info_file(file).is_file():
            info = _load(_info_file(file))
            content = info.item() if info.dtype == object else None
            if not isinstance(content, dict):
                raise ValueError(
                    f"{_info_file(file)} holds {restricted_pickle.brief(info)}, expected one pickled dict."
                )
            fields = known(content) | fields
        return record(image_id, fields, background, feature_dtype)

    for file in files:
        image_id = file.relative_to(root).as_posix().removesuffix(".npy")
        yield Item(str(file), "", image_id, partial(load, file, image_id))


def record(
    image_id: str, fields: dict[str, Any], background: bool | None, feature_dtype: str | None = None
) -> RegionRecord:
    """Makes the record of the known fields of MMF. Raises ValueError naming the image and the field."""

    def given(name: str) -> np.ndarray | None:
        return array(image_id, name, fields[name], None) if name in fields else None

    ids, probabilities, scores = given("objects"), given("cls_prob"), None
    if probabilities is not None and probabilities.ndim == 1:
        probabilities, scores = None, probabilities
        logging.warn_once(
            logger,
            "MMF's frcnn script stores the size of the RESIZED photo beside boxes of the original: the locations of "
            "its regions are wrong by that scale.",
        )
    if probabilities is not None:
        probabilities, background = foreground(image_id, "cls_prob", probabilities, background, VG_CLASSES)
        if probabilities.ndim == 2 and probabilities.size:
            scores = probabilities.max(axis=1)
    sizes: dict[str, Any] = {
        field: whole_number(image_id, field, fields[field])
        for field in ("image_width", "image_height")
        if field in fields
    }
    return RegionRecord(
        image_id,
        boxes=given("bbox"),
        features=feature_array(image_id, "features", fields.get("features"), None, feature_dtype),
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
