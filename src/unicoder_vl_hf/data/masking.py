"""What masks share: their salt, the label of what is not predicted, and the draw of what is hidden."""

import numpy as np

SALT = 0x6D61736B  # keeps these draws apart from orders and mismatches that use the same seed
IGNORED = -100


def choose(rng: np.random.Generator, count: int, probability: float) -> np.ndarray:
    """Each of `count` with `probability`, and one of them where none came up."""
    chosen = rng.random(count) < probability
    if not chosen.any():
        chosen[rng.integers(count)] = True
    return chosen
