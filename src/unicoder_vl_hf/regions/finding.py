"""Finds the regions of photos that are at hand, as an extraction finds them, without a store."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import logging
from ..feature_extraction_unicoder_vl import provenance_differences
from ..records_unicoder_vl import RegionRecord
from .detectors import FAMILIES, Detector, load_detector
from .photos import describe, read_photo
from .shards import MANIFEST, from_bfloat16, to_bfloat16
from .store import RegionStore, RegionStoreWriter

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.get_logger(__name__)

# A GPU computes this many photos at a time. A CPU gains nothing by it and takes one, which makes a stop quicker.
GPU_BATCH_SIZE = 8


class RegionFinder:
    """
    A function from photos to the records of their regions. Its detector is loaded when the first photo comes.

    Args:
        detector (`str` or [`Detector`], *optional*): The name of a detector, see [`load_detector`], or a detector.
            Defaults to the one that `trained_on` names.
        trained_on (`dict`, *optional*): Provenance of the regions that a model was trained on, such as
            `processor.feature_extractor.region_provenance`. Another detector than its own is warned of.
        device (`torch.device` or `str`, *optional*): Device to compute on; None takes a GPU if there is one.
        cache (`str` or `os.PathLike`, *optional*): The folder of a [`RegionStore`], made if need be, that keeps what is
            found under the SHA-256 of a photo's content, so that the same photo is not detected in twice.
        options: Options of a detector by name, and its `precision`. Defaults to those that `trained_on` has of it.

    Example:

    ```python
    >>> finder = RegionFinder("grid:facebook/dinov2-base")
    >>> (record,) = finder(["photo.jpg"])
    ```
    """

    def __init__(
        self,
        detector: str | Detector | None = None,
        *,
        trained_on: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        cache: str | PathLike[str] | None = None,
        **options: Any,
    ):
        self.detector = detector
        self.trained_on = dict(trained_on or {})
        self.device = device
        self.cache = None if cache is None else Path(cache)
        self.options = options
        self._loaded: Detector | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_loaded": None}  # another process loads its own

    def __call__(self, photos: "Sequence[str | PathLike[str] | Image]") -> list[RegionRecord]:
        """
        Finds the regions of photos, in their order.

        Args:
            photos (sequence of `str`, `os.PathLike` or `PIL.Image.Image`): Files, or opened photos. A record is named
                by its file, or by its place among the photos.

        Raises:
            `ValueError`: there is no detector, it is not that of the training or of the cache, or a photo is damaged or
                gives no region; the message names it.
            `OSError`: there is no such file, or the detector's weights are not here.
        """
        names = [_name(place, photo) for place, photo in enumerate(photos)]
        if self.cache is None:
            return list(self._find(names, photos))
        keys = [_content_id(*pair) for pair in zip(names, photos, strict=True)]
        store = self._open(self.cache)
        known: Mapping[str, RegionRecord] = {} if store is None else store
        new = {key: place for place, key in enumerate(keys) if key not in known}
        found: dict[str, RegionRecord] = {}
        try:  # an error, or Ctrl-C, costs no photo that was before it
            places = new.values()
            records = self._find([names[place] for place in places], [photos[place] for place in places])
            found.update(zip(new, records, strict=True))
        finally:
            self._keep(self.cache, store, found)
        return [
            replace(found[key] if key in found else known[key], image_id=name)
            for key, name in zip(keys, names, strict=True)
        ]

    def _open(self, cache: Path) -> RegionStore | None:
        """Opens what was found before. Raises ValueError where it is by another detector."""
        if not (cache / MANIFEST).exists():
            return None
        store = RegionStore(cache)
        # What the detector of the training found is known by its revision, and nothing needs to be loaded.
        is_known = self.detector is None and self.trained_on.get("detector_revision") is not None
        wanted = self.trained_on if is_known else self.load().provenance
        differences = provenance_differences(wanted, store.provenance, ("here", "there"))
        if self._dtype != store.provenance["dtype"]:
            differences.append(f"dtype {self._dtype!r} here, {store.provenance['dtype']!r} there")
        if not re.fullmatch("[0-9a-f]{64}", image_id := next(iter(store))):
            differences.append(f"it has the image {image_id!r}, and so is a store of another use")
        if differences:
            raise ValueError(
                f"{cache} is no cache of this detector: {'; '.join(differences)}. Name another folder (cache=, "
                "--cache)."
            )
        return store

    def _keep(self, cache: Path, store: RegionStore | None, found: Mapping[str, RegionRecord]) -> None:
        """Adds records to the cache, by which the detector may have another name, that of its folder then."""
        if not found:
            return
        provenance = self.load().provenance | {"dtype": self._dtype} if store is None else store.provenance
        options = {name: value for name, value in provenance.items() if name not in ("feature_dim", "package_version")}
        with RegionStoreWriter(cache, resume=True, **options) as writer:
            for key, record in found.items():
                if key not in writer:  # another process may have found it, too
                    writer.write(replace(record, image_id=key))

    @property
    def _dtype(self) -> str:
        return self.trained_on.get("dtype") or "float32"

    def load(self) -> Detector:
        """
        Loads the detector now, before the first photo comes. Raises ValueError where there is none or it is not that of
        the training, and OSError where its weights are not here.
        """
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _find(self, names: Sequence[str], photos: "Sequence[str | PathLike[str] | Image]") -> Iterator[RegionRecord]:
        if not photos:
            return
        detector = self.load()
        size = default_batch_size(self.device)
        starts = range(0, len(photos), size)
        for start in logging.tqdm(starts, desc="Finding regions", unit="batch", leave=False, disable=len(starts) < 2):
            read = []
            for place in range(start, min(start + size, len(photos))):
                image, shape = read_photo(photos[place], names[place])
                read.append(ReadPhoto(place, names[place], shape, image.size, detector.prepare(image)))
            for photo, found in zip(read, detect(detector, read), strict=True):
                if isinstance(found, Exception):
                    raise ValueError(f"{photo.image_id} gives no regions: {describe(found)}.") from found
                yield self._as_stored(found)

    def _load(self) -> Detector:
        detector = self.detector
        own: str | None = self.trained_on.get("detector")
        if detector is None:
            if str(own).partition(":")[0] not in FAMILIES:
                kind = f"{own!r}, which is not loaded unasked" if own else "no detector"
                raise ValueError(
                    f"The regions that the model was trained on come from {kind}, so those of a photo cannot be found: "
                    "name the detector (detector=, --detector), or give an image of a store."
                )
            detector = str(own)
        if isinstance(detector, str):
            options = (self._own_options() if detector == own else {}) | self.options
            try:
                detector = load_detector(detector, device=self.device, **options)
            except (OSError, ValueError, ImportError) as error:
                if self.detector is not None:
                    raise
                raise next(kind for kind in (OSError, ImportError, ValueError) if isinstance(error, kind))(
                    f"{error} It is the detector of the regions that the model was trained on; if it is elsewhere, "
                    "name it (detector=, --detector)."
                ) from error
        differences = provenance_differences(self.trained_on, detector.provenance)
        if differences and self.detector is None:
            raise ValueError(
                f"{own} is not what it was in training: {'; '.join(differences)}. Name a detector and its options "
                "(detector=, --detector) to find regions by it all the same."
            )
        if differences:
            logger.warning(f"The detector is not that of the training: {'; '.join(differences)}.")
        return detector

    def _own_options(self) -> dict[str, Any]:
        """Gives the options of the training's own detector, with the commit if it is of the Hub."""
        revision = str(self.trained_on.get("detector_revision"))
        commit = {"revision": revision} if re.fullmatch("[0-9a-f]{40}", revision) else {}
        return commit | (self.trained_on.get("detector_options") or {})

    def _as_stored(self, record: RegionRecord) -> RegionRecord:
        """Rounds the features as the store of the training did, so that a photo scores as its stored record does."""
        dtype = self.trained_on.get("dtype")
        if dtype == "float16":
            return replace(record, features=record.features.astype(np.float16))
        return replace(record, features=from_bfloat16(to_bfloat16(record.features))) if dtype == "bfloat16" else record


