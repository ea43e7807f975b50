"""Foreign files → `RegionStore`, in one pass and constant memory, by one process or several."""

import json
import multiprocessing
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from .. import logging
from ..records_unicoder_vl import RegionRecord
from .editing import merge_stores
from .formats import FORMATS, known_provenance, read_records
from .shards import MANIFEST, PLAN, SKIPPED, shard_path
from .store import NoRecordWritten, RegionStore, RegionStoreWriter
from .tensor_files import locked, make_folder, write_json

logger = logging.get_logger(__name__)

WRITERS = {name: module.write for name, module in FORMATS.items() if "write" in vars(module)}
EXPORTS = ("parquet", *WRITERS)  # formats that `export` writes


class UnmappedId(ValueError):
    """A rule does not cover an id."""


@dataclass(frozen=True)
class Rename:
    """
    A function from ids to ids that can be sent to other processes, and the rule that it stands for.

    Args:
        rule (`str`): What it is called where it is recorded.
        function (`Callable[[str], str]`): Raises `UnmappedId` on an id that the rule does not cover.
    """

    rule: str
    function: Callable[[str], str]

    def __call__(self, image_id: str) -> str:
        return self.function(image_id)


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
    skip_unmapped: bool = False,
    workers: int = 1,
    resume: bool = False,
    format_options: dict[str, Any] | None = None,
    **options: Any,
) -> RegionStore:
    """
    Converts a file or folder of a known format to a store, with a progress bar, and opens it.

    Args:
        source (`str` or `os.PathLike`): See `formats.read_records`.
        destination (`str` or `os.PathLike`): Folder of the store.
        format (`str`, *optional*): A key of `formats.FORMATS`; None detects it.
        rename (`Rename`, *optional*): Gives the id to store an image under, see `data.image_ids.id_mapping`.
        skip_unmapped (`bool`, defaults to `False`): Leave out images that `rename` does not cover; `skipped.jsonl` in
            the store's folder lists them.
        workers (`int`, defaults to 1): Processes. Each takes the images whose ids hash to its number, and reads past
            the others; their parts lie beside the destination until all are whole, and are then merged.
        resume (`bool`, defaults to `False`): Go on after an interruption, with as many workers as before, or add what
            is new to a finished store.
        format_options (`dict`, *optional*): Arguments of the format's `read`, such as `class_names`.
        options: Arguments of `RegionStoreWriter`: provenance and `dtype`.

    Raises:
        ValueError: The format is unknown, a record is malformed, the destination was begun with other settings, or see
            `RegionStoreWriter`.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1.")
    folder, format_options = Path(destination).absolute(), format_options or {}
    options = known_provenance(source, format) | options | {"resume": resume}
    task = _Task(Path(source), options["source_format"], rename, skip_unmapped, format_options, options)
    plan = {"workers": workers, "ids": None if rename is None else rename.rule, **format_options}
    plan = json.loads(json.dumps(plan, default=str))  # as it will be read again
    parts = folder.with_name(f".{folder.name}.parts")
    _check_plan(folder, parts, plan, resume)
    made, finished = not folder.exists(), (folder / MANIFEST).exists()
    try:
        if workers == 1 or finished:
            skipped = task.run(folder, plan=None if finished else plan)
        else:
            make_folder(folder)
            with locked(folder):
                write_json(folder / PLAN, plan)
                skipped = task.share(parts, workers)
                stores = [part for part in sorted(parts.iterdir()) if (part / MANIFEST).exists()]
                if not stores:
                    raise ValueError(f"{source} holds no records.")
                merge_stores(stores, folder)
    except BaseException:
        _forget_empty(folder, parts, made)
        raise
    shutil.rmtree(parts, ignore_errors=True)
    write_skipped(folder, skipped)
    return RegionStore(folder)


def write_skipped(folder: Path, rows: list[dict[str, Any]]) -> None:
    """
    Lists what a store lacks, each image with its file and the reason, and files that are none of an image with an
    image_id of null; where it lacks none, there is no list.
    """
    path = folder / SKIPPED
    if not rows:
        path.unlink(missing_ok=True)
        return
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    logger.warning(f"{len(rows):,} left out: {path} says which and why.")


def _begun(folder: Path, parts: Path) -> list[Path]:
    """The folders that hold something converted."""
    return [store for store in (folder, *parts.glob("*")) if shard_path(store, 0).exists()]


def _forget_empty(folder: Path, parts: Path, made: bool) -> None:
    """Removes what a failed start leaves, where nothing was converted, and no other process is at work."""
    with suppress(OSError, ValueError), locked(folder):
        if not _begun(folder, parts):
            (folder / PLAN).unlink(missing_ok=True)
            shutil.rmtree(parts, ignore_errors=True)
    if made:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _check_plan(folder: Path, parts: Path, plan: dict[str, Any], resume: bool) -> None:
    """Raises ValueError where something is begun that `resume` does not allow, or that other settings began."""
    if not (begun := _begun(folder, parts)):
        return
    place = folder if begun[0] == folder else parts
    if not resume:
        raise ValueError(
            f"{place} holds a store, or the beginning of one: go on with it by resume=True (--resume), remove it, or "
            "take another folder."
        )
    before = json.loads((folder / PLAN).read_text(encoding="utf-8")) if (folder / PLAN).exists() else {}
    for name in before.keys() | plan.keys():
        if before.get(name) != plan.get(name) and not (name == "workers" and (folder / MANIFEST).exists()):
            raise ValueError(
                f"{place} was begun with {name}={before.get(name)!r:.80}, not {plan.get(name)!r:.80}: resume with "
                "equal settings, remove it, or take another folder."
            )


@dataclass
class _Task:
    source: Path
    format: str
    rename: Rename | None
    skip_unmapped: bool
    format_options: dict[str, Any]
    options: dict[str, Any]

    def run(self, destination: Path, part: int = 0, parts: int = 1, plan: dict[str, Any] | None = None) -> list[dict]:
        """Writes a share of the images. Returns what was left out, a row an image."""
        with RegionStoreWriter(destination, **self.options) as writer:
            if plan is not None:
                write_json(destination / PLAN, plan)
            skip = _Skip(writer.resumed, self.rename, self.skip_unmapped, part, parts)
            records = read_records(self.source, self.format, skip=skip, **self.format_options)
            for record in logging.tqdm(records, desc=f"Converting {self.format}", unit="image", position=part):
                if self.rename is not None:
                    record.image_id = self.rename(record.image_id)
                writer.write(record)
        return [{"image_id": name, "file": str(self.source), "reason": why} for name, why in skip.unmapped.items()]

    def run_part(self, destination: Path, part: int, parts: int) -> list[dict]:
        try:
            return self.run(destination, part, parts)
        except NoRecordWritten:  # a small source may leave nothing for one of many
            return []

    def share(self, folder: Path, workers: int) -> list[dict]:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = [pool.submit(self.run_part, folder / str(part), part, workers) for part in range(workers)]
            return [row for part in parts for row in part.result()]


@dataclass
class _Skip(Container[str]):
    """
    The ids of a source that a worker passes over: what its store holds already, the share of others, and, if they are
    to be left out, those without a new id, which it notes with the reason.
    """

    stored: Container[str]
    rename: Rename | None
    skip_unmapped: bool
    part: int
    parts: int
    unmapped: dict[str, str] = field(default_factory=dict)

    def __contains__(self, image_id: object) -> bool:
        image_id = str(image_id)
        if self.parts > 1 and zlib.crc32(image_id.encode()) % self.parts != self.part:
            return True
        try:
            return (image_id if self.rename is None else self.rename(image_id)) in self.stored
        except UnmappedId as error:
            if not self.skip_unmapped:
                hint = "skip_unmapped=True (--skip-unmapped) leaves such images out."
                raise UnmappedId(f"{error} {hint}") from None
            self.unmapped[image_id] = str(error)
            return True


def export(store: RegionStore, path: str | PathLike, format: str) -> None:
    """
    Writes a store in a format that other tools read, with a progress bar. What the format has no place for is left
    out, with a warning that names these fields.

    Args:
        store (`RegionStore`): What to write.
        path (`str` or `os.PathLike`): A new file or folder, as the format has it.
        format (`str`): One of `EXPORTS`: `parquet`, which `datasets` reads by itself, or a format of other tools.

    Raises:
        ValueError: The format cannot be written or not by this name, or a record lacks what it needs.
    """
    if format == "parquet":
        from .parquet import export_parquet

        export_parquet(store, path)
    elif format in WRITERS:
        lost: Counter[str] = Counter()
        WRITERS[format](_counting_lost(store, format, lost), path)
        if lost:
            fields = ", ".join(f"{name} ({images:,} images)" for name, images in lost.items())
            logger.warning(f"{path} lacks what {format} has no place for: {fields}.")
    else:
        raise ValueError(f"{format!r} cannot be written, only {list(EXPORTS)}.")


def _counting_lost(store: RegionStore, format: str, lost: Counter[str]) -> Iterator[RegionRecord]:
    """The records of a store; `lost` counts the images of each field that is not written."""
    for record in logging.tqdm(store.values(), desc=f"Writing {format}", unit="image", total=len(store)):
        lost.update(FORMATS[format].not_written(record))
        yield record
