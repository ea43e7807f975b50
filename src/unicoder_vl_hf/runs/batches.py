"""The batches of validation rows, shared among processes, in the evaluation of any task."""

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
