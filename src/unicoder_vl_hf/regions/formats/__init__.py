"""
Region features as other tools leave them, one module a format.

Each module has `NAME`, `matches(path)` (a look at the first bytes) and `read(path, skip)`, a generator of records in
constant memory. What a format lacks is None in the record; ids are those of the source. Some also have
`write(records, path)`, and `not_written(record)`: the fields that a record knows and the file will not.
"""

import inspect
from collections.abc import Container, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from ...records_unicoder_vl import RegionRecord
from . import (
    bottom_up_tsv,
    frcnn_arrow,
    hdf5,
    lxmert_tsv,
    milvlg_npz,
    mmf_lmdb,
    mmf_npy,
    scan_npy,
    uniter_lmdb,
    uniter_npz,
    vinvl_tsv,
    volta_lmdb,
)

FORMATS = {
    module.NAME: module
    for module in (
        bottom_up_tsv,
        milvlg_npz,
        lxmert_tsv,
        vinvl_tsv,
        hdf5,
        scan_npy,
        frcnn_arrow,
        uniter_lmdb,
        uniter_npz,
        volta_lmdb,
        mmf_npy,
        mmf_lmdb,
    )
}

# Those that have `provenance(path)`.
SELF_DESCRIBING = tuple(module for module in FORMATS.values() if "provenance" in vars(module))


def detect_format(path: str | PathLike) -> str:
    """
    Name of the format of a file or folder.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: No format, or more than one, matches, or the folder is empty.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: no store was finished there, and there is nothing to convert.")
    found = [name for name, module in FORMATS.items() if module.matches(path)]
    if len(found) != 1:
        state = f"could be any of {found}" if found else f"is none of the known formats {list(FORMATS)}"
        raise ValueError(f"{path} {state}: name its format (--format).")
    return found[0]


def read_records(
    path: str | PathLike, format: str | None = None, skip: Container[str] = (), **options: Any
) -> Iterator[RegionRecord]:
    """
    Records of a file or folder of any known format, one at a time.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        format (`str`, *optional*): A key of `FORMATS`; None asks `detect_format`.
        skip (container of `str`): Ids of images to pass over, cheaply: what a resumed store holds.
        options: What the format's `read` takes beside: `class_names` where it names classes by words, `background`
            where a tool may have counted it, `index` where it numbers its images.

    Raises:
        ValueError: The format is unknown or knows no such option, or a record is malformed; the message names the file,
            the place and the field.
    """
    read = get_format(path, format).read
    known = inspect.signature(read).parameters.keys() - {"path", "skip"}
    if unknown := options.keys() - known:
        raise ValueError(f"{path}: this format has no option {sorted(unknown)}, only {sorted(known)}.")
    return read(path, skip, **options)


def known_provenance(path: str | PathLike, format: str | None = None) -> dict[str, Any]:
    """What a file or folder tells of its own provenance, as arguments of `RegionStoreWriter`."""
    module = get_format(path, format)
    told = module.provenance(path) if module in SELF_DESCRIBING else {}
    return {"source_format": module.NAME} | told


def get_format(path: str | PathLike, format: str | None = None) -> Any:
    """
    The module of a format.

    Raises:
        ValueError: The format is unknown.
    """
    name = detect_format(path) if format is None else format
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}, expected one of {list(FORMATS)}.")
    return FORMATS[name]
