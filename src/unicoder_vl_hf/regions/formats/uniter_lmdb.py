"""
The image LMDB of UNITER (Chen et al., 2020; its `convert_imgdir.py` and `DetectFeatLmdb`): key = `<image_id>.npz`,
value = the arrays of `uniter_npz` in msgpack as msgpack_numpy encodes them, or, in folders `*_compressed`, as the bytes
of an .npz. Under the key `__keys__` stands a JSON list of keys. The folder's name tells which rows are to be used:

    feat_th0.2_max100_min10   the first min(100, max(10, how many score above 0.2)), as many as the JSON file beside the
                              folder, nbb_th0.2_max100_min10.json, says
    feat_numbb36              the first 36
    all                       all; UNITER takes what `feat_th0.2_max100_min10` would hold, and so do we

msgpack_numpy itself unpickles arrays of objects, which would run code, so its encoding is decoded here.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import optional_import
from ...files import new_folder
from ...records_unicoder_vl import RegionRecord
from . import _lmdb
from ._parsing import from_json
from ._pickled import array, known
from .items import Item
from .restricted_pickle import array_of, dtype_of, load_npz
from .uniter_npz import ARRAYS, arrays_of, not_written, record

__all__ = ["items", "matches", "not_written", "provenance", "write"]

NAME = "uniter-lmdb"
KEYS = b"__keys__"
_FILTERED = re.compile(r"feat_th(-?[\d.]+)_max(\d+)_min(\d+)")
_FIXED = re.compile(r"feat_numbb(\d+)")
_ALL: dict[str, Any] = {"score": 0.2, "min_regions": 10, "max_regions": 100}
_IMAGES_PER_COMMIT = 1000


def matches(path: str | PathLike) -> bool:
    """Tells whether `path` is an LMDB (its folder or file) whose first value is an .npz or a map in msgpack."""
    value = _lmdb.first_value(Path(path), KEYS) or b""
    # A pickle begins with 0x80, too, which in msgpack is an empty map.
    return value.startswith(b"PK") or b"\x81" <= value[:1] <= b"\x8f"


def provenance(path: str | PathLike) -> dict[str, Any]:
    """Gives the thresholds that the folder's name tells."""
    thresholds = _thresholds(_folder_name(Path(path)))
    return {"thresholds": thresholds} if thresholds else {}


def items(path: str | PathLike, *, feature_dtype: str | None = None) -> Iterator[Item]:
    """
    Yields the images by ascending key. The image_id is the key without `.npz`. In a folder of another name all rows are
    read.

    Raises:
        ValueError: The JSON file beside the folder is malformed; the message names it.
    """
    path = Path(path)
    name = _folder_name(path)
    counts = _counts(path, name)

    def load(key: str, value: bytes) -> RegionRecord:
        image_id = key.removesuffix(".npz")
        arrays = known(_decode(image_id, value))
        num_regions = _num_regions(image_id, name, arrays, counts.get(key))
        return record(image_id, arrays, num_regions, feature_dtype)

    return _lmdb.lmdb_items(path, KEYS, load, ".npz")


def write(records: Iterable[RegionRecord], path: str | PathLike) -> None:
    """
    Writes a folder that UNITER's loader reads: all rows of each record, and the JSON file of their numbers beside it.
    See `uniter_npz.arrays_of` for the arrays.

    Args:
        records (iterable of `RegionRecord`): Records with boxes.
        path (`str` or `os.PathLike`): The new folder, whose name UNITER makes of its options:
            `feat_th0.2_max100_min10` or `feat_numbb36`, with `_compressed` behind it for .npz in place of msgpack.

    Raises:
        ValueError: `path` has another name, it or the JSON file exists already, or a record lacks boxes, has an id that
            is too long or came before, or, for `numbb`, has another number of regions.
    """
    path = Path(path).absolute()
    name = _folder_name(path)
    fixed = _FIXED.fullmatch(name)
    if not fixed and not _FILTERED.fullmatch(name):
        raise ValueError(
            f"{path}: UNITER finds no folder of this name, expected feat_th0.2_max100_min10 or feat_numbb36 (of other "
            "numbers too, and with _compressed behind it)."
        )
    counts_file = _counts_file(path, name)
    if not fixed and counts_file.exists():
        raise ValueError(f"{counts_file} exists already: remove it, or choose another folder.")
    lmdb = optional_import("lmdb", "lmdb")
    encode = _npz_bytes if path.name.endswith("_compressed") else _msgpack_bytes
    counts: dict[str, int] = {}
    with new_folder(path) as folder, lmdb.open(str(folder), map_size=2**40) as environment:
        transaction = environment.begin(write=True)
        for image in records:
            key = f"{image.image_id}.npz"
            if fixed and len(image) != int(fixed[1]):
                raise ValueError(
                    f"Image {image.image_id!r}: {len(image)} regions, expected {fixed[1]} by the name {name}."
                )
            try:
                if not transaction.put(key.encode(), encode(arrays_of(image)), overwrite=False):
                    raise ValueError(f"Image {image.image_id!r} comes twice: ids must differ.")
            except lmdb.BadValsizeError as error:
                raise ValueError(f"Image {image.image_id!r}: the id is too long for an LMDB ({error}).") from error
            counts[key] = len(image)
            if len(counts) % _IMAGES_PER_COMMIT == 0:
                transaction.commit()
                transaction = environment.begin(write=True)
        transaction.put(KEYS, json.dumps(list(counts)).encode())
        transaction.commit()
        (folder / "lock.mdb").unlink(missing_ok=True)
        if not fixed:
            counts_file.write_text(json.dumps(counts), encoding="utf-8")


