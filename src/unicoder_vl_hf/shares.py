"""
Shares of a job, such as the tasks of a scheduler's array: each computes its own, knows of no other and meets them in a
folder, and when all have run, the job is gathered.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

from .errors import FinishedRun


@dataclass(frozen=True)
class Share:
    """
    A share of a job, such as a task of a scheduler's array: every `count`-th block, from block `index` on.

    Args:
        index (`int`, *optional*): The number of the share, from 0 and below `count`. None computes nothing: it gathers
            what the shares have computed.
        count (`int`): The number of shares, at least 1.

    Raises:
        `ValueError`: a number is out of its range.
    """

    index: int | None
    count: int

    def __post_init__(self):
        if self.count < 1 or not 0 <= (self.index or 0) < self.count:
            raise ValueError(f"{self} is no share; expected --share I/N, with I from 0 to N - 1, or --gather N.")

    @classmethod
    def of_options(cls, share: str | None, gather: int | None) -> Self | None:
        """
        Reads the options `--share I/N` and `--gather N`, of which at most one is given; None without either.

        Raises:
            `ValueError`: both are given, or a value is none of a share.
        """
        if share is None:
            return None if gather is None else cls(None, gather)
        index, slash, count = share.partition("/")
        if gather is not None or not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(
                f"--share is {share!r}, with --gather {gather}; expected I/N, such as 0/8, and --gather 8 when all "
                "shares have run."
            )
        return cls(int(index), int(count))

    def of_process(self, process: int, num_processes: int) -> "Share":
        """Gives the part of one of the launcher's processes, which compute the share together."""
        if self.index is None:
            return self
        return Share(self.index + self.count * process, self.count * num_processes)

    def blocks(self, num_blocks: int) -> range:
        """Lists the blocks of this share."""
        return range(0) if self.index is None else range(self.index, num_blocks, self.count)

    def rows(self, count: int) -> range:
        """Lists the rows of this share where shares take `count` rows in turn, each those that follow one another."""
        if self.index is None:
            return range(0)
        return range(self.index * count // self.count, (self.index + 1) * count // self.count)

    def __str__(self) -> str:
        return f"gather {self.count}" if self.index is None else f"share {self.index}/{self.count}"


def check_restart(restart: bool, share: Share | None) -> None:
    """Raises ValueError where a share is to begin a job anew, whose other shares it does not know."""
    if restart and share is not None:
        raise ValueError(f"{share} cannot begin anew for all: run --restart without --share and --gather.")


class FinishedShare(FinishedRun):
    """An error that says that a share is computed, so that there is nothing to show before all are."""

    def __init__(self, share: Share, path: object):
        super().__init__(
            f"{path}: {share} is computed. When all are, the same command with --gather {share.count} in place of "
            "--share puts them together."
        )


class MissingShares(ValueError):
    """An error that names the shares that are to run before the job can be gathered, as numbers in `indices`."""

    def __init__(self, indices: Collection[int], count: int, path: object):
        self.indices, self.count = sorted(indices), count
        listed = in_ranges(self.indices)
        super().__init__(
            f"{path} lacks blocks of {len(self.indices)} of {count} shares: {listed}. Run the same command with "
            f"--share {self.indices[0]}/{count} in place of --gather, and so on for each of them (Slurm: "
            f"sbatch --array={listed}), then gather again."
        )


def in_ranges(numbers: Iterable[int]) -> str:
    """Writes rising numbers as Slurm's `--array` takes them, such as `"0-3,7"`."""
    # In a run of numbers that follow one another, each is as far above its place as the first.
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def run_shares(parts: Iterable[Callable[[], Any]], path: object) -> None:
    """
    Runs the parts of a job that has a folder for each, before it says which shares are finished, or missing.

    Args:
        parts (iterable of callables): Calls that compute a share of a folder, or gather it.
        path: The place of all the folders, for the message.

    Raises:
        `FinishedShare`: a share of each part is computed.
        `MissingShares`: a part lacks shares; those of all parts are named.
    """
    finished: FinishedShare | None = None
    missing: set[int] = set()
    count = 0
    for part in parts:
        try:
            part()
        except FinishedShare as error:
            finished = error
        except MissingShares as error:
            missing, count = missing | {*error.indices}, error.count
    if missing:
        raise MissingShares(missing, count, path)
    if finished is not None:
        raise finished