def _name(place: int, photo: "str | PathLike[str] | Image") -> str:
    """Names a photo by its file, or by its place among the photos."""
    if isinstance(photo, (str, PathLike)):
        return fspath(photo)
    return vars(photo).get("filename") or f"photo {place + 1}"


def _content_id(name: str, photo: "str | PathLike[str] | Image") -> str:
    """Names a photo by its content: the bytes of a file, or the pixels of an opened one."""
    if isinstance(photo, (str, PathLike)):
        return hashlib.sha256(Path(photo).read_bytes()).hexdigest()
    image, size = read_photo(photo, name)
    return hashlib.sha256(repr((size, image.size)).encode() + image.tobytes()).hexdigest()


def default_batch_size(device: torch.device | str | None) -> int:
    """Gives the number of photos in a call of a detector on this device; None is a GPU if there is one."""
    on_cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    return 1 if on_cpu else GPU_BATCH_SIZE


@dataclass(frozen=True)
class ReadPhoto:
    """A photo that was read, in the form that the detector takes; `problem` says why it could not be read."""

    index: int
    image_id: str
    size: tuple[int, int] = (1, 1)  # width and height of the upright photo
    decoded_size: tuple[int, int] = (1, 1)
    prepared: Any = None
    boxes: np.ndarray | None = None  # given ones, in pixels of the upright photo
    problem: str | None = None

    @property
    def scale(self) -> np.ndarray:
        """The factors `(4,)` that take boxes in the decoded photo to boxes in the photo."""
        return np.tile(np.divide(self.size, self.decoded_size), 2)


def detect(detector: Detector, photos: Sequence[ReadPhoto]) -> list[RegionRecord | Exception]:
    """
    Gives the records of some photos, or for each the reason why it has none. Where the photos fail together, each is
    tried alone, so that an odd photo, or too many for the memory, cost no other.
    """
    ids = [photo.image_id for photo in photos]
    boxes = None if photos[0].boxes is None else [photo.boxes / photo.scale for photo in photos]
    try:
        records = detector([photo.prepared for photo in photos], ids, boxes)
        return [_in_photo(record, photo) for record, photo in zip(records, photos, strict=True)]
    except Exception as error:
        return [error] if len(photos) == 1 else [detect(detector, [photo])[0] for photo in photos]


def _in_photo(record: RegionRecord, photo: ReadPhoto) -> RegionRecord:
    """
    Gives a record with its boxes in the photo, where the decoded photo has another size; given boxes as they were
    given.
    """
    if photo.boxes is None and photo.size == photo.decoded_size:
        return record
    boxes = photo.boxes if photo.boxes is not None else record.boxes * photo.scale
    return replace(record, image_width=photo.size[0], image_height=photo.size[1], boxes=boxes)