def _folder_name(path: Path) -> str:
    """Gives the name of the folder that holds `data.mdb`, without `_compressed`; `path` is the folder or that file."""
    path = path.absolute()
    return (path.parent if path.name == "data.mdb" else path).name.removesuffix("_compressed")


def _thresholds(name: str) -> dict[str, Any] | None:
    if name == "all":
        return _ALL
    if found := _FILTERED.fullmatch(name):
        return {"score": float(found[1]), "min_regions": int(found[3]), "max_regions": int(found[2])}
    return {"max_regions": int(found[1])} if (found := _FIXED.fullmatch(name)) else None


def _counts_file(path: Path, name: str) -> Path:
    folder = path.parent if path.name == "data.mdb" else path
    return folder.parent / f"{name.replace('feat_', 'nbb_')}.json"


def _counts(path: Path, name: str) -> dict[str, int]:
    """Reads key → number of regions from the file beside a folder of filtered regions; empty where there is none."""
    file = _counts_file(path.absolute(), name)
    if not _FILTERED.fullmatch(name) or not file.is_file():
        return {}
    counts = from_json(str(file), file.read_bytes())
    if not isinstance(counts, dict) or not all(type(count) is int and count > 0 for count in counts.values()):
        raise ValueError(f"{file} is no JSON of {{key: number of regions}}.")
    return counts


def _num_regions(image_id: str, name: str, arrays: dict[str, Any], count: int | None) -> int | None:
    """Gives the number of rows to use; None for all."""
    if fixed := _FIXED.fullmatch(name):
        return int(fixed[1])
    if name != "all":
        return count
    if "conf" not in arrays:
        raise ValueError(f"Image {image_id!r}: conf is missing, by which UNITER selects regions.")
    above = int((array(image_id, "conf", arrays["conf"], None) > _ALL["score"]).sum())
    return min(_ALL["max_regions"], max(_ALL["min_regions"], above))


def _decode(image_id: str, value: bytes) -> dict[str, Any]:
    if value.startswith(b"PK"):
        return load_npz(io.BytesIO(value), f"image {image_id!r}", ARRAYS)
    msgpack = optional_import("msgpack", "lmdb")
    try:
        # An image has few arrays, of few dimensions. A value that claims more would take memory before it is refused.
        arrays = msgpack.unpackb(value, object_hook=_decode_array, max_array_len=64, max_map_len=64)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"Image {image_id!r}: the msgpack cannot be read: {error}.") from error
    if not isinstance(arrays, dict):
        raise ValueError(f"Image {image_id!r} is a {type(arrays).__name__}, expected a map of arrays.")
    return arrays


def _decode_array(fields: dict[Any, Any]) -> Any:
    """Decodes an array or scalar as msgpack_numpy writes it; other maps stay."""
    if b"nd" not in fields:
        return fields
    shape = tuple(fields[b"shape"]) if fields[b"nd"] else (1,)
    decoded = array_of(dtype_of(fields[b"type"]), shape, fields[b"data"])
    return decoded if fields[b"nd"] else decoded[0]


def _msgpack_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Encodes arrays as msgpack_numpy would."""
    fields = {
        name: {b"nd": True, b"type": a.dtype.str, b"kind": b"", b"shape": a.shape, b"data": a.tobytes()}
        for name, a in arrays.items()
    }
    return optional_import("msgpack", "lmdb").packb(fields, use_bin_type=True)


def _npz_bytes(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()
