"""
Stores made from stores: merged, cut to some images, or split.

Each function goes on when it is called again after an interruption, with the same arguments.
"""

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .. import logging
from ..files import (
    begun_anew,
    complete,
    partial_path,
    put_back,
    replace_folder,
    say_finished,
    sync_folder,
    write_json,
)
from ..records_unicoder_vl import check_several
from .shards import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    SKIPPED,
    STORE_OF_STORES,
    UNFINISHED,
    ImageIds,
    Shards,
    shard_path,
    sorted_run,
)
from .store import MERGE, UNCOMPARED, RegionStore, RegionStoreWriter, finish_store
from .tensor_files import file_facts


def merge_stores(
    sources: Sequence[str | PathLike],
    destination: str | PathLike,
    *,
    num_classes: int | None = None,
    move: bool = False,
    restart: bool = False,
) -> RegionStore:
    """
    Makes one store of several, with the images in the order of the sources. Shards are hard links where the file system
    has them, else copies, and are never rewritten. A merge that is complete already stays as it is.

    Args:
        sources (sequence of `str` or `os.PathLike`): Finished stores of equal provenance (but for `package_version`).
        destination (`str` or `os.PathLike`): A new folder, or that of the same merge.
        num_classes (`int`, *optional*): Number of object classes, for sources that do not tell it; one source is
            enough.
        move (`bool`, defaults to `False`): Whether to remove the sources once the destination is complete.
        restart (`bool`, defaults to `False`): Whether to begin anew where the destination holds a store, finished or
            not.

    Raises:
        ValueError: Provenances differ, an image is in two stores, an object id is not below `num_classes`, or the
            destination holds something else.
    """
    folder, paths = Path(destination).resolve(), [Path(source).absolute() for source in sources]
    if not paths:
        raise ValueError("sources is empty, expected at least one store.")
    if folder in [path.resolve() for path in paths]:
        raise ValueError(f"{folder} is one of the stores to be merged: take another folder.")
    with begun_anew(folder, restart, STORE_OF_STORES):
        merge_into(folder, paths, num_classes, move)
    return RegionStore(folder)


def merge_into(folder: Path, paths: Sequence[Path], num_classes: int | None = None, move: bool = False) -> None:
    """Merges stores as `merge_stores` does, but for a restart, which is the business of whoever calls it."""
    if (folder / UNFINISHED).exists():
        if merged_stores(folder) != [str(path) for path in paths]:
            raise ValueError(
                f"{folder} is unfinished, and no merge of {', '.join(map(str, paths))}: begin anew with "
                "restart=True (--restart), or take another folder."
            )
    elif (folder / MANIFEST).exists():
        _check_merged(RegionStore(folder), [RegionStore(path) for path in paths], num_classes)
        say_finished(folder)
    elif shard_path(folder, 0).exists():
        raise ValueError(f"{folder} holds shards of a store without its {MANIFEST}: take another folder.")
    if not (folder / MANIFEST).exists():
        _merge([RegionStore(path) for path in paths], folder, num_classes)
    if move:
        for path in paths:
            _remove(path)
    (folder / UNFINISHED).unlink(missing_ok=True)


def _check_merged(found: RegionStore, stores: list[RegionStore], num_classes: int | None) -> None:
    """Raises ValueError where a finished store is not the merge of these stores."""
    remedy = "begin anew with restart=True (--restart), or take another folder."
    shards = [facts["sha256"] for store in stores for facts in store.manifest["shards"]]
    if [facts["sha256"] for facts in found.manifest["shards"]] != shards:
        names = ", ".join(str(store.path) for store in stores)
        raise ValueError(f"{found.path} holds a store already, and no merge of {names}: {remedy}")
    for name, value in _common_provenance(stores, num_classes).items():
        if name not in ("package_version", UNCOMPARED) and found.provenance[name] != value:
            raise ValueError(f"{found.path} was merged with {name}={found.provenance[name]!r}, not {value!r}: {remedy}")


