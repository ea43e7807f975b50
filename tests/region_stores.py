"""Small stores for tests: records that differ in every way that a store must keep."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from unicoder_vl_hf import RegionRecord, RegionStore, RegionStoreWriter

FIELDS = list(vars(RegionRecord("x", features=[[1.0]])))


def make(number: int, width: int = 8) -> RegionRecord:
    """Image `number`; which optional fields it has depends on the number, and w != h, n varies."""
    rng = np.random.default_rng(number)
    n = 1 + number % 5
    corners = np.sort(rng.random((n, 2, 2)), axis=1)
    sized = number % 3 != 0
    boxes = (corners * ((300, 200) if sized else (1, 1))).reshape(n, 4)
    return RegionRecord(
        f"photo_{number}" + "ü" * (number % 4),
        image_width=300 if sized else None,
        image_height=200 if sized else None,
        boxes=boxes if number % 7 else None,
        features=rng.standard_normal((n, width)).astype(np.float16),
        object_ids=rng.integers(-1, 9, n) if number % 2 else None,
        object_scores=rng.random(n) if number % 2 else None,
        attribute_ids=rng.integers(-1, 4, n) if number % 5 == 1 else None,
        attribute_scores=rng.random(n) if number % 5 == 2 else None,
        class_probabilities=rng.random((n, 9)).astype(np.float32 if number % 4 else np.float16)
        if number % 6 == 1
        else None,
    )


def assert_same(found: RegionRecord, given: RegionRecord) -> None:
    for name in FIELDS:
        a, b = getattr(found, name), getattr(given, name)
        if isinstance(b, np.ndarray):
            assert a.shape == b.shape, name
            assert np.array_equal(a, b), name
            if name != "class_probabilities":  # a shard widens float16 to the float32 of a neighbour
                assert a.dtype == b.dtype, name
        else:
            assert (a, type(a)) == (b, type(b)), name


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_store(records: Iterable[RegionRecord], folder: Path, **options) -> RegionStore:
    with RegionStoreWriter(folder, **options) as writer:
        for record in records:
            if record.image_id not in writer.resumed:
                writer.write(record)
    return RegionStore(folder)
