"""A look at a store or a foreign file: counts, widths, known fields, and one record."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise

import numpy as np

from .. import logging
from ..records_unicoder_vl import RegionRecord


@dataclass
class Inspection:
    """
    The result of `inspect_records`; `str` of it is a table.

    Args:
        images (`int`): Number of records seen.
        regions (`Counter`): Number of regions -> number of images.
        features (`Counter`): `(D, dtype)` of the features -> number of images.
        known (`Counter`): Optional field -> number of images that have it.
        repeated (`int`): Number of records whose id an earlier one has.
        example (`RegionRecord`): The first record.
        complete (`bool`): Whether all records were seen.
    """

    images: int = 0
    regions: Counter[int] = field(default_factory=Counter)
    features: Counter[tuple[int, str]] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    example: RegionRecord | None = None
    complete: bool = True

    def __str__(self) -> str:
        some = "" if self.complete else " looked at, there are more"
        total = sum(count * images for count, images in self.regions.items())
        lines = [f"images    {self.images:,}{some}"]
        lines += [f"repeated  {self.repeated:,} have the id of an earlier one"] if self.repeated else []
        lines += [f"regions   {total:,}"]
        lines += [
            f"features  {width} x {dtype} in {images:,} images" for (width, dtype), images in self.features.items()
        ]
        optional = (entry.name for entry in fields(RegionRecord) if entry.name not in ("image_id", "features"))
        in_words = {0: "none", self.images: "all"}
        lines += [f"{name:20} {in_words.get(self.known[name], f'{self.known[name]:,}')}" for name in optional]
        lines += ["", "regions an image", *_histogram(self.regions)]
        if self.example is not None:
            lines += ["", f"first {describe(self.example)}"]
        return "\n".join(lines)


def describe(record: RegionRecord) -> str:
    """Describes a record, a line for each known field: its dtype, shape, range and first row."""
    known = {name: value for name, value in record.to_dict().items() if name != "image_id"}
    return "\n".join(
        [f"record: {record.image_id!r}", *(f"  {name:20} {_shown(value)}" for name, value in known.items())]
    )


def check_photo_size(record: RegionRecord, photo: str, size: tuple[int, int]) -> None:
    """Raises ValueError where a photo has another size than the one in which the regions of a record were found."""
    known = record.image_width, record.image_height
    if None not in known and known != size:
        raise ValueError(
            f"{photo} is not the photo of {record.image_id!r}: it has {size[0]} x {size[1]} pixels, that has "
            f"{known[0]} x {known[1]}. Give the photo that the regions were found in, or another --image-id."
        )


def inspect_records(
    records: Iterable[RegionRecord], max_images: int | None = None, total: int | None = None
) -> Inspection:
    """
    Looks at records one at a time, with a progress bar.

    Args:
        records (iterable of `RegionRecord`): Records of a store (`store.values()`) or of `formats.read_records`.
        max_images (`int`, *optional*): Number of records to stop after.
        total (`int`, *optional*): Number of records, for the bar.
    """
    found, rest = Inspection(), iter(records)
    seen: set[int] = set()
    for record in logging.tqdm(islice(rest, max_images), desc="Inspecting", unit="image", total=total, leave=False):
        found.images += 1
        found.repeated += hash(record.image_id) in seen
        seen.add(hash(record.image_id))
        found.regions[record.num_regions] += 1
        found.features[record.features.shape[1], record.features.dtype.name] += 1
        found.known.update(record.to_dict().keys())
        found.example = found.example or record
    found.complete = next(rest, None) is None
    return found


def _histogram(counts: Counter[int], bins: int = 10, width: int = 40) -> list[str]:
    """Gives a line for each bin: from, to, images, and a bar."""
    if not counts:
        return []
    edges = np.unique(np.linspace(min(counts), max(counts) + 1, bins + 1).round().astype(int)).tolist()
    lines = []
    for first, last in pairwise(edges):
        images = sum(counts[n] for n in range(first, last))
        label = str(first) if last - first == 1 else f"{first}-{last - 1}"
        bar = "#" * round(width * images / counts.total())
        lines.append(f"{label:>9} {images:10,} {bar}")
    return lines


def _shown(value: object) -> str:
    if not isinstance(value, np.ndarray):
        return str(value)
    first = np.array2string(value[0], precision=3, threshold=6, edgeitems=3)
    return f"{value.dtype} {value.shape}, {value.min():.3g} to {value.max():.3g}, first {first}"