def merged_stores(folder: Path) -> list[str]:
    """Names the stores whose merge into a folder was interrupted; none where there was no such merge."""
    progress = folder / UNFINISHED
    return json.loads(progress.read_text(encoding="utf-8")).get(MERGE, []) if progress.exists() else []


def subset_store(source: str | PathLike, image_ids: Iterable[str], destination: str | PathLike) -> RegionStore:
    """
    Copies some images of a store to a new one, in disk order.

    Args:
        source (`str` or `os.PathLike`): The store.
        image_ids (iterable of `str`): Ids of the images to copy; one that is given twice counts once.
        destination (`str` or `os.PathLike`): A new folder.

    Raises:
        KeyError: An id is not in the store; nothing is written then.
        ValueError: There is no id, or the destination holds other images.
    """
    store = RegionStore(source)
    return _copy(store, _numbers(store, image_ids), Path(destination))


def remove_images(path: str | PathLike, image_ids: Iterable[str]) -> RegionStore:
    """
    Takes images out of a store. It stays as it is until the store without them is complete.

    Args:
        path (`str` or `os.PathLike`): The store.
        image_ids (iterable of `str`): Ids of the images to take out.

    Raises:
        KeyError: An id is not in the store; nothing is changed then.
        ValueError: No image would be left.
    """
    folder = Path(path).resolve()
    put_back(folder)
    store = RegionStore(folder)
    kept = np.setdiff1d(np.arange(len(store)), _numbers(store, image_ids))
    if not len(kept):
        raise ValueError(f"{folder} would be left without an image: remove the folder instead.")
    if len(kept) < len(store):
        new = folder.with_name(f".{folder.name}.without")
        shutil.rmtree(new, ignore_errors=True)  # of a call that was stopped, which may have been for other images
        _copy(store, kept, new)
        if (skipped := folder / SKIPPED).exists():
            shutil.copy2(skipped, new)
        replace_folder(folder, new)
    return RegionStore(folder)


def split_store(
    source: str | PathLike, splits: Mapping[str, Iterable[str]], folder: str | PathLike
) -> dict[str, RegionStore]:
    """
    Copies the images of a store to one store for each split; no two of them share an image.

    Args:
        source (`str` or `os.PathLike`): The store.
        splits (`Mapping`): Name of a split -> ids of its images. Images in no split are left out.
        folder (`str` or `os.PathLike`): The folder of the new stores, each under the name of its split.

    Raises:
        KeyError: An id is not in the store; nothing is written then.
        ValueError: An image is in two splits, a split is empty, or see `subset_store`.
    """
    store = RegionStore(source)
    split_of: dict[int, str] = {}
    numbers = {name: _numbers(store, image_ids) for name, image_ids in splits.items()}
    for name, own in numbers.items():
        for number in own.tolist():
            if (other := split_of.setdefault(number, name)) != name:
                image_id = store.record_at(number).image_id
                raise ValueError(f"Image {image_id!r} is in the splits {other!r} and {name!r}: put it in one of them.")
    return {name: _copy(store, own, Path(folder) / name) for name, own in numbers.items()}


def _merge(stores: list[RegionStore], folder: Path, num_classes: int | None) -> None:
    provenance = _common_provenance(stores, num_classes)
    starts = [0, *accumulate(map(len, stores))]

    def find(number: int) -> tuple[RegionStore, str]:
        place = bisect_right(starts, number) - 1
        return stores[place], stores[place].index.image_ids[number - starts[place]]

    hashes, numbers = [], []
    for store, start in zip(stores, starts, strict=False):
        own_hashes, own_numbers = store.index.ids.all()
        known = own_numbers < len(store)  # an index may hold images that an interrupted writer added
        hashes.append(own_hashes[known])
        numbers.append(own_numbers[known] + np.uint32(start))
    ids = ImageIds(lambda number: find(number)[1], [sorted_run(np.concatenate(hashes), np.concatenate(numbers))])
    for first, second in ids.duplicates():
        (store, image_id), (other, _) = find(first), find(second)
        raise ValueError(f"Image {image_id!r} is in {store.path} and in {other.path}: take it out of one of them.")

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / UNFINISHED, {"format_version": FORMAT_VERSION, MERGE: [str(store.path) for store in stores]})
    shards = Shards(folder)
    for store in logging.tqdm(stores, desc=f"Merging {folder.name}", unit="store"):
        for facts in store.manifest["shards"]:
            path = shard_path(folder, len(shards))
            _link_or_copy(store.path / facts["file"], path, facts["sha256"])
            shards.add({**facts, "file": path.name})
    sync_folder(folder)
    finish_store(shards, ids, provenance)


