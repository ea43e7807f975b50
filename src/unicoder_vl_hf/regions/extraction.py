"""
Extraction of photos to a `RegionStore`: read by worker processes, detected in batches, by one process or many, and
resumed after a kill.

Each process writes a store of its own in `<output>.parts`; at the end these become one. The regions of a photo do not
depend on the photos beside it, so the store does not depend on the number of processes, workers or photos a batch.
"""

import json
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.utils.data import DataLoader, Dataset

from .. import logging
from ..files import begun_anew, locked, make_folder, remove_folder, say_finished
from ..name_lists import numbered_lines
from ..processes import StopSignal
from ..records_unicoder_vl import RegionRecord, check_several
from .conversion import Rename, read_rows, write_skipped, write_store
from .detectors import Detector, load_detector, split_name
from .editing import merge_stores, merged_stores, remove_images
from .finding import GPU_BATCH_SIZE, ReadPhoto, detect
from .photos import PhotoSource, decode_photo, describe, in_words, list_photos
from .shards import MANIFEST, SKIPPED, STORE, UNFINISHED
from .store import NoRecordWritten, OtherSettings, RegionStore, RegionStoreWriter

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

# Photos are sorted by shape over this many batches: a detector computes those of equal shape together.
BATCHES_SORTED = 4
# Where a detector fails at this many photos in a row, the fault is not the photos'.
FAILURES_IN_A_ROW = 8

Boxes = Mapping[str, np.ndarray]


