"""Evaluates the three tasks of pre-training, beside the figures that guessing reaches (paper, section Pre-training)."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import ArrayLike

from ...data.negatives import PairsWithMismatches
from ...runs.masked_prediction import evaluate_masked_prediction, outputs_on
from .collator import DataCollatorForUnicoderVLPreTraining


def evaluate_pretraining(
    model: torch.nn.Module,
    pairs: PairsWithMismatches,
    collator: DataCollatorForUnicoderVLPreTraining,
    accelerator: Accelerator,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """
    Evaluates the three tasks on a validation split, over all processes; nothing larger than a batch is kept.

    Masked tokens and regions are predicted on the matches, masked as in training. Matching is told on the UNMASKED
    pairs, one match and one mismatch each.

    Args:
        model ([`UnicoderVLForPreTraining`]): The model, prepared by accelerate or not.
        pairs ([`PairsWithMismatches`]): The validation pairs, with `fixed_epoch`, so that each evaluation
            sees the same masks and mismatches.
        collator ([`DataCollatorForUnicoderVLPreTraining`]): The collator of the training.
        accelerator ([`~accelerate.Accelerator`]): The accelerator of the run.
        batch_size (`int`, *optional*, defaults to 64): Rows of a batch in each process.
        num_workers (`int`, *optional*, defaults to 0): Processes that read for each process.

    Returns:
        `dict[str, float]`: the metrics of [`evaluate_masked_prediction`] (a task whose probability is 0 has none), and
        `matching_loss`, `matching_accuracy` and `matching_auc` (chance 0.5).
    """
    options = {"batch_size": batch_size, "num_workers": num_workers}
    metrics = evaluate_masked_prediction(model, pairs, collator.collate_matches, accelerator, **options)
    unmasked = dataclasses.replace(collator, mlm_probability=0.0, moc_probability=0.0)
    scores: list[float] = []
    for _, outputs in outputs_on(model, pairs, unmasked, accelerator, name="Evaluating matching", **options):
        half = len(outputs.scores) // 2
        # (match, mismatch) pair by pair, so that processes may gather in any order.
        scores += torch.stack((outputs.scores[:half], outputs.scores[half:]), dim=1).flatten().tolist()
    all_scores = np.asarray(gather_object(scores) if accelerator.num_processes > 1 else scores, dtype=np.float32)
    matches = np.tile([1, 0], len(all_scores) // 2)
    signed = np.where(matches == 1, all_scores, -all_scores)  # the margin of the right answer
    return metrics | {
        "matching_loss": float(np.logaddexp(0, -signed.astype(np.float64)).mean()),
        "matching_accuracy": float((signed > 0).mean()),
        "matching_auc": roc_auc(all_scores, matches),
    }


def metrics_table(metrics: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """Makes a table of metrics in percent, with chance beside each; metrics without chance are left out."""
    lines = [f"{'':24}{'model':>8}{'chance':>8}  (percent)"]
    lines += [f"{name:24}{100 * metrics[name]:8.1f}{100 * value:8.1f}" for name, value in chance.items()]
    return "\n".join(lines)


def pretraining_chance(metrics: Mapping[str, float]) -> dict[str, float]:
    """Gives the figures that guessing reaches: the commonest target of each masked task, and a coin for matching."""
    chance = {
        name.replace("_majority", ""): value for name, value in metrics.items() if name.endswith("_majority_accuracy")
    }
    return chance | {"matching_accuracy": 0.5, "matching_auc": 0.5}


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """
    Computes the area under the ROC curve: how often a match scores above a mismatch, a tie counting half.

    Args:
        scores (array of shape `(num_pairs,)`): Higher = better match.
        labels (array of shape `(num_pairs,)`): 1 = match, 0 = mismatch; both must occur.

    Returns:
        `float` in `[0, 1]`; chance is 0.5.

    Raises:
        `ValueError`: shapes do not fit, a score is NaN, or labels are not 0 and 1, both.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores have shape {scores.shape} and labels {labels.shape}; expected one dimension of equal length."
        )
    if np.isnan(scores).any():
        raise ValueError(f"scores[{np.flatnonzero(np.isnan(scores))[0]}] is NaN; expected a number for every pair.")
    if not np.isin(labels, (0, 1)).all() or len(np.unique(labels)) != 2:
        raise ValueError(
            f"labels hold {np.unique(labels)[:5].tolist()}; expected both 1 (match) and 0 (mismatch), and nothing else."
        )
    _, level, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, the mean rank of its ties
    matches = labels == 1
    num_matches, num_mismatches = int(matches.sum()), int((~matches).sum())
    return float((ranks[level[matches]].sum() - num_matches * (num_matches + 1) / 2) / (num_matches * num_mismatches))
