"""
Pairs of a stream: captions in shards of `datasets`, local or on the Hub, of which no more is read than the next steps
need.

Follows the paper's matching but for one thing: a mismatch is drawn among the captions and images of a window of the
stream, not of the whole split, which nobody has read. `datasets` loses what is in its shuffle buffer when a run is
resumed, and so the buffer is ours: the window is read again, from the state that the stream had where it begins.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, islice
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from .. import logging
from .caption_files import LISTS, check_row, find_columns, no_column, no_split, stem_of
from .negatives import PairsWithMismatches
from .rows import Row
from .samplers import SALT, epoch_order

logger = logging.get_logger(__name__)


class CaptionStream:
    """
    The captions of a split in shards of parquet or JSON lines, as `datasets` streams them. Only the first shard is
    opened, for the names of its columns.

    Args:
        path (`str` or `os.PathLike`): A folder of shards, or a dataset of the Hub.
        split (`str`): The split; `"val"` is also that which `datasets` calls `"validation"`.
        images (container of `str`): The ids of the images that have regions, such as a `RegionStore`.
        skip_missing (`bool`, *optional*, defaults to `False`): Leaves out captions of other images, instead of raising.
        rename (callable, *optional*): Gives an image its other id, see `image_ids.id_mapping`.

    Raises:
        `ValueError`: there is no such split or no column of images or captions; or `path` is no folder of shards.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        split: str,
        images: Any,
        *,
        skip_missing: bool = False,
        rename: Callable[[str], str] | None = None,
    ):
        if Path(path).is_file() or Path(path, "state.json").exists() or Path(path, "dataset_dict.json").exists():
            raise ValueError(
                f"{path} is no folder of shards, expected parquet or JSON lines: read it without --streaming, or write "
                "it as shards, a call of `to_parquet` each."
            )
        self.path, self.split, self.images, self.skip_missing, self.rename = path, split, images, skip_missing, rename
        splits = datasets.load_dataset(str(path), streaming=True)
        name = "validation" if split == "val" and split not in splits else split
        if name not in splits:
            raise ValueError(no_split(path, split, splits))
        stream = splits[name]
        if stream.features is None:
            raise ValueError(f"{path}: its columns cannot be told from a part of it; expected parquet or JSON lines.")
        # A column of pictures may be called image, too, and is not read.
        usable = [column for column, kind in stream.features.items() if isinstance(kind, datasets.Value | LISTS)]
        self._image, self._caption = find_columns(path, usable)
        for column in (self._image, self._caption):
            if column not in usable:
                raise ValueError(no_column(path, column, stream.features))
        self.stream = stream.select_columns(
            [column for column in usable if column in (self._image, self._caption, "split")]
        )

    def pairs_of(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """
        Gives `image_id` and `caption` of a row of the stream, once for each of its captions.

        Raises:
            `ValueError`: the row is of another split, its image has no regions, or it has no caption.
        """
        image_id = row[self._image] if self._image == "image_id" else stem_of(row[self._image])
        captions = row[self._caption] if isinstance(row[self._caption], list) else [row[self._caption]]
        pairs = [{"image_id": image_id, "caption": caption} for caption in captions or [None]]
        for pair in pairs:
            check_row(pair, self.path, f"split {self.split!r}", skip_empty=False)
            if self.rename is not None:
                pair["image_id"] = self.rename(pair["image_id"])
        image_id = pairs[0]["image_id"]
        if row.get("split", self.split) != self.split:
            raise ValueError(
                f"{self.path}: image {image_id!r} among those of the split {self.split!r} has {row['split']!r} in its "
                "column split; expected shards of one split each, named after it, such as train-00000.parquet."
            )
        if image_id in self.images:
            return pairs
        if not self.skip_missing:
            raise ValueError(
                f"{self.path}: image {image_id!r} has no regions in {self.images}. Extract them, or leave such "
                "captions out: --skip_missing."
            )
        logging.warn_once(logger, f"{self.path}: captions of images without regions in {self.images} are left out.")
        return []

    def first(self, count: int) -> datasets.Dataset:
        """Reads the first pairs of the stream, `count` of them or all."""
        pairs = islice((pair for row in self.stream for pair in self.pairs_of(row)), count)
        return datasets.Dataset.from_list(list(pairs))


class StreamedPairs:
    """
    The pairs of a stream, without end, each with a mismatch: rows as those of [`PairsWithMismatches`].

    The shards of each pass lie in a random order, and each process has its part of them. It reads one after another, a
    window at a time, shuffles the window, and draws mismatches within it. A window is to its rows what an epoch is
    elsewhere: mismatches and masks follow from the seed, the number of the window and the place in it.

    Args:
        captions ([`CaptionStream`]): The captions.
        seed (`int`): Seed of the order and of mismatches, at least 0.
        window (`int`, *optional*, defaults to 10,000): Captions that are shuffled together, at least 2.
        process_index (`int`, *optional*, defaults to 0): Number of this process, in `[0, num_processes)`.
        num_processes (`int`, *optional*, defaults to 1): Number of all processes; there must be as many shards.

    Raises:
        `ValueError`: there are fewer shards than processes, or `window` is below 2.
    """

    def __init__(
        self,
        captions: CaptionStream,
        *,
        seed: int,
        window: int = 10_000,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if window < 2:
            raise ValueError(f"shuffle_buffer_size={window}, expected at least 2 captions: a pair and its mismatch.")
        self.captions, self.seed, self.window = captions, seed, window
        self.process_index, self.num_processes = process_index, num_processes
        self.num_shards = captions.stream.num_shards
        if self.num_shards < num_processes:
            raise ValueError(
                f"{captions.path} has {self.num_shards} shards of the split {captions.split!r} for {num_processes} "
                "processes; expected one each at least: write it in more shards, or start fewer processes."
            )
        self.stream = split_dataset_by_node(
            captions.stream, rank=process_index, world_size=num_processes, strategy="shards"
        )
        self._states: dict[int, dict[str, Any]] = {}  # at the beginning of windows, by their numbers
        self._pending: list[dict[str, str]] = []  # further captions of the row that was read last
        self._begin_pass(0)
        self._begin(self._state(0))

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: a stream counts its passes itself."""

    def make_rows(self, numbers: Sequence[int]) -> list[Row]:
        """Makes the rows of these numbers in the stream of this process, which must rise from call to call."""
        rows: list[Row] = []
        for window, some in groupby(numbers, lambda number: number // self.window):
            while self._number < window:
                self._read_window()
            rows += self._rows.make_rows([self._order[number % self.window] for number in some])
        return rows

    def passes(self, number: int) -> int:
        """Counts the whole passes over the shards of this process before the window of a row that was made."""
        return self._states[number // self.window]["pass"]

    def state_dict(self, number: int) -> dict[str, Any]:
        """
        Gives what [`~StreamedPairs.load_state_dict`] needs to make the rows from `number` on, as JSON has it. States of
        rows before are forgotten.
        """
        self._states = {window: state for window, state in self._states.items() if window >= number // self.window}
        return self._states[number // self.window]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; rows of its window are read again, not given again."""
        self._begin_pass(state["pass"])
        self.stream.load_state_dict(state["stream"])
        self._pending = list(state["pending"])
        self._begin(state)

    def _begin_pass(self, number: int) -> None:
        """Lets `datasets` shuffle the shards, alike in all processes, before each has its part of them."""
        self._pass = number
        self.stream.set_epoch(int(np.random.default_rng([self.seed, number, SALT]).integers(1, 2**62)))

    def _begin(self, state: dict[str, Any]) -> None:
        self._number = state["window"] - 1  # of the window that is here
        self._states = {state["window"]: state}
        self._pairs = self._read()

    def _state(self, window: int) -> dict[str, Any]:
        """Gives the state in which the stream is, where a window begins."""
        return {
            "window": window,
            "pass": self._pass,
            "stream": self.stream.state_dict(),
            "pending": list(self._pending),
        }

    def _read_window(self) -> None:
        pairs = list(islice(self._pairs, self.window))
        self._number += 1
        self._states[self._number + 1] = self._state(self._number + 1)
        epoch = self._number * self.num_processes + self.process_index
        self._order = epoch_order(self.window, seed=self.seed, epoch=epoch).tolist()
        try:
            self._rows = PairsWithMismatches(datasets.Dataset.from_list(pairs), seed=self.seed, fixed_epoch=epoch)
        except ValueError as error:
            raise ValueError(
                f"{self.captions.path}, {self.window:,} captions in a row: {error} Give a larger "
                "--shuffle_buffer_size, or shuffle the captions before they are written."
            ) from error

    def _read(self) -> Iterator[dict[str, str]]:
        """Gives the pairs of this process, pass after pass."""
        empty_passes = 0
        while empty_passes < 2:  # the first may go on from the end of one
            empty_passes += 1
            for pairs in chain([self._pending], map(self.captions.pairs_of, self.stream)):
                self._pending = pairs
                while pairs:
                    empty_passes = 0
                    yield pairs.pop(0)
            self._begin_pass(self._pass + 1)
        raise ValueError(f"{self.captions.path} has no caption of the split {self.captions.split!r} with regions.")
