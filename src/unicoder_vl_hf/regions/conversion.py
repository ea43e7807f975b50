"""Foreign files → `RegionStore`, in one pass and constant memory."""

from collections.abc import Iterable
from os import PathLike
from typing import Any

from transformers.utils import logging

from ..feature_extraction_unicoder_vl import RegionRecord
from .formats import detect_format, read_records
from .store import RegionStore, RegionStoreWriter


def write_store(
    records: Iterable[RegionRecord], path: str | PathLike, *, total: int | None = None, **options: Any
) -> RegionStore:
    """
    Writes records to a store, with a progress bar, and opens it.

    Args:
        records (iterable of `RegionRecord`): Of different ids. With `resume=True`, those in the store are passed over.
        path (`str` or `os.PathLike`): Folder of the store.
        total (`int`, *optional*): Number of records, for the bar.
        options: Arguments of `RegionStoreWriter`.

    Raises:
        ValueError: See `RegionStoreWriter`.
    """
    with RegionStoreWriter(path, **options) as writer:
        for record in logging.tqdm(records, desc=f"Writing {writer.path.name}", unit="image", total=total):
            if record.image_id not in writer.resumed:
                writer.write(record)
    return RegionStore(path)


def convert(
    source: str | PathLike, destination: str | PathLike, *, format: str | None = None, **options: Any
) -> RegionStore:
    """
    Converts a file or folder of a known format to a store, with a progress bar, and opens it.

    Args:
        source (`str` or `os.PathLike`): See `formats.read_records`.
        destination (`str` or `os.PathLike`): Folder of the store.
        format (`str`, *optional*): A key of `formats.FORMATS`; None detects it.
        options: Arguments of `RegionStoreWriter`: provenance, `dtype`, `resume=True` to go on after an interruption.

    Raises:
        ValueError: The format is unknown, a record is malformed, or see `RegionStoreWriter`.
    """
    name = detect_format(source) if format is None else format
    with RegionStoreWriter(destination, source_format=name, **options) as writer:
        records = read_records(source, name, skip=writer.resumed)
        for record in logging.tqdm(records, desc=f"Converting {name}", unit="image"):
            writer.write(record)
    return RegionStore(destination)
