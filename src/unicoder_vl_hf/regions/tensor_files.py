"""
safetensors files, written as a stream and read as a memory map.

The library writes a file from tensors that are all in memory, and its lazy slices copy what they read. Here a tensor
grows on disk row by row, and reading gives views of the page cache. Any safetensors reader opens the files.
"""

import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F16": np.dtype("<f2"),
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


def replace_atomically(partial: Path, path: Path) -> None:
    """Gives a file that is complete and synced its name, and makes the name last."""
    os.replace(partial, path)
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically: readers see the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    replace_atomically(partial, path)


class TensorFileWriter:
    """
    Writes the file `path`, which appears with `commit` and never before: until then there is `<path>.partial`.

    Tensors grow along their first axis, one after the other. Each must begin on a multiple of its item size, as readers
    that do not copy expect: write the widest types first, or see `position`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.position = 0  # bytes of data so far
        self._header: dict[str, dict[str, Any]] = {}
        self._file = self.partial.open("wb")

    def append(self, name: str, rows: np.ndarray) -> None:
        """Adds rows to tensor `name`, which is a new one or the last one. A failed call leaves no trace."""
        # Not where the last write ended, but where the last one that succeeded did.
        self._file.seek(DATA_START + self.position)
        self._file.write(np.ascontiguousarray(rows).data)
        entry = self._header.setdefault(
            name,
            {
                "dtype": DTYPE_NAMES[rows.dtype],
                "shape": [0, *rows.shape[1:]],
                "data_offsets": [self.position, self.position],
            },
        )
        self.position += rows.nbytes
        entry["shape"][0] += len(rows)
        entry["data_offsets"][1] = self.position

    def commit(self) -> None:
        """Completes the file and gives it its name."""
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(DATA_START - 8)
        if len(header) != DATA_START - 8:
            raise ValueError(
                f"{self.path}: the header of {len(self._header)} tensors does not fit into {DATA_START} bytes."
            )
        self._file.truncate(DATA_START + self.position)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        replace_atomically(self.partial, self.path)

    def discard(self) -> None:
        """Drops what was written."""
        self._file.close()
        self.partial.unlink(missing_ok=True)


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
                self._starts[name] = start = data_start + entry["data_offsets"][0]
                self.tensors[name] = np.ndarray(entry["shape"], DTYPES[entry["dtype"]], self._map, start)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{path} is cut short or no safetensors file ({error}): copy or write it again."
            ) from error

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
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
