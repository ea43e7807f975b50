"""
Mismatched pairs: for every pair of a caption and its image, one of the two is replaced by another of the split.

Follows the paper's visual-linguistic matching ("for every pair one negative is sampled: either another image or
another caption") and its image-text retrieval (three of each for every pair). The replacement comes from a row drawn
uniformly over the whole split, for captions and images alike: both occur in mismatches as often as in matches, so that
neither gives the label away. A draw is a pure function of (seed, epoch, row). Hard negatives are read from columns of
the pairs; `tasks/retrieval/mining.py` finds them.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .. import logging
from ..name_lists import numbered_lines
from .caption_files import encode_column
from .foils import Foil
from .rows import Row, RowsOfEpoch, natural

logger = logging.get_logger(__name__)

# Columns of hard negatives: for each pair a list of captions, and a list of image ids.
NEGATIVE_CAPTIONS, NEGATIVE_IMAGES = "negative_captions", "negative_image_ids"

SALT = 0x6E6567  # keeps these draws apart from masks and shuffles that use the same seed

_TRIES, _BLOCK = 16, 4


def fold_caption(text: str) -> str:
    """Gives the form in which two captions count as the same text: case folded, each run of whitespace one space."""
    return " ".join(text.casefold().split())


def read_duplicate_groups(path: str | PathLike[str]) -> list[list[str]]:
    """
    Reads groups of image ids whose photos show the same, one group a line: a JSON list (`.jsonl`), or ids between
    commas (`.csv`, without a header). Empty lines are left out.

    Raises:
        `ValueError`: a line is neither; the message names the file and the line.
    """
    path = Path(path)
    groups = []
    for number, line in numbered_lines(path):
        cells = next(csv.reader([line], skipinitialspace=True)) if path.suffix == ".csv" else _json_list(line)
        row = None if cells is None else [cell.strip() if isinstance(cell, str) else cell for cell in cells]
        if row is None or not all(isinstance(image_id, str) and image_id for image_id in row):
            raise ValueError(
                f"{path}, line {number}: expected the image ids of one group, as text: a JSON list, or in a file "
                "named .csv ids between commas."
            )
        groups.append(row)
    return groups


def _json_list(line: str) -> list[Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, list) else None


class MismatchIndex:
    """
    An index of which caption text belongs to which image, as sorted integers: 16 bytes a pair, whatever the texts.

    A text belongs to an image where any row pairs the two; case and spacing make no difference. So neither another
    caption of an image nor the same words for another image ever count as a mismatch. Images that are duplicates of one
    another share a code: a text that belongs to one of them belongs to all.

    Args:
        images (`np.ndarray` of shape `(num_pairs,)`): integer code of each pair's image.
        texts (`np.ndarray` of shape `(num_pairs,)`): integer code of each pair's folded caption.
    """

    @classmethod
    def from_pairs(cls, pairs: datasets.Dataset, duplicates: Iterable[Sequence[str]] = ()) -> "MismatchIndex":
        """
        Makes the index of rows with `image_id` and `caption`; `duplicates` are groups of image ids whose photos show
        the same. Warns where none of them is among the pairs.
        """
        encoded, images = encode_column(pairs, "image_id")
        image_ids, duplicates = encoded.to_pylist(), [list(group) for group in duplicates]
        named = {image_id for group in duplicates for image_id in group}
        if named and named.isdisjoint(image_ids):
            logger.warning(
                f"None of the {len(named):,} images that duplicates names, such as {min(named)!r}, is among those of "
                f"the pairs, such as {image_ids[0]!r}: no duplicate is known. Expected the ids that the store has."
            )
        groups = _merged(image_ids, duplicates)
        return cls(groups[images], encode_column(pairs, "caption", fold_caption)[1])

    def __init__(self, images: np.ndarray, texts: np.ndarray):
        self.images, self.texts = images, texts
        self._num_images = int(images.max()) + 1
        self._known = np.unique(self._key(texts, images))

    def __len__(self) -> int:
        return len(self.images)

    def belongs(self, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Tells whether each text belongs to each image; the two arrays of codes broadcast."""
        keys = self._key(texts, images)
        # An index past the end wraps to the first key, which is smaller than the key that is looked for.
        return self._known.take(np.searchsorted(self._known, keys), mode="wrap") == keys

    def images_of(self, text: int) -> np.ndarray:
        """Gives the codes of the images that a text belongs to."""
        start = int(text) * self._num_images  # may exceed the 32 bits of a code
        first, last = np.searchsorted(self._known, [start, start + self._num_images])
        return self._known[first:last] - start

    def stuck(self) -> np.ndarray:
        """
        Gives the rows of which no mismatch can be made: every text belongs to their image, and their text to every
        image.
        """
        return np.flatnonzero(self.irreplaceable(True) & self.irreplaceable(False))

    def irreplaceable(self, image: bool) -> np.ndarray:
        """
        Tells for each row whether no other image (or, with `image=False`, no other caption) makes a mismatch of it.
        """
        texts, images = np.divmod(self._known, self._num_images)
        if image:
            taken = np.bincount(texts, weights=np.bincount(self.images)[images]) == len(self)
            return taken[self.texts]
        taken = np.bincount(images, weights=np.bincount(self.texts)[texts]) == len(self)
        return taken[self.images]

    def draw(self, rng: np.random.Generator, row: int, replace_image: bool) -> int | None:
        """
        Draws a row whose image (`replace_image`) or caption makes a mismatch in place of that of `row`, uniformly over
        all such rows; None if there is none.
        """
        return next(iter(self.draw_distinct(rng, row, replace_image, 1)), None)

    def draw_distinct(
        self, rng: np.random.Generator, row: int, replace_image: bool, count: int, but: Iterable[int] = ()
    ) -> list[int]:
        """
        Draws `count` rows as `draw` does, with as many different images (or texts), none of them the image (or text) of
        a row in `but`. Gives fewer where there are no more.
        """
        codes = self.images if replace_image else self.texts
        taken = {int(codes[other]) for other in but}
        drawn: list[int] = []

        def take(candidates: np.ndarray) -> None:
            for other in candidates[~self.makes_match(row, candidates, replace_image)].tolist():
                if len(drawn) < count and int(codes[other]) not in taken:
                    taken.add(int(codes[other]))
                    drawn.append(other)

        for _ in range(_TRIES):
            if len(drawn) == count:
                return drawn
            take(rng.integers(len(self), size=_BLOCK * count))
        take(rng.permutation(len(self)))
        return drawn

    def makes_match(self, row: int, others: np.ndarray, replace_image: bool) -> np.ndarray:
        """Tells whether `row` is still a match with the image (`replace_image`) or caption of each of the others."""
        if replace_image:
            return self.belongs(self.texts[row], self.images[others])
        return self.belongs(self.texts[others], self.images[row])

    def _key(self, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        return texts.astype(np.int64) * self._num_images + images


def _merged(image_ids: Sequence[str], duplicates: Iterable[Sequence[str]]) -> np.ndarray:
    """Gives a code for each image, which is equal for images of one group, and of groups that share an image."""
    parent: dict[str, str] = {}

    def root(image_id: str) -> str:
        while (above := parent.get(image_id, image_id)) != image_id:
            parent[image_id] = parent.get(above, above)  # halves the way for next time: groups may form a long chain
            image_id = above
        return image_id

    for first, *others in filter(None, duplicates):
        for other in others:
            parent[root(other)] = root(first)
    codes: dict[str, int] = {}
    return np.array([codes.setdefault(root(image_id), len(codes)) for image_id in image_ids], dtype=np.int32)


def pairs_digest(pairs: datasets.Dataset) -> str:
    """Gives a SHA-256 of the image ids and captions of all rows, in their order."""
    digest = hashlib.sha256()
    for name in ("image_id", "caption"):
        values, codes = encode_column(pairs, name)
        digest.update("\0".join(values.to_pylist()).encode())
        digest.update(codes.tobytes())
    return digest.hexdigest()


class _PairsOfEpoch(RowsOfEpoch):
    """Pairs of a split, from which the rows of an epoch are made."""

    def __init__(self, pairs: datasets.Dataset, seed: int, fixed_epoch: int | None):
        super().__init__(fixed_epoch)
        missing = [name for name in ("image_id", "caption") if name not in pairs.column_names]
        if missing:
            raise ValueError(
                f"The pairs have no column {' and '.join(missing)}; their columns are {pairs.column_names}."
            )
        if len(pairs) == 0:
            raise ValueError("There are no pairs; expected at least two, of two images.")
        self.pairs = pairs.select_columns(["image_id", "caption"]).with_format("arrow")
        self.seed = natural("seed", seed)

    def __len__(self) -> int:
        return len(self.pairs)

    def _texts(self, rows: Sequence[int]) -> tuple[list[str], list[str]]:
        """Gives the image ids and captions of rows."""
        table = self.pairs[rows]
        return table["image_id"].to_pylist(), table["caption"].to_pylist()

    def _row(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"Row {row} is out of range; there are {len(self):,} pairs.")
        return int(row) % len(self)


class PairsWithMismatches(_PairsOfEpoch):
    """
    The pairs of a split, each with a mismatched pair drawn for the epoch: N items, which give 2N rows of a batch.

    An item holds `image_id` and `caption` (a match), `mismatch_image_id` and `mismatch_caption` (a mismatch that
    shares one of the two with the match; which one is a fair coin), `row_index` and `epoch`, from which a collator
    derives its own randomness.

    The epoch lives in shared memory, so that `set_epoch` reaches running workers too (`persistent_workers=True`, fork
    and spawn). Call `set_epoch` between epochs, before you iterate the loader: workers fetch ahead.

    Args:
        pairs (`datasets.Dataset`):
            Rows with columns `image_id` and `caption`: the whole split, for mismatches are drawn from it. Under spawn
            a dataset in memory is copied to each worker; one that lies on disk (`save_to_disk`, `load_from_disk`) is
            not.
        seed (`int`):
            Seed of the draws, at least 0.
        fixed_epoch (`int`, *optional*):
            Epoch to draw for at all times, whatever `set_epoch` says: an evaluation has the same mismatches each time.

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
        super().__init__(pairs, seed, fixed_epoch)
        self.index = MismatchIndex.from_pairs(pairs)
        stuck = self.index.stuck()
        if len(stuck):
            raise ValueError(
                f"No mismatch exists for {len(stuck):,} of {len(self):,} pairs, such as row {stuck[0]}, image "
                f"{pairs[int(stuck[0])]['image_id']!r}: its caption belongs to every image, and every caption to its "
                "image. Expected pairs of at least two images with different captions."
            )

    def make_rows(self, numbers: Sequence[int]) -> list[Row]:
        """Makes the rows of these numbers, each a match with its mismatch for the epoch."""
        epoch = self.epoch
        rows = [self._row(number) for number in numbers]
        drawn = [self.mismatch(row, epoch) for row in rows]
        image_ids, captions = self._texts(rows + [other for other, _ in drawn])
        return [
            Row(
                image_id=image_ids[i],
                caption=captions[i],
                mismatch_image_id=image_ids[i + len(rows) if replace_image else i],
                mismatch_caption=captions[i if replace_image else i + len(rows)],
                row_index=row,
                epoch=epoch,
            )
            for i, (row, (_, replace_image)) in enumerate(zip(rows, drawn, strict=True))
        ]

    def mismatch(self, row: int, epoch: int) -> tuple[int, bool]:
        """Gives the row that replaces part of `row` in `epoch`, and whether its image is taken (else its caption)."""
        rng = np.random.default_rng([self.seed, epoch, row, SALT])
        coin = bool(rng.integers(2))
        for replace_image in (coin, not coin):  # where one of the two makes no mismatch, the other is drawn
            other = self.index.draw(rng, row, replace_image)
            if other is not None:
                return other, replace_image
        raise ValueError(
            f"No mismatch exists for row {row}, expected pairs of at least two images with different captions."
        )


class PairsWithNegatives(_PairsOfEpoch):
    """
    The pairs of a split, each with captions and images that do not match it, drawn for the epoch: the groups of the
    paper's image-text retrieval.

    An item holds `image_id` and `caption` (a match), `negative_captions` (which mismatch its image),
    `negative_image_ids` (which mismatch its caption), `row_index`, `epoch`, and for in-batch negatives `image_code` and
    `codes_of_caption`: the caption of one item matches the image of another whose `image_code` is among the
    `codes_of_caption` of the first.

    Hard negatives come first. Where the pairs have the columns `negative_captions` or `negative_image_ids` (a list a
    row), negatives are drawn from these, anew each epoch where there are more than needed; the rest is drawn at random.
    The negatives of a pair are distinct, and repeat only where the split holds too few. `set_epoch` is that of
    [`PairsWithMismatches`].

    Args:
        pairs (`datasets.Dataset`):
            Rows with columns `image_id` and `caption`: the whole split, for negatives are drawn from it.
        seed (`int`):
            Seed of the draws, at least 0.
        num_captions, num_images (`int`, *optional*, default to 3):
            Number of negatives of each kind; the defaults are the paper's.
        duplicates (iterable of sequences of `str`, *optional*):
            Groups of image ids whose photos show the same, such as [`read_duplicate_groups`] gives: a caption that
            matches one image of a group is no negative of another.
        fixed_epoch (`int`, *optional*):
            Epoch to draw for at all times, whatever `set_epoch` says.
        foils (sequence of [`Foil`], *optional*):
            Captions made false by one word, such as `unicoder-vl foil --for-training` makes. A pair has all of its own
            as further caption negatives, its last, in every epoch, so that they are as balanced as the file is.

    Raises:
        `ValueError`: a column is missing, there are no pairs, no negative exists for a pair, or no foil is of a pair.
            The message names the image.

    Example:

    ```python
    >>> pairs = datasets.Dataset.from_dict({"image_id": ["1", "2"], "caption": ["A dog", "A cat"]})
    >>> PairsWithNegatives(pairs, seed=0, num_captions=1, num_images=1)[0]
    {'image_id': '1', 'caption': 'A dog', 'negative_captions': ['A cat'], 'negative_image_ids': ['2'],
     'row_index': 0, 'epoch': 0, 'image_code': 0, 'codes_of_caption': [0]}
    ```
    """

    def __init__(
        self,
        pairs: datasets.Dataset,
        *,
        seed: int,
        num_captions: int = 3,
        num_images: int = 3,
        duplicates: Iterable[Sequence[str]] = (),
        fixed_epoch: int | None = None,
        foils: Sequence[Foil] = (),
    ):
        super().__init__(pairs, seed, fixed_epoch)
        self.num_captions = natural("num_captions", num_captions)
        self.num_images = natural("num_images", num_images)
        self.index = MismatchIndex.from_pairs(pairs, duplicates)
        for replace_image, name, count in ((False, "caption", num_captions), (True, "image", num_images)):
            stuck = np.flatnonzero(self.index.irreplaceable(replace_image))
            if count and len(stuck):
                raise ValueError(
                    f"No negative {name} exists for {len(stuck):,} of {len(self):,} pairs, such as row {stuck[0]}, "
                    f"image {pairs[int(stuck[0])]['image_id']!r}. Expected pairs of at least two images with different "
                    "captions."
                )
        self.hard_captions = self._hard_rows(pairs, NEGATIVE_CAPTIONS, replace_image=False)
        self.hard_images = self._hard_rows(pairs, NEGATIVE_IMAGES, replace_image=True)
        self.foils = self._foils_of_rows(foils) if foils else {}

    def _foils_of_rows(self, foils: Sequence[Foil]) -> dict[int, list[str]]:
        """Finds the foils of each row that has some: false captions of its image, and of those that show the same."""
        image_ids, captions = self._texts(range(len(self)))
        folded, image_of = list(map(fold_caption, captions)), dict(zip(image_ids, self.index.images, strict=True))
        matches = set(zip(self.index.images, folded, strict=True))
        of_pair: dict[tuple[str, str], list[str]] = {}
        for foil in foils:
            if (image_of.get(foil.image_id), fold_caption(foil.foil)) not in matches:
                of_pair.setdefault((foil.image_id, fold_caption(foil.caption)), []).append(foil.foil)
        pairs = list(zip(image_ids, folded, strict=True))
        found = {row: of_pair[pair] for row, pair in enumerate(pairs) if pair in of_pair}
        used = sum(len(of_pair[pair]) for pair in of_pair.keys() & set(pairs))
        if used < len(foils):
            told = f"{len(foils) - used:,} of {len(foils):,} foils"
            if not found:
                raise ValueError(
                    f"{told} are of no pair of this split, such as that of image {foils[0].image_id!r} and the caption "
                    f"{foils[0].caption!r}: give foils of the captions that are trained on (`unicoder-vl foil "
                    "--for-training`)."
                )
            logger.warning(f"{told} are left out: they match their image, or their caption is not in the split.")
        return found

    def _hard_rows(self, pairs: datasets.Dataset, name: str, replace_image: bool) -> list[np.ndarray] | None:
        """Finds for each row the rows of its hard negatives: distinct ones of the split that do not match it."""
        if name not in pairs.column_names:
            return None
        fold, codes = (str, self.index.images) if replace_image else (fold_caption, self.index.texts)
        values = self.pairs[:]["image_id" if replace_image else "caption"].to_pylist()
        row_of = {fold(value): row for row, value in enumerate(values)}
        given, hard = 0, []
        for row, negatives in enumerate(pairs[name]):
            found = [row_of[fold(value)] for value in negatives or () if fold(value) in row_of]
            others = np.array(found, dtype=np.int32)
            others = others[np.unique(codes[others], return_index=True)[1]]
            given += len(negatives or ())
            hard.append(others[~self.index.makes_match(row, others, replace_image)])
        if dropped := given - sum(map(len, hard)):
            logger.warning(
                f"{dropped:,} of {given:,} {name} are left out: they match their pair, repeat, or are not in the split."
            )
        return hard

    def make_rows(self, numbers: Sequence[int]) -> list[Row]:
        """Makes the rows of these numbers, each a match with its negatives for the epoch."""
        epoch = self.epoch
        rows = [self._row(number) for number in numbers]
        drawn = [self.negatives(row, epoch) for row in rows]
        image_ids, captions = self._texts(rows + [other for pair in drawn for others in pair for other in others])
        items, at = [], len(rows)
        for i, (row, (with_image, with_caption)) in enumerate(zip(rows, drawn, strict=True)):
            middle, end = at + len(with_image), at + len(with_image) + len(with_caption)
            items.append(
                Row(
                    image_id=image_ids[i],
                    caption=captions[i],
                    negative_captions=captions[at:middle] + self.foils.get(row, []),
                    negative_image_ids=image_ids[middle:end],
                    row_index=row,
                    epoch=epoch,
                    image_code=int(self.index.images[row]),
                    codes_of_caption=self.index.images_of(self.index.texts[row]).tolist(),
                )
            )
            at = end
        return items

    def negatives(self, row: int, epoch: int) -> tuple[list[int], list[int]]:
        """Gives the rows whose captions, and those whose images, are the negatives of `row` in `epoch`."""
        rng = np.random.default_rng([self.seed, epoch, row, SALT])
        return (
            self._draw(rng, row, False, self.num_captions, self.hard_captions),
            self._draw(rng, row, True, self.num_images, self.hard_images),
        )

    def _draw(
        self, rng: np.random.Generator, row: int, replace_image: bool, count: int, hard: list[np.ndarray] | None
    ) -> list[int]:
        found = [] if hard is None else rng.permutation(hard[row])[:count].tolist()
        found += self.index.draw_distinct(rng, row, replace_image, count - len(found), but=found)
        return [found[i % len(found)] for i in range(count)]
