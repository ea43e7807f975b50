"""The metrics of NLVR2, and the file of predictions that its evaluation takes."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ...files import write_csv


def nlvr2_metrics(predictions: ArrayLike, labels: ArrayLike, identifiers: Sequence[str]) -> dict[str, float]:
    """
    Measures accuracy and consistency as the official evaluation does.

    Args:
        predictions, labels (arrays of shape `(num_rows,)`): 1 = true, 0 = false.
        identifiers (sequence of `str`): The rows' identifiers, split-set-pair-sentence.

    Returns:
        `dict` of `accuracy`, in `[0, 1]`, and `consistency`, the share of sentences that are judged right of all of
        their pairs.

    Raises:
        `ValueError`: there is no row, a label is neither, or the lengths differ.
    """
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    if not len(identifiers) or predicted.shape != wanted.shape or wanted.shape != (len(identifiers),):
        raise ValueError(
            f"There are {predicted.shape} predictions, {wanted.shape} labels and {len(identifiers)} identifiers; "
            "expected as many of each, at least one."
        )
    if (unknown := ~np.isin(wanted, (0, 1))).any():
        raise ValueError(f"labels[{unknown.argmax()}] is {wanted[unknown][0]}, expected 1 or 0: is it a test split?")
    right = predicted == wanted
    consistent: dict[tuple[str, ...], bool] = {}
    for identifier, is_right in zip(identifiers, right.tolist(), strict=True):
        split, of_set, _, sentence = identifier.split("-")
        consistent[split, of_set, sentence] = consistent.get((split, of_set, sentence), True) and is_right
    return {"accuracy": float(right.mean()), "consistency": sum(consistent.values()) / len(consistent)}


def write_predictions(path: str | PathLike[str], identifiers: Sequence[str], predictions: ArrayLike) -> None:
    """
    Writes the CSV of identifier and True or False that NLVR2's `metrics.py` reads, whole or not at all.

    Raises:
        `ValueError`: there are not as many predictions as identifiers.
    """
    predicted = np.asarray(predictions)
    if predicted.shape != (len(identifiers),):
        raise ValueError(f"There are {predicted.shape} predictions for {len(identifiers)} identifiers.")
    write_csv(Path(path), zip(identifiers, (str(bool(value)) for value in predicted), strict=True))
