"""
Photos → `RegionStore`: read by worker processes, detected in batches, by one process or many, and resumed after a kill.

Each process writes a store of its own in `<output>.parts`; at the end they become one. A photo gives what it gives
alone, so that the store does not depend on the number of processes, workers or photos a batch.
"""

import json
import math
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from io import BytesIO
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.utils.data import DataLoader, Dataset

from .. import logging
from ..records_unicoder_vl import RegionRecord
from ..training import StopSignal
from .conversion import SKIPPED, write_skipped, write_store
from .detectors import Detector, load_detector
from .editing import merge_stores, merged_stores
from .shards import MANIFEST, UNFINISHED
from .store import NoRecordWritten, RegionStore, RegionStoreWriter
from .tensor_files import locked, make_folder

if TYPE_CHECKING:
    import datasets
    from PIL import Image

logger = logging.get_logger(__name__)

SUFFIXES = frozenset(".avif .bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
# Pillow refuses files that claim more than about 179 million pixels. Photos of 500 exist; a small file may claim more.
MAX_PIXELS = 500_000_000
# Photos of four times as many pixels are halved, and so on: every detector scales them down further.
ENOUGH_PIXELS = 8_000_000
# Photos are sorted by shape over so many batches: a detector computes those of equal shape together.
BATCHES_SORTED = 4

Boxes = Mapping[str, np.ndarray]


def extract(
    photos: "str | PathLike | datasets.Dataset",
    output: str | PathLike,
    detector: str | Detector,
    *,
    ids: Literal["stem", "path"] = "stem",
    image_column: str = "image",
    id_column: str = "image_id",
    split: str | None = None,
    boxes: str | PathLike | Mapping[str, Any] | None = None,
    batch_size: int = 8,
    num_workers: int = 2,
    device: torch.device | str | None = None,
    precision: str = "auto",
    dtype: str = "float16",
    shard_size: int = 128 * 2**20,
    **options: Any,
) -> RegionStore:
    """
    Extracts the regions of photos to a store, with a progress bar, and opens it.

    Run again after an interruption, it goes on: what complete shards hold is not extracted again. Ctrl-C and SIGTERM
    complete the shard first. Under `accelerate launch` or `torchrun` the processes share the photos. Photos that cannot
    be read, or in which nothing can be extracted, are listed in `skipped.jsonl` in the store's folder: image_id, file,
    reason. Run again, it tries them again.

    Args:
        photos (`str`, `os.PathLike` or `datasets.Dataset`): A folder, with all photos and .tar files below it; one
            .tar file, as webdataset has them; a .parquet file or a folder that `Dataset.save_to_disk` wrote; a dataset.
        output (`str` or `os.PathLike`): Folder of the store.
        detector (`str` or `Detector`): Its name, see `load_detector`; or a detector, on its device.
        ids (`str`, defaults to `"stem"`): What an image_id is: `"stem"`, the file's name without its suffix (in a .tar
            the key, which holds the folder), or `"path"`, the path below `photos`. Of a dataset it is `id_column`.
        image_column, id_column (`str`): Columns of a dataset.
        split (`str`, *optional*): Of a dataset that has several.
        boxes (`str`, `os.PathLike` or `Mapping`, *optional*): Given boxes, in which features are pooled instead of in
            detected ones: image_id -> `(n, 4)` pixels x1 y1 x2 y2 of the upright photo (further columns, such as VCR's
            scores, are left out), as a mapping, a .npz, or a .jsonl of `image_id` and `boxes`. Rows keep their order.
        batch_size (`int`, defaults to 8): Photos a call of the detector.
        num_workers (`int`, defaults to 2): Reading processes, for each process that computes.
        device (`torch.device` or `str`, *optional*): Where to compute; None takes a GPU if there is one.
        precision (`str`, defaults to `"auto"`): `"auto"`, `"no"`, `"bf16"` or `"fp16"`; see `load_detector`.
        dtype (`str`, defaults to `"float16"`): Of the stored features.
        shard_size (`int`, defaults to 128 MiB): Bytes after which a shard is complete; what a kill -9 may cost.
        options: Those of the detector's family.

    Raises:
        ValueError: Two photos have one id, no photo is found or none gives regions, the store was begun with other
            settings or is being written, or it is finished and lacks photos that were not there.
        KeyboardInterrupt: It was told to stop, and can go on.
    """
    # Without `cpu`, processes that torchrun starts on a machine without GPUs would not know of one another. They wait
    # for one another at the end, for which the default patience of ten minutes is short.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))
    source = list_photos(photos, ids=ids, image_column=image_column, id_column=id_column, split=split)
    given = None if boxes is None else read_boxes(boxes)
    folder = Path(output).absolute()
    parts = folder.with_name(f"{folder.name}.parts")
    if isinstance(detector, str):
        detector = load_detector(detector, device=device or state.device, precision=precision, **options)
    elif options:
        raise ValueError(f"{sorted(options)} are options of a detector by name, but this one is loaded already.")
    settings = {**detector.provenance, "dtype": dtype, "shard_size": shard_size}
    if given is not None:
        settings["box_type"] = "given"

    with ExitStack() as stack:
        if state.is_main_process:
            make_folder(parts)
            stack.callback(_remove_if_empty, parts)
            stack.enter_context(locked(parts))
            _finish_parts(parts, folder, settings)
        state.wait_for_everyone()
        before = _parts(parts)
        done = {image_id for store in (*before, *_finished(folder)) for image_id in RegionStore(store)}
        left = [index for index, image_id in enumerate(source.ids) if image_id not in done]
        state.wait_for_everyone()  # before new parts appear
        if done and state.is_main_process:
            if not before:  # finished
                _check_left(folder, [source.ids[index] for index in left])
            logger.warning(f"{len(source.ids) - len(left)} photos are in {folder} already; {len(left)} are left.")
        reader = _Reader(source, left[state.process_index :: state.num_processes], detector.prepare, given)
        results = logging.tqdm(
            _results(detector, reader, batch_size, num_workers),
            desc=f"Extracting {folder.name}",
            unit="photo",
            total=len(reader),
            disable=not state.is_main_process,
        )
        rank = f"{state.process_index:05d}"
        part = parts / f"part-{len(before):05d}-{rank}"
        _extract_part(results, source, part, parts / f"skipped-{rank}.jsonl", settings)
        state.wait_for_everyone()
        if state.is_main_process:
            _join_parts(parts, folder, settings, source.ids)
        state.wait_for_everyone()
    return RegionStore(folder)


# Sources


class _Source(Protocol):
    """Photos by index."""

    ids: list[str]

    def name(self, index: int) -> str:
        """What a user finds it by."""
        ...

    def read(self, index: int) -> bytes: ...


@dataclass
class _Files:
    """Files and members of .tar files: path, member (empty for a file), and where in the file its bytes are."""

    ids: list[str]
    places: list[tuple[Path, str, int, int]]

    def name(self, index: int) -> str:
        path, member, _, _ = self.places[index]
        return f"{path}:{member}" if member else str(path)

    def read(self, index: int) -> bytes:
        path, _, offset, length = self.places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass
class _Column:
    """A column of encoded images."""

    ids: list[str]
    images: "datasets.Dataset"
    column: str

    def name(self, index: int) -> str:
        return self.images[index][self.column]["path"] or f"row {index}"

    def read(self, index: int) -> bytes:
        image = self.images[index][self.column]
        return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def list_photos(
    photos: "str | PathLike | datasets.Dataset", *, ids: str, image_column: str, id_column: str, split: str | None
) -> _Source:
    """
    The photos of a folder, a .tar, a dataset on disk or in memory; see `extract`.

    Raises:
        FileNotFoundError: There is nothing at `photos`.
        ValueError: There is no photo, or two have one id.
    """
    if ids not in ("stem", "path"):
        raise ValueError(f"ids is {ids!r}, expected 'stem' or 'path'.")
    source: _Source
    if not isinstance(photos, (str, PathLike)):
        source = _column(photos, image_column, id_column)
    elif not (path := Path(photos)).exists():
        raise FileNotFoundError(f"{path} does not exist.")
    elif path.suffix == ".parquet" or any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        source = _column(_open_dataset(path, split), image_column, id_column)
    else:
        source = _list_files(path, ids)
    if not source.ids:
        raise ValueError(f"{photos} holds no photo: expected files that end in {', '.join(sorted(SUFFIXES))}.")
    first: dict[str, int] = {}
    for index, image_id in enumerate(source.ids):
        if (other := first.setdefault(image_id, index)) != index:
            raise ValueError(
                f"{source.name(other)} and {source.name(index)} both have the id {image_id!r}: with ids='path' "
                "(--ids path) the path is the id; in a dataset give different ids."
            )
    return source


def _open_dataset(path: Path, split: str | None) -> "datasets.Dataset":
    import datasets

    table = datasets.Dataset.from_parquet(str(path)) if path.is_file() else datasets.load_from_disk(path)
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(f"{path} has the splits {list(table)}, got {split!r}: name one with split (--split).")
        table = table[split]
    return table


def _column(table: "datasets.Dataset", image_column: str, id_column: str) -> _Column:
    import datasets

    missing = [name for name in (image_column, id_column) if name not in table.column_names]
    if missing:
        raise ValueError(
            f"The dataset has no column {missing}, but {table.column_names}: name image_column (--image-column) "
            "and id_column (--id-column)."
        )
    images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return _Column([str(image_id) for image_id in table[id_column]], images, image_column)


def _list_files(root: Path, ids: str) -> _Files:
    files = _Files([], [])
    for path in _walk(root):
        if path.suffix.lower() in SUFFIXES:
            below = path.relative_to(root) if path != root else Path(path.name)
            files.ids.append(path.stem if ids == "stem" else below.as_posix())
            files.places.append((path, "", 0, -1))
        elif path.suffix == ".tar":
            for key, member in _members(path):
                files.ids.append(key if ids == "stem" else member.name)
                files.places.append((path, member.name, member.offset_data, member.size))
    return files


def _members(path: Path) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The photos of a .tar with their keys, which end at the first point of the file's name, as in webdataset."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if member.isfile() and f".{suffix.lower()}" in SUFFIXES:
                    yield folder + slash + stem, member
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no .tar file without compression, or it is cut short: {error}.") from error


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder, or the file itself, in an order that does not depend on the file system."""
    if root.is_file():
        yield root
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def read_boxes(boxes: str | PathLike | Mapping[str, Any]) -> Boxes:
    """
    Given boxes by image_id; see `extract`.

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
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                found[row["image_id"]] = np.asarray(row["boxes"], dtype=np.float32)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: expected image_id and boxes ({error!r}).") from error
    return found


# Photos


def decode_photo(data: bytes) -> "tuple[Image.Image, tuple[int, int]]":
    """
    A photo as RGB and upright, and its width and height; one of 32 million pixels or more comes smaller than that.

    Of an animation it is the first frame. Transparent pixels show white, 16 bits become 8.

    Raises:
        Exception: Of any kind, as Pillow finds the file damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    with _pixel_limit():
        try:
            image = Image.open(BytesIO(data))
        except UnidentifiedImageError:
            raise ValueError(f"its {len(data)} bytes are no image of a known format") from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS}")
        factor = max(1, math.isqrt(width * height // ENOUGH_PIXELS))
        # JPEG decodes to a half, a quarter or an eighth at no cost.
        drafted = image.draft(None, (-(-width // factor), -(-height // factor)))
        lies = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8
        ImageOps.exif_transpose(image, in_place=True)
    size = image.size if drafted is None else (height, width) if lies else (width, height)
    rgb = _to_rgb(image)
    factor = max(1, math.isqrt(rgb.width * rgb.height // ENOUGH_PIXELS))
    return (rgb.reduce(factor) if factor > 1 else rgb), size


@contextmanager
def _pixel_limit() -> Iterator[None]:
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow's own conversion makes white of what exceeds 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels run from {values.min()} to {values.max()}, expected 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are fractions of unknown range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class _Photo:
    """What a reading process makes of a photo; `problem` says why it could make nothing."""

    index: int
    image_id: str
    size: tuple[int, int] = (1, 1)  # width and height of the upright photo
    decoded_size: tuple[int, int] = (1, 1)
    prepared: Any = None
    boxes: np.ndarray | None = None  # given ones, in pixels of the upright photo
    problem: str | None = None

    @property
    def scale(self) -> np.ndarray:
        """From boxes in the decoded photo to boxes in the photo."""
        return np.tile(np.divide(self.size, self.decoded_size), 2)


class _Reader(Dataset[_Photo]):
    """Photos as the detector takes them. Whatever is wrong with one, it is returned and not raised."""

    def __init__(self, source: _Source, indices: Sequence[int], prepare: Any, given: Boxes | None):
        self.source = source
        self.indices = indices
        self.prepare = prepare
        self.given = given

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> _Photo:
        index = self.indices[row]
        image_id = self.source.ids[index]
        try:
            image, size = decode_photo(self.source.read(index))
            boxes = None if self.given is None else _boxes_of(image_id, size, self.given)
            return _Photo(index, image_id, size, image.size, self.prepare(image), boxes)
        except Exception as error:
            return _Photo(index, image_id, problem=_describe(error))


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


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


# Work


def _extract_part(
    results: "Iterator[tuple[_Photo, RegionRecord | str]]",
    source: _Source,
    part: Path,
    skipped: Path,
    settings: dict[str, Any],
) -> None:
    """The share of one process: a store, and a list of what was skipped. Raises KeyboardInterrupt when told to stop."""
    with (
        StopSignal() as stop,
        skipped.open("w", encoding="utf-8") as skips,
        suppress(NoRecordWritten),
        RegionStoreWriter(part, **settings) as writer,
    ):
        for photo, result in results:
            if isinstance(result, RegionRecord):
                try:
                    writer.write(result)
                except ValueError as error:  # such as features that do not fit into float16
                    result = _describe(error)
            if isinstance(result, str):
                row = {"image_id": photo.image_id, "file": source.name(photo.index), "reason": result}
                skips.write(json.dumps(row, ensure_ascii=False) + "\n")
            if stop.is_set():
                break
    _remove_empty(part)
    if stop.is_set():
        raise KeyboardInterrupt(f"Stopped, with what is extracted in {part.parent}: the same call goes on.")


def _results(
    detector: Detector, reader: _Reader, batch_size: int, num_workers: int
) -> "Iterator[tuple[_Photo, RegionRecord | str]]":
    """Each photo with its record, or with the reason why it has none."""
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
    while window := list(islice(photos, BATCHES_SORTED * batch_size)):
        yield from ((photo, photo.problem) for photo in window if photo.problem is not None)
        readable = [photo for photo in window if photo.problem is None]
        readable.sort(key=lambda photo: photo.size[0] / photo.size[1])
        for start in range(0, len(readable), batch_size):
            batch = readable[start : start + batch_size]
            yield from zip(batch, _detect(detector, batch), strict=True)


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches every process; readers go on until the one that they read for ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _detect(detector: Detector, photos: Sequence[_Photo]) -> list[RegionRecord | str]:
    """
    The records of some photos. Where they fail together, each is tried alone: so one that is odd, or too many for the
    memory, cost no other. Where each fails, it is not the photos' fault, and raised.
    """
    ids = [photo.image_id for photo in photos]
    boxes = None if photos[0].boxes is None else [photo.boxes / photo.scale for photo in photos]
    try:
        records = detector([photo.prepared for photo in photos], ids, boxes)
        return [_in_photo(record, photo) for record, photo in zip(records, photos, strict=True)]
    except Exception as error:
        if len(photos) == 1:
            return [_describe(error)]
        results = [_detect(detector, [photo])[0] for photo in photos]
        if all(isinstance(result, str) for result in results):
            raise
        return results


def _in_photo(record: RegionRecord, photo: _Photo) -> RegionRecord:
    """From the decoded photo to the photo, where its size differs; given boxes as they were given."""
    if photo.boxes is None and photo.size == photo.decoded_size:
        return record
    boxes = photo.boxes if photo.boxes is not None else record.boxes * photo.scale
    return replace(record, image_width=photo.size[0], image_height=photo.size[1], boxes=boxes)


# Parts


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def _finished(folder: Path) -> list[Path]:
    return [folder] * (folder / MANIFEST).exists()


def _finish_parts(parts: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Makes stores of what an interrupted run left, and forgets what it skipped, which is tried again."""
    if sources := merged_stores(folder):  # it was stopped at its very end
        merge_stores(sources, folder)
    elif folder.is_file() or ((folder / UNFINISHED).exists() and not _finished(folder)):
        raise ValueError(f"{folder} is a file, or the beginning of another store: take another folder.")
    for store in _parts(parts) or _finished(folder):  # a finished store must be of these settings, too
        with suppress(NoRecordWritten), RegionStoreWriter(store, resume=True, **settings):
            pass
        _remove_empty(store)
    for skipped in parts.glob("skipped-*.jsonl"):
        skipped.unlink()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _remove_empty(part: Path) -> None:
    if not (part / MANIFEST).exists():
        shutil.rmtree(part, ignore_errors=True)  # a writer that wrote nothing has removed it


def _check_left(folder: Path, left: Sequence[str]) -> None:
    """A finished store takes what it skipped before, and no other photos. Raises ValueError."""
    skipped = {row["image_id"] for row in _read_rows(folder / SKIPPED)}
    new = [image_id for image_id in left if image_id not in skipped]
    if new:
        raise ValueError(
            f"{folder} is finished and lacks {len(new)} of these photos, such as {new[0]!r}: extract those to another "
            "store and merge the two."
        )


def _read_rows(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _join_parts(parts: Path, folder: Path, settings: dict[str, Any], image_ids: Sequence[str]) -> None:
    """Makes one store of the parts, or adds them to the finished one, whose list of skipped photos they renew."""
    stores, tried = _parts(parts), set(image_ids)
    skips = [row for row in _read_rows(folder / SKIPPED) if row["image_id"] not in tried]
    skips += [row for file in sorted(parts.glob("skipped-*.jsonl")) for row in _read_rows(file)]
    skips.sort(key=lambda row: row["file"])
    if _finished(folder):
        records = chain.from_iterable(RegionStore(part).values() for part in stores)
        write_store(records, folder, resume=True, **settings)
    elif stores:
        merge_stores(stores, folder)
    else:
        reason = f"of {skips[0]['file']}: {skips[0]['reason']}"
        raise ValueError(f"None of {len(skips)} photos gave regions; the first reason, {reason}. All are in {parts}.")
    write_skipped(folder, skips)
    shutil.rmtree(parts)
