"""
A folder of region records: written once, read at random by many processes.

    manifest.json               counts, provenance, size and SHA-256 of every file; written last, so a store that has
                                it is complete
    index.safetensors           hashes (N,) uint64 sorted, numbers (N,) uint32 of the images with an id of that hash;
                                and the ids themselves, by number
    regions-00000.safetensors   features (rows, D) and the other fields, flat; the offsets of each image's rows, and a
                                checksum (CRC-32) for each image
    unfinished.json             while a writer is at work, and after it was interrupted

A shard also holds the ids of its images, so that the index can be made again. Records are views of a memory map:
nothing is copied until the caller does. Work on whole stores has its own modules: `validation`, `editing` (merge,
subset, split), `hub` and `parquet`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .._version import __version__
from ..files import full_disk_named, json_digest, locked, make_folder, write_json
from ..records_unicoder_vl import RegionRecord, check_several, is_region_record
from .shards import (
    FORMAT_VERSION,
    LARGEST,
    MANIFEST,
    MAX_SHARD_IMAGES,
    UNFINISHED,
    WIDE_FIELDS,
    ImageIds,
    Index,
    Shard,
    Shards,
    ShardWriter,
    checksum,
    read_manifest,
    shard_path,
    to_bfloat16,
    to_float16,
    write_index,
)

MERGE = "merge_of"  # in unfinished.json: the stores that are merged here
MAX_COMING = 2**14
ABSURD = 1e8  # a magnitude that no feature has
# Stores of older versions do not know it. What it changes shows in the thresholds and the revision, which are compared.
UNCOMPARED = "detector_options"


class RegionStore(Mapping[str, RegionRecord]):
    """
    A folder written by `RegionStoreWriter`, as a mapping from image_id to `RegionRecord`. It iterates in disk order.

    The arrays of a record are read-only views of a memory map, features in the dtype of the store: copy an array to
    change it. NumPy has no bfloat16, so features that are stored so are read as float32, exactly. Files are opened when
    first needed, anew in each process; a store may be pickled, forked and read by many processes.

    Args:
        path (`str` or `os.PathLike`): The folder.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: The store is unfinished, damaged, or of another version of this package.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self.manifest = read_manifest(self.path)
        self.shards = Shards(self.path, self.manifest["shards"])
        self._index: Index | None = None
        self._coming: dict[str, int] = {}  # numbers of images that `will_need` named and that are not read yet

    @property
    def index(self) -> Index:
        """The index, which finds the place of an id; opened when first asked for."""
        if self._index is None:
            self._index = Index(self.path, len(self))
        return self._index

    def __fspath__(self) -> str:
        return str(self.path)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, images={len(self)}, feature_dim={self.feature_dim})"

    @property
    def provenance(self) -> dict[str, Any]:
        """
        The origin of the regions, ready for JSON: `detector`, `detector_revision`, `detector_options`,
        `detector_declared`, `box_type`, `thresholds`, `class_names`, `num_classes`, `source_format` (None where
        unknown), `feature_dim`, `dtype`, `package_version`.
        """
        return {"detector_options": None, **json.loads(json.dumps(self.manifest["provenance"]))}

    @property
    def feature_dim(self) -> int:
        """The width D of the features."""
        return self.manifest["provenance"]["feature_dim"]

    @property
    def num_regions(self) -> int:
        """The number of regions of all images together."""
        return self.manifest["regions"]

    def __len__(self) -> int:
        return self.manifest["images"]

    def __iter__(self) -> Iterator[str]:
        return islice(self.index.image_ids, len(self))

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.index.ids

    def __getitem__(self, image_id: str) -> RegionRecord:
        return self._named(image_id, self.record_at(self.number_of(image_id)))

    def get_many(self, image_ids: Iterable[str]) -> list[RegionRecord]:
        """
        Reads the records of images, in the order of `image_ids`; the kernel fetches them all at once, in disk order.
        Raises KeyError where no image has an id.
        """
        check_several("image_ids", image_ids)
        image_ids = list(image_ids)
        wanted = set(image_ids)
        numbers = {image_id: n for image_id in wanted if (n := self._coming.pop(image_id, None)) is not None}
        numbers |= self._fetch(wanted - numbers.keys())
        places = ((image_id, *self.shards.find(numbers[image_id])) for image_id in image_ids)
        return [self._named(image_id, shard.record(row)) for image_id, shard, row in places]

    def _named(self, image_id: str, record: RegionRecord) -> RegionRecord:
        """
        Gives the record if it has the id that was asked for. Raises ValueError where a shard of another store is here.
        """
        if record.image_id != image_id:
            raise ValueError(
                f"{self.path} holds image {record.image_id!r} where its index has {image_id!r}: its files are not all "
                "of one store. Copy it again; `unicoder-vl validate` says which are wrong."
            )
        return record

    def will_need(self, image_ids: Iterable[str]) -> None:
        """
        Has the kernel fetch these images, without waiting for them: name the images of the next batch before you
        compute on this one, and the disk works meanwhile ([`ReadAhead`] does so for the batches of a `DataLoader`).
        """
        if len(self._coming) > MAX_COMING:  # other processes read these, or nobody does
            self._coming = {}
        self._coming |= self._fetch(image_ids)

    def _fetch(self, image_ids: Iterable[str]) -> dict[str, int]:
        """Has the kernel fetch images, in disk order, and gives their numbers."""
        check_several("image_ids", image_ids)
        numbers = {image_id: self.number_of(image_id) for image_id in image_ids}
        for number in sorted(numbers.values()):
            shard, row = self.shards.find(number)
            shard.will_need_row(row)
        return numbers

    def number_of(self, image_id: str) -> int:
        """Gives the place of an image in disk order, from 0. Raises KeyError where no image has this id."""
        return self.index.number_of(image_id)

    def highest_object_ids(self, image_ids: Iterable[str]) -> np.ndarray:
        """
        Gives the highest object id of each of these images, int `(len(image_ids),)`: -1 where no region has a class,
        `shards.NO_OBJECT_IDS` where the record has no ids. Only the ids are read, within seconds for a million images.
        """
        return self._from_tables(image_ids, Shard.highest_object_ids)

    def region_counts(self, image_ids: Iterable[str]) -> np.ndarray:
        """The number of regions of each of these images. Reads the offsets alone, and no features."""
        return self._from_tables(image_ids, lambda shard: np.diff(shard.region_offsets))

    def _from_tables(self, image_ids: Iterable[str], table: Callable[[Shard], np.ndarray]) -> np.ndarray:
        """The integer of each image in a table that every shard has for all of its images."""
        check_several("image_ids", image_ids)
        numbers = np.fromiter(map(self.number_of, image_ids), np.int64)
        shard_of = np.searchsorted(self.shards.starts, numbers, side="right") - 1
        values = np.empty(len(numbers), np.int64)
        for shard in np.unique(shard_of).tolist():
            here = shard_of == shard
            values[here] = table(self.shards[shard])[numbers[here] - self.shards.starts[shard]]
        return values

    def record_at(self, number: int) -> RegionRecord:
        """Reads the record at a place in disk order."""
        shard, row = self.shards.find(number)
        shard.will_need_row(row)
        return shard.record(row)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload regions",
    ) -> str:
        """
        Uploads the store to a dataset repository, made if need be, with a card written from the manifest; a card that
        someone wrote (`README.md` here or there) is kept. After an interruption the same call goes on. The manifest
        goes last, so that a store on the Hub is complete, too. Returns the full name of the repository.

        Args:
            repo_id (`str`): Name of the repository, such as `"someone/flickr30k-regions"`.
            private (`bool`, *optional*): Whether a new repository is private; None takes the default of the account.
            token (`str` or `bool`, *optional*): Access token; None takes the one that `hf auth login` saved.
            revision (`str`, *optional*): A branch that exists; None is the main one.
            commit_message (`str`): Message of the commit.
        """
        from .hub import push_store

        return push_store(self.path, self.manifest, repo_id, private, token, revision, commit_message)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        image_ids: Iterable[str] | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """
        Downloads a store from the Hub, or finds it in the cache, and opens it.

        Args:
            repo_id (`str`): The dataset repository.
            revision (`str`, *optional*): A branch, tag or commit; None is the main branch.
            image_ids (iterable of `str`, *optional*): Images whose shards are fetched; None fetches all. All ids stay
                known, but reading an image of another shard raises FileNotFoundError: call again with its id.
            cache_dir (`str` or `os.PathLike`, *optional*): Folder of the cache; None takes that of huggingface_hub.
            token (`str` or `bool`, *optional*): Access token; None takes the one that `hf auth login` saved.
            local_files_only (`bool`, defaults to `False`): Whether to look in the cache only.

        Raises:
            KeyError: The store has no image with one of the ids.
            FileNotFoundError: A file is not in the cache, and `local_files_only` is set; or the repository lacks it.
        """
        from .hub import fetch_store

        return cls(fetch_store(repo_id, revision, image_ids, cache_dir, token, local_files_only))


