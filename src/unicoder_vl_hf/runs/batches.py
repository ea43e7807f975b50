"""Evaluation of any task: the batches of validation rows, shared among processes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Subset

from .. import logging


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
    Gives the batches of this process, on a device and under a progress bar called `name`. Process p of n takes the rows
    p, p + n, p + 2n and so on.
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
