"""The metric of foils: how often a caption scores above its foil. Pure NumPy, no model and no files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class FoilAccuracy:
    """
    The accuracy of pairs, with a 95 % interval.

    Args:
        accuracy, low, high (`float`): The accuracy and its interval, in `[0, 1]`; chance is 0.5.
        num_foils, num_ties (`int`): The pairs, and those of equal scores, which count half.
    """

    accuracy: float
    low: float
    high: float
    num_foils: int
    num_ties: int

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def foil_accuracy(margins: ArrayLike, image_ids: Sequence[str]) -> FoilAccuracy:
    """
    Measures how often captions score above their foils, with any scorer.

    The interval is that of a mean over images (1.96 standard errors, within 0 and 1), since the pairs of an image are
    not independent of each other.

    Args:
        margins (array of shape `(num_foils,)` or `(num_foils, num_runs)`): The score of each caption less that of its
            foil. Of several runs, such as seeds, each pair counts with its mean over them.
        image_ids (sequence of `str`): The image of each foil.

    Returns:
        [`FoilAccuracy`]: the accuracy.

    Raises:
        `ValueError`: there is no foil, a margin is NaN, or the shapes do not fit.

    Example:

    ```python
    >>> foil_accuracy([0.5, -0.1, 2.0, 0.0], ["a", "a", "b", "c"])
    FoilAccuracy(accuracy=0.625, low=0.0849..., high=1.0, num_foils=4, num_ties=1)
    ```
    """
    margins = np.asarray(margins)
    if margins.ndim not in (1, 2) or len(margins) != len(image_ids) or margins.size == 0:
        raise ValueError(
            f"margins has shape {margins.shape}, and there are {len(image_ids)} image_ids; expected a margin, or one "
            "of each run, for every image id, and at least one."
        )
    if np.isnan(margins).any():
        raise ValueError(f"margins[{np.argwhere(np.isnan(margins))[0][0]}] is NaN; expected a number for every foil.")
    right = ((np.sign(margins) + 1) / 2).reshape(len(margins), -1).mean(axis=1)
    accuracy = float(right.mean())
    _, image_of_foil = np.unique(np.asarray(image_ids), return_inverse=True)
    errors = np.bincount(image_of_foil, weights=right - accuracy)
    half = 1.96 * float(np.sqrt((errors**2).sum() * len(errors) / max(1, len(errors) - 1))) / len(right)
    ties = int((margins == 0).reshape(len(margins), -1).all(axis=1).sum())
    return FoilAccuracy(accuracy, max(0.0, accuracy - half), min(1.0, accuracy + half), len(right), ties)


def accuracies_by_kind(margins: ArrayLike, kinds: Sequence[str], image_ids: Sequence[str]) -> dict[str, FoilAccuracy]:
    """Measures [`foil_accuracy`] of all foils, as `"all"`, and of each kind, the most frequent first."""
    margins, of_foil, images = np.asarray(margins), np.asarray(kinds), np.asarray(image_ids)
    names, counts = np.unique(of_foil, return_counts=True)
    found = {"all": foil_accuracy(margins, image_ids)}
    for name in names[np.argsort(-counts, kind="stable")].tolist():
        found[name] = foil_accuracy(margins[of_foil == name], images[of_foil == name].tolist())
    return found
