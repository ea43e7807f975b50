"""
A reader of the keys and values of an LMDB file, in order, by plain reads and without the library.

The library maps the file and trusts it: on a damaged or truncated file the process dies of SIGBUS or SIGSEGV. It also
refuses to open a file twice in a process, and its handles must not be carried over a fork. Here every offset is
checked, keys must ascend (so that a loop of pages ends), and a value is read only when it is asked for.

The layout is that of LMDB 0.9 on 64-bit little-endian machines (`mdb.c`: MDB_page, MDB_node, MDB_meta). Left out:
named databases and duplicate keys, which no format here has.
"""

import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from ...records_unicoder_vl import RegionRecord
from .items import Item, broken, check_text, text_id

MAX_DEPTH = 32  # of the tree, as in LMDB
_HEADER = struct.Struct("<QHHHH")  # page number, pad, flags, ends of the pointers and of the free space behind them
_NODE = struct.Struct("<HHHH")  # two halves of a number, flags, size of the key
_META = struct.Struct(
    "<16xII16xI44xI2H8x8x8x8xQ8xQ"
)  # magic, version, page size; main database: pad, flags, depth, root
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG_DATA = 1
_NO_PAGE = 2**64 - 1
_MAGIC = 0xBEEFC0DE


def entries(path: Path) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """
    Yields `(key, value)` of a file, or of `data.mdb` in a folder, by ascending key. Calling `value` reads the bytes; it
    must be called before the next step.

    Raises:
        ValueError: The file is no LMDB, or is damaged or cut short; the message names it.
    """
    path = path / "data.mdb" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is no file, expected an LMDB: data.mdb, or a folder that holds it.")
    with path.open("rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            page_size, root = _newest_root(file)
            last = b""
            for key, value in _walk(file, size, page_size, root, 0):
                if key <= last:
                    raise ValueError(f"key {key[:80]!r} follows {last[:80]!r}, expected ascending keys")
                last = key
                yield key, partial(_whole, path, value)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path} is damaged, cut short or no LMDB: {error}.") from error


def lmdb_items(
    path: str | os.PathLike, keys: bytes, load: Callable[[str, bytes], RegionRecord], suffix: str = ""
) -> Iterator[Item]:
    """
    Yields an image for each key other than `keys`, whose image_id is the key without `suffix`; `load(key, value)` makes
    its record. Where the file is damaged, a broken image comes last.
    """

    def checked(key: bytes, value: Callable[[], bytes]) -> RegionRecord:
        check_text(key)
        return load(key.decode(), value())

    try:
        for key, value in entries(Path(path)):
            if key != keys:
                name = text_id(key)
                yield Item(str(path), f"key {name!r}", name.removesuffix(suffix), partial(checked, key, value))
    except ValueError as error:
        yield broken(str(path), Path(path).name, error)


def _whole(path: Path, value: Callable[[], bytes]) -> bytes:
    try:
        return value()
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def damage(path: Path) -> str | None:
    """Describes the damage of an LMDB whose first value cannot be read; None where the file is none, or is whole."""
    file = path / "data.mdb" if path.is_dir() else path
    try:
        with file.open("rb") as start:
            if _META.unpack(start.read(_META.size))[0] != _MAGIC:
                return None
    except (OSError, struct.error):
        return None
    try:
        for _, value in entries(path):
            value()
            return None
    except ValueError as error:
        return str(error)
    return f"{file} is an LMDB without keys."


def first_value(path: Path, skip: bytes) -> bytes | None:
    """Gives the value of the first key other than `skip`; None where there is none, or the file is no LMDB."""
    try:
        return next((value() for key, value in entries(path) if key != skip), None)
    except (ValueError, OSError):
        return None


def _newest_root(file: IO[bytes]) -> tuple[int, int]:
    """Reads the page size, and the root of the main database as of the last transaction."""
    newest = (-1, _NO_PAGE)
    page_size = 0
    for number in range(2):
        file.seek(number * page_size)
        magic, version, meta_page_size, _, flags, _, root, transaction = _META.unpack(file.read(_META.size))
        page_size = page_size or meta_page_size
        if magic != _MAGIC or version != 1 or page_size not in (2**k for k in range(9, 17)):
            raise ValueError(f"it begins with magic {magic:#x}, version {version} and page size {page_size}")
        if flags:
            raise ValueError(f"its keys have the flags {flags:#x}, expected plain ones")
        newest = max(newest, (transaction, root))
    return page_size, newest[1]


def _walk(
    file: IO[bytes], size: int, page_size: int, number: int, depth: int
) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    if number == _NO_PAGE:
        return
    page = _read(file, size, number * page_size, page_size)
    found, _, flags, lower, upper = _HEADER.unpack_from(page)
    if found != number or flags & ~16 not in (_BRANCH, _LEAF) or not _HEADER.size <= lower <= upper <= page_size:
        raise ValueError(f"page {number} says of itself {(found, flags, lower, upper)}")
    if depth == MAX_DEPTH:
        raise ValueError(f"its tree is deeper than {MAX_DEPTH} pages")
    for start in struct.unpack_from(f"<{(lower - _HEADER.size) // 2}H", page, _HEADER.size):
        low, high, node_flags, key_size = _NODE.unpack_from(page, start)
        data = start + _NODE.size + key_size
        if data > page_size:
            raise ValueError(f"a key of page {number} ends behind the page")
        if flags & _BRANCH:
            yield from _walk(file, size, page_size, low | high << 16 | node_flags << 32, depth + 1)
            continue
        key, length = page[start + _NODE.size : data], low | high << 16
        if node_flags == _BIG_DATA:
            (overflow,) = struct.unpack_from("<Q", page, data)
            yield key, partial(_read, file, size, overflow * page_size + _HEADER.size, length)
        elif node_flags or data + length > page_size:
            raise ValueError(f"the value of {key[:80]!r} is of an unknown kind, or ends behind its page")
        else:
            yield key, partial(bytes, page[data : data + length])


def _read(file: IO[bytes], size: int, start: int, length: int) -> bytes:
    if start + length > size:
        raise ValueError(f"it was cut short: it has {size} bytes, but byte {start + length} is asked for")
    file.seek(start)
    return file.read(length)
