"""The batches of validation rows, shared among processes, in an evaluation of any task, and the logits of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from .. import logging

Batch = dict[str, torch.Tensor]
Collator = Callable[[Sequence[Mapping[str, Any]]], Batch]


@dataclass
class WithoutInputs:
    """Leaves some tensors out of the batches of a collator.

    Args:
        collator (callable): Makes the batches.
        names (sequence of `str`): The tensors that are left out.
    """

    collator: Collator
    names: Sequence[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return {name: value for name, value in self.collator(rows).items() if name not in self.names}


def batches_to_evaluate(
    rows: Dataset[Any],
    collate_fn: Callable[..., dict[str, torch.Tensor]],
    device: torch.device,
    *,
    name: str,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Gives the batches of this process, moved to a device and under a progress bar.

    Args:
        rows (`Dataset`): The rows of all processes; process p of n takes the rows p, p + n, p + 2n and so on.
        collate_fn (callable): Makes the tensors of a batch of rows.
        device (`torch.device`): The device that batches are moved to.
        name (`str`): The title of the progress bar.
        batch_size (`int`): Rows of a batch; the last batch may have fewer.
        num_workers (`int`, *optional*, defaults to 0): Processes that make batches; 0 makes them in this one.
    """
    state = PartialState()
    loader = DataLoader(
        Subset(rows, range(state.process_index, len(rows), state.num_processes)),  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        generator=torch.Generator(),  # or it would draw from the dropout's
    )
    for batch in logging.tqdm(loader, desc=name, leave=False, disable=not state.is_local_main_process):
        yield {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def compute_logits(
    model: PreTrainedModel,
    collator: Collator,
    rows: Dataset[Any],
    *,
    name: str,
    batch_size: int = 32,
    num_workers: int = 0,
) -> np.ndarray:
    """
    Computes the logits of each row, by a model without dropout. Every process calls it, and gets those of all rows.

    Args:
        model ([`PreTrainedModel`]): The model, on the device of this process.
        collator (callable): Makes the batches; their `labels` are left out.
        rows, name, batch_size, num_workers: The arguments of [`batches_to_evaluate`].

    Returns:
        `np.ndarray` of shape `(num_rows, num_logits)`, float32; -inf behind those of a row that has fewer.
    """
    was_training = model.training
    model.eval()
    logits: list[Any] = []
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    for batch in batches_to_evaluate(rows, collator, model.device, name=name, **options):
        logits += model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float().cpu()
    model.train(was_training)
    state = PartialState()
    found = {state.process_index + number * state.num_processes: row for number, row in enumerate(logits)}
    if state.num_processes > 1:
        found = dict(gather_object(list(found.items())))
    width = max(map(len, found.values()))
    padded = np.full((len(found), width), -np.inf, dtype=np.float32)
    for number, row in found.items():
        padded[number, : len(row)] = row
    return padded
