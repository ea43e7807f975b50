"""
Conversion of foreign files to a `RegionStore` and back, in one pass and constant memory, by one process or several.
"""

import json
import multiprocessing
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .. import logging
from ..files import begun_anew, locked, make_folder, remove_folder, say_finished, write_json
from ..records_unicoder_vl import RegionRecord
from .editing import merge_into
from .formats import FORMATS, Item, OtherType, known_provenance, read_items
from .shards import PLAN, SKIPPED, STORE, UNFINISHED, shard_path
from .store import NoRecordWritten, RegionStore, RegionStoreWriter

logger = logging.get_logger(__name__)

WRITERS = {name: module.write for name, module in FORMATS.items() if "write" in vars(module)}
EXPORTS = ("parquet", *WRITERS)  # formats that `export` writes
# Raise it when the meaning of a plan changes, such as how workers share images, or that stores keep class names.
PLAN_VERSION = 2
SKIP_BROKEN, SKIP_UNMAPPED = "skip_broken=True (--skip-broken)", "skip_unmapped=True (--skip-unmapped)"
BACKGROUND_NAMES = ("background", "__background__")


class UnmappedId(ValueError):
    """An id that a rule does not cover."""


@dataclass(frozen=True)
class Rename:
    """
    A function from ids to ids that can be sent to other processes, with the rule that it stands for.

    Args:
        rule (`str`): The rule, as it is recorded in plans and named in errors.
        function (`Callable[[str], str]`): Gives the new id; raises `UnmappedId` on an id that the rule does not cover.
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
        records (iterable of `RegionRecord`): Records of different ids. With `resume=True`, those in the store are
            skipped.
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
    skip_broken: bool = False,
    keep_first: bool = False,
    workers: int = 1,
    resume: bool | None = None,
    restart: bool = False,
    format_options: dict[str, Any] | None = None,
    **options: Any,
) -> RegionStore:
    """
    Converts a file or folder of a known format to a store, with a progress bar, and opens it.

    Called again after an interruption, it goes on. An image that comes twice is taken once if it is the same both
    times. The log tells how many images were left out, and how many came twice.

    Args:
        source (`str` or `os.PathLike`): The file or folder, see `formats.read_items`.
        destination (`str` or `os.PathLike`): Folder of the store.
        format (`str`, *optional*): A key of `formats.FORMATS`; None detects it.
        rename (`Rename`, *optional*): Rule that gives images the ids of the store, see `data.image_ids.id_mapping`.
        skip_unmapped (`bool`, defaults to `False`): Whether to leave out images that `rename` does not cover;
            `skipped.jsonl` in the store's folder lists them.
        skip_broken (`bool`, defaults to `False`): Whether to leave out, likewise, images that are malformed or do not
            fit the others.
        keep_first (`bool`, defaults to `False`): Whether to take the first of several images that have one id and
            differ, and to leave out the others likewise.
        workers (`int`, defaults to 1): Number of processes. Each takes the images whose ids hash to its number, and
            skips the others. Their parts lie beside the destination until all are complete, and are then merged.
        resume (`bool`, *optional*): None goes on with a conversion of equal settings, and leaves a finished store of
            this source as it is; True also adds images that a finished store lacks; False refuses both.
        restart (`bool`, defaults to `False`): Whether to begin anew, with any settings.
        format_options (`dict`, *optional*): Arguments of the format's `items`, such as `feature_dtype`, and
            `class_names`, which the store keeps.
        options: Arguments of `RegionStoreWriter`: provenance and `dtype`.

    Raises:
        ValueError: The format is unknown, an image is malformed, or comes twice and differs, the destination was begun
            with other settings, or see `RegionStoreWriter`. The message names the file and the place in it.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1.")
    source, folder = Path(source), Path(destination).resolve()
    if source.exists() and source.resolve() == folder:
        raise ValueError(f"{source} is both the source and the store: take another folder for the store.")
    parts = folder.with_name(f".{folder.name}.parts")
    format_options = format_options or {}
    options = known_provenance(source, format) | options
    task = _Task(
        source, options["source_format"], rename, skip_unmapped, skip_broken, keep_first, format_options, options
    )
    read_items(source, task.format, **format_options).close()  # raises on an option that the format does not have
    plan = {
        "workers": workers,
        "ids": None if rename is None else rename.rule,
        "source": str(source.absolute()),
        "version": PLAN_VERSION,
        **format_options,
    }
    plan = json.loads(json.dumps(plan, default=str))  # as it will be read again
    with begun_anew(folder, restart, STORE, parts):
        begun = _begun(folder, parts)
        before = _read_plan(folder) if begun else {}
        if begun:
            _check_plan(folder if begun[0] == folder else parts, before, plan, resume, STORE.is_complete(folder))
        if before.get("version") == PLAN_VERSION or not begun:
            task.name_classes()
        else:
            task.shares_source_ids, plan = True, plan | {"version": before.get("version")}
        task.options["resume"] = resume is not False
        return _convert(task, folder, parts, plan, workers, resume)


