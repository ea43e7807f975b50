"""Photos for the tests of detectors and extraction."""

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured blobs, different at each place."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


# Four shapes, of which two occur twice, in no order.
SIZES = [(120, 80), (80, 120), (120, 80), (97, 61), (80, 120), (200, 50)]
