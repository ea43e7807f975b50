"""
The files of a region store: shards, the numbers of the images in them, and the index from image_id to number.

The number of an image counts through all shards in their order. The ids are kept in memory as hashes and numbers, 12
bytes an id whatever its length; an id counts as found where the files hold exactly that id.
"""

import hashlib
import json
import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..files import OutputKind
from ..records_unicoder_vl import RegionRecord
from .tensor_files import DTYPES, TensorFile, TensorFileWriter, file_facts

FORMAT_VERSION = 1
MANIFEST, INDEX, UNFINISHED = "manifest.json", "index.safetensors", "unfinished.json"
SKIPPED = "skipped.jsonl"  # images of the source that the store lacks, and why
PLAN = "conversion.json"  # the settings of a conversion, which must stay the same when it goes on
# A card or a note that someone wrote is no part of a store.
SHARDS_ALONE = (MANIFEST, INDEX, UNFINISHED, "regions-*.safetensors", "*.partial")
STORE = OutputKind(
    "region store",
    last=MANIFEST,
    files=(*SHARDS_ALONE, SKIPPED, PLAN),
    work=("part-*", "skipped-*.jsonl", "[0-9]*"),
)
STORE_OF_STORES = OutputKind("store made of other stores", last=MANIFEST, files=SHARDS_ALONE)
# The dtypes that features may have, and the largest number of each.
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
CLASS_FIELDS = ("object_ids", "object_scores", "attribute_ids", "attribute_scores")
NARROW_FIELDS = ("boxes", *CLASS_FIELDS)
# The bits of a shard's `present`, lowest first: new fields go to the end.
OPTIONAL_FIELDS = (*NARROW_FIELDS, "class_probabilities")
PIECE = 2**14  # numbers converted at a time: larger arrays between steps would cost page faults
NO_OBJECT_IDS = -2  # the record has no ids; -1 is a region without a class
# The wide fields are fetched for each record. The other tensors, about 1 % of a shard, are fetched with the first one.
WIDE_FIELDS = ("features", "class_probabilities")
# Each open shard holds a file descriptor, of which a process has 1,024 by default.
MAX_OPEN_SHARDS = 256
# Ids and offsets of a shard being written are in memory, some 60 bytes an image.
MAX_SHARD_IMAGES = 2**18


def shard_path(folder: Path, number: int) -> Path:
    """Gives the path of a shard by its number."""
    return folder / f"regions-{number:05d}.safetensors"


