"""What the formats of one .npz an image share."""

import os
import zipfile
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...records_unicoder_vl import RegionRecord
from ..tensor_files import new_folder
from .restricted_pickle import load_npz


def members(path: str | os.PathLike) -> set[str]:
    """Names of the arrays of an .npz, or of the first one of a folder; none where there is no such file."""
    try:
        with zipfile.ZipFile(next(_files(Path(path)))) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    # Of foreign bytes zipfile says NotImplementedError and UnicodeDecodeError too.
    except (StopIteration, zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return set()


def read_files(
    path: str | os.PathLike,
    skip: Container[str],
    names: Collection[str],
    record: Callable[[str, dict[str, Any]], RegionRecord],
) -> Iterator[RegionRecord]:
    """
    `record(image_id, arrays)` of one .npz, or of all of a folder by name, with those of `names` that are there.

    Raises:
        ValueError: There is no .npz, one is damaged, or what `record` raises, after the file.
    """
    files = sorted(_files(Path(path)))
    if not files:
        raise ValueError(f"{path} is no .npz file, nor a folder of them.")
    for file in files:
        image_id = file.name.removesuffix(".npz")
        if image_id in skip:
            continue
        arrays = load_npz(file, str(file), names)
        try:
            yield record(image_id, arrays)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def write_files(
    records: Iterable[RegionRecord], path: str | os.PathLike, arrays: Callable[[RegionRecord], Mapping[str, Any]]
) -> None:
    """
    `arrays(record)` of each record to `<image_id>.npz` in a new folder, which gets its name when all is written.

    Raises:
        ValueError: `path` exists, two ids are the same or one is no name of a file, or what `arrays` raises.
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
