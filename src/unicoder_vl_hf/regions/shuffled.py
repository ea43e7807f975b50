"""A store that gives every image the regions of another, to see what a model tells without looking."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..records_unicoder_vl import RegionRecord


class ShuffledStore(Mapping[str, RegionRecord]):
    """
    A store that gives every image the regions of another: with it a model can only tell from the text.

    Args:
        store (`Mapping[str, RegionRecord]`): The regions of the images.
        image_ids (sequence of `str`): The images that are shuffled, at least two.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffling.
    """

    def __init__(self, store: Mapping[str, RegionRecord], image_ids: Sequence[str], seed: int = 0):
        image_ids = sorted(set(image_ids))
        if len(image_ids) < 2:
            raise ValueError(f"image_ids holds {image_ids}, expected at least two images to take regions from.")
        order = np.random.default_rng(seed).permutation(len(image_ids))
        # One cycle through all images: none keeps its own regions.
        self.other = {image_ids[a]: image_ids[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
        self.store = store

    def __getitem__(self, image_id: str) -> RegionRecord:
        return dataclasses.replace(self.store[self.other[image_id]], image_id=image_id)

    def __iter__(self):
        return iter(self.other)

    def __len__(self) -> int:
        return len(self.other)