def hash_id(image_id: str) -> int:
    """Hashes an id to 64 bits, the same in every process (unlike Python's own hash)."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")


def to_float16(features: np.ndarray) -> np.ndarray:
    """
    Gives the nearest float16 of float32 `(n, D)`, ties to even, as `astype` does, whose branches take three times as
    long where many numbers are zero, as behind a ReLU.
    """
    sample = features[:2]  # tells which way is faster
    if np.count_nonzero(sample) > 0.95 * sample.size:
        with np.errstate(over="ignore"):  # larger numbers become infinite
            return features.astype(np.float16)
    halves = np.empty(features.shape, np.float16)
    step = PIECE // features.shape[1] + 1
    for first in range(0, len(features), step):
        rows = features[first : first + step]
        bits = rows.view(np.uint32)
        exponents = np.maximum(bits & 0x7F800000, 113 << 23)  # the smallest exponent of float16 is -14
        # A sum with a number 2**13 times as large keeps as many bits as float16 has.
        large = exponents + (13 << 23)
        sums = np.abs(rows) + large.view(np.float32)
        magnitudes = sums.view(np.uint32) - large + (exponents >> 13) - (113 << 10)
        magnitudes = np.minimum(magnitudes, 0x7C00)
        halves[first : first + step].view(np.uint16)[:] = magnitudes | bits >> 16 & 0x8000
    return halves


def to_bfloat16(features: np.ndarray) -> np.ndarray:
    """Gives the bits (uint16) of the nearest bfloat16, ties to even."""
    bits = features.astype(np.float32, copy=False).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Gives the float32 of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def checksum(record: RegionRecord, features: np.ndarray) -> int:
    """
    Computes a CRC-32 over everything that a shard holds of an image; `features` as they are stored, optional fields as
    `record` has them.
    """
    probabilities = record.class_probabilities
    if probabilities is not None:  # a shard may widen them
        probabilities = probabilities.astype(np.float32, copy=False)
    size = np.array([record.image_width or 0, record.image_height or 0], "<i4")
    value = zlib.crc32(record.image_id.encode())
    for values in (size, features, *(getattr(record, name) for name in NARROW_FIELDS), probabilities):
        if values is not None:
            value = zlib.crc32(np.ascontiguousarray(values).data, value)
    return value


class Strings:
    """A list of str as two tensors: UTF-8 text, and the places where each str begins."""

    def __init__(self, text: np.ndarray, offsets: np.ndarray):
        self._text, self._offsets = text, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> str:
        first, last = self._offsets[number : number + 2].tolist()
        return self._text[first:last].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), 2**16):
            offsets = self._offsets[begin : begin + 2**16 + 1].tolist()
            text = self._text[offsets[0] : offsets[-1]].tobytes()
            for first, last in pairwise(offsets):
                yield text[first - offsets[0] : last - offsets[0]].decode()


class Shard(TensorFile):
    """A file of records: the number of images (`len`), their ids, and a record for each row."""

    def __init__(self, path: Path):
        super().__init__(path)
        tensors = self.tensors
        try:
            self.image_ids = Strings(tensors["image_ids"], tensors["image_id_offsets"])
            self.region_offsets, self._sizes = tensors["region_offsets"], tensors["image_sizes"]
            self._present, self.features = tensors["present"], tensors["features"]
            self._checksums = tensors["checksums"]
        except KeyError as error:
            raise ValueError(f"{path} is no shard of a region store: it has no tensor {error}.") from error
        self._fields = [(name, 1 << bit, tensors.get(name)) for bit, name in enumerate(OPTIONAL_FIELDS)]
        self._bfloat16 = self.features.dtype == DTYPES["BF16"]
        self._narrow_asked = False

    def __len__(self) -> int:
        return len(self._present)

    def facts(self) -> dict[str, Any]:
        """Gives the entry of this shard in the manifest."""
        return {**file_facts(self.path), "images": len(self), "regions": len(self.features)}

    def will_need_row(self, row: int) -> None:
        """Has the kernel fetch the wide fields of one image, and on the first call the narrow fields of all."""
        if not self._narrow_asked:
            self._narrow_asked = True
            for name in self.tensors.keys() - WIDE_FIELDS:
                self.will_need(name)
        first, last = self.region_offsets[row : row + 2].tolist()
        for name in WIDE_FIELDS:
            if name in self.tensors:
                self.will_need(name, first, last)

    def record(self, row: int) -> RegionRecord:
        """Gives the record of a row; its arrays are views of the file."""
        first, last = self.region_offsets[row : row + 2].tolist()
        width, height = self._sizes[row].tolist()
        present = int(self._present[row])
        features = self.features[first:last]
        values = {
            "image_id": self.image_ids[row],
            "image_width": width or None,
            "image_height": height or None,
            "features": from_bfloat16(features) if self._bfloat16 else features,
        }
        for name, bit, tensor in self._fields:
            values[name] = tensor[first:last] if tensor is not None and present & bit else None
        return RegionRecord.unchecked(values)

    def highest_object_ids(self) -> np.ndarray:
        """
        Gives the highest object id of each image, `NO_OBJECT_IDS` where it has none. Nothing else of the shard is read.
        """
        _, bit, object_ids = next(field for field in self._fields if field[0] == "object_ids")
        if object_ids is None:
            return np.full(len(self), NO_OBJECT_IDS)
        highest = np.maximum.reduceat(object_ids, self.region_offsets[:-1])
        return np.where(self._present & bit, highest, NO_OBJECT_IDS)

    def checksum(self, row: int) -> int:
        """Gives the checksum that was stored for a row, see the function `checksum`."""
        return int(self._checksums[row])

    def is_intact(self, row: int, record: RegionRecord) -> bool:
        """Tells whether `record`, which was read from `row`, is the record that was written there."""
        first, last = self.region_offsets[row : row + 2].tolist()
        return checksum(record, self.features[first:last]) == self.checksum(row)


class Shards:
    """
    The shards of a folder, opened when needed and anew in each process, which find the place of an image by its number.

    Args:
        folder (`Path`): The folder of the shards.
        facts (list of `dict`): Size, number of images and so on of each shard, as in the manifest.
    """

    def __init__(self, folder: Path, facts: Iterable[dict[str, Any]] = ()):
        self.folder = folder
        self.facts: list[dict[str, Any]] = []
        self.starts = [0]
        self.opened: dict[int, Shard] = {}
        self._pid = os.getpid()
        for shard_facts in facts:
            self.add(shard_facts)

    def __reduce__(self) -> tuple[type[Self], tuple[Path, list[dict[str, Any]]]]:
        return type(self), (self.folder, self.facts)

    def add(self, facts: dict[str, Any]) -> None:
        """Adds one shard behind the last."""
        self.facts.append(facts)
        self.starts.append(self.starts[-1] + facts["images"])

    @property
    def num_images(self) -> int:
        """The number of images in all shards."""
        return self.starts[-1]

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, number: int) -> Shard:
        if self._pid != os.getpid():
            self._pid, self.opened = os.getpid(), {}
        if number not in self.opened:
            if len(self.opened) >= MAX_OPEN_SHARDS:
                self.opened.pop(next(iter(self.opened)), None)
            path, expected = shard_path(self.folder, number), self.facts[number]["bytes"]
            try:
                shard = Shard(path)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{path} is not here: copy it again, or, where it comes from the Hub, name the images you need in "
                    "RegionStore.from_hub."
                ) from None
            if shard.num_bytes != expected:
                raise ValueError(f"{path} has {shard.num_bytes} bytes, expected {expected}: copy it again.")
            self.opened[number] = shard
        return self.opened[number]

    def close(self) -> None:
        """Closes the maps: a reader that goes through everything in turn need not hold the shards behind it."""
        self.opened.clear()

    def number_of(self, image: int) -> int:
        """Gives the number of the shard that holds an image."""
        return bisect_right(self.starts, image) - 1

    def find(self, image: int) -> tuple[Shard, int]:
        """Gives the shard of an image, and its row there."""
        number = self.number_of(image)
        return self[number], image - self.starts[number]

    def image_id(self, image: int) -> str:
        """Gives the id of an image by its number."""
        shard, row = self.find(image)
        return shard.image_ids[row]


class ImageIds(Container[str]):
    """
    The ids of a store and the numbers of their images, in sorted runs of hashes.

    Args:
        id_of (callable): Gives the id of an image by its number; None where no image has this number.
        runs (list): Hashes and numbers, sorted by hash, see `add`.
    """

    def __init__(self, id_of: Callable[[int], str | None], runs: Iterable[tuple[np.ndarray, np.ndarray]] = ()):
        self._id_of = id_of
        self._runs = list(runs)

    def copy(self) -> "ImageIds":
        """Copies the ids that are here now."""
        return ImageIds(self._id_of, self._runs)

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._runs)

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self.find(image_id) is not None

    def add(self, image_ids: Iterable[str]) -> None:
        """Adds ids under the next numbers."""
        hashes = np.fromiter(map(hash_id, image_ids), np.uint64)
        numbers = np.arange(len(self), len(self) + len(hashes), dtype=np.uint32)
        self._runs.append(sorted_run(hashes, numbers))
        # Each run is at least twice as long as the next, so that there are few runs, and each id moves few times.
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            self._merge_last()

    def find(self, image_id: str) -> int | None:
        """Gives the number of an image, None if it is not here."""
        try:
            wanted = np.uint64(hash_id(image_id))
        except UnicodeEncodeError:  # a file's name that is no text, which no store holds
            return None
        for hashes, numbers in self._runs:
            place = int(hashes.searchsorted(wanted))
            while place < len(hashes) and hashes[place] == wanted:
                number = int(numbers[place])
                if self._id_of(number) == image_id:
                    return number
                place += 1  # another id with the same hash
        return None

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives all hashes, sorted, and the number of each."""
        while len(self._runs) > 1:
            self._merge_last()
        return self._runs[0]

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """Yields the numbers of every two images that share an id."""
        hashes, numbers = self.all()
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            other = place + 1
            while other < len(hashes) and hashes[other] == hashes[place]:
                first, second = sorted((int(numbers[place]), int(numbers[other])))
                if self._id_of(first) == self._id_of(second):
                    yield first, second
                other += 1

    def _merge_last(self) -> None:
        (hashes, numbers), (more_hashes, more_numbers) = self._runs[-2:]
        self._runs[-2:] = [sorted_run(np.concatenate([hashes, more_hashes]), np.concatenate([numbers, more_numbers]))]


