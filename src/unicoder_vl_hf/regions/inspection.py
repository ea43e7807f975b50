"""What is in a store or a foreign file: counts, widths, which fields are known, and one record."""

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
    What `inspect_records` saw; printed as a table.

    Args:
        images (`int`): Records seen.
        regions (`Counter`): How many images have how many regions.
        features (`Counter`): How many images have features of which `(D, dtype)`.
        known (`Counter`): How many images know each optional field.
        example (`RegionRecord`): The first.
        complete (`bool`): Whether these were all.
    """

    images: int = 0
    regions: Counter[int] = field(default_factory=Counter)
    features: Counter[tuple[int, str]] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    example: RegionRecord | None = None
    complete: bool = True

    def __str__(self) -> str:
        some = "" if self.complete else " looked at, there are more"
        total = sum(count * images for count, images in self.regions.items())
        lines = [f"images    {self.images:,}{some}", f"regions   {total:,}"]
        lines += [
            f"features  {width} x {dtype} in {images:,} images" for (width, dtype), images in self.features.items()
        ]
        lines += [
            f"{name:20} {'all' if (images := self.known[name]) == self.images else f'{images:,}' if images else 'none'}"
            for name in (entry.name for entry in fields(RegionRecord))
            if name not in ("image_id", "features")
        ]
        lines += ["", "regions an image", *_histogram(self.regions)]
        if self.example is not None:
            lines += ["", f"first {describe(self.example)}"]
        return "\n".join(lines)


def describe(record: RegionRecord) -> str:
    """A line a field that is known: its kind, range and first row."""
    known = {name: value for name, value in record.to_dict().items() if name != "image_id"}
    return "\n".join(
        [f"record: {record.image_id!r}", *(f"  {name:20} {_shown(value)}" for name, value in known.items())]
    )


def inspect_records(
    records: Iterable[RegionRecord], max_images: int | None = None, total: int | None = None
) -> Inspection:
    """
    Looks at records one at a time, with a progress bar.

    Args:
        records (iterable of `RegionRecord`): Of a store (`store.values()`) or of `formats.read_records`.
        max_images (`int`, *optional*): Stop after so many.
        total (`int`, *optional*): Number of records, for the bar.
    """
    found, rest = Inspection(), iter(records)
    for record in logging.tqdm(islice(rest, max_images), desc="Inspecting", unit="image", total=total, leave=False):
        found.images += 1
        found.regions[record.num_regions] += 1
        found.features[record.features.shape[1], record.features.dtype.name] += 1
        found.known.update(record.to_dict().keys())
        found.example = found.example or record
    found.complete = next(rest, None) is None
    return found


def _histogram(counts: Counter[int], bins: int = 10, width: int = 40) -> list[str]:
    """A line a bin: from, to, images, and a bar."""
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
