"""
The comparison of two stores of the same images, region by region: do their features agree?

Features may differ for many reasons: another detector or revision, swapped channels, another resize, other boxes, ids
off by one. Regions are matched by their boxes, since row order means nothing; then features are compared by cosine, and
object classes by equality. Left out: judging which of the two is right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from .. import logging
from ..records_unicoder_vl import RegionRecord


@dataclass
class StoreComparison:
    """
    The result of `compare_stores`. Shares are fractions in 0..1, None where nothing could be compared.

    Args:
        images, only_in_a, only_in_b (`int`): Number of images in both stores, and in one of them only.
        without_boxes (`int`): Number of images in both that have no boxes in one of the stores: they were not compared.
        other_photos (`list`): Ids that stand for two different photos, as the proportions of their sizes show; they
            were not compared.
        matched, unmatched_in_a, unmatched_in_b (`int`): Number of regions of the compared images.
        ious (`np.ndarray` of shape `(matched,)`): Overlap of each matched pair of boxes (intersection over union, 0 to
            1).
        cosines (`np.ndarray` of shape `(matched,)`): Cosine of their features, -1 to 1; empty where the widths differ.
        same_class (`np.ndarray` of shape `(known,)`, bool): Whether the classes agree, for the matched regions whose
            class both stores know.
        class_offsets (`dict`): Class id in B minus that in A -> number of regions, commonest first: all at 1 or -1
            means that one of them counts a background class.
        worst (`list`): Image ids with the lowest mean cosine, each with that cosine.
    """

    images: int = 0
    only_in_a: int = 0
    only_in_b: int = 0
    without_boxes: int = 0
    other_photos: list[str] = field(default_factory=list)
    matched: int = 0
    unmatched_in_a: int = 0
    unmatched_in_b: int = 0
    ious: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    cosines: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    same_class: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    class_offsets: dict[int, int] = field(default_factory=dict)
    worst: list[tuple[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"images        {self.images:,} in both, {self.only_in_a:,} in A alone, {self.only_in_b:,} in B alone",
            f"regions       {self.matched:,} matched; without a match {self.unmatched_in_a:,} in A, "
            f"{self.unmatched_in_b:,} in B",
        ]
        if self.without_boxes:
            lines.append(f"without boxes {self.without_boxes:,} images, which were not compared")
        if self.other_photos:
            lines.append(
                f"other photos  {len(self.other_photos):,} images, such as {', '.join(self.other_photos[:3])}, which "
                "were not compared: the name is one, the proportions of the photos are not"
            )
        for name, values in (("box overlap", self.ious), ("cosine", self.cosines)):
            if len(values):
                low, middle = np.quantile(values, (0.05, 0.5))
                lines.append(f"{name:13} median {middle:.4f}, lowest 5 % below {low:.4f}, lowest {values.min():.4f}")
        if self.matched and not len(self.cosines):
            lines.append("cosine        none: the features differ in width")
        if len(self.same_class):
            lines.append(f"object class  {100 * self.same_class.mean():.1f} % of {len(self.same_class):,} agree")
            offset, count = next(iter(self.class_offsets.items()))
            if offset and count > 0.5 * len(self.same_class):
                lines.append(
                    f"              {count:,} ids in B are those of A {offset:+d}: is background counted in one?"
                )
        elif self.matched:
            lines.append("object class  could not be compared: no matched region has one in both")
        if self.worst and self.worst[0][1] < 0.99:
            lines.append("worst images  " + ", ".join(f"{name} ({cosine:.3f})" for name, cosine in self.worst))
        return "\n".join(lines)


def compare_stores(
    a: Mapping[str, RegionRecord],
    b: Mapping[str, RegionRecord],
    *,
    min_iou: float = 0.5,
    max_images: int | None = None,
) -> StoreComparison:
    """
    Compares the images that both stores hold, with a progress bar.

    Args:
        a, b (`Mapping[str, RegionRecord]`): Two stores that share image ids.
        min_iou (`float`, defaults to 0.5): Smallest overlap (0 to 1) at which boxes match. Each box matches at most one
            other, the largest overlaps first.
        max_images (`int`, *optional*): Number of images to compare, the first of A; None compares all.

    Raises:
        ValueError: No image is in both; the message shows ids of each.
    """
    found = StoreComparison()
    ious, cosines, offsets, means = [], [], [], []
    shared = [image_id for image_id in a if image_id in b]
    found.images, found.only_in_a, found.only_in_b = len(shared), len(a) - len(shared), len(b) - len(shared)
    if not shared:
        raise ValueError(
            f"No image is in both: A's ids are like {list(islice(a, 3))}, B's like {list(islice(b, 3))}. Convert one "
            "of them with other ids."
        )
    for image_id in logging.tqdm(shared[:max_images], desc="Comparing", unit="image"):
        one, other = a[image_id], b[image_id]
        if not _may_be_one_photo(one, other):
            found.other_photos.append(image_id)
            continue
        if one.boxes is None or other.boxes is None:
            found.without_boxes += 1
            continue
        overlap = box_iou(one.locations()[:, :4], other.locations()[:, :4])
        rows, columns = match_boxes(overlap, min_iou)
        found.matched += len(rows)
        found.unmatched_in_a += len(one) - len(rows)
        found.unmatched_in_b += len(other) - len(rows)
        ious.append(overlap[rows, columns])
        if len(rows) and one.features.shape[1] == other.features.shape[1]:
            cosines.append(_cosine(one.features[rows], other.features[columns]))
            means.append((float(cosines[-1].mean()), image_id))
        if one.object_ids is not None and other.object_ids is not None:
            left, right = one.object_ids[rows], other.object_ids[columns]
            known = (left >= 0) & (right >= 0)
            offsets.append((right - left)[known])
    if ious:
        found.ious = np.concatenate(ious)
    if cosines:
        found.cosines = np.concatenate(cosines)
        found.worst = [(image_id, cosine) for cosine, image_id in sorted(means)[:5]]
    if offsets:
        values, counts = np.unique(np.concatenate(offsets), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        found.class_offsets = dict(zip(values[order].tolist(), counts[order].tolist(), strict=True))
        found.same_class = np.concatenate(offsets) == 0
    return found


def _may_be_one_photo(a: RegionRecord, b: RegionRecord) -> bool:
    """Tells whether one photo may be the other, resized: each side is then rounded by less than a pixel."""
    sizes = [a.image_width, a.image_height, b.image_width, b.image_height]
    if None in sizes:
        return True
    width, height, other_width, other_height = (size or 0 for size in sizes)
    return abs(width * other_height - other_width * height) <= max(width + height, other_width + other_height)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """
    Gives the intersection over union of every box of `a (n, 4)` with every one of `b (m, 4)`: `(n, m)`, 0 to 1, 0 for
    empty boxes.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    overlap = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    intersection = overlap.clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def match_boxes(iou: np.ndarray, min_iou: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Matches the rows and columns of `iou (n, m)`, each at most once, the largest overlap first, none below `min_iou`.
    Gives the indices of both.
    """
    free, pairs = iou.copy(), []
    while free.size and (best := free.max()) >= min_iou and best > 0:
        row, column = np.unravel_index(free.argmax(), free.shape)
        pairs.append((row, column))
        free[row], free[:, column] = -1, -1
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return rows, columns


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float32), b.astype(np.float32)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), norms, out=np.zeros_like(norms), where=norms > 0)
