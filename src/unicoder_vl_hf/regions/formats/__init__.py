"""
Region features as other tools leave them, one module a format.

Each module has `NAME`, `matches(path)` (a look at the first bytes) and `read(path, skip)`, a generator of records in
constant memory. What a format lacks is None in the record; ids are those of the source.
"""

from collections.abc import Container, Iterator
from os import PathLike
from pathlib import Path

from ...feature_extraction_unicoder_vl import RegionRecord
from . import bottom_up_tsv, milvlg_npz

FORMATS = {module.NAME: module for module in (bottom_up_tsv, milvlg_npz)}


def detect_format(path: str | PathLike) -> str:
    """
    Name of the format of a file or folder.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: No format, or more than one, matches.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    found = [name for name, module in FORMATS.items() if module.matches(path)]
    if len(found) != 1:
        state = f"could be any of {found}" if found else f"is none of the known formats {list(FORMATS)}"
        raise ValueError(f"{path} {state}: name its format.")
    return found[0]


def read_records(path: str | PathLike, format: str | None = None, skip: Container[str] = ()) -> Iterator[RegionRecord]:
    """
    Records of a file or folder of any known format, one at a time.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        format (`str`, *optional*): A key of `FORMATS`; None asks `detect_format`.
        skip (container of `str`): Ids of images to pass over, cheaply: what a resumed store holds.

    Raises:
        ValueError: The format is unknown, or a record malformed; the message names the file, the place and the field.
    """
    name = detect_format(path) if format is None else format
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}, expected one of {list(FORMATS)}.")
    return FORMATS[name].read(path, skip)