def sorted_run(hashes: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts hashes and numbers by the hashes."""
    order = hashes.argsort(kind="stable")  # a stable sort merges runs that are sorted already
    return hashes[order], numbers[order]


def parts_of(folder: Path) -> Path | None:
    """Gives the folder beside a store that holds its parts while processes extract or convert them; None without."""
    beside = (folder.absolute().with_name(name.format(folder.absolute().name)) for name in ("{}.parts", ".{}.parts"))
    return next((parts for parts in beside if parts.is_dir()), None)


def _images_in(parts: Path) -> int:
    """Counts the images in the complete shards of unfinished parts."""
    count = 0
    for part in parts.iterdir():
        for name in (MANIFEST, UNFINISHED):
            if (part / name).is_file():
                shards = json.loads((part / name).read_text(encoding="utf-8"))["shards"]
                count += sum(facts["images"] for facts in shards)
                break
    return count


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished store; see `RegionStore` for the errors."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise ValueError(
                f"{folder} is an unfinished store: the command that writes it is at work, or was stopped and goes on "
                "when it is run again (in Python with resume=True)."
            ) from None
        if parts := parts_of(folder):
            raise ValueError(
                f"{folder} is unfinished: {_images_in(parts):,} images so far in {parts}. Run the same command again "
                "(`unicoder-vl extract`, for one): it goes on."
            ) from None
        if folder.is_dir() and not any(folder.iterdir()):
            raise FileNotFoundError(f"{folder} is empty: no store was finished there.") from None
        raise FileNotFoundError(f"{folder} is no region store: there is no {MANIFEST}.") from None
    except NotADirectoryError:
        raise ValueError(f"{folder} is a file, expected the folder of a region store.") from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}): copy it again.") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version is not None and version != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {version}, expected {FORMAT_VERSION}: update unicoder-vl-hf.")
    if version is None or not {"images", "regions", "provenance", "shards"} <= manifest.keys():
        raise ValueError(f"{folder / MANIFEST} is damaged (it lacks what a manifest says): copy it again.")
    return manifest


class Index(TensorFile):
    """The index file of a store: the id of each image, and hashes by which ids are found."""

    def __init__(self, folder: Path, num_images: int):
        super().__init__(folder / INDEX)
        self.num_images = num_images
        try:
            self.image_ids = Strings(self.tensors["image_ids"], self.tensors["image_id_offsets"])
            runs = [(self.tensors["hashes"], self.tensors["numbers"])]
        except KeyError as error:
            raise ValueError(f"{self.path} is no index of a region store: it has no tensor {error}.") from error
        self.ids = ImageIds(self._image_id, runs)

    def number_of(self, image_id: str) -> int:
        """Gives the place of an image in disk order, from 0. Raises KeyError where no image has this id."""
        number = self.ids.find(image_id) if isinstance(image_id, str) else None
        if number is None:
            examples = ", ".join(repr(self.image_ids[place]) for place in range(min(3, self.num_images)))
            raise KeyError(
                f"{self.path.parent} has no image {image_id!r}; its {self.num_images} ids are like {examples}."
            )
        return number

    def _image_id(self, number: int) -> str | None:
        # While a resumed writer finishes, the index may already know images that the manifest does not.
        return self.image_ids[number] if number < self.num_images else None


def write_index(shards: Shards, ids: ImageIds) -> dict[str, Any]:
    """Writes the index of a folder and gives its entry in the manifest."""
    writer = TensorFileWriter(shards.folder / INDEX)
    hashes, numbers = ids.all()
    writer.append("hashes", hashes)
    writer.append("numbers", numbers)
    begin = 0
    writer.append("image_id_offsets", np.zeros(1, np.int64))
    for number in range(len(shards)):
        tensors = shards[number].tensors
        offsets = tensors["image_id_offsets"]
        writer.append("image_ids", tensors["image_ids"])
        writer.append("image_id_offsets", begin + offsets[1:])
        begin += int(offsets[-1])
    writer.commit()
    return file_facts(shards.folder / INDEX)


class ShardWriter:
    """A shard that is being written. Fields go to disk at once, the small tables of all images with `commit`."""

    def __init__(self, path: Path):
        self._file = TensorFileWriter(path)
        self._fields: set[str] = set()
        self._text, self._id_offsets, self._region_offsets = bytearray(), array("q", [0]), array("q", [0])
        self._sizes, self._present, self._checksums = array("i"), bytearray(), array("I")
        self._field_bytes = 0

    @property
    def num_bytes(self) -> int:
        """The size of the shard so far, approximately."""
        return self._field_bytes + len(self._text) + 29 * len(self)

    def __len__(self) -> int:
        return len(self._present)

    def add(self, record: RegionRecord, features: np.ndarray) -> None:
        """Adds a record, with features as they are stored. A call that fails leaves no trace."""
        first = self._region_offsets[-1]
        self._file.write("features", features, first)
        present, num_bytes = 0, features.nbytes
        for bit, name in enumerate(OPTIONAL_FIELDS):
            if (values := getattr(record, name)) is not None:
                # Zeros stay where an image lacks the field, so that one table of offsets serves all fields.
                self._file.write(name, values, first)
                self._fields.add(name)
                present |= 1 << bit
                num_bytes += values.nbytes
        crc = checksum(record, features)
        self._text += record.image_id.encode()
        self._id_offsets.append(len(self._text))
        self._region_offsets.append(first + len(features))
        self._sizes.extend((record.image_width or 0, record.image_height or 0))
        self._present.append(present)
        self._checksums.append(crc)
        self._field_bytes += num_bytes

    @property
    def image_ids(self) -> Strings:
        """The ids of the images so far."""
        return Strings(np.frombuffer(self._text, np.uint8), np.array(self._id_offsets, np.int64))

    def checksum(self, row: int) -> int:
        """Gives the checksum of a row, see the function `checksum`."""
        return self._checksums[row]

    def commit(self) -> None:
        """Writes the tables, completes the file and gives it its name."""
        tables: dict[str, np.ndarray] = {
            "image_ids": np.frombuffer(self._text, np.uint8),
            "image_id_offsets": np.array(self._id_offsets, np.int64),
            "region_offsets": np.array(self._region_offsets, np.int64),
            "image_sizes": np.array(self._sizes, np.int32).reshape(-1, 2),
            "present": np.frombuffer(self._present, np.uint8),
            "checksums": np.array(self._checksums, np.uint32),
        }
        for name, table in tables.items():
            self._file.append(name, table)
        self._file.commit(dict.fromkeys(("features", *self._fields), self._region_offsets[-1]))

    def discard(self) -> None:
        """Removes the unfinished file."""
        self._file.discard()
