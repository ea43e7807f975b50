"""Mismatched pairs: for every pair of a caption and its image, one of the two replaced by another of the split.

Follows the paper's visual-linguistic matching ("for every pair one negative is sampled: either another image or
another caption"). What stands in is taken from a row drawn uniformly over the whole split, in both directions, so
that captions and images occur in mismatches as often as they do in matches and none of them tells the label. A draw
is a pure function of (seed, epoch, row). Mining hard negatives is left out.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .captions import encode_column

SALT = 0x6E6567  # keeps these draws apart from masks and shuffles that use the same seed

_TRIES, _BLOCK = 16, 4


def fold_caption(text: str) -> str:
    """The form in which two captions count as the same text: case folded, runs of whitespace made one space."""
    return " ".join(text.casefold().split())


class MismatchIndex:
    """
    Which caption text belongs to which image, as sorted integers: 16 bytes a pair, whatever the texts.

    A text belongs to an image where any row pairs the two, case and spacing folded. Thus neither another caption of
    an image nor the same words on another image ever counts as a mismatch.

    Args:
        images (`np.ndarray` of shape `(num_pairs,)`): integer code of each pair's image.
        texts (`np.ndarray` of shape `(num_pairs,)`): integer code of each pair's folded caption.
    """

    def __init__(self, images: np.ndarray, texts: np.ndarray):
        self.images, self.texts = images, texts
        self._num_images = int(images.max()) + 1
        self._known = np.unique(self._key(texts, images))

    def __len__(self) -> int:
        return len(self.images)

    def belongs(self, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Whether each text belongs to each image; the two broadcast."""
        keys = self._key(texts, images)
        # An index past the end wraps to the first key, which is smaller than what was looked up.
        return self._known.take(np.searchsorted(self._known, keys), mode="wrap") == keys

    def stuck(self) -> np.ndarray:
        """The rows that no mismatch can be made of: each text belongs to their image, and their text to all."""
        texts, images = np.divmod(self._known, self._num_images)
        rows_of_image, rows_of_text = np.bincount(self.images), np.bincount(self.texts)
        image_taken = np.bincount(texts, weights=rows_of_image[images]) == len(self)
        text_taken = np.bincount(images, weights=rows_of_text[texts]) == len(self)
        return np.flatnonzero(image_taken[self.texts] & text_taken[self.images])

    def draw(self, rng: np.random.Generator, row: int, replace_image: bool) -> int | None:
        """
        A row, uniform over those whose image (`replace_image`) or caption makes a mismatch in place of that of `row`;
        `None` if there is none.
        """
        for _ in range(_TRIES):
            candidates = rng.integers(len(self), size=_BLOCK)
            mismatch = ~self._replaced(row, candidates, replace_image)
            if mismatch.any():
                return int(candidates[mismatch.argmax()])
        candidates = np.flatnonzero(~self._replaced(row, np.arange(len(self)), replace_image))
        return int(rng.choice(candidates)) if len(candidates) else None

    def _replaced(self, row: int, others: np.ndarray, replace_image: bool) -> np.ndarray:
        if replace_image:
            return self.belongs(self.texts[row], self.images[others])
        return self.belongs(self.texts[others], self.images[row])

    def _key(self, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        return texts.astype(np.int64) * self._num_images + images


class PairsWithMismatches(Dataset[dict[str, Any]]):
    """
    The pairs of a split, each with a mismatched pair drawn for the epoch: N items, which give 2N rows of a batch.

    An item holds `image_id` and `caption` (a match), `mismatch_image_id` and `mismatch_caption` (a mismatch that
    shares one of the two with the match; which one is a fair coin), `row_index` and `epoch`, from which a collator
    derives its own randomness.

    The epoch lives in shared memory, so that `set_epoch` reaches running workers too (`persistent_workers=True`, fork
    and spawn). Call it between epochs, before iterating the loader: workers fetch ahead.

    Args:
        pairs (`datasets.Dataset`):
            Rows with columns `image_id` and `caption`: the whole split, for mismatches are drawn from it. Under spawn
            a dataset in memory is copied to each worker; one that lies on disk (`save_to_disk`, `load_from_disk`) is
            not.
        seed (`int`):
            At least 0.
        fixed_epoch (`int`, *optional*):
            Draw as in this epoch for ever and ignore `set_epoch`: for evaluation, the same mismatches each time.

    Raises:
        `ValueError`: a column is missing, there are no pairs, or no mismatch exists for a pair. The message names the
            image.

    Example:

    ```python
    >>> pairs = datasets.Dataset.from_dict({"image_id": ["1", "2"], "caption": ["A dog", "A cat"]})
    >>> PairsWithMismatches(pairs, seed=0)[0]
    {'image_id': '1', 'caption': 'A dog', 'mismatch_image_id': '1', 'mismatch_caption': 'A cat',
     'row_index': 0, 'epoch': 0}
    ```
    """

    def __init__(self, pairs: datasets.Dataset, *, seed: int, fixed_epoch: int | None = None):
        missing = [name for name in ("image_id", "caption") if name not in pairs.column_names]
        if missing:
            raise ValueError(
                f"The pairs have no column {' and '.join(missing)}; their columns are {pairs.column_names}."
            )
        if len(pairs) == 0:
            raise ValueError("There are no pairs; expected at least two, of two images.")
        self.pairs = pairs.select_columns(["image_id", "caption"]).with_format("arrow")
        self.seed = _natural("seed", seed)
        self.fixed_epoch = None if fixed_epoch is None else _natural("fixed_epoch", fixed_epoch)
        self._epoch = torch.tensor(self.fixed_epoch or 0).share_memory_()

        self.index = MismatchIndex(
            encode_column(pairs, "image_id")[1], encode_column(pairs, "caption", fold_caption)[1]
        )
        stuck = self.index.stuck()
        if len(stuck):
            raise ValueError(
                f"No mismatch exists for {len(stuck):,} of {len(self):,} pairs, such as row {stuck[0]}, image "
                f"{pairs[int(stuck[0])]['image_id']!r}: its caption belongs to every image, and every caption to its "
                "image. Expected pairs of at least two images with different captions."
            )

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch from now on, in workers as well; nothing happens under `fixed_epoch`."""
        epoch = _natural("epoch", epoch)
        if self.fixed_epoch is None:
            self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a whole batch, read from `pairs` at once; a `DataLoader` asks for this one."""
        epoch = self.epoch
        rows = [self._row(row) for row in rows]
        drawn = [self.mismatch(row, epoch) for row in rows]
        table = self.pairs[rows + [other for other, _ in drawn]]
        image_ids, captions = table["image_id"].to_pylist(), table["caption"].to_pylist()
        return [
            {
                "image_id": image_ids[i],
                "caption": captions[i],
                "mismatch_image_id": image_ids[i + len(rows) if replace_image else i],
                "mismatch_caption": captions[i if replace_image else i + len(rows)],
                "row_index": row,
                "epoch": epoch,
            }
            for i, (row, (_, replace_image)) in enumerate(zip(rows, drawn, strict=True))
        ]

    def mismatch(self, row: int, epoch: int) -> tuple[int, bool]:
        """The row that stands in for `row` in `epoch`, and whether by its image (else by its caption)."""
        rng = np.random.default_rng([self.seed, epoch, row, SALT])
        coin = bool(rng.integers(2))
        for replace_image in (coin, not coin):  # a direction without any mismatch leaves the draw to the other
            other = self.index.draw(rng, row, replace_image)
            if other is not None:
                return other, replace_image
        raise ValueError(f"No mismatch exists for row {row}.")

    def _row(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"Row {row} is out of range; there are {len(self):,} pairs.")
        return int(row) % len(self)


def _natural(name: str, value: int) -> int:
    if value < 0 or value != int(value):
        raise ValueError(f"{name}={value!r}; expected an integer of at least 0.")
    return int(value)
