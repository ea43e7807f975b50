"""
Extraction of photos to a `RegionStore`: read by worker processes, detected in batches, by one process or many, by the
tasks of an array or on Ray, and resumed after a kill.

Each process, and each share, writes a store of its own in `<output>.parts`; at the end these become one. The regions of
a photo do not depend on the photos beside it, so the store does not depend on the number of processes, shares, workers
or photos a batch.
"""

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .. import logging
from ..extras import optional_import
from ..files import begun_anew, locked, make_folder, remove_folder, say_finished
from ..name_lists import read_jsonl
from ..records_unicoder_vl import check_several
from ..shares import FinishedShare, MissingShares, Share, check_restart
from .conversion import Rename, read_rows, write_skipped, write_store
from .detectors import Detector, load_detector, split_name
from .editing import merge_into, merged_stores, remove_images
from .finding import default_batch_size
from .parts import Boxes, Work, share_name
from .photos import PhotoSource, in_words, list_photos
from .shards import SKIPPED, STORE, UNFINISHED
from .store import RegionStore

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

# Where a detector fails at this many photos in a row, the fault is not the photos'.
FAILURES_IN_A_ROW = 8
ENGINES = ("local", "ray")


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
    share: Share | None = None,
    engine: Literal["local", "ray"] = "local",
    share_size: int = 256,
    detectors: int | None = None,
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
        share ([`Share`], *optional*): The share of the photos that is extracted here, or the one that gathers what
            shares have extracted. By default all photos are extracted.
        engine (`str`, defaults to `"local"`): `"local"`, the processes that the launcher started, or `"ray"`, which
            spreads shares of the photos over a cluster, see `ray_extraction`.
        share_size (`int`, defaults to 256): Number of photos in a share on Ray; a kill loses what is at work of it.
        detectors (`int`, *optional*): Number of detectors on Ray. None takes one for each GPU, and without GPUs one for
            every two CPUs.
        options: Options of the detector's family.

    Raises:
        ValueError: Two photos have one id, no photo is found or none gives regions, the store was begun with other
            settings, photos or ids, or is being written, it is finished and lacks photos that are new (unless `add`),
            or an id of `remove` is neither that of a photo nor of an image of the store.
        ImportError: `engine` is `"ray"` and Ray is not installed.
        FinishedShare, MissingShares: The share is extracted, or shares that are to be gathered are not.
        KeyboardInterrupt: It was told to stop; the same call goes on.
        Exception: The detector fails at `FAILURES_IN_A_ROW` photos in a row; regions that were extracted before are
            kept.
    """
    check_several("remove", remove)
    unwanted = set(remove or ())
    if isinstance(detector, str):
        split_name(detector)  # before all photos are listed
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, expected one of {', '.join(map(repr, ENGINES))}.")
    if engine == "ray":
        optional_import("ray", "ray")
    check_restart(restart, share)
    # Without `cpu`, processes that torchrun starts on a machine without GPUs would not know of one another. At the end
    # they wait for one another, perhaps longer than the default timeout of ten minutes.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))
    if (state.num_processes > 1) + (share is not None) + (engine == "ray") > 1:
        raise ValueError("A launcher's processes, --share and --engine ray each share the photos: use one of them.")
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
    folder = Path(output).resolve()
    parts = folder.with_name(f"{folder.name}.parts")
    # On Ray other processes compute: this one asks the detector for its provenance alone.
    here = "cpu" if engine == "ray" else device or state.device
    named = detector
    if isinstance(detector, str):
        detector = load_detector(detector, device=here, precision=precision, **options)
    elif options:
        raise ValueError(f"{sorted(options)} are options of a detector by name, but this one is loaded already.")
    if batch_size is None and engine == "local":
        batch_size = default_batch_size(here)
    settings = {**detector.provenance, "dtype": dtype, "shard_size": shard_size}
    if given is not None:
        settings["box_type"] = "given"
    work = Work(source, given, detector.prepare, parts, settings, batch_size, FAILURES_IN_A_ROW)
    if share is not None and share.index is not None:
        _extract_share(share, work, detector, unwanted, num_workers, add)

    with ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(begun_anew(folder, restart, STORE, parts))
            make_folder(parts)
            stack.callback(_remove_if_empty, parts)
            stack.enter_context(locked(parts))
            _finish_parts(work)
        state.wait_for_everyone()
        before = _parts(parts)
        work.failed = _failed(*_skip_lists(work))
        done = {image_id for store in (*before, *_finished(folder)) for image_id in RegionStore(store)}
        if ids == "stem" and rename is None and done and not add and done.isdisjoint(source.ids):
            work.source = source = _by_key(photos, folder, done) or source
        if unknown := unwanted - done.union(source.ids):
            raise ValueError(f"remove (--remove) names {min(unknown)!r}, which neither {folder} nor the photos have.")
        left = [index for index, image_id in enumerate(source.ids) if image_id not in done | unwanted]
        if not left and not done:
            raise ValueError(f"remove (--remove) leaves out every photo of {photos}: there is nothing to extract.")
        state.wait_for_everyone()  # before new parts appear
        if done and state.is_main_process:
            if not add:
                _check_ids(folder, done, source.ids)
            if not before and not add:  # finished
                _check_left(folder, [source.ids[index] for index in left])
            if left or before:
                if share is None:
                    logger.warning(f"{len(done)} photos are in {folder} already; to go: {len(left)}.")
            elif done.isdisjoint(unwanted):
                say_finished(folder)
        if share is not None:
            _check_gathered(share, work, left)
        elif engine == "ray":
            from .ray_extraction import extract_on_ray

            extract_on_ray(work, left, share_size, named, {"precision": precision, **options}, device, detectors)
        else:
            rank, shown = state.process_index, state.is_main_process and bool(left)
            mine = left[rank :: state.num_processes]
            work.extract(f"{len(before):05d}-{rank:05d}", mine, detector, num_workers, shown)
        state.wait_for_everyone()
        if state.is_main_process:
            _join_parts(work)
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
        ValueError: The file is neither .npz nor .jsonl, is damaged, or a line of it is malformed or of an image that
            came before; or a key of a mapping is no text.
    """
    if isinstance(boxes, Mapping):
        if (other := next((key for key in boxes if not isinstance(key, str)), None)) is not None:
            raise ValueError(f"boxes has the key {other!r}, a {type(other).__name__}; expected image ids, as text.")
        return boxes
    path = Path(boxes)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged or no .npz of numbers ({error}); expected an array (n, 4) for each image_id."
            ) from error
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} holds no boxes: expected a .npz, or a .jsonl of image_id and boxes.")
    found: dict[str, np.ndarray] = {}
    lines: dict[str, int] = {}
    for number, row in read_jsonl(path):
        try:
            image_id, own = row["image_id"], np.asarray(row["boxes"], dtype=np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected image_id and boxes ({error!r}).") from error
        if not isinstance(image_id, (str, int)):
            raise ValueError(f"{path}, line {number}: image_id is {image_id!r}; expected a text, or an integer.")
        if (before := lines.setdefault(str(image_id), number)) != number:
            raise ValueError(
                f"{path}, line {number}: the boxes of image {image_id!r} are in line {before} already; expected all "
                "boxes of an image in one line."
            )
        found[str(image_id)] = own
    return found


# Shares


def _extract_share(
    share: Share, work: Work, detector: Detector, unwanted: set[str], num_workers: int, add: bool
) -> NoReturn:
    """Extracts a share to a part of its own, whatever other shares do meanwhile, and raises FinishedShare."""
    folder, name, ids = work.store, share_name(share), work.source.ids
    of_all = name.partition("-")[2]  # how many shares there are
    for part in _parts(work.parts):
        if not part.name.endswith(f"-{of_all}"):
            raise ValueError(
                f"{part} is of a run without shares, or with another number of them, than {share}: go on with that, or "
                "begin anew with --restart, without --share."
            )
    before = _finished(folder)
    for store in before:
        work.finish(store)
    done = unwanted.union(*map(RegionStore, before))
    left = [index for index in work.left_of(name, share.rows(len(ids))) if ids[index] not in done]
    if before and not add:
        _check_left(folder, [ids[index] for index in left])
    if left:
        make_folder(work.parts)
        work.failed = _failed(work.skip_list(name), folder / SKIPPED)
        work.extract(name, left, detector, num_workers)
    raise FinishedShare(share, folder)


def _check_gathered(share: Share, work: Work, left: Iterable[int]) -> None:
    """Raises MissingShares where photos are left that no share has tried."""
    ids, failed = work.source.ids, _failed(*_skip_lists(work))
    left = {index for index in left if ids[index] not in failed}
    missing = [i for i in range(share.count) if not left.isdisjoint(Share(i, share.count).rows(len(ids)))]
    if missing:
        raise MissingShares(missing, share.count, work.parts)


# Parts


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def _skip_lists(work: Work) -> list[Path]:
    return [*sorted(work.parts.glob("skipped-*.jsonl")), work.store / SKIPPED]


def _failed(*skip_lists: Path) -> frozenset[str]:
    """Gives the ids of the photos that are listed as skipped."""
    return frozenset(row["image_id"] for file in skip_lists for row in read_rows(file))


def _finished(folder: Path) -> list[Path]:
    return [folder] if STORE.is_complete(folder) else []


def _finish_parts(work: Work) -> None:
    """Makes finished stores of the parts of an interrupted run."""
    folder = work.store
    if sources := merged_stores(folder):  # it was stopped while its parts were merged
        merge_into(folder, [Path(source) for source in sources])
    elif folder.is_file() or ((folder / UNFINISHED).exists() and not _finished(folder)):
        raise ValueError(f"{folder} is a file, or the beginning of another store: take another folder.")
    for store in _parts(work.parts) or _finished(folder):  # a finished store must be of these settings, too
        work.finish(store)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


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
    skipped = _failed(folder / SKIPPED)
    new = [image_id for image_id in left if image_id not in skipped]
    if new:
        raise ValueError(
            f"{folder} is finished and lacks {len(new)} of these photos, such as {new[0]!r}: add=True (--add) adds "
            "what is new, remove=[…] (--remove) leaves out what is not wanted."
        )


def _join_parts(work: Work) -> None:
    """Makes one store of the parts, or adds them to the finished one, whose list of skipped photos they renew."""
    parts, folder, source = work.parts, work.store, work.source
    stores, renewed = _parts(parts), {None, *source.ids}  # None: files that the listing left out
    failed = {row["image_id"]: row for file in sorted(parts.glob("skipped-*.jsonl")) for row in read_rows(file)}
    if stores and _finished(folder):
        records = chain.from_iterable(RegionStore(part).values() for part in stores)
        write_store(records, folder, resume=True, **work.settings)
    elif stores:
        merge_into(folder, stores)
    elif not _finished(folder):
        first = min(failed.values(), key=lambda row: row["file"])
        raise ValueError(
            f"None of {len(failed)} photos gave regions; the first reason, of {first['file']}: {first['reason']}. All "
            f"are in {parts}."
        )
    extracted = RegionStore(folder)
    skips = [row for image_id, row in failed.items() if image_id not in extracted]  # others failed but once
    skips += [row for row in read_rows(folder / SKIPPED) if row["image_id"] not in renewed]
    skips += [{"image_id": None, "file": file, "reason": reason} for file, reason in source.left_out]
    write_skipped(folder, sorted(skips, key=lambda row: row["file"]))
    remove_folder(parts)
