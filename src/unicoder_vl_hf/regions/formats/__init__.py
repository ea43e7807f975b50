"""
Formats of region features as other tools write them, one module a format.

Each module has `NAME`, `matches(path)` (a look at the first bytes) and `items(path, **options)`, a generator of `Item`s
in constant memory: an image with its place and its id, not yet decoded. A field that a format lacks is None in the
record; ids are those of the source. Some modules also have `write(records, path)`, and `not_written(record)`: the known
fields of a record that the file cannot hold.
"""

import importlib
import inspect
from collections.abc import Container, Generator, Iterator
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any

from ...records_unicoder_vl import RegionRecord
from . import _lmdb, _npz, bottom_up_tsv, hdf5, scan_npy
from ._numbers import FEATURE_DTYPES, OtherType, check_dtype
from .items import Item

_MODULES = (
    "bottom_up_tsv milvlg_npz lxmert_tsv vinvl_tsv hdf5 volta_hdf5 scan_npy frcnn_arrow uniter_lmdb uniter_npz "
    "volta_lmdb mmf_npy mmf_lmdb vlbert_json"
)
FORMATS = {
    module.NAME: module for module in (importlib.import_module(f".{name}", __name__) for name in _MODULES.split())
}
# These hold no object ids, so class names have no use.
WITHOUT_CLASSES = (bottom_up_tsv, hdf5, scan_npy)

__all__ = [
    "FEATURE_DTYPES",
    "FORMATS",
    "Item",
    "OtherType",
    "detect_format",
    "get_format",
    "known_provenance",
    "read_items",
    "read_records",
]

# These describe the damage of a file that is recognised as no format for that reason.
DAMAGE = (_lmdb.damage, _npz.damage, hdf5.damage)


def detect_format(path: str | PathLike) -> str:
    """
    Detects the format of a file or folder and gives its name, a key of `FORMATS`.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: No format matches, or more than one does, the file was cut short, or the folder is empty.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: no store was finished there, and there is nothing to convert.")
    found = [name for name, module in FORMATS.items() if module.matches(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} could be any of {found}: name its format (--format).")
    for damage in DAMAGE:
        if problem := damage(path):
            raise ValueError(problem)
    raise ValueError(f"{path} is none of the known formats {list(FORMATS)}: name its format (--format).")


def read_items(path: str | PathLike, format: str | None = None, **options: Any) -> Generator[Item]:
    """
    Yields the images of a file or folder of any known format, one at a time and not yet decoded. A broken image is
    found when its record is made, so that the reader may go on with the next one.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        format (`str`, *optional*): A key of `FORMATS`; None asks `detect_format`.
        options: Options of the format's `items`: `feature_dtype`, and, as far as the format has them, `background`
            (whether ids count it), `index` (the ids of images that are numbered) and `class_names` (the name of each
            object id). All formats with object ids take `class_names`; most do not need them to read.

    Raises:
        ValueError: The format is unknown or has no such option.
    """
    module = get_format(path, format)
    known = inspect.signature(module.items).parameters.keys() - {"path"}
    if "class_names" not in known and module not in WITHOUT_CLASSES:
        options.pop("class_names", None)
    if unknown := options.keys() - known:
        why = "; it has no object ids that could have names" if "class_names" in unknown else ""
        raise ValueError(f"{path}: this format has no option {sorted(unknown)}, only {sorted(known)}{why}.")
    check_dtype(options.get("feature_dtype"))
    return module.items(path, **options)


def read_records(
    path: str | PathLike, format: str | None = None, skip: Container[str] = (), **options: Any
) -> Iterator[RegionRecord]:
    """
    Yields the records of a file or folder of any known format, one at a time.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        format (`str`, *optional*): A key of `FORMATS`; None asks `detect_format`.
        skip (container of `str`): Ids of images to skip without decoding them.
        options: See `read_items`.

    Raises:
        ValueError: The format is unknown or has no such option, or an image is broken; the message names the file, the
            place and the field.
    """
    return _records(read_items(path, format, **options), skip)


def _records(items: Generator[Item], skip: Container[str]) -> Iterator[RegionRecord]:
    with closing(items):
        yield from (item.record() for item in items if item.image_id not in skip)


def known_provenance(path: str | PathLike, format: str | None = None) -> dict[str, Any]:
    """Reads the provenance that a file or folder tells of itself, as arguments of `RegionStoreWriter`."""
    module = get_format(path, format)
    told = module.provenance(path) if "provenance" in vars(module) else {}  # of few formats
    return {"source_format": module.NAME} | told


def get_format(path: str | PathLike, format: str | None = None) -> Any:
    """
    Gives the module of a format.

    Raises:
        ValueError: The format is unknown.
    """
    name = detect_format(path) if format is None else format
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}, expected one of {list(FORMATS)}.")
    return FORMATS[name]
