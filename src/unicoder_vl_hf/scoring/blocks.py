"""A folder of blocks of numbers, written by many processes at once and read after any kill.

    job.json                the job that is computed: a folder of another job is refused
    <process>-<…>.blocks    the blocks that one process finished, record by record: number of the block, number of
    values, CRC-32,
                            values
    scores.npy              all of it, once every block is there; the .blocks are then removed

Each run of each process writes a file of its own, so that nobody waits, and a record that a kill cut short is the last
of its file. Processes meet in the folder alone: it must be on a disk that all of them see. They are those of a
launcher, or each is a [`Share`], such as a task of a scheduler's array, which knows of no other.
"""

import json
import os
import struct
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from .. import logging
from ..errors import FinishedRun
from ..files import check_writable

logger = logging.get_logger(__name__)

JOB, RESULT = "job.json", "scores.npy"
HEADER = struct.Struct("<QI")  # block, values
CHECKSUM = struct.Struct("<I")


def job_of(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the job of a folder; empty if none was begun there."""
    known = Path(path) / JOB
    return json.loads(known.read_text()) if known.exists() else {}


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

    def __str__(self) -> str:
        return f"gather {self.count}" if self.index is None else f"share {self.index}/{self.count}"


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
        self.indices, self.count, self.path = sorted(indices), count, path
        listed = in_ranges(self.indices)
        super().__init__(
            f"{path} lacks blocks of {len(self.indices)} of {count} shares: {listed}. Run the same command with "
            f"--share {self.indices[0]}/{count} in place of --gather, and so on for each of them (Slurm: "
            f"sbatch --array={listed}), then gather again."
        )


def in_ranges(numbers: Iterable[int]) -> str:
    """Writes rising numbers as Slurm's `--array` takes them, such as `"0-3,7"`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in ranges)


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


class BlockFolder:
    """
    A folder of blocks that processes fill together, each with the blocks that it computes.

    Args:
        path (`str` or `os.PathLike`): The folder, made if need be.
        job (`dict`): Names and values, as JSON, of all that the blocks follow from.
        process (`int`): Rank of this process; process 0 puts the blocks together.
        share ([`Share`], *optional*): The share that the launcher's processes compute, or that they gather. By default
            they compute all blocks that are missing.

    Raises:
        `ValueError`: the folder holds another job, and the message names what differs; or other files and no job.
        `OSError`: nothing can be written into the folder.
    """

    def __init__(self, path: str | os.PathLike, job: dict[str, Any], process: int = 0, share: Share | None = None):
        self.path = Path(path)
        self.process = process
        self.share = share
        self._offsets: dict[Path, int] = {}
        self._file: Any = None
        self.path.mkdir(parents=True, exist_ok=True)
        known = self.path / JOB
        if not known.exists():
            # Where another process has written the job meanwhile, it is here now.
            foreign = sorted(entry.name for entry in self.path.iterdir() if not _is_ours(entry) and entry.name != JOB)
            if foreign:
                raise ValueError(f"{self.path} holds {foreign[:3]} and no {JOB}: give an empty folder, or a new one.")
            _write_text(known, json.dumps(job, indent=2))
        before = job_of(self.path)
        differing = [name for name in sorted({*before, *job}) if before.get(name) != job.get(name)]
        if differing:
            details = "; ".join(f"{name} was {before.get(name)!r}, is {job.get(name)!r}" for name in differing)
            raise ValueError(
                f"{self.path} holds scores of another job: {details}. Give those values, or another folder."
            )
        if not self.is_complete:
            check_writable(self.path)
        self.done = {block for block, _ in self._read_new()}

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are there and put together."""
        return (self.path / RESULT).exists()

    def write(self, block: int, values: np.ndarray) -> None:
        """Writes the values of a finished block, as float32."""
        if self._file is None:
            self._file = (self.path / f"{self.process:05d}-{uuid.uuid4().hex}.blocks").open("xb")
        payload = values.astype("<f4", copy=False).tobytes()
        header = HEADER.pack(block, len(values))
        self._file.write(header + CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header))) + payload)
        self._file.flush()
        self.done.add(block)

    def result(self, num_blocks: int, shape: tuple[int, ...], positions: Callable[[int], np.ndarray]) -> np.ndarray:
        """
        Waits for all blocks, and opens the array that they make: block b fills `positions(b)` of the flattened array.

        Returns:
            `np.ndarray` of `shape`, float32, a read-only memory map.

        Raises:
            `FinishedShare`: the blocks are those of a share, and it is computed.
            `MissingShares`: shares are gathered, and blocks of some are missing.
        """
        if self._file is not None:
            self._file.close()
            self._file = None
        share = self.share
        if share is not None and share.index is not None:
            own = share.blocks(num_blocks)
            self._wait_until(lambda: self._has(own), "the other processes of the share")
            raise FinishedShare(share, self.path)
        if share is not None and not self._has(range(num_blocks)):
            missing = {block % share.count for block in range(num_blocks) if block not in self.done}
            raise MissingShares(missing, share.count, self.path)
        if self.process == 0 and not self.is_complete:
            self._assemble(num_blocks, shape, positions)
        self._wait_until(lambda: self.is_complete, "process 0 to put the blocks together")
        if self.process == 0:
            for file in filter(_is_ours, self.path.iterdir()):
                file.unlink(missing_ok=True)
        return np.load(self.path / RESULT, mmap_mode="r")

    def _has(self, blocks: Iterable[int]) -> bool:
        """Tells whether these blocks are written, by whatever process."""
        if not self.is_complete:
            self.done.update(block for block, _ in self._read_new())
        return self.is_complete or self.done.issuperset(blocks)

    def _assemble(self, num_blocks: int, shape: tuple[int, ...], positions: Callable[[int], np.ndarray]) -> None:
        partial = self.path / f"{uuid.uuid4().hex}.partial"
        scores = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        if sys.platform == "linux":  # a map of more than a full disk holds would end the process by a signal
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        flat = scores.reshape(-1)  # a view
        missing = set(range(num_blocks))
        self._offsets.clear()

        def place_new() -> bool:
            for block, values in self._read_new():
                flat[positions(block)] = values
                missing.discard(block)
            return not missing

        self._wait_until(place_new, "the blocks of other processes")
        scores.flush()
        os.replace(partial, self.path / RESULT)

    def _read_new(self) -> Iterator[tuple[int, np.ndarray]]:
        """Reads the blocks that were written since the last call."""
        for path in sorted(self.path.glob("*.blocks")):
            with suppress(FileNotFoundError):  # removed meanwhile by process 0, which has put all together
                for end, block, values in read_blocks(path, self._offsets.get(path, 0)):
                    self._offsets[path] = end
                    yield block, values

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        started = time.monotonic()
        warned = 0
        while not condition():
            time.sleep(0.2)
            minutes = int((time.monotonic() - started) / 60)
            if minutes > warned:
                warned = minutes
                logger.warning(f"Waiting for {what} in {self.path} for {minutes} min. Are all processes alive?")


def read_blocks(path: Path, offset: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
    """Reads the records of a file up to one that is not whole: offset of the end, number of the block, and values."""
    with path.open("rb") as file:
        file.seek(offset)
        while len(head := file.read(HEADER.size + CHECKSUM.size)) == HEADER.size + CHECKSUM.size:
            header = head[: HEADER.size]
            block, count = HEADER.unpack(header)
            payload = file.read(4 * count)
            if CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header))) != head[HEADER.size :]:
                return
            yield file.tell(), block, np.frombuffer(payload, dtype="<f4")


def _is_ours(path: Path) -> bool:
    return path.suffix in (".blocks", ".partial")


def _write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; of several processes that write the same, any may win."""
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    partial.write_text(text)
    os.replace(partial, path)