def extract(
    photos: "str | PathLike | datasets.Dataset",
    output: str | PathLike,
    detector: str | Detector,
    *,
    ids: str = "stem",
    rename: Rename | None = None,
    skip_unmapped: bool = False,
    image_column: str = "image",
    id_column: str = "image_id",
    split: str | None = None,
    boxes: str | PathLike | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    num_workers: int = 2,
    device: torch.device | str | None = None,
    precision: str = "auto",
    dtype: str = "float16",
    shard_size: int = 128 * 2**20,
    add: bool = False,
    remove: Sequence[str] | None = None,
    restart: bool = False,
    **options: Any,
) -> RegionStore:
    """
    Extracts the regions of photos to a store, with a progress bar, and opens it.

    Called again after an interruption, it goes on: photos in complete shards are not extracted again. On Ctrl-C and
    SIGTERM it ends the photo or batch at work and completes the shard first. Under `accelerate launch` or `torchrun`
    the processes share the photos. Photos that cannot be read, or in which nothing can be extracted, are listed in
    `skipped.jsonl` in the store's folder (image_id, file, reason), and tried again by the next call. Files that are
    left out, since they are no photos or hidden, are listed there with image_id null.

    Args:
        photos (`str`, `os.PathLike` or `datasets.Dataset`): A folder, with all photos and .tar files below it; one .tar
            file; a .txt file that names photos, one a line, relative to its own folder; a .parquet file or a folder
            that `Dataset.save_to_disk` wrote; a dataset.
        output (`str` or `os.PathLike`): Folder of the store.
        detector (`str` or `Detector`): The name of a detector, see `load_detector`; or a detector, on its device.
        ids (`str`, defaults to `"stem"`): The image_id of a photo: `"stem"`, the file's name without folders and
            suffix; `"path"`, the path below `photos`, or in the .tar; or `"key"`, webdataset's key, which is the path
            up to the first point of the file's name. In a dataset it is `id_column`.
        rename (`Rename`, *optional*): Rule that gives the image_id instead, see `data.image_ids.id_mapping`, from the
            path, the file's name or its stem, whichever the rule knows; in a dataset from `id_column`.
        skip_unmapped (`bool`, defaults to `False`): Whether to leave out photos that `rename` does not cover.
        image_column, id_column (`str`): Columns of a dataset that hold the photos and their ids.
        split (`str`, *optional*): Split to take from a dataset that has several.
        boxes (`str`, `os.PathLike` or `Mapping`, *optional*): Given boxes, in which features are pooled in place of
            detected ones: image_id -> `(n, 4)` pixels x1 y1 x2 y2 of the upright photo (further columns, such as VCR's
            scores, are left out), as a mapping, a .npz, or a .jsonl of `image_id` and `boxes`. Rows keep their order.
        batch_size (`int`, *optional*): Number of photos in a call of the detector; None takes 1 on a CPU and 8 on a
            GPU. The progress bar moves, and a stop takes effect, after each call.
        num_workers (`int`, defaults to 2): Number of reading processes for each process that computes.
        device (`torch.device` or `str`, *optional*): Device to compute on; None takes a GPU if there is one.
        precision (`str`, defaults to `"auto"`): `"auto"`, `"no"`, `"bf16"` or `"fp16"`; see `load_detector`.
        dtype (`str`, defaults to `"float16"`): Type of the stored features.
        shard_size (`int`, defaults to 128 MiB): Bytes after which a shard is complete; a kill -9 loses the incomplete
            one.
        add (`bool`, defaults to `False`): Whether photos that a finished store lacks are added to it. It stays valid as
            it is until they are all there.
        remove (sequence of `str`, *optional*): Ids of images to leave out, and to take out of a finished store.
        restart (`bool`, defaults to `False`): Whether to begin anew where `output` holds a store, finished or not.
        options: Options of the detector's family.

    Raises:
        ValueError: Two photos have one id, no photo is found or none gives regions, the store was begun with other
            settings, photos or ids, or is being written, it is finished and lacks photos that are new (unless `add`),
            or an id of `remove` is neither that of a photo nor of an image of the store.
        KeyboardInterrupt: It was told to stop; the same call goes on.
        Exception: The detector fails at `FAILURES_IN_A_ROW` photos in a row; regions that were extracted before are
            kept.
    """
    check_several("remove", remove)
    unwanted = set(remove or ())
    if isinstance(detector, str):
        split_name(detector)  # before all photos are listed
    # Without `cpu`, processes that torchrun starts on a machine without GPUs would not know of one another. At the end
    # they wait for one another, perhaps longer than the default timeout of ten minutes.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))
    source = list_photos(
        photos,
        ids=ids,
        rename=rename,
        skip_unmapped=skip_unmapped,
        image_column=image_column,
        id_column=id_column,
        split=split,
    )
    given = None if boxes is None else read_boxes(boxes)
    if state.is_main_process:
        _say_what_is_there(photos, source, given)
    folder = Path(output).absolute()
    parts = folder.with_name(f"{folder.name}.parts")
    if isinstance(detector, str):
        detector = load_detector(detector, device=device or state.device, precision=precision, **options)
    elif options:
        raise ValueError(f"{sorted(options)} are options of a detector by name, but this one is loaded already.")
    if batch_size is None:
        batch_size = 1 if torch.device(device or state.device).type == "cpu" else GPU_BATCH_SIZE
    settings = {**detector.provenance, "dtype": dtype, "shard_size": shard_size}
    if given is not None:
        settings["box_type"] = "given"

    with ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(begun_anew(folder, restart, STORE, parts))
            make_folder(parts)
            stack.callback(_remove_if_empty, parts)
            stack.enter_context(locked(parts))
            _finish_parts(parts, folder, settings)
        state.wait_for_everyone()
        before = _parts(parts)
        done = {image_id for store in (*before, *_finished(folder)) for image_id in RegionStore(store)}
        if ids == "stem" and rename is None and done and not add and done.isdisjoint(source.ids):
            source = _by_key(photos, folder, done) or source
        if unknown := unwanted - done.union(source.ids):
            raise ValueError(f"remove (--remove) names {min(unknown)!r}, which neither {folder} nor the photos have.")
        left = [index for index, image_id in enumerate(source.ids) if image_id not in done | unwanted]
        state.wait_for_everyone()  # before new parts appear
        if done and state.is_main_process:
            if not add:
                _check_ids(folder, done, source.ids)
            if not before and not add:  # finished
                _check_left(folder, [source.ids[index] for index in left])
            if left or before:
                logger.warning(f"{len(done)} photos are in {folder} already; {len(left)} are left.")
            elif done.isdisjoint(unwanted):
                say_finished(folder)
        # A finished store has every photo that the detector can take: it may well fail at all that are left.
        patience = FAILURES_IN_A_ROW if before or not done else float("inf")
        reader = _Reader(source, left[state.process_index :: state.num_processes], detector.prepare, given)
        results = logging.tqdm(
            _results(detector, reader, batch_size, num_workers, patience),
            desc=f"Extracting {folder.name}",
            unit="photo",
            total=len(reader),
            disable=not state.is_main_process or not left,
        )
        rank = f"{state.process_index:05d}"
        part = parts / f"part-{len(before):05d}-{rank}"
        _extract_part(results, source, part, parts / f"skipped-{rank}.jsonl", settings)
        state.wait_for_everyone()
        if state.is_main_process:
            _join_parts(parts, folder, settings, source)
            if taken_out := done & unwanted:
                remove_images(folder, taken_out)
                logger.warning(f"{len(taken_out)} images are taken out of {folder}.")
        state.wait_for_everyone()
    return RegionStore(folder)


