"""
safetensors files, written as a stream and read as a memory map.

The library writes a file from tensors that are all in memory, and its lazy slices copy what they read. Here tensors
grow on disk row by row, and reading gives views of the page cache. Any safetensors reader opens the files.
"""

import hashlib
import json
import math
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import logging
from ..files import complete, partial_path

logger = logging.get_logger(__name__)

DTYPES: dict[str, np.dtype] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # its bits, as NumPy has no such type
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Room for the header, which is written last. A page, so that the first tensor begins on a page too.
DATA_START = 4096
CHUNK_BYTES = 2**20


def file_facts(path: Path) -> dict[str, Any]:
    """Gives the name, size and SHA-256 of a file, as a manifest lists them (and `sha256sum`, and the Hub)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": path.name, "bytes": file.tell(), "sha256": digest}


@dataclass
class _Growing:
    """A tensor that is being written to `file`, from byte `start` on."""

    file: IO[bytes]
    start: int
    dtype: np.dtype
    row_shape: tuple[int, ...]
    rows: int = 0
    position: int | None = None  # current position in the file, None after an error

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.row_shape)

    def write(self, rows: np.ndarray, first: int) -> None:
        begin = self.start + first * self.row_bytes
        if self.position != begin:  # seeking flushes
            self.file.seek(begin)
        self.position = None
        self.file.write(np.ascontiguousarray(rows, self.dtype).data)
        self.position = begin + len(rows) * self.row_bytes
        self.rows = first + len(rows)

    def widened(self, dtype: np.dtype, file: IO[bytes]) -> "_Growing":
        """Copies the tensor to another file, in another dtype."""
        wide = _Growing(file, 0, dtype, self.row_shape)
        step = max(1, CHUNK_BYTES // self.row_bytes)
        self.file.seek(0)
        for first in range(0, self.rows, step):
            rows = self.file.read(min(step, self.rows - first) * self.row_bytes)
            wide.write(np.frombuffer(rows, self.dtype).reshape(-1, *self.row_shape), first)
        self.file.close()
        return wide


class TensorFileWriter:
    """
    Writes the file `path`, which appears with `commit` and never before: until then there is `<path>.partial`.

    Tensors grow along their first axis, all at the same time and in little memory. The first one is written to its
    final place; the others wait in nameless files of the same folder, which vanish with the process.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = partial_path(path).open("w+b")
        self._tensors: dict[str, _Growing] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Adds rows behind the last one of the tensor `name`."""
        self.write(name, rows, self._tensors[name].rows if name in self._tensors else 0)

    def write(self, name: str, rows: np.ndarray, first: int) -> None:
        """
        Writes rows of the tensor `name` from row `first` on, over rows that a failed call left there. Rows in between
        that nobody wrote are zeros.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            file, start = (self._spool(), 0) if self._tensors else (self._file, DATA_START)
            tensor = self._tensors[name] = _Growing(file, start, rows.dtype, rows.shape[1:])
        elif rows.dtype != tensor.dtype and (dtype := np.result_type(tensor.dtype, rows.dtype)) != tensor.dtype:
            tensor = self._tensors[name] = tensor.widened(dtype, self._spool())
        tensor.write(rows, first)

    def commit(self, lengths: Mapping[str, int] | None = None) -> None:
        """
        Completes the file and gives it its name.

        Args:
            lengths (`Mapping`, *optional*): Number of rows of a tensor; by default it ends with the rows written last.
        """
        header: dict[str, Any] = {}
        position = 0
        first, *spooled = self._tensors
        # Readers that do not copy expect a tensor at a multiple of its item size: widest types first.
        for name in (first, *sorted(spooled, key=lambda name: -self._tensors[name].dtype.itemsize)):
            tensor = self._tensors[name]
            if gap := -position % tensor.dtype.itemsize:
                self._file.write(bytes(gap))  # safetensors allows a gap only as a tensor
                header["padding"] = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
                position += gap
            rows = (lengths or {}).get(name, tensor.rows)
            end = position + rows * tensor.row_bytes
            tensor.file.truncate(tensor.start + end - position)
            if tensor.file is not self._file:
                tensor.file.seek(0)
                shutil.copyfileobj(tensor.file, self._file, CHUNK_BYTES)
                tensor.file.close()
            else:
                self._file.seek(0, os.SEEK_END)
            shape = [rows, *tensor.row_shape]
            header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode().ljust(DATA_START - 8)
        if len(text) != DATA_START - 8:
            raise ValueError(f"{self.path}: the header of {len(header)} tensors does not fit into {DATA_START} bytes.")
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        complete(self._file, self.path)

    def discard(self) -> None:
        """Removes everything that was written."""
        partial_path(self.path).unlink(missing_ok=True)
        for file in (self._file, *(tensor.file for tensor in self._tensors.values())):
            with suppress(OSError):  # a full disk does not take what was left to write
                file.close()

    def _spool(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self.path.parent)


class TensorFile:
    """
    A safetensors file as read-only views of its memory map. The views keep the map alive.

    Raises:
        ValueError: The file is cut short, or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, np.ndarray] = {}
        self._starts: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data_start = 8 + int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8:data_start])
            header.pop("__metadata__", None)
            end = data_start + max(entry["data_offsets"][1] for entry in header.values())
            if end != len(self._map):
                raise ValueError(f"it has {len(self._map)} bytes, expected {end}")
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                self._starts[name] = data_start + first
                tensor = np.ndarray(entry["shape"], DTYPES[entry["dtype"]], self._map, data_start + first)
                if tensor.nbytes != last - first:
                    raise ValueError(f"{name} has {last - first} bytes, expected {tensor.nbytes}")
                self.tensors[name] = tensor
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{path} is cut short or no safetensors file ({error}): copy or write it again."
            ) from error

    @property
    def num_bytes(self) -> int:
        """The size of the file in bytes."""
        return len(self._map)

    def will_need(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Has the kernel fetch rows first..last of a tensor, all at once and without waiting for them."""
        if sys.platform == "win32":
            return
        tensor = self.tensors[name]
        row_bytes = tensor.strides[0]
        start = self._starts[name] + first * row_bytes
        stop = self._starts[name] + (len(tensor) if last is None else last) * row_bytes
        aligned = start - start % mmap.PAGESIZE
        if stop > aligned:
            self._map.madvise(mmap.MADV_WILLNEED, aligned, stop - aligned)