def _convert(
    task: "_Task", folder: Path, parts: Path, plan: dict[str, Any], workers: int, resume: bool | None
) -> RegionStore:
    made, finished = not folder.exists(), STORE.is_complete(folder)
    if finished and not resume and not (folder / UNFINISHED).exists():
        with RegionStoreWriter(folder, **task.options):  # refuses other settings
            pass
        remove_folder(parts)
        say_finished(folder)
        return RegionStore(folder)
    try:
        if workers == 1 or finished:
            found = task.run(folder, plan=None if finished else plan)
        else:
            make_folder(folder)
            with locked(folder):
                write_json(folder / PLAN, plan)
                found = task.share(parts, workers)
                stores = [part for part in sorted(parts.iterdir()) if STORE.is_complete(part)]
                if stores:
                    merge_into(folder, stores)
        if not STORE.is_complete(folder):
            raise ValueError(_nothing(task.source, found))
    except BaseException:
        _forget_empty(folder, parts, made)
        raise
    remove_folder(parts)
    # What an earlier source left out is still lacking.
    others = [row for row in read_rows(folder / SKIPPED) if not _is_of(task.source, row["file"])]
    write_skipped(folder, others + found.skipped)
    if found.repeated:
        logger.warning(f"{found.repeated:,} image(s) came again, the same as before, and were taken once.")
    return RegionStore(folder)


def write_skipped(folder: Path, rows: list[dict[str, Any]]) -> None:
    """
    Writes the list of images that a store lacks, each with its file and the reason; files that hold no image have an
    image_id of null. Where nothing is lacking, there is no list.
    """
    path = folder / SKIPPED
    if not rows:
        path.unlink(missing_ok=True)
        return
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # a name of a file may be no text
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    logger.warning(f"{len(rows):,} left out: {path} says which and why.")


def _is_of(source: Path, file: str) -> bool:
    """Tells whether a file is a source, or in its folder."""
    return Path(file).absolute().is_relative_to(source.absolute())


def _nothing(source: Path, found: "_Found") -> str:
    if not found.skipped:
        return f"{source} holds no records."
    first = found.skipped[0]
    return f"{source}: all {len(found.skipped):,} images were skipped; the first reason: {first['reason']}"


def _begun(folder: Path, parts: Path) -> list[Path]:
    """Gives the folders that hold converted images."""
    return [store for store in (folder, *parts.glob("*")) if shard_path(store, 0).exists()]


def _forget_empty(folder: Path, parts: Path, made: bool) -> None:
    """Removes the files of a failed start, where no image was converted and no other process is at work."""
    with suppress(OSError, ValueError), locked(folder):
        if not _begun(folder, parts):
            for name in (PLAN, SKIPPED):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(parts, ignore_errors=True)
    if made:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _read_plan(folder: Path) -> dict[str, Any]:
    """
    Reads the settings of a conversion that was begun; empty where none was, or where a version that noted none began
    it.
    """
    path = folder / PLAN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _check_plan(place: Path, before: dict[str, Any], plan: dict[str, Any], resume: bool | None, finished: bool) -> None:
    """Raises ValueError where a conversion at `place` must not be gone on with, or was begun with other settings."""
    if resume is False:
        raise ValueError(
            f"{place} holds a store, or the beginning of one, and resume=False refuses both: take another folder."
        )
    ignored = {"version"} | ({"workers"} if finished else set())
    if resume or "source" not in before:  # a source may have moved, or a second one may be added
        ignored.add("source")
    for name in sorted((before.keys() | plan.keys()) - ignored):
        if before.get(name) != plan.get(name):
            raise ValueError(
                f"{place} was begun with {name}={before.get(name)!r:.300}, not {plan.get(name)!r:.300}: go on with "
                "equal settings, begin anew with --restart, or take another folder."
            )