def _say_what_is_there(photos: Any, source: PhotoSource, given: Boxes | None) -> None:
    """Warns of files that the listing left out, and of boxes that are given for no photo."""
    if source.left_out:
        logger.warning(f"{photos}: {in_words(source)} {SKIPPED} in the store's folder will list them.")
    if given is not None and (unused := given.keys() - set(source.ids)):
        logger.warning(f"Boxes are given for {len(unused):,} images that are no photos, such as {min(unused)!r}.")


def read_boxes(boxes: str | PathLike | Mapping[str, Any]) -> Boxes:
    """
    Reads given boxes by image_id; see `extract`.

    Raises:
        ValueError: The file is neither .npz nor .jsonl, or a line of it is malformed.
    """
    if isinstance(boxes, Mapping):
        return boxes
    path = Path(boxes)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} holds no boxes: expected a .npz, or a .jsonl of image_id and boxes.")
    found: dict[str, np.ndarray] = {}
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
            found[row["image_id"]] = np.asarray(row["boxes"], dtype=np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected image_id and boxes ({error!r}).") from error
    return found


# Photos


class _Reader(Dataset[ReadPhoto]):
    """Photos in the form that the detector takes. An error in one is returned with it, and not raised."""

    def __init__(self, source: PhotoSource, indices: Sequence[int], prepare: Any, given: Boxes | None):
        self.source = source
        self.indices = indices
        self.prepare = prepare
        self.given = given

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> ReadPhoto:
        index = self.indices[row]
        image_id = self.source.ids[index]
        try:
            image, size = decode_photo(self.source.read(index))
            boxes = None if self.given is None else _boxes_of(image_id, size, self.given)
            return ReadPhoto(index, image_id, size, image.size, self.prepare(image), boxes)
        except Exception as error:
            return ReadPhoto(index, image_id, problem=describe(error))


def _boxes_of(image_id: str, size: tuple[int, int], given: Boxes) -> np.ndarray:
    if image_id not in given:
        raise ValueError("no boxes are given for it")
    boxes = np.asarray(given[image_id], dtype=np.float32)
    if boxes.ndim != 2 or 0 in boxes.shape or boxes.shape[1] < 4:
        raise ValueError(f"the given boxes have shape {boxes.shape}, expected (n, 4)")
    boxes = np.ascontiguousarray(boxes[:, :4])
    # A record checks them against the photo.
    RegionRecord(image_id, image_width=size[0], image_height=size[1], boxes=boxes, features=np.zeros((len(boxes), 1)))
    return boxes


# Work


def _extract_part(
    results: "Iterable[tuple[ReadPhoto, RegionRecord | str]]",
    source: PhotoSource,
    part: Path,
    skipped: Path,
    settings: dict[str, Any],
) -> None:
    """
    Writes the share of one process: a store, and a list of photos that were skipped. Raises KeyboardInterrupt when told
    to stop, and the errors of `results`; regions that were extracted before are kept.
    """
    failures: list[Exception] = []
    with (
        StopSignal("Stopping after this photo. Once more to stop at once.") as stop,
        skipped.open("w", encoding="utf-8") as skips,
        suppress(NoRecordWritten),
        RegionStoreWriter(part, **settings) as writer,
    ):
        for photo, result in _until_failure(results, failures):
            if isinstance(result, RegionRecord):
                try:
                    writer.write(result)
                except ValueError as error:  # such as features that do not fit into float16
                    result = describe(error)
            if isinstance(result, str):
                row = {"image_id": photo.image_id, "file": source.name(photo.index), "reason": result}
                skips.write(json.dumps(row, ensure_ascii=False) + "\n")
            if stop.is_set():
                break
    _remove_empty(part)
    if failures:
        raise failures[0]
    if stop.is_set():
        raise KeyboardInterrupt(f"Stopped; the regions so far are in {part.parent}, and the same call goes on.")


def _until_failure(items: Iterable[Any], failures: list[Exception]) -> Iterator[Any]:
    """Yields the items before the one whose making fails; the error goes into the list."""
    try:
        yield from items
    except Exception as error:
        failures.append(error)


def _results(
    detector: Detector, reader: _Reader, batch_size: int, num_workers: int, patience: float
) -> "Iterator[tuple[ReadPhoto, RegionRecord | str]]":
    """
    Yields each photo with its record, or with the reason why it has none. Raises the error of the detector at the last
    of `patience` photos in a row.
    """
    photos = iter(
        DataLoader(
            reader,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals,
        )
    )
    sorted_at_once = 1 if batch_size == 1 else BATCHES_SORTED * batch_size
    failed = 0  # in a row
    while window := list(islice(photos, sorted_at_once)):
        yield from ((photo, photo.problem) for photo in window if photo.problem is not None)
        readable = [photo for photo in window if photo.problem is None]
        readable.sort(key=lambda photo: photo.size[0] / photo.size[1])
        for start in range(0, len(readable), batch_size):
            batch = readable[start : start + batch_size]
            for photo, result in zip(batch, detect(detector, batch), strict=True):
                failed = failed + 1 if isinstance(result, Exception) else 0
                if failed == patience and isinstance(result, Exception):
                    raise result
                yield photo, describe(result) if isinstance(result, Exception) else result


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals(worker: int) -> None:
    """Ignores Ctrl-C, which reaches every process: readers go on until the process that they read for ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Parts


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def _finished(folder: Path) -> list[Path]:
    return [folder] if (folder / MANIFEST).exists() else []


def _finish_parts(parts: Path, folder: Path, settings: dict[str, Any]) -> None:
    """
    Makes finished stores of the parts of an interrupted run, and forgets the photos that it skipped, which are tried
    again.
    """
    if sources := merged_stores(folder):  # it was stopped while its parts were merged
        merge_stores(sources, folder)
    elif folder.is_file() or ((folder / UNFINISHED).exists() and not _finished(folder)):
        raise ValueError(f"{folder} is a file, or the beginning of another store: take another folder.")
    for store in _parts(parts) or _finished(folder):  # a finished store must be of these settings, too
        try:
            with suppress(NoRecordWritten), RegionStoreWriter(store, resume=True, **settings):
                pass
        except OtherSettings as error:
            raise OtherSettings(folder, error.differences, error.told) from error
        _remove_empty(store)
    for skipped in parts.glob("skipped-*.jsonl"):
        skipped.unlink()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _remove_empty(part: Path) -> None:
    if not (part / MANIFEST).exists():
        shutil.rmtree(part, ignore_errors=True)  # a writer that wrote nothing has removed it


def _by_key(photos: Any, folder: Path, done: set[str]) -> PhotoSource | None:
    """
    Lists the photos of a .tar by webdataset's keys, where the store was begun with them: they were once the default
    there.
    """
    if not isinstance(photos, (str, PathLike)) or not all("/" in image_id for image_id in done):
        return None
    source = list_photos(photos, ids="key")
    if done.isdisjoint(source.ids):
        return None
    logger.warning(f"{folder} was begun with ids='key' (--ids key), and goes on so.")
    return source


def _check_ids(folder: Path, done: set[str], image_ids: Sequence[str]) -> None:
    """Raises ValueError where the store was begun with none of these photos: they are others, or have other ids."""
    if done.isdisjoint(image_ids):
        raise ValueError(
            f"{folder} was begun with images such as {min(done)!r}, and none of these photos, such as "
            f"{image_ids[0]!r}, is among them: give the photos and --ids that it was begun with, begin anew with "
            "restart=True (--restart), or take another folder."
        )


def _check_left(folder: Path, left: Sequence[str]) -> None:
    """
    Raises ValueError where photos are left that a finished store did not skip: it takes those that it skipped, and no
    other.
    """
    skipped = {row["image_id"] for row in read_rows(folder / SKIPPED)}
    new = [image_id for image_id in left if image_id not in skipped]
    if new:
        raise ValueError(
            f"{folder} is finished and lacks {len(new)} of these photos, such as {new[0]!r}: add=True (--add) adds "
            "what is new, remove=[…] (--remove) leaves out what is not wanted."
        )


def _join_parts(parts: Path, folder: Path, settings: dict[str, Any], source: PhotoSource) -> None:
    """Makes one store of the parts, or adds them to the finished one, whose list of skipped photos they renew."""
    stores, renewed = _parts(parts), {None, *source.ids}  # None: files that the listing left out
    skips = [row for file in sorted(parts.glob("skipped-*.jsonl")) for row in read_rows(file)]
    if stores and _finished(folder):
        records = chain.from_iterable(RegionStore(part).values() for part in stores)
        write_store(records, folder, resume=True, **settings)
    elif stores:
        merge_stores(stores, folder)
    elif not _finished(folder):
        first = min(skips, key=lambda row: row["file"])
        raise ValueError(
            f"None of {len(skips)} photos gave regions; the first reason, of {first['file']}: {first['reason']}. All "
            f"are in {parts}."
        )
    skips += [row for row in read_rows(folder / SKIPPED) if row["image_id"] not in renewed]
    skips += [{"image_id": None, "file": file, "reason": reason} for file, reason in source.left_out]
    write_skipped(folder, sorted(skips, key=lambda row: row["file"]))
    remove_folder(parts)
