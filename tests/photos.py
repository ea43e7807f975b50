"""Photos for the tests of detectors and extraction."""

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured blobs, different at each place."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


# Four shapes, of which two occur twice, in no order.
SIZES = [(120, 80), (80, 120), (120, 80), (97, 61), (80, 120), (200, 50)]


def as_tar(photos: Path, path: Path) -> Path:
    """The photos of a folder as a shard of webdataset."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(photos.iterdir()):
            archive.add(file, file.name)
    return path


def as_tables(photos: Path, folder: Path) -> Path:
    """The photos of a folder in a column of two .parquet files of several row groups."""
    import datasets  # which `make gpu-check` does without

    folder.mkdir()
    rows = [
        {"image_id": file.stem, "image": {"bytes": file.read_bytes(), "path": file.name}}
        for file in sorted(photos.iterdir())
    ]
    half = len(rows) // 2
    for name, some in (("0", rows[:half]), ("1", rows[half:])):
        datasets.Dataset.from_list(some).to_parquet(folder / f"{name}.parquet", batch_size=4)
    return folder