@dataclass
class _Found:
    """
    The images that a conversion met and did not write: rows of `skipped.jsonl`, and the number of images that came
    again.
    """

    skipped: list[dict[str, str]] = field(default_factory=list)
    repeated: int = 0


@dataclass
class _Task:
    """
    A conversion, in a form that can be sent to the processes that share it.

    Args:
        source, format, rename, skip_unmapped, skip_broken, keep_first, format_options: See `convert`.
        options (`dict`): Arguments of `RegionStoreWriter`.
        shares_source_ids (`bool`): Whether workers share the images by their ids in the source, as older versions did,
            and not by their ids in the store: a conversion must go on as it was begun.
    """

    source: Path
    format: str
    rename: Rename | None
    skip_unmapped: bool
    skip_broken: bool
    keep_first: bool
    format_options: dict[str, Any]
    options: dict[str, Any]
    shares_source_ids: bool = False

    def name_classes(self) -> None:
        """Has the store keep the class names. Raises ValueError where they begin with the background."""
        names = self.format_options.get("class_names")
        if names is None:
            return
        if names and names[0].strip().lower() in BACKGROUND_NAMES:
            raise ValueError(f"class_names begin with {names[0]!r}: take it out, object ids count from behind it.")
        self.options["class_names"] = names

    def run(self, destination: Path, part: int = 0, parts: int = 1, plan: dict[str, Any] | None = None) -> _Found:
        """Writes one share of the images, and tells what else it met."""
        found = _Found()
        with suppress(NoRecordWritten), RegionStoreWriter(destination, **self.options) as writer:
            if plan is not None:
                write_json(destination / PLAN, plan)
            sorter = _Sorter(self, writer, destination / SKIPPED, found)
            items = read_items(self.source, self.format, **self.format_options)
            with closing(items):
                for item in logging.tqdm(items, desc=f"Converting {self.format}", unit="image", position=part):
                    sorter.take(item, part, parts)
        return found

    def share(self, folder: Path, workers: int) -> _Found:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = [pool.submit(self.run, folder / str(part), part, workers) for part in range(workers)]
            results = [share.result() for share in shares]
        skipped = [row for found in results for row in found.skipped]
        return _Found(skipped, sum(found.repeated for found in results))

    def new_id(self, item: Item) -> str:
        """
        Gives the id that an image is stored under. Raises UnmappedId, naming the place of the image, where the rule
        gives none.
        """
        if self.rename is None:
            return item.image_id
        try:
            return self.rename(item.image_id)
        except UnmappedId as error:
            raise UnmappedId(f"{item.place}: {error}") from error


