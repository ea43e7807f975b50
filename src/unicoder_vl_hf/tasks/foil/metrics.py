"""The metric of foils: how often a caption scores above its foil. Pure NumPy, no model and no files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

CROSS_ENCODER, FIRST_STAGE, GAIN = "cross-encoder", "first stage", "above first stage"


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


@dataclass(frozen=True)
class FoilGain:
    """
    The difference of two scorers' accuracies on the same foils, with a 95 % interval.

    Args:
        gain, low, high (`float`): The difference and its interval, in `[-1, 1]`; above 0 where the first is better.
        num_foils (`int`): The pairs.
    """

    gain: float
    low: float
    high: float
    num_foils: int

    def __str__(self) -> str:
        gain, low, high = (round(100 * value, 1) + 0.0 for value in (self.gain, self.low, self.high))  # and no -0
        return f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"


def foil_accuracy(margins: ArrayLike, image_ids: Sequence[str]) -> FoilAccuracy:
    """
    Measures how often captions score above their foils, with any scorer.

    The interval is that of a mean over images (1.96 standard errors, within 0 and 1), since the pairs of an image are
    not independent of each other. It says nothing of other runs, and of one image it is all from 0 to 1.

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
    FoilAccuracy(accuracy=0.625, low=0.344..., high=0.905..., num_foils=4, num_ties=1)
    ```
    """
    right = _right(margins, image_ids)
    accuracy, half = _mean(right, image_ids)
    margins = np.asarray(margins).reshape(len(right), -1)
    ties = int((margins == 0).all(axis=1).sum())
    return FoilAccuracy(accuracy, max(0.0, accuracy - half), min(1.0, accuracy + half), len(right), ties)


def foil_gain(margins: ArrayLike, other_margins: ArrayLike, image_ids: Sequence[str]) -> FoilGain:
    """
    Measures how much more often a scorer prefers captions to their foils than another scorer does.

    Both told the same foils of the same images, so that the interval of their difference is far narrower than the
    distance of two intervals of [`foil_accuracy`]; it is made like these. Where the two differ in a handful of foils it
    is too narrow.

    Args:
        margins, other_margins (arrays of shape `(num_foils,)` or `(num_foils, num_runs)`): The margins of the two.
        image_ids (sequence of `str`): The image of each foil.

    Returns:
        [`FoilGain`]: the difference, above 0 where the first is better.

    Raises:
        `ValueError`: there is no foil, a margin is NaN, or the shapes do not fit.

    Example:

    ```python
    >>> foil_gain([0.5, -0.1, 2.0, 1.0], [0.5, -0.1, -1.0, -0.5], ["a", "a", "b", "c"])
    FoilGain(gain=0.5, low=-0.235, high=1.0, num_foils=4)
    ```
    """
    gains = _right(margins, image_ids) - _right(other_margins, image_ids, "other_margins")
    gain, half = _mean(gains, image_ids)
    return FoilGain(gain, max(-1.0, gain - half), min(1.0, gain + half), len(gains))


def _right(margins: ArrayLike, image_ids: Sequence[str], name: str = "margins") -> np.ndarray:
    """Says how often each foil was told, over the runs: `(num_foils,)`, 0 to 1."""
    margins = np.asarray(margins)
    if margins.ndim not in (1, 2) or len(margins) != len(image_ids) or margins.size == 0:
        raise ValueError(
            f"{name} has shape {margins.shape}, and there are {len(image_ids)} image_ids; expected a margin, or one "
            "of each run, for every image id, and at least one."
        )
    if np.isnan(margins).any():
        raise ValueError(f"{name}[{np.argwhere(np.isnan(margins))[0][0]}] is NaN; expected a number for every foil.")
    return ((np.sign(margins) + 1) / 2).reshape(len(margins), -1).mean(axis=1)


def _mean(values: np.ndarray, image_ids: Sequence[str]) -> tuple[float, float]:
    """Averages values of foils, and gives half the 95 % interval of this mean over images; of one image it is all."""
    mean = float(values.mean())
    _, image_of_foil = np.unique(np.asarray(image_ids), return_inverse=True)
    errors = np.bincount(image_of_foil, weights=values - mean)
    if len(errors) == 1:
        return mean, 2.0
    return mean, 1.96 * float(np.sqrt((errors**2).sum() * len(errors) / (len(errors) - 1))) / len(values)


def accuracies_by_kind(margins: ArrayLike, kinds: Sequence[str], image_ids: Sequence[str]) -> dict[str, FoilAccuracy]:
    """Measures [`foil_accuracy`] of all foils, as `"all"`, and of each kind, the most frequent first."""
    return _by_kind(foil_accuracy, (margins,), kinds, image_ids)


def gains_by_kind(
    margins: ArrayLike, other_margins: ArrayLike, kinds: Sequence[str], image_ids: Sequence[str]
) -> dict[str, FoilGain]:
    """
    Measures [`foil_gain`] of all foils, as `"all"`, and of each kind, the most frequent first; the errors are its.
    """
    return _by_kind(foil_gain, (margins, other_margins), kinds, image_ids)


Found = TypeVar("Found", FoilAccuracy, FoilGain)


def _by_kind(
    measure: Callable[..., Found], margins: Sequence[ArrayLike], kinds: Sequence[str], image_ids: Sequence[str]
) -> dict[str, Found]:
    given, of_foil, images = [np.asarray(each) for each in margins], np.asarray(kinds), np.asarray(image_ids)
    names, counts = np.unique(of_foil, return_counts=True)
    found = {"all": measure(*given, image_ids)}
    for name in names[np.argsort(-counts, kind="stable")].tolist():
        found[name] = measure(*(each[of_foil == name] for each in given), images[of_foil == name].tolist())
    return found


def foil_results(
    margins: Mapping[str, np.ndarray], kinds: Sequence[str], image_ids: Sequence[str]
) -> dict[str, dict[str, FoilAccuracy] | dict[str, FoilGain]]:
    """
    Measures the margins of several scorers: the accuracies of each, of all foils and of each kind, and behind those of
    the `"first stage"` how far the `"cross-encoder"`, which has to be there, is above them. The errors are those of
    [`foil_accuracy`].
    """
    results: dict[str, Any] = {}
    for scorer, of_scorer in margins.items():
        results[scorer] = accuracies_by_kind(of_scorer, kinds, image_ids)
        if scorer == FIRST_STAGE:
            results[GAIN] = gains_by_kind(margins[CROSS_ENCODER], of_scorer, kinds, image_ids)
    return results
