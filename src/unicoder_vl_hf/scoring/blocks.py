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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import logging
from ..files import check_writable
from ..shares import FinishedShare, MissingShares, Share

logger = logging.get_logger(__name__)

JOB, RESULT = "job.json", "scores.npy"
HEADER = struct.Struct("<QI")  # block, values
CHECKSUM = struct.Struct("<I")


def job_of(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the job of a folder; empty if none was begun there."""
    known = Path(path) / JOB
    return json.loads(known.read_text()) if known.exists() else {}


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
