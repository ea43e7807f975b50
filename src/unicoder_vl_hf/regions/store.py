"""
A folder of region records: written once, read at random by many processes.

    manifest.json               counts, shards, provenance; written last, so where it is the store is whole
    index.safetensors           hashes (N,) uint64 sorted, shards (N,) and rows (N,) uint32: where each image_id is
    regions-00000.safetensors   features (rows, D) and the other fields, flat; offsets say which rows are whose image's
    unfinished.json             while a writer is at work, and after it was interrupted

A shard also holds the ids of its images, so that the index can be made again. Reading is a memory map: nothing is
copied until the caller does. Left out: checksums, validation, merging and the Hub, which build on these files.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .. import __version__
from ..feature_extraction_unicoder_vl import RegionRecord, is_region_record
from .tensor_files import TensorFile, TensorFileWriter, write_json

FORMAT_VERSION = 1
MANIFEST, INDEX, UNFINISHED = "manifest.json", "index.safetensors", "unfinished.json"
FEATURE_DTYPES: dict[str, np.dtype] = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
# The bits of a shard's `present`, lowest first: new fields go to the end.
OPTIONAL_FIELDS = (
    "boxes",
    "object_ids",
    "object_scores",
    "attribute_ids",
    "attribute_scores",
    "class_probabilities",
)
# As wide as features: fetched per record. The other tensors are about 1 % of a shard and fetched when it is opened.
WIDE_FIELDS = ("features", "class_probabilities")
# Each open shard holds a file descriptor, of which a process has 1,024 by default.
MAX_OPEN_SHARDS = 256


def _hash(image_id: str) -> int:
    """Of 64 bits, and the same in every process (Python's own is not)."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"regions-{number:05d}.safetensors"


class _Shard(TensorFile):
    """One shard: `len`, the ids of its images, and a record for each row."""

    def __init__(self, path: Path):
        super().__init__(path)
        tensors = self.tensors
        try:
            self._ids, self._id_offsets = tensors["image_ids"], tensors["image_id_offsets"]
            self._region_offsets, self._sizes = tensors["region_offsets"], tensors["image_sizes"]
            self._present, self.features = tensors["present"], tensors["features"]
        except KeyError as error:
            raise ValueError(f"{path} is no shard of a region store: it has no tensor {error}.") from error
        self._fields = [(name, 1 << bit, tensors.get(name)) for bit, name in enumerate(OPTIONAL_FIELDS)]

    def __len__(self) -> int:
        return len(self._present)

    def will_need_narrow(self) -> None:
        """Has the kernel fetch everything but the wide fields."""
        for name in self.tensors.keys() - WIDE_FIELDS:
            self.will_need(name)

    def will_need_row(self, row: int) -> None:
        """Has the kernel fetch the wide fields of one image."""
        first, last = self._region_offsets[row : row + 2].tolist()
        for name in WIDE_FIELDS:
            if name in self.tensors:
                self.will_need(name, first, last)

    def image_id(self, row: int) -> str:
        first, last = self._id_offsets[row : row + 2].tolist()
        return self._ids[first:last].tobytes().decode()

    def image_ids(self) -> Iterator[str]:
        ids, offsets = self._ids.tobytes(), self._id_offsets.tolist()
        for first, last in pairwise(offsets):
            yield ids[first:last].decode()

    def record(self, row: int, image_id: str) -> RegionRecord:
        first, last = self._region_offsets[row : row + 2].tolist()
        width, height = self._sizes[row].tolist()
        present = int(self._present[row])
        values = {
            "image_id": image_id,
            "image_width": width or None,
            "image_height": height or None,
            "features": self.features[first:last],
        }
        for name, bit, tensor in self._fields:
            values[name] = tensor[first:last] if tensor is not None and present & bit else None
        return RegionRecord.unchecked(values)


class RegionStore(Mapping[str, RegionRecord]):
    """
    A folder written by `RegionStoreWriter`, as a mapping from image_id to `RegionRecord`. Iterates in disk order.

    The arrays of a record are read-only views of a memory map, features in the dtype of the store: copy what you
    want to change. Files are opened when first needed, anew in each process; a store may be pickled, forked and
    read by many.

    Args:
        path (`str` or `os.PathLike`): The folder.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: The store is unfinished, damaged, or of a later version of this package.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self._manifest = _read_manifest(self.path)
        self._pid = os.getpid()
        self._index: dict[str, np.ndarray] = {}
        self._shards: dict[int, _Shard] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, images={len(self)}, feature_dim={self.feature_dim})"

    @property
    def provenance(self) -> dict[str, Any]:
        """
        Where the regions come from, ready for JSON: `detector`, `detector_revision`, `box_type`, `thresholds`,
        `class_names`, `num_classes`, `source_format` (None where unknown), `feature_dim`, `dtype`, `package_version`.
        """
        return json.loads(json.dumps(self._manifest["provenance"]))

    @property
    def feature_dim(self) -> int:
        """D, the width of the features."""
        return self._manifest["provenance"]["feature_dim"]

    @property
    def num_regions(self) -> int:
        """Regions of all images together."""
        return self._manifest["regions"]

    def __len__(self) -> int:
        return self._manifest["images"]

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self._manifest["shards"])):
            yield from self._shard(number).image_ids()

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self._find(image_id) is not None

    def __getitem__(self, image_id: str) -> RegionRecord:
        number, row = self._locate(image_id)
        shard = self._shard(number)
        shard.will_need_row(row)
        return shard.record(row, image_id)

    def get_many(self, image_ids: Iterable[str]) -> list[RegionRecord]:
        """The records of these images, in the order asked for; the kernel fetches them all at once, in disk order."""
        image_ids = list(image_ids)
        places = [self._locate(image_id) for image_id in image_ids]
        for number, row in sorted(set(places)):
            self._shard(number).will_need_row(row)
        return [
            self._shard(number).record(row, image_id) for (number, row), image_id in zip(places, image_ids, strict=True)
        ]

    def _locate(self, image_id: str) -> tuple[int, int]:
        place = self._find(image_id) if isinstance(image_id, str) else None
        if place is None:
            examples = [self._shard(0).image_id(row) for row in range(min(3, len(self._shard(0))))]
            raise KeyError(
                f"{self.path} has no image {image_id!r}; its {len(self)} ids are like {', '.join(map(repr, examples))}."
            )
        return place

    def _find(self, image_id: str) -> tuple[int, int] | None:
        """Shard and row of an image, None if it is not here."""
        self._forget_other_process()
        if not self._index:
            self._index = TensorFile(self.path / INDEX).tensors
        hashes, shards, rows = self._index["hashes"], self._index["shards"], self._index["rows"]
        wanted = np.uint64(_hash(image_id))
        place = int(hashes.searchsorted(wanted))
        while place < len(hashes) and hashes[place] == wanted:
            number, row = int(shards[place]), int(rows[place])
            # While a resumed writer finishes, the index may already know shards that the manifest does not.
            if number < len(self._manifest["shards"]) and self._shard(number).image_id(row) == image_id:
                return number, row
            place += 1  # another id with the same hash
        return None

    def _shard(self, number: int) -> _Shard:
        self._forget_other_process()
        if number not in self._shards:
            if len(self._shards) >= MAX_OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards)), None)
            shard = _Shard(_shard_path(self.path, number))
            if shard.num_bytes != (expected := self._manifest["shards"][number]["bytes"]):
                raise ValueError(f"{shard.path} has {shard.num_bytes} bytes, expected {expected}: copy it again.")
            shard.will_need_narrow()
            self._shards[number] = shard
        return self._shards[number]

    def _forget_other_process(self) -> None:
        if self._pid != os.getpid():
            self._pid, self._index, self._shards = os.getpid(), {}, {}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise ValueError(
                f"{folder} is an unfinished store: its writer is at work or was stopped; resume=True goes on."
            ) from None
        raise FileNotFoundError(f"{folder} is no region store: there is no {MANIFEST}.") from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}): copy it again.") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {version}, expected {FORMAT_VERSION}: update unicoder-vl-hf.")
    return manifest


class _PendingShard:
    """The shard being written: features go to disk at once, the rest, which is small, with `commit`."""

    def __init__(self, path: Path):
        self.file = TensorFileWriter(path)
        self.num_bytes = 0
        self._records: list[dict[str, Any]] = []

    def add(self, record: RegionRecord, features: np.ndarray) -> None:
        # Copies, because the caller may reuse its arrays, or hold a memory map behind them.
        values = {name: value.copy() for name in OPTIONAL_FIELDS if (value := getattr(record, name)) is not None}
        self.file.append("features", features)
        self.num_bytes += features.nbytes + sum(value.nbytes for value in values.values())
        size = (record.image_width or 0, record.image_height or 0)
        self._records.append({"image_id": record.image_id, "n": record.num_regions, "size": size, **values})

    def commit(self) -> None:
        records, counts = self._records, [record["n"] for record in self._records]
        ids = [record["image_id"].encode() for record in records]
        blob = b"".join(ids)
        # Zeros behind the last id put what follows on a multiple of 8 bytes.
        blob += bytes(-(self.file.position + len(blob)) % 8)
        self.file.append("image_ids", np.frombuffer(blob, np.uint8))
        present = [sum(1 << bit for bit, name in enumerate(OPTIONAL_FIELDS) if name in record) for record in records]
        tensors: dict[str, list[np.ndarray]] = {
            "image_id_offsets": [np.cumsum([0, *map(len, ids)], dtype=np.int64)],
            "region_offsets": [np.cumsum([0, *counts], dtype=np.int64)],
            "image_sizes": [np.array([record["size"] for record in records], dtype=np.int32)],
            "present": [np.array(present, dtype=np.uint8)],
        }
        for name in OPTIONAL_FIELDS:
            values = [record[name] for record in records if name in record]
            if values:
                dtype, row_shape = np.result_type(*values), values[0].shape[1:]
                # Zeros stand where an image lacks the field, so that one table of offsets serves all fields.
                tensors[name] = [
                    record[name].astype(dtype, copy=False) if name in record else np.zeros((n, *row_shape), dtype)
                    for record, n in zip(records, counts, strict=True)
                ]
        for name, chunks in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            for chunk in chunks:
                self.file.append(name, chunk)
        self.file.commit()


class RegionStoreWriter:
    """
    Writes a `RegionStore`, as a context manager with `write(record)`.

    Shards appear whole or not at all, the manifest when the `with` block ends without an error. After an error or
    a kill the complete shards stay; `resume=True` goes on behind them, and `writer.resumed` holds the ids that need
    not be written again (`image_id in writer` knows the new ones, too). One writer a folder: several processes write
    several stores.

    Args:
        path (`str` or `os.PathLike`): The folder, made if need be.
        dtype (`str`, defaults to `"float16"`): Of the features, `"float16"` or `"float32"`.
        shard_size (`int`, defaults to 512 MiB): Bytes after which a shard is complete.
        resume (`bool`, defaults to `False`): Go on with an unfinished store, or add to a finished one, of equal
            provenance; an empty folder will do, too. Without it, a folder that holds a store is refused.
        detector, detector_revision (`str`, *optional*): What found the regions, such as a name and a commit on the Hub.
        box_type (`str`, *optional*): What the boxes are, such as `"proposal"`, `"regressed"` or `"ground truth"`.
        thresholds (`dict`, *optional*): What the detector kept, such as `{"score": 0.2, "max_regions": 100}`.
        class_names (sequence of `str`, *optional*): Name of each object id, without background.
        num_classes (`int`, *optional*): Number of object classes where their names are unknown. Ids must be below it.
        source_format (`str`, *optional*): The format that the records were read from.

    Raises:
        ValueError: The folder holds a store that `resume` does not allow or match, or an argument is malformed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        dtype: str = "float16",
        shard_size: int = 512 * 2**20,
        resume: bool = False,
        detector: str | None = None,
        detector_revision: str | None = None,
        box_type: str | None = None,
        thresholds: Mapping[str, Any] | None = None,
        class_names: Iterable[str] | None = None,
        num_classes: int | None = None,
        source_format: str | None = None,
    ):
        if dtype not in FEATURE_DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {list(FEATURE_DTYPES)}.")
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}, expected a positive number of bytes.")
        names = None if class_names is None else list(class_names)
        if names is not None and num_classes not in (None, len(names)):
            raise ValueError(f"num_classes is {num_classes}, but there are {len(names)} class_names: give one of them.")
        self.path = Path(path).absolute()
        self.shard_size = shard_size
        self._dtype = FEATURE_DTYPES[dtype]
        self._provenance = {
            "detector": detector,
            "detector_revision": detector_revision,
            "box_type": box_type,
            "thresholds": None if thresholds is None else dict(thresholds),
            "class_names": names,
            "num_classes": num_classes if names is None else len(names),
            "source_format": source_format,
            "dtype": dtype,
        }
        self._widths: dict[str, int] = {}  # of the wide fields, which one store must agree on
        self._shard_facts: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._pending: _PendingShard | None = None
        self._open = True
        self._start(resume)
        self.resumed = frozenset(self._ids)  # what was here before

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if kind is None:
            self._finish()
        elif self._pending is not None:
            self._pending.file.discard()

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def write(self, record: RegionRecord) -> None:
        """
        Adds a record.

        Raises:
            ValueError: The id is here already, the width differs from that of the records before, an object id is
                outside `num_classes`, or a feature does not fit into float16. The store is as it was before the call.
        """
        features = self._check(record)
        if self._pending is None:
            self._pending = _PendingShard(_shard_path(self.path, len(self._shard_facts)))
        self._pending.add(record, features)
        self._ids.add(record.image_id)
        self._note_widths(record.features, record.class_probabilities)
        if self._pending.num_bytes >= self.shard_size:
            self._commit_shard()

    def _start(self, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        settings = {"format_version": FORMAT_VERSION, "provenance": self._provenance}
        known = [self.path / name for name in (MANIFEST, UNFINISHED) if (self.path / name).exists()]
        if known and not resume:
            state = "a finished" if known[0].name == MANIFEST else "an unfinished"
            raise ValueError(f"{self.path} holds {state} store: pass resume=True to go on with it, or another folder.")
        if known:
            self._check_same(json.loads(known[0].read_text(encoding="utf-8")))
        elif _shard_path(self.path, 0).exists():
            raise ValueError(f"{self.path} holds shards but neither {MANIFEST} nor {UNFINISHED}: take another folder.")
        else:
            write_json(self.path / UNFINISHED, settings)
        for partial in self.path.glob("*.partial"):  # what a kill left
            partial.unlink()
        while (path := _shard_path(self.path, len(self._shard_facts))).exists():
            shard = _Shard(path)
            self._ids.update(shard.image_ids())
            self._note_widths(shard.features, shard.tensors.get("class_probabilities"))
            self._shard_facts.append(_facts(shard))

    def _check_same(self, before: dict[str, Any]) -> None:
        if before.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} has format version {before.get('format_version')}, expected {FORMAT_VERSION}."
            )
        now = json.loads(json.dumps(self._provenance))  # tuples become lists, as they did before
        for name, value in now.items():
            if before["provenance"].get(name) != value:
                raise ValueError(
                    f"{self.path} was begun with {name}={before['provenance'].get(name)!r}, not {value!r}: resume with "
                    "equal settings, or write another store."
                )

    def _check(self, record: RegionRecord) -> np.ndarray:
        """The features as they will be stored."""
        if not self._open:
            raise ValueError(f"The writer of {self.path} is closed: write inside its with block.")
        if not is_region_record(record):
            raise ValueError(f"write takes a RegionRecord, got a {type(record).__name__}.")
        name = record.image_id
        if name in self._ids:
            raise ValueError(
                f"Image {name!r} is in {self.path} already: ids must differ; skip what is in writer.resumed."
            )
        for field in WIDE_FIELDS:
            array = getattr(record, field)
            width = None if array is None else array.shape[1]
            if width is not None and width != self._widths.get(field, width):
                raise ValueError(
                    f"Image {name!r}: {field} have width {width}, expected {self._widths[field]} as before."
                )
        num_classes = self._provenance["num_classes"]
        if num_classes is not None and record.object_ids is not None and record.object_ids.max() >= num_classes:
            raise ValueError(
                f"Image {name!r}: object_ids hold {record.object_ids.max()}, expected ids below the store's "
                f"{num_classes} classes, 0-based and without background."
            )
        limit = np.finfo(self._dtype).max
        if record.features.dtype.itemsize > self._dtype.itemsize:
            largest = max(record.features.max(), -record.features.min())
            if largest > limit:
                raise ValueError(
                    f"Image {name!r}: features hold a magnitude of {largest}, but {self._dtype} ends at {limit}: write "
                    "the store with dtype='float32'."
                )
        return record.features.astype(self._dtype, copy=False)

    def _note_widths(self, features: np.ndarray, class_probabilities: np.ndarray | None) -> None:
        self._widths["features"] = features.shape[1]
        if class_probabilities is not None:
            self._widths["class_probabilities"] = class_probabilities.shape[1]

    def _commit_shard(self) -> None:
        if self._pending is not None:
            self._pending.commit()
            self._shard_facts.append(_facts(_Shard(self._pending.file.path)))
            self._pending = None

    def _finish(self) -> None:
        self._commit_shard()
        if (self.path / MANIFEST).exists() and len(self._ids) == len(self.resumed) == len(RegionStore(self.path)):
            return  # nothing was added to a finished store
        if not self._shard_facts:
            raise ValueError(f"No record was written to {self.path}: a store holds at least one image.")
        _write_index(self.path, len(self._shard_facts), len(self._ids))
        provenance = {
            **self._provenance,
            "feature_dim": self._widths["features"],
            "package_version": __version__,
        }
        manifest = {
            "format": "region store of unicoder-vl-hf",
            "format_version": FORMAT_VERSION,
            "images": sum(facts["images"] for facts in self._shard_facts),
            "regions": sum(facts["regions"] for facts in self._shard_facts),
            "provenance": provenance,
            "shards": self._shard_facts,
        }
        write_json(self.path / MANIFEST, manifest)
        (self.path / UNFINISHED).unlink(missing_ok=True)


def _facts(shard: _Shard) -> dict[str, Any]:
    """What the manifest says of a shard."""
    return {"file": shard.path.name, "images": len(shard), "regions": len(shard.features), "bytes": shard.num_bytes}


def _write_index(folder: Path, num_shards: int, num_images: int) -> None:
    """Makes the index from the ids that the shards hold."""
    hashes = np.empty(num_images, np.uint64)
    shards, rows = np.empty(num_images, np.uint32), np.empty(num_images, np.uint32)
    end = 0
    for number in range(num_shards):
        found = [_hash(image_id) for image_id in _Shard(_shard_path(folder, number)).image_ids()]
        begin, end = end, end + len(found)
        hashes[begin:end], shards[begin:end], rows[begin:end] = found, number, np.arange(len(found))
    order = hashes.argsort(kind="stable")
    index = TensorFileWriter(folder / INDEX)
    for name, array in (("hashes", hashes), ("shards", shards), ("rows", rows)):
        index.append(name, array[order])
    index.commit()
