"""Evaluates the three tasks of pre-training, beside the figures that guessing reaches (paper, section Pre-training)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import ArrayLike

from ...data.masking import IGNORED
from ...data.negatives import PairsWithMismatches
from ...records_unicoder_vl import RegionRecord
from ...runs.batches import batches_to_evaluate
from .collator import DataCollatorForUnicoderVLPreTraining


@torch.no_grad()
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
        `dict[str, float]`: `mlm_loss` (mean negative log-likelihood of a masked token), `mlm_perplexity`,
        `mlm_accuracy`, `moc_loss`, `moc_accuracy`, and for either accuracy `…_majority_accuracy`, that of always naming
        the commonest target (a task whose probability is 0 has no entries); `matching_loss`, `matching_accuracy` and
        `matching_auc` (chance 0.5).
    """
    was_training = model.training
    model.eval()

    def batches(collate_fn: Any, name: str):
        for batch in batches_to_evaluate(
            pairs, collate_fn, accelerator.device, name=name, batch_size=batch_size, num_workers=num_workers
        ):
            with accelerator.autocast():
                yield batch, model(**batch, sparse_prediction=True)

    config = accelerator.unwrap_model(model).config
    tasks = {"mlm": ("labels", config.vocab_size), "moc": ("region_labels", config.num_region_classes)}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in tasks}  # of losses, of right predictions
    counts = {name: torch.zeros(size, dtype=torch.float64) for name, (_, size) in tasks.items()}  # of each target
    for batch, outputs in batches(collator.collate_matches, "Evaluating masked prediction"):
        for name, logits in (("mlm", outputs.prediction_logits), ("moc", outputs.region_logits)):
            labels = batch[tasks[name][0]]
            targets = labels[labels != IGNORED]
            if name == "moc":  # the others are of the targets alone
                logits = logits[labels != IGNORED][:, -config.num_region_classes :]  # none of background
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            sums[name] += torch.stack((losses, (logits.argmax(-1) == targets).sum())).double().cpu()
            counts[name] += torch.bincount(targets, minlength=len(counts[name])).cpu()

    unmasked = dataclasses.replace(collator, mlm_probability=0.0, moc_probability=0.0)
    scores: list[float] = []
    for _, outputs in batches(unmasked, "Evaluating matching"):
        half = len(outputs.scores) // 2
        # (match, mismatch) pair by pair, so that processes may gather in any order.
        scores += torch.stack((outputs.scores[:half], outputs.scores[half:]), dim=1).flatten().tolist()

    model.train(was_training)
    all_scores = np.asarray(gather_object(scores) if accelerator.num_processes > 1 else scores, dtype=np.float32)
    matches = np.tile([1, 0], len(all_scores) // 2)

    metrics: dict[str, float] = {}
    for name in tasks:
        loss, right = accelerator.reduce(sums[name].to(accelerator.device), reduction="sum").tolist()
        targets_of_class = accelerator.reduce(counts[name].to(accelerator.device), reduction="sum")
        if (total := targets_of_class.sum().item()) > 0:
            metrics[f"{name}_loss"] = loss / total
            metrics[f"{name}_accuracy"] = right / total
            metrics[f"{name}_majority_accuracy"] = targets_of_class.max().item() / total
    if "mlm_loss" in metrics:
        metrics["mlm_perplexity"] = math.exp(min(metrics["mlm_loss"], 50.0))
    signed = np.where(matches == 1, all_scores, -all_scores)  # the margin of the right answer
    metrics |= {
        "matching_loss": float(np.logaddexp(0, -signed.astype(np.float64)).mean()),
        "matching_accuracy": float((signed > 0).mean()),
        "matching_auc": roc_auc(all_scores, matches),
    }
    return metrics


class ShuffledStore(Mapping[str, RegionRecord]):
    """
    A store that gives every image the regions of another: with it a model can only tell from the text.

    Args:
        store (`Mapping[str, RegionRecord]`): The regions of the images.
        image_ids (sequence of `str`): The images that are shuffled, at least two.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffling.
    """

    def __init__(self, store: Mapping[str, RegionRecord], image_ids: Sequence[str], seed: int = 0):
        image_ids = sorted(set(image_ids))
        if len(image_ids) < 2:
            raise ValueError(f"image_ids holds {image_ids}, expected at least two images to take regions from.")
        order = np.random.default_rng(seed).permutation(len(image_ids))
        # One cycle through all images: none keeps its own regions.
        self.other = {image_ids[a]: image_ids[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
        self.store = store

    def __getitem__(self, image_id: str) -> RegionRecord:
        return dataclasses.replace(self.store[self.other[image_id]], image_id=image_id)

    def __iter__(self):
        return iter(self.other)

    def __len__(self) -> int:
        return len(self.other)


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
