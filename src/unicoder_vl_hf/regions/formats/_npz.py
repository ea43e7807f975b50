"""Reading and writing that the formats of one .npz an image share."""

import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...files import new_folder
from ...records_unicoder_vl import RegionRecord
from ._pickled import known
from .items import Item
from .restricted_pickle import load_npz

# zipfile raises NotImplementedError and UnicodeDecodeError, too, on foreign bytes.
ERRORS = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError)


def members(path: str | os.PathLike) -> set[str]:
    """
    Gives the names of the arrays of an .npz, or of the first whole .npz of a folder; none where there is no such file.
    """
    for file in _files(Path(path)):
        try:
            with zipfile.ZipFile(file) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        except ERRORS:
            continue
    return set()


def damage(path: Path) -> str | None:
    """Describes the damage of an .npz whose members cannot be listed; None where the file is none, or is whole."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    try:
        zipfile.ZipFile(path).close()
    except ERRORS as error:
        return f"{path} is no whole .npz ({error}): it was cut short, or is damaged; copy it again."
    return None


def npz_items(
    path: str | os.PathLike, names: Collection[str], record: Callable[[str, dict[str, Any]], RegionRecord]
) -> Iterator[Item]:
    """
    Yields an image for one .npz, or for each .npz of a folder by name, with the name as its image_id;
    `record(image_id, arrays)` makes its record of those arrays of `names` that are there and known.

    Raises:
        ValueError: There is no .npz.
    """
    files = sorted(_files(Path(path)))
    if not files:
        raise ValueError(f"{path} is no .npz file, nor a folder of them.")

    def load(file: Path, image_id: str) -> RegionRecord:
        return record(image_id, known(load_npz(file, str(file), names)))

    for file in files:
        image_id = file.name.removesuffix(".npz")
        yield Item(str(file), "", image_id, partial(load, file, image_id))


def write_files(
    records: Iterable[RegionRecord], path: str | os.PathLike, arrays: Callable[[RegionRecord], Mapping[str, Any]]
) -> None:
    """
    Writes `arrays(record)` of each record to `<image_id>.npz` in a new folder, which gets its name when all is written.

    Raises:
        ValueError: `path` exists, two ids are the same, an id is no name of a file, or `arrays` raises it.
    """
    with new_folder(path) as folder:
        for record in records:
            file = folder / f"{record.image_id}.npz"
            if file.parent != folder or file.exists():
                raise ValueError(f"Image {record.image_id!r}: the id is here already, or is no name of a file.")
            np.savez(file, **arrays(record))


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        return (file for file in path.iterdir() if file.suffix == ".npz")
    return iter([path] if path.suffix == ".npz" else [])