def _common_provenance(stores: list[RegionStore], num_classes: int | None) -> dict[str, Any]:
    first, *others = [_provenance(store, num_classes) for store in stores]
    for store, other in zip(stores[1:], others, strict=True):
        for name, value in first.items():
            if other[name] != value and name not in ("package_version", UNCOMPARED):
                raise ValueError(
                    f"{stores[0].path} has {name}={value!r}, {store.path} has {other[name]!r}: a store holds regions "
                    "of one kind."
                    + (" Tell the one that does not know, with --num-classes." if name == "num_classes" else "")
                )
    return first


def _provenance(store: RegionStore, num_classes: int | None) -> dict[str, Any]:
    """Gives the provenance of a store, with the number of classes where the store does not tell it."""
    provenance = store.provenance
    if num_classes is None or provenance["num_classes"] == num_classes:
        return provenance
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}; expected at least 1.")
    if provenance["num_classes"] is not None:
        raise ValueError(f"{store.path} has num_classes={provenance['num_classes']}, not {num_classes}: leave it out.")
    highest = store.highest_object_ids(store)
    if highest.max() >= num_classes:
        image_id = store.record_at(int(highest.argmax())).image_id
        raise ValueError(
            f"{store.path}, image {image_id!r}: object_ids hold {highest.max()}, expected ids below num_classes="
            f"{num_classes}, 0-based and without background."
        )
    return provenance | {"num_classes": num_classes}


def _link_or_copy(source: Path, path: Path, sha256: str) -> None:
    if path.exists():
        # It was made before an interruption, unless the source was written anew since then.
        if path.samefile(source) or file_facts(path)["sha256"] == sha256:
            return
        path.unlink()
    try:
        os.link(source.resolve(), path)
    except OSError:  # another file system, or one without links
        with source.open("rb") as original, partial_path(path).open("wb") as copy:
            shutil.copyfileobj(original, copy, 2**20)
            complete(copy, path)


def _remove(folder: Path) -> None:
    """Removes a store, and its folder if nothing else is in it. Files that are no part of the store stay."""
    for path in (folder / MANIFEST, folder / INDEX, *folder.glob("regions-*.safetensors")):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _numbers(store: RegionStore, image_ids: Iterable[str]) -> np.ndarray:
    """Gives the places of images in the store, sorted, each once."""
    check_several("image_ids", image_ids)
    return np.unique(np.fromiter(map(store.number_of, image_ids), np.int64))


def _copy(store: RegionStore, numbers: np.ndarray, destination: Path) -> RegionStore:
    provenance = store.provenance
    options = {name: value for name, value in provenance.items() if name not in ("feature_dim", "package_version")}
    with RegionStoreWriter(destination, resume=True, **options) as writer:
        # An interrupted call left the first of the images that are to be written.
        done = len(writer.resumed)
        first = [store.shards.image_id(number) for number in numbers[:done].tolist()]
        if len(first) < done or not all(image_id in writer.resumed for image_id in first):
            raise ValueError(f"{destination} holds other images than those asked for: take another folder.")
        for number in logging.tqdm(numbers[done:].tolist(), desc=f"Copying to {destination.name}", unit="image"):
            writer.write(store.record_at(number))
    return RegionStore(destination)