class _Sorter:
    """
    Writes the images of a source that are to be written, and notes why others are not.

    Of several images with one id, the first that is not broken is taken, wherever an earlier run was stopped: each run
    notes broken images at once, and a later one decodes them again.
    """

    def __init__(self, task: _Task, writer: RegionStoreWriter, log: Path, found: _Found):
        self.task = task
        self.writer = writer
        self.log = log
        self.found = found
        if log.exists():
            with log.open("a") as file:
                file.write("\n")  # ends a row that a kill cut short
        self.broken_before = {(row["file"], row.get("place", "")) for row in read_rows(log)}
        self.met = np.zeros(len(writer.resumed), bool)  # the images of earlier runs that this run met
        self.width = writer.feature_dim  # or that of the first whole image of the source, whichever process writes it

    def take(self, item: Item, part: int, parts: int) -> None:
        """
        Writes an image, or notes why it is not written. Raises ValueError, naming its place, where it ends the
        conversion.
        """
        if not _is_text(item.image_id):
            if part == 0:
                error = ValueError(f"{item.place}: the image_id {item.image_id!r} is no text.")
                self._skip(item, error, self.task.skip_broken, SKIP_BROKEN)
            return
        try:
            image_id = self.task.new_id(item)
        except UnmappedId as error:
            if _is_mine(item.image_id, part, parts):
                self._skip(item, error, self.task.skip_unmapped, SKIP_UNMAPPED)
            return
        mine = _is_mine(item.image_id if self.task.shares_source_ids else image_id, part, parts)
        if mine and (item.file, item.where) not in self.broken_before and self._is_of_earlier_run(image_id):
            return
        if not mine and self.width is not None:
            return
        try:
            record = item.load()
            record.image_id = image_id
            self.width = self.width or record.features.shape[1]
            if mine:
                self._write(item, record)
        except _Differs:
            raise
        except OtherType as error:
            if mine:
                raise ValueError(item.explain(error)) from error
        except ValueError as error:
            if mine:
                error = ValueError(item.explain(error))
                self._skip(item, error, self.task.skip_broken, SKIP_BROKEN)

    def _is_of_earlier_run(self, image_id: str) -> bool:
        """Tells whether an earlier run wrote the image of this id, and no other image of this id came in this run."""
        number = self.writer.resumed.find(image_id) if len(self.met) else None
        if number is None or self.met[number]:
            return False
        self.met[number] = True
        return True

    def _write(self, item: Item, record: RegionRecord) -> None:
        if record.features.shape[1] != self.width:
            raise ValueError(
                f"Image {record.image_id!r}: features have width {record.features.shape[1]}, expected {self.width} as "
                "the first image has."
            )
        if self._is_of_earlier_run(record.image_id):  # it was broken then
            return
        if record.image_id not in self.writer:
            self.writer.write(record)
        elif self.writer.holds(record):
            self.found.repeated += 1
        elif self.task.keep_first:
            self._leave_out(item, f"{item.place}: another image of the id {record.image_id!r} came first, and differs.")
        else:
            raise _Differs(
                f"Image {record.image_id!r} is in {self._first_place(record.image_id)}, and in {item.place}, which "
                "differ: take one of them out of the source, or take the first of all such images with "
                "keep_first=True (--keep-first)."
            )

    def _skip(self, item: Item, error: ValueError, may: bool, option: str) -> None:
        if not may:
            raise ValueError(f"{error} {option} leaves such images out.") from error
        self._leave_out(item, str(error))

    def _leave_out(self, item: Item, reason: str) -> None:
        row = {"image_id": item.image_id, "file": item.file, "reason": reason}
        if item.where:
            row["place"] = item.where
        self.found.skipped.append(row)
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _first_place(self, image_id: str) -> str:
        """Finds the place of the image that was taken."""
        broken = {(row["file"], row.get("place", "")) for row in self.found.skipped}
        items = read_items(self.task.source, self.task.format, **self.task.format_options)
        with closing(items):
            for item in items:
                with suppress(UnmappedId):
                    if self.task.new_id(item) == image_id and (item.file, item.where) not in broken:
                        return item.place
        return str(self.writer.path)  # the image is of another source


class _Differs(ValueError):
    """An image that comes twice and is not the same both times."""


def _is_text(image_id: str) -> bool:
    """Tells whether an id can be stored: names of files and of groups in HDF5 are bytes, which may be no UTF-8."""
    try:
        image_id.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_mine(image_id: str, part: int, parts: int) -> bool:
    return parts == 1 or zlib.crc32(image_id.encode()) % parts == part


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a `skipped.jsonl`, without one that a kill cut short."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def export(store: RegionStore, path: str | PathLike, format: str) -> None:
    """
    Writes a store in a format that other tools read, with a progress bar. Fields that the format cannot hold are left
    out, with a warning that names them.

    Args:
        store (`RegionStore`): The store to write.
        path (`str` or `os.PathLike`): A new file or folder, whichever the format is.
        format (`str`): One of `EXPORTS`: `parquet`, which `datasets` reads by itself, or a format of other tools.

    Raises:
        ValueError: The format cannot be written, or not under this name, or a record lacks a field that it needs.
    """
    if format == "parquet":
        from .parquet import export_parquet

        export_parquet(store, path)
    elif format in WRITERS:
        lost: Counter[str] = Counter()
        WRITERS[format](_counting_lost(store, format, lost), path)
        if lost:
            fields = ", ".join(f"{name} ({images:,} images)" for name, images in lost.items())
            logger.warning(f"{path} lacks fields that {format} cannot hold: {fields}.")
    else:
        raise ValueError(f"{format!r} cannot be written, only {list(EXPORTS)}.")


def _counting_lost(store: RegionStore, format: str, lost: Counter[str]) -> Iterator[RegionRecord]:
    """Yields the records of a store, and counts in `lost` the images of each field that is not written."""
    for record in logging.tqdm(store.values(), desc=f"Writing {format}", unit="image", total=len(store)):
        lost.update(FORMATS[format].not_written(record))
        yield record
