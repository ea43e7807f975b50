"""Foreign files → `RegionStore`, in one pass and constant memory, by one process or several."""

import multiprocessing
import shutil
import zlib
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..feature_extraction_unicoder_vl import RegionRecord
from .editing import merge_stores
from .formats import FORMATS, known_provenance, read_records
from .store import MANIFEST, NoRecordWritten, RegionStore, RegionStoreWriter

Rename = Callable[[str], str]


def write_store(
    records: Iterable[RegionRecord], path: str | PathLike, *, total: int | None = None, **options: Any
) -> RegionStore:
    """
    Writes records to a store, with a progress bar, and opens it.

    Args:
        records (iterable of `RegionRecord`): Of different ids. With `resume=True`, those in the store are passed over.
        path (`str` or `os.PathLike`): Folder of the store.
        total (`int`, *optional*): Number of records, for the bar.
        options: Arguments of `RegionStoreWriter`.

    Raises:
        ValueError: See `RegionStoreWriter`.
    """
    with RegionStoreWriter(path, **options) as writer:
        for record in logging.tqdm(records, desc=f"Writing {writer.path.name}", unit="image", total=total):
            if record.image_id not in writer.resumed:
                writer.write(record)
    return RegionStore(path)


def convert(
    source: str | PathLike,
    destination: str | PathLike,
    *,
    format: str | None = None,
    rename: Rename | None = None,
    workers: int = 1,
    format_options: dict[str, Any] | None = None,
    **options: Any,
) -> RegionStore:
    """
    Converts a file or folder of a known format to a store, with a progress bar, and opens it.

    Args:
        source (`str` or `os.PathLike`): See `formats.read_records`.
        destination (`str` or `os.PathLike`): Folder of the store.
        format (`str`, *optional*): A key of `formats.FORMATS`; None detects it.
        rename (function of an id, *optional*): Gives the id to store an image under, see `data.image_ids.id_mapping`.
        workers (`int`, defaults to 1): Processes. Each takes the images whose ids hash to its number, and reads past
            the others; their parts lie beside the destination until all are whole, and are then merged.
        format_options (`dict`, *optional*): Arguments of the format's `read`, such as `class_names`.
        options: Arguments of `RegionStoreWriter`: provenance, `dtype`, `resume=True` to go on after an interruption
            (with as many workers as before).

    Raises:
        ValueError: The format is unknown, a record is malformed, or see `RegionStoreWriter`.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1.")
    options = known_provenance(source, format) | options
    task = _Task(Path(source), options["source_format"], rename, format_options or {}, options)
    if workers == 1:
        task.run(Path(destination))
        return RegionStore(destination)

    parts = Path(destination).with_name(f".{Path(destination).name}.parts-{workers}")
    if not (Path(destination) / MANIFEST).exists():
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in [pool.submit(task.run_part, parts / str(part), part, workers) for part in range(workers)]:
                future.result()
        stores = [parts / str(part) for part in range(workers) if (parts / str(part) / MANIFEST).exists()]
        if not stores:
            raise ValueError(f"{source} holds no records.")
        merge_stores(stores, destination)
    elif not parts.exists():  # where they do, only removing them was interrupted
        raise ValueError(f"{destination} holds a store: take another folder.")
    shutil.rmtree(parts)
    return RegionStore(destination)


@dataclass
class _Task:
    source: Path
    format: str
    rename: Rename | None
    format_options: dict[str, Any]
    options: dict[str, Any]

    def run(self, destination: Path, part: int = 0, parts: int = 1) -> None:
        with RegionStoreWriter(destination, **self.options) as writer:
            skip = _Skip(writer.resumed, self.rename, part, parts)
            records = read_records(self.source, self.format, skip=skip, **self.format_options)
            for record in logging.tqdm(records, desc=f"Converting {self.format}", unit="image", position=part):
                if self.rename is not None:
                    record.image_id = self.rename(record.image_id)
                writer.write(record)

    def run_part(self, destination: Path, part: int, parts: int) -> None:
        with suppress(NoRecordWritten):  # a small source may leave nothing for one of many
            self.run(destination, part, parts)


@dataclass
class _Skip(Container[str]):
    """The ids of a source that a worker passes over: what its store holds already, and the share of others."""

    stored: Container[str]
    rename: Rename | None
    part: int
    parts: int

    def __contains__(self, image_id: object) -> bool:
        image_id = str(image_id)
        if self.parts > 1 and zlib.crc32(image_id.encode()) % self.parts != self.part:
            return True
        return (image_id if self.rename is None else self.rename(image_id)) in self.stored


def export(store: RegionStore, path: str | PathLike, format: str) -> None:
    """
    Writes a store in a format that other tools read.

    Args:
        store (`RegionStore`): What to write.
        path (`str` or `os.PathLike`): A new file or folder, as the format has it.
        format (`str`): `parquet`, which `datasets` reads by itself, or a key of `formats.FORMATS` that can be written.

    Raises:
        ValueError: The format cannot be written, or a record lacks what it needs.
    """
    writers = {name: module.write for name, module in FORMATS.items() if "write" in vars(module)}
    if format == "parquet":
        from .parquet import export_parquet

        export_parquet(store, path)
    elif format in writers:
        writers[format](logging.tqdm(store.values(), desc=f"Writing {format}", unit="image", total=len(store)), path)
    else:
        raise ValueError(f"{format!r} cannot be written, only {['parquet', *writers]}.")
