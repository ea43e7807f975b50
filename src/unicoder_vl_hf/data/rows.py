"""Rows of training, and the epoch for which masks, mismatches and negatives are drawn."""

import os
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import logging
from ..records_unicoder_vl import RegionRecord
from ..regions.store import RegionStore

logger = logging.get_logger(__name__)


class Row(UserDict[str, Any]):
    """
    A row on its way to a collator. It is no dict, because Trainer with its defaults takes out of dicts all that the
    forward of the model does not name, which is everything here.
    """


if TYPE_CHECKING:
    from torch.utils.data import Dataset

    Rows = Dataset[Row]
else:
    Rows = object  # a dataset needs a length and items alone, and reading a file must not import PyTorch


class RowsOfEpoch(Rows):
    """
    Rows that follow from their number and the epoch, which lives in shared memory and so reaches running workers.

    Warns where one epoch gives 1.5 times as many rows as there are: `set_epoch` was not called for the next epoch.

    Args:
        fixed_epoch (`int`, *optional*): Epoch to stay in, whatever `set_epoch` says.
    """

    def __init__(self, fixed_epoch: int | None = None):
        import torch

        self.fixed_epoch = None if fixed_epoch is None else natural("fixed_epoch", fixed_epoch)
        self._epoch = torch.tensor(self.fixed_epoch or 0).share_memory_()
        self._given = torch.tensor(0).share_memory_()  # rows given in this epoch, by this process and its workers

    @property
    def epoch(self) -> int:
        """The epoch for which rows are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draws for this epoch from now on, in workers as well; nothing happens where there is a `fixed_epoch`."""
        epoch = natural("epoch", epoch)
        if self.fixed_epoch is None and epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._given.zero_()

    def __len__(self) -> int:
        raise NotImplementedError

    def make_rows(self, numbers: Sequence[int]) -> list[Row]:
        """Makes the rows of these numbers, without counting them as trained on."""
        raise NotImplementedError

    def __getitem__(self, number: int) -> Row:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Row]:
        """Makes the rows of a whole batch at once, as `DataLoader` asks for them."""
        if self.fixed_epoch is None:
            self._count(len(numbers))
        return self.make_rows(numbers)

    def _count(self, count: int):
        before, limit = int(self._given), 1.5 * len(self) / int(os.environ.get("WORLD_SIZE", 1))
        self._given += count
        if before <= limit < before + count:
            logger.warning(
                f"Of {len(self):,} rows {before + count:,} were asked for in epoch {self.epoch}, which has not "
                "changed. Call set_epoch(epoch) of the dataset before each epoch (for Trainer: "
                "callbacks=[EpochOfData()]); otherwise every epoch has the same masks and negatives."
            )


class EpochOfExamples(RowsOfEpoch):
    """
    Gives the examples of several parts one after another, each with its number and the epoch.

    Args:
        parts (sequence): Datasets whose items are mappings, such as those of `datasets`.
    """

    def __init__(self, parts: "Sequence[Dataset[Any]]"):
        from torch.utils.data import ConcatDataset

        super().__init__()
        self.examples: ConcatDataset[Any] = ConcatDataset(parts)

    def __len__(self) -> int:
        return len(self.examples)

    def make_rows(self, numbers: Sequence[int]) -> list[Row]:
        """Gives the examples of these numbers, with the epoch."""
        return [Row(self.examples[number], row_index=number, epoch=self.epoch) for number in numbers]


def natural(name: str, value: int) -> int:
    """Gives `value` as an int. Raises ValueError, naming `name`, where it is no integer or below 0."""
    if value < 0 or value != int(value):
        raise ValueError(f"{name}={value!r}; expected an integer of at least 0.")
    return int(value)


def check_rows(rows: Sequence[Mapping[str, Any]], names: Sequence[str], wrapper: str):
    """
    Checks that rows hold all the names that a collator needs.

    Raises:
        `ValueError`: a row lacks one of the names; the message says that `wrapper` makes rows that have them.
    """
    for row in rows:
        if lacking := [name for name in names if name not in row]:
            raise ValueError(
                f"A row holds {', '.join(row) or 'nothing'}, but no {', '.join(lacking)}. Train on {wrapper}, whose "
                "rows hold all that is needed. Of rows of another kind Trainer leaves out what the model's forward "
                "does not name, unless TrainingArguments(remove_unused_columns=False)."
            )


def is_mismatch(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tells whether the caption of one row is a mismatch with the image of another."""
    return other["image_code"] not in row["codes_of_caption"]


def fetch(store: Mapping[str, RegionRecord], image_ids: Sequence[str]) -> list[RegionRecord]:
    """Reads the records of images, in the order of `image_ids`; each image is read once, however often it is named."""
    unique = list(dict.fromkeys(image_ids))
    if isinstance(store, RegionStore):
        records = dict(zip(unique, store.get_many(unique), strict=True))
    else:
        records = {image_id: store[image_id] for image_id in unique}
    return [records[image_id] for image_id in image_ids]
