"""
Parts of an extraction: photos that are read, detected in and written to a store of their own by whatever process, which
may be killed and go on.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from .. import logging
from ..processes import StopSignal
from ..records_unicoder_vl import RegionRecord
from ..shares import Share
from .detectors import Detector
from .finding import ReadPhoto, detect
from .photos import PhotoSource, decode_photo, describe
from .shards import STORE
from .store import NoRecordWritten, OtherSettings, RegionStore, RegionStoreWriter

# Photos are sorted by shape over this many batches: a detector computes those of equal shape together.
BATCHES_SORTED = 4

Boxes = Mapping[str, np.ndarray]


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


@dataclass
class Work:
    """
    Photos and how they are extracted: all but the detector that a process needs, and in a form that can be sent to it.

    Args:
        source (`PhotoSource`): The photos.
        given (`Mapping`, *optional*): Boxes that are given, by image_id.
        prepare (callable): That of the detector.
        parts (`Path`): The folder of the parts, each a store and a list of skipped photos.
        settings (`dict`): Arguments of `RegionStoreWriter`.
        batch_size (`int`, *optional*): Number of photos in a call of the detector; None takes that of its device.
        patience (`int`): Number of photos in a row at which the detector fails when its error is raised.
        failed (`frozenset` of `str`, *optional*): Ids of photos that gave no regions in an earlier run: that these fail
            again says nothing of the detector.
    """

    source: PhotoSource
    given: Boxes | None
    prepare: Any
    parts: Path
    settings: dict[str, Any]
    batch_size: int | None
    patience: int
    failed: frozenset[str] = frozenset()

    @property
    def store(self) -> Path:
        """The folder of the store that the parts become."""
        return self.parts.with_name(self.parts.stem)

    def only(self, indices: Sequence[int]) -> "Work":
        """Gives the same with some of the photos alone."""
        source = self.source.only(indices)
        given = self.given and {image_id: self.given[image_id] for image_id in source.ids if image_id in self.given}
        return replace(self, source=source, given=given, failed=self.failed.intersection(source.ids))

    def read(self, index: int) -> ReadPhoto:
        """Reads a photo in the form that the detector takes. An error in it is returned with it, and not raised."""
        image_id = self.source.ids[index]
        try:
            image, size = decode_photo(self.source.read(index))
            boxes = None if self.given is None else _boxes_of(image_id, size, self.given)
            return ReadPhoto(index, image_id, size, image.size, self.prepare(image), boxes)
        except Exception as error:
            return ReadPhoto(index, image_id, problem=describe(error))

    def part(self, name: str) -> Path:
        """Gives the folder of a part."""
        return self.parts / f"part-{name}"

    def skip_list(self, name: str) -> Path:
        """Gives the file that lists the photos which a part lacks, a line for each time that one failed."""
        return self.parts / f"skipped-{name}.jsonl"

    def left_of(self, name: str, indices: Iterable[int]) -> list[int]:
        """Gives those of some photos that a part lacks. What a killed process left of it becomes whole."""
        part = self.part(name)
        if part.exists():
            self.finish(part)
        done = RegionStore(part) if STORE.is_complete(part) else {}
        return [index for index in indices if self.source.ids[index] not in done]

    def finish(self, store: Path) -> None:
        """
        Makes a finished store of what a killed process left. Raises OtherSettings where it was begun with such, in the
        name of the store that the parts become.
        """
        try:
            with suppress(NoRecordWritten), RegionStoreWriter(store, resume=True, **self.settings):
                pass
        except OtherSettings as error:
            raise OtherSettings(self.store, error.differences, error.told) from error
        _remove_empty(store)

    def write(
        self, name: str, results: "Iterable[tuple[ReadPhoto, RegionRecord | str]]", told_to_stop: Callable[[], bool]
    ) -> None:
        """
        Writes a part and its list of skipped photos, or goes on with both, until it is told to stop. Raises the errors
        of `results`; regions that were extracted before are kept.
        """
        failures: list[Exception] = []
        with (
            # The name of a file may be no text.
            self.skip_list(name).open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as skips,
            suppress(NoRecordWritten),
            RegionStoreWriter(self.part(name), resume=True, **self.settings) as writer,
        ):
            for photo, result in _until_failure(results, failures):
                if isinstance(result, RegionRecord):
                    try:
                        writer.write(result)
                    except ValueError as error:  # such as features that do not fit into float16
                        result = describe(error)
                if isinstance(result, str):
                    row = {"image_id": photo.image_id, "file": self.source.name(photo.index), "reason": result}
                    skips.write(json.dumps(row, ensure_ascii=False) + "\n")
                if told_to_stop():
                    break
        _remove_empty(self.part(name))
        if failures:
            raise failures[0]

    def extract(
        self, name: str, indices: Sequence[int], detector: Detector, num_workers: int, shown: bool = True
    ) -> None:
        """
        Extracts photos in this process, with a progress bar if it is `shown`, and writes them to a part. Raises
        KeyboardInterrupt when told to stop, and the errors of `detected`.
        """
        photos: Iterable[ReadPhoto] = DataLoader(
            indices,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            collate_fn=self.read,  # type: ignore[arg-type]
            worker_init_fn=_leave_signals,
        )
        results = logging.tqdm(
            detected(detector, photos, self.batch_size or 1, self.patience, self.failed),
            desc=f"Extracting {self.store.name}",
            unit="photo",
            total=len(indices),
            disable=not shown,
        )
        with StopSignal("Stopping after this photo. Once more to stop at once.") as stop:
            self.write(name, results, stop.is_set)
        if stop.is_set():
            raise KeyboardInterrupt(f"Stopped; the regions so far are in {self.parts}, and the same call goes on.")


def _until_failure(items: Iterable[Any], failures: list[Exception]) -> Iterator[Any]:
    """Yields the items before the one whose making fails; the error goes into the list."""
    try:
        yield from items
    except Exception as error:
        failures.append(error)


def detected(
    detector: Detector, photos: Iterable[ReadPhoto], batch_size: int, patience: int, failed_before: Set[str]
) -> "Iterator[tuple[ReadPhoto, RegionRecord | str]]":
    """
    Yields each photo with its record, or with the reason why it has none. Raises the error of the detector at the last
    of `patience` photos in a row, of which none failed before.
    """
    photos = iter(photos)
    sorted_at_once = 1 if batch_size == 1 else BATCHES_SORTED * batch_size
    failed = 0  # in a row
    while window := list(islice(photos, sorted_at_once)):
        yield from ((photo, photo.problem) for photo in window if photo.problem is not None)
        readable = [photo for photo in window if photo.problem is None]
        readable.sort(key=lambda photo: photo.size[0] / photo.size[1])
        for start in range(0, len(readable), batch_size):
            batch = readable[start : start + batch_size]
            for photo, result in zip(batch, detect(detector, batch), strict=True):
                if not isinstance(result, Exception):
                    failed = 0
                    yield photo, result
                    continue
                failed += photo.image_id not in failed_before
                if failed == patience:
                    raise result
                yield photo, describe(result)


def _leave_signals(worker: int) -> None:
    """Ignores Ctrl-C, which reaches every process: readers go on until the process that they read for ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def share_name(share: Share) -> str:
    """Gives the name of the part of a share."""
    return f"{share.index:05d}-of-{share.count:05d}"


def _remove_empty(part: Path) -> None:
    if not STORE.is_complete(part):
        shutil.rmtree(part, ignore_errors=True)  # a writer that wrote nothing has removed it
