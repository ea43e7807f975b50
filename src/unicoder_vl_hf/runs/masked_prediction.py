"""Evaluates masked language modelling and masked object classification (paper, section Pre-training)."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from ..data.masking import IGNORED
from .batches import batches_to_evaluate


def evaluate_masked_prediction(
    model: torch.nn.Module,
    rows: Dataset[Any],
    collate_fn: Callable[..., dict[str, torch.Tensor]],
    accelerator: Accelerator,
    **options: int,
) -> dict[str, float]:
    """
    Predicts the masked tokens and regions of validation rows, over all processes; nothing larger than a batch is kept.

    Args:
        model ([`UnicoderVLForPreTraining`]): The model, prepared by accelerate or not.
        rows (`Dataset`): The rows of all processes.
        collate_fn (callable): Masks the rows of a batch, and makes its tensors with `labels` and `region_labels`.
        accelerator ([`~accelerate.Accelerator`]): The accelerator of the run.
        options: `batch_size` and `num_workers` of [`batches_to_evaluate`].

    Returns:
        `dict[str, float]`: `mlm_loss` (mean negative log-likelihood of a masked token), `mlm_perplexity`,
        `mlm_accuracy`, `moc_loss`, `moc_accuracy`, and for either accuracy `…_majority_accuracy`, that of always naming
        the commonest target. A task of which nothing is masked has no entries.
    """
    config = accelerator.unwrap_model(model).config
    tasks = {"mlm": ("labels", config.vocab_size), "moc": ("region_labels", config.num_region_classes)}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in tasks}  # of losses, of right predictions
    counts = {name: torch.zeros(size, dtype=torch.float64) for name, (_, size) in tasks.items()}  # of each target
    for batch, outputs in outputs_on(
        model, rows, collate_fn, accelerator, name="Evaluating masked prediction", **options
    ):
        for name, logits in (("mlm", outputs.prediction_logits), ("moc", outputs.region_logits)):
            labels = batch[tasks[name][0]]
            targets = labels[labels != IGNORED]
            if name == "moc":  # the others are of the targets alone
                logits = logits[labels != IGNORED][:, -config.num_region_classes :]  # none of background
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            sums[name] += torch.stack((losses, (logits.argmax(-1) == targets).sum())).double().cpu()
            counts[name] += torch.bincount(targets, minlength=len(counts[name])).cpu()
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
    return metrics


def outputs_on(
    model: torch.nn.Module,
    rows: Dataset[Any],
    collate_fn: Callable[..., dict[str, torch.Tensor]],
    accelerator: Accelerator,
    **options: Any,
) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """
    Gives the batches of this process with the outputs of the model, which is in evaluation meanwhile. The arguments are
    those of [`batches_to_evaluate`].
    """
    was_training = model.training
    model.eval()
    for batch in batches_to_evaluate(rows, collate_fn, accelerator.device, **options):
        with torch.no_grad(), accelerator.autocast():
            outputs = model(**batch, sparse_prediction=True)
        yield batch, outputs
    model.train(was_training)
