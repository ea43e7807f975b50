"""The check whether a store is as it was written, and whether its records are sound: every byte is read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .. import logging
from ..records_unicoder_vl import RegionRecord
from .shards import INDEX, MANIFEST, Index, Shard, Shards, hash_id, read_manifest
from .store import manifest_checksum
from .tensor_files import file_facts


@dataclass(frozen=True)
class Problem:
    """
    A fault of a store.

    Args:
        file (`str`): Name of the file.
        message (`str`): The fault in that file, and what to do.
        image_ids (tuple of `str`): Ids of the images that it affects, as far as can be told.
    """

    file: str
    message: str
    image_ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        ids = ", ".join(map(repr, self.image_ids[:3])) + (", …" if len(self.image_ids) > 3 else "")
        return f"{self.file}: {self.message}" + (f" [{len(self.image_ids)} images: {ids}]" if ids else "")


def validate(path: str | PathLike) -> Iterator[Problem]:
    """
    Yields the faults of a store: truncation, changed bytes, values that no record may have, and disagreement of index
    and shards. It shows a progress bar and takes constant memory. A store is sound if this yields nothing.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: The store is unfinished, or of another version of this package.
    """
    folder = Path(path).absolute()
    if (folder / MANIFEST).exists() and not _is_intact(folder / MANIFEST):
        yield Problem(MANIFEST, "is damaged, or was edited: copy it again")
        return
    manifest = read_manifest(folder)
    index: Index | None = None
    try:
        index = _open_index(folder, manifest["images"])
    except (FileNotFoundError, ValueError) as error:
        yield Problem(INDEX, str(error))
    shards = Shards(folder, manifest["shards"])
    with logging.tqdm(total=len(shards), desc=f"Validating {folder.name}", unit="shard") as bar:
        for number in range(len(shards)):
            yield from _check_shard(shards, number, index, manifest["provenance"]["num_classes"])
            shards.close()
            bar.update()
    if index is not None:
        yield from _check_index(index, manifest["index"])


def _check_shard(shards: Shards, number: int, index: Index | None, num_classes: int | None) -> Iterator[Problem]:
    facts, start = shards.facts[number], shards.starts[number]
    file = facts["file"]
    try:
        shard = shards[number]
        _check_tables(shard, facts)
    except (FileNotFoundError, ValueError) as error:
        yield Problem(file, str(error), _ids_in_index(index, start, facts["images"]))
        return
    hit = False
    for row in range(len(shard)):
        known = _id_in_index(index, start + row)
        messages = list(_check_row(shard, row, num_classes))
        for message in messages:
            yield Problem(file, message, (known or f"row {row}",))
        hit = hit or bool(messages)
        if index is None or messages:
            continue
        image_id = shard.image_ids[row]
        place = _find(index, image_id)
        if image_id != known:
            yield Problem(INDEX, f"names row {row} of {file} {known!r}", (image_id,))
        elif place is None or place > start + row:
            yield Problem(INDEX, f"has no entry for row {row} of {file}", (image_id,))
        elif place < start + row:
            other = shards.facts[shards.number_of(place)]["file"]
            yield Problem(file, f"holds in row {row} an image that {other} holds, too", (image_id,))
    if not hit and file_facts(shard.path)["sha256"] != facts["sha256"]:
        message = "is not what was written (SHA-256), in a place that belongs to no single image: copy it again"
        yield Problem(file, message, _ids_in_index(index, start, facts["images"]))


def _check_tables(shard: Shard, facts: dict[str, Any]) -> None:
    """
    Raises ValueError where lengths and offsets do not fit together, so that the rows of images cannot be told apart.
    """
    tensors, images, regions = shard.tensors, facts["images"], facts["regions"]
    for name, tensor in tensors.items():
        rows = {"padding": len(tensor), "image_ids": len(tensor)}
        rows |= {"image_id_offsets": images + 1, "region_offsets": images + 1}
        rows |= dict.fromkeys(("image_sizes", "present", "checksums"), images)
        if len(tensor) != rows.get(name, regions):
            raise ValueError(f"has {len(tensor)} rows of {name}, expected {rows.get(name, regions)}: copy it again")
    for name, end in (("image_id_offsets", len(tensors["image_ids"])), ("region_offsets", regions)):
        offsets = tensors[name]
        if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] <= offsets[:-1]).any():
            raise ValueError(f"{name} do not rise from 0 to {end}: copy it again")


def _check_row(shard: Shard, row: int, num_classes: int | None) -> Iterator[str]:
    try:
        record = shard.record(row)
        intact = shard.is_intact(row, record)
    except ValueError as error:  # an id that is no text
        yield f"row {row} cannot be read ({error}): copy the file again"
        return
    if not intact:
        yield f"row {row} is not what was written (CRC-32): copy the file again"
    try:
        RegionRecord.from_dict(record.to_dict())
    except ValueError as error:
        yield f"row {row}: {error}"
    highest = -1 if record.object_ids is None else int(record.object_ids.max())
    if num_classes is not None and highest >= num_classes:
        yield f"row {row}: object_ids hold {highest}, expected ids below {num_classes}"


def _open_index(folder: Path, num_images: int) -> Index:
    index = Index(folder, num_images)
    shapes = {name: tensor.shape for name, tensor in index.tensors.items()}
    ids = len(index.image_ids)
    if shapes["hashes"] != shapes["numbers"] or shapes["hashes"] != (ids,) or ids < num_images:
        raise ValueError(f"has tensors of shapes {shapes} for {num_images} images: copy it again")
    return index


def _check_index(index: Index, facts: dict[str, Any]) -> Iterator[Problem]:
    hashes, numbers = index.tensors["hashes"], index.tensors["numbers"]
    hit = False
    for begin in range(0, len(hashes), 2**16):
        chunk = slice(begin, begin + 2**16)
        for hash_, number in zip(hashes[chunk].tolist(), numbers[chunk].tolist(), strict=True):
            image_id = _id_in_index(index, number)
            if image_id is None or hash_id(image_id) != hash_:
                hit = True
                ids = () if image_id is None else (image_id,)
                yield Problem(INDEX, f"has an entry for image number {number} where there is none of its id", ids)
    if not hit and file_facts(index.path) != facts:
        yield Problem(INDEX, "is not what was written (SHA-256): copy it again")


def _is_intact(manifest: Path) -> bool:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        return content["sha256"] == manifest_checksum(content)
    except (ValueError, KeyError, TypeError):
        return False


def _find(index: Index, image_id: str) -> int | None:
    try:
        return index.ids.find(image_id)
    except ValueError:  # the index holds an id that is no text
        return None


def _id_in_index(index: Index | None, number: int) -> str | None:
    """Gives the id of an image, None where the index does not tell."""
    try:
        return None if index is None or number >= index.num_images else index.image_ids[number]
    except ValueError:
        return None


def _ids_in_index(index: Index | None, start: int, images: int) -> tuple[str, ...]:
    found = (_id_in_index(index, number) for number in range(start, start + images))
    return tuple(image_id for image_id in found if image_id is not None)