class NoRecordWritten(ValueError):
    """An error of a writer whose block ended without a record, so that there is no store."""


class OtherSettings(ValueError):
    """
    An error that says that a store was begun with other settings.

    Args:
        path (`Path`): Folder of the store.
        differences (`str`): The settings then and now, in words.
        told (`str`): A further way out, in words.
    """

    def __init__(self, path: Path, differences: str, told: str = ""):
        super().__init__(path, differences, told)
        self.differences, self.told = differences, told

    def __str__(self) -> str:
        return (
            f"{self.args[0]} was begun with {self.differences}: go on with equal settings, begin anew with --restart, "
            f"or take another folder{self.told}."
        )


def _differences(name: str, before: Any, now: Any) -> str:
    """Says how a setting differs; of a table, such as the thresholds, only what differs in it."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{name}={before!r}, not {now!r}"
    entries = [entry for entry in {**before, **now} if before.get(entry) != now.get(entry)]
    return ", ".join(f"{entry}={before.get(entry)!r}, not {now.get(entry)!r}" for entry in entries)


class RegionStoreWriter:
    """
    Writes a `RegionStore`, as a context manager with `write(record)`.

    Shards appear whole or not at all, the manifest when the `with` block ends without an error. After an error or a
    kill the complete shards stay; `resume=True` goes on behind them, and `image_id in writer.resumed` tells which
    images need not be written again (`image_id in writer` includes the new ones). A folder has one writer at a time:
    several processes write several stores, which `editing.merge_stores` makes one.

    Args:
        path (`str` or `os.PathLike`): The folder, made if need be.
        dtype (`str`, defaults to `"float16"`): Type of the stored features, `"float16"`, `"bfloat16"` or `"float32"`.
            bfloat16 has the range of float32 and 8 bits of precision; NumPy does not have it, so that records of such
            a store have float32 features.
        shard_size (`int`, defaults to 512 MiB): Bytes after which a shard is complete; so it is after 262,144 images.
        resume (`bool`, defaults to `False`): Whether to go on with an unfinished store, or add to a finished one, of
            equal provenance; an empty folder is fine, too. With False a folder that holds a store is refused.
        detector, detector_revision (`str`, *optional*): The detector that found the regions, such as a name and a
            commit on the Hub.
        detector_options (`dict`, *optional*): Options that the detector was loaded with, as JSON has them.
        detector_declared (`bool`, *optional*): Whether a user named the detector, rather than a file.
        box_type (`str`, *optional*): Kind of the boxes, such as `"proposal"`, `"regressed"` or `"ground truth"`.
        thresholds (`dict`, *optional*): Limits by which the detector kept regions, such as
            `{"score": 0.2, "max_regions": 100}`.
        class_names (sequence of `str`, *optional*): Name of each object id, without background.
        num_classes (`int`, *optional*): Number of object classes where their names are unknown. Ids must be below it.
        source_format (`str`, *optional*): The foreign format that the records were read from.

    Raises:
        ValueError: The folder holds a store that `resume` does not allow or match, or an argument is malformed.
        NoRecordWritten: The block ends without a record; this is a ValueError, too.
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
        detector_options: Mapping[str, Any] | None = None,
        detector_declared: bool | None = None,
        box_type: str | None = None,
        thresholds: Mapping[str, Any] | None = None,
        class_names: Iterable[str] | None = None,
        num_classes: int | None = None,
        source_format: str | None = None,
    ):
        if dtype not in LARGEST:
            raise ValueError(f"dtype is {dtype!r}, expected one of {list(LARGEST)}.")
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}, expected a positive number of bytes.")
        names = None if class_names is None else list(class_names)
        if names is not None and num_classes not in (None, len(names)):
            raise ValueError(f"num_classes is {num_classes}, but there are {len(names)} class_names: give one of them.")
        self.path = Path(path).absolute()
        self.shard_size = shard_size
        self._provenance: dict[str, Any] = {
            "detector": detector,
            "detector_revision": detector_revision,
            "detector_options": None if detector_options is None else dict(detector_options),
            "detector_declared": detector_declared,
            "box_type": box_type,
            "thresholds": None if thresholds is None else dict(thresholds),
            "class_names": names,
            "num_classes": num_classes if names is None else len(names),
            "source_format": source_format,
            "dtype": dtype,
        }
        self._widths: dict[str, int] = {}  # widths of the wide fields, which are the same in all records of a store
        self._shards = Shards(self.path)
        self._ids = ImageIds(self._shards.image_id)  # ids in the shards
        self._new: dict[str, int] = {}  # ids in the shard being written, with their rows
        self._pending: ShardWriter | None = None
        self._open = True
        self._made = not self.path.exists()
        make_folder(self.path)
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            self._start(resume)
            self._lock = stack.pop_all()
        self.resumed = self._ids.copy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        with self._lock:
            try:
                if kind is None:
                    with full_disk_named(self.path):
                        self._finish()
                elif self._pending is not None:
                    self._pending.discard()
            finally:
                self._forget_empty()
                if self._made:
                    with suppress(OSError):  # it holds something
                        self.path.rmdir()

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._new or image_id in self._ids

    def __len__(self) -> int:
        return len(self._ids) + len(self._new)

    @property
    def feature_dim(self) -> int | None:
        """The width D of the features; None before the first record."""
        return self._widths.get("features")

    def write(self, record: RegionRecord) -> None:
        """
        Adds a record to the store.

        Raises:
            ValueError: The id is here already, the width differs from that of the records before, an object id is not
                below `num_classes`, or a feature does not fit into the dtype. The store is as it was before the call.
        """
        if not self._open:
            raise ValueError(f"The writer of {self.path} is closed: write inside its with block.")
        if not is_region_record(record):
            raise ValueError(f"write takes a RegionRecord, got a {type(record).__name__}.")
        if record.image_id in self:
            raise ValueError(
                f"Image {record.image_id!r} is in {self.path} already: ids must differ; skip what is in writer.resumed."
            )
        features = self._check(record)
        with full_disk_named(self.path):
            if self._pending is None:
                self._pending = ShardWriter(shard_path(self.path, len(self._shards)))
            self._pending.add(record, features)
            self._new[record.image_id] = len(self._new)
            self._note_widths(record.features, record.class_probabilities)
            if self._pending.num_bytes >= self.shard_size or len(self._pending) >= MAX_SHARD_IMAGES:
                self._commit_shard()

    def holds(self, record: RegionRecord) -> bool:
        """
        Tells whether the image of this id is here and equals what `write` would make of `record`, by its checksum.
        """
        if (row := self._new.get(record.image_id)) is not None and self._pending is not None:
            written = self._pending.checksum(row)
        elif (number := self._ids.find(record.image_id)) is not None:
            shard, row = self._shards.find(number)
            written = shard.checksum(row)
        else:
            return False
        return written == checksum(record, self._stored(record.features))

    def _forget_empty(self) -> None:
        """
        Removes the settings of an unfinished store without shards: nothing was written yet, so other settings may
        follow.
        """
        progress = self.path / UNFINISHED
        if shard_path(self.path, 0).exists() or not progress.exists():
            return
        if MERGE not in json.loads(progress.read_text(encoding="utf-8")):
            progress.unlink()

    def _start(self, resume: bool) -> None:
        self._forget_empty()
        # An unfinished store may be a finished one that is being extended: then it has more shards than the manifest.
        known = [self.path / name for name in (UNFINISHED, MANIFEST) if (self.path / name).exists()]
        if known and not resume:
            state = "a finished" if known[-1].name == MANIFEST else "an unfinished"
            raise ValueError(f"{self.path} holds {state} store: go on with resume=True, or take another folder.")
        if not known and shard_path(self.path, 0).exists():
            raise ValueError(f"{self.path} holds shards but neither {MANIFEST} nor {UNFINISHED}: take another folder.")
        for partial in self.path.glob("*.partial"):  # left by a killed process
            partial.unlink()
        if known:
            before = json.loads(known[0].read_text(encoding="utf-8"))
            self._check_same(before)
            for facts in before["shards"]:
                self._adopt(facts)
        else:
            self._note_progress()
        # A process may have been killed after it wrote a shard, and before it noted that.
        while (path := shard_path(self.path, len(self._shards))).exists():
            self._adopt(Shard(path).facts())

    def _adopt(self, facts: dict[str, Any]) -> None:
        """Adds a shard that is here already, to go on behind it."""
        self._shards.add(facts)
        shard = self._shards[len(self._shards) - 1]
        self._ids.add(shard.image_ids)
        self._note_widths(shard.features, shard.tensors.get("class_probabilities"))

    def _note_progress(self) -> None:
        settings = {"format_version": FORMAT_VERSION, "provenance": self._provenance, "shards": self._shards.facts}
        write_json(self.path / UNFINISHED, settings)

    def _check_same(self, before: dict[str, Any]) -> None:
        if MERGE in before:
            raise ValueError(f"{self.path} is being merged from {before[MERGE]}: merge them again.")
        if before.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} has format version {before.get('format_version')}, expected {FORMAT_VERSION}: "
                "update unicoder-vl-hf, or take another folder."
            )
        now = json.loads(json.dumps(self._provenance))  # tuples become lists, as they did before
        for name, value in now.items():
            if before["provenance"].get(name) != value and name != UNCOMPARED:
                told = "; `unicoder-vl merge --num-classes` tells it to a finished one" if name == "num_classes" else ""
                raise OtherSettings(self.path, _differences(name, before["provenance"].get(name), value), told)

    def _check(self, record: RegionRecord) -> np.ndarray:
        """Checks a record and gives its features as they will be stored."""
        name = record.image_id
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"Image {name!r}: the id is no text, expected one that UTF-8 can encode.") from None
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
        features, dtype = record.features, self._provenance["dtype"]
        if features.dtype != np.float16 and dtype != "float32":  # values of float16 fit into every dtype
            largest = float(max(features.max(), -features.min()))
            if largest > LARGEST[dtype]:
                advice = "write the store with dtype='float32' (--dtype float32)"
                if largest > ABSURD:
                    advice = "no detector gives such (float32 would hold it): it may have been read as a wrong type"
                raise ValueError(
                    f"Image {name!r}: features hold a magnitude of {largest}, but {dtype} ends at {LARGEST[dtype]}: "
                    f"{advice}."
                )
        return self._stored(features)

    def _stored(self, features: np.ndarray) -> np.ndarray:
        dtype = self._provenance["dtype"]
        if dtype == "bfloat16":
            return to_bfloat16(features)
        if dtype == "float16" and features.dtype == np.float32:
            return to_float16(features)
        return features.astype(dtype, copy=False)

    def _note_widths(self, features: np.ndarray, class_probabilities: np.ndarray | None) -> None:
        self._widths["features"] = features.shape[1]
        if class_probabilities is not None:
            self._widths["class_probabilities"] = class_probabilities.shape[1]

    def _commit_shard(self) -> None:
        if self._pending is not None:
            self._pending.commit()
            self._shards.add(Shard(shard_path(self.path, len(self._shards))).facts())
            self._note_progress()
            self._ids.add(self._pending.image_ids)
            self._pending, self._new = None, {}

    def _finish(self) -> None:
        self._commit_shard()
        if not len(self._shards):
            raise NoRecordWritten(f"No record was written to {self.path}: a store holds at least one image.")
        if not (self.path / MANIFEST).exists() or self._shards.facts != read_manifest(self.path)["shards"]:
            finish_store(self._shards, self._ids, {**self._provenance, "feature_dim": self._widths["features"]})
        (self.path / UNFINISHED).unlink(missing_ok=True)


def finish_store(shards: Shards, ids: ImageIds, provenance: dict[str, Any]) -> None:
    """Writes the index and the manifest of a folder of shards."""
    manifest = {
        "format": "region store of unicoder-vl-hf",
        "format_version": FORMAT_VERSION,
        "images": shards.num_images,
        "regions": sum(facts["regions"] for facts in shards.facts),
        "provenance": {**provenance, "package_version": __version__},
        "index": write_index(shards, ids),
        "shards": shards.facts,
    }
    write_json(shards.folder / MANIFEST, {**manifest, "sha256": manifest_checksum(manifest)})


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Gives a SHA-256 of everything in a manifest except the checksum itself."""
    return json_digest({name: value for name, value in manifest.items() if name != "sha256"})
