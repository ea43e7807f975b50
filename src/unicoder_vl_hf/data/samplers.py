"""The order of training: the rows that an optimiser step takes, shared among processes and micro-batches.

The order is a pure function of (seed, epoch, step): the rows of a step are the same for any number of processes and
micro-batches, so that a resume on another machine trains on the same steps. Every row occurs exactly once an epoch.
Steps hold equal numbers of rows, the last of an epoch fewer ([`StepBatchSampler`]), or about equal numbers of tokens
([`TokenBatchSampler`]). Of a stream each process has a part of its own ([`StreamBatchSampler`]).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

SALT = 0x6F7264  # keeps these draws apart from masks and negatives that use the same seed

# Steps whose rows are sorted together. Batches of 192 pairs (13 words, 44 regions on average) then have 1.22 times the
# tokens that they have without padding: 2.10 where 1 step is sorted alone, 1.41 for 4, 1.18 for 64.
STEPS_PER_WINDOW = 16


def epoch_order(num_rows: int, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """
    Gives the order in which an epoch visits its rows, int64 of shape `(num_rows,)`; without `shuffle` as they lie.
    """
    return np.random.default_rng([seed, epoch, SALT]).permutation(num_rows) if shuffle else np.arange(num_rows)


def step_parts(rows: np.ndarray, num_parts: int) -> list[tuple[list[int], float]]:
    """
    Splits the rows of one step into parts of nearly equal size, each with its weight: rows of the part / of the step.

    Where there are fewer rows than parts, an empty part holds the step's first row with weight 0: every process runs
    every micro-step (gradients are summed over all of them, and one that stays away is waited for), and the row
    counts once.

    Example:

    ```python
    >>> step_parts(np.array([7, 3, 5]), 2)
    [([7, 3], 0.6666666666666666), ([5], 0.3333333333333333)]
    >>> step_parts(np.array([7]), 2)
    [([7], 1.0), ([7], 0.0)]
    ```
    """
    return [
        ((part if len(part) else rows[:1]).tolist(), len(part) / len(rows)) for part in np.array_split(rows, num_parts)
    ]


def cut_evenly(tokens: np.ndarray, count: int, least: int = 1) -> np.ndarray:
    """
    Cuts rows, in their order, into parts of nearly equal numbers of tokens.

    Args:
        tokens (`np.ndarray` of shape `(num_rows,)`): The tokens of each row.
        count (`int`): Number of parts.
        least (`int`, *optional*, defaults to 1): Rows that a part has at least; there must be `count * least`.

    Returns:
        The first row of each part, and behind them the number of rows: int64 of shape `(count + 1,)`.

    Example:

    ```python
    >>> cut_evenly(np.array([1, 1, 1, 1, 2, 2, 4]), 3)
    array([0, 4, 6, 7])
    ```
    """
    middles = tokens.cumsum() - tokens / 2  # a row is of the part that its middle is in
    cuts = np.searchsorted(middles, tokens.sum() * np.arange(count + 1) / count)
    # Each part has its rows, whatever the tokens are: cuts move up, and then down from the end.
    rows_before = least * np.arange(count + 1)
    cuts = np.maximum.accumulate(cuts - rows_before) + rows_before
    return np.minimum(cuts, len(tokens) - rows_before[::-1])


@dataclass(eq=False)
class StepBatchSampler(Sampler[list[int]]):
    """
    Gives the micro-batches of one process, for `DataLoader(batch_sampler=…)`: `micro_batches` of them make a step.

    Micro-batches differ in size by a row where the rows do not divide, and at the end of an epoch. Mean losses add up
    to the mean over the step when each is multiplied by its weight, and by the number of processes where DDP averages
    gradients:

    ```python
    sampler.set_epoch(epoch, start_step=step)
    for batch, weight in zip(loader, sampler.weights(), strict=True):
        (model(**batch).loss * weight * num_processes).backward()
    ```

    The sampler splits over processes itself: keep `accelerate` from splitting again (do not `prepare` the loader).

    Args:
        num_rows (`int`): Rows of an epoch.
        rows_per_step (`int`): Rows of one optimiser step, over all processes and micro-batches.
        micro_batches (`int`, *optional*, defaults to 1): Forward passes of one process in a step (gradient
            accumulation).
        seed (`int`): Seed of the order, at least 0.
        process_index (`int`, *optional*, defaults to 0): Number of this process, in `[0, num_processes)`.
        num_processes (`int`, *optional*, defaults to 1): Number of all processes.
        shuffle (`bool`, *optional*, defaults to `True`): Whether each epoch has another order, or else that of the
            rows.

    Raises:
        `ValueError`: an argument is out of its range.
    """

    num_rows: int
    _: KW_ONLY
    rows_per_step: int
    micro_batches: int = 1
    seed: int
    process_index: int = 0
    num_processes: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("num_rows", "rows_per_step", "micro_batches", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1.")
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(
                f"process_index={self.process_index}; expected 0 to {self.num_processes - 1}, as "
                f"num_processes={self.num_processes}."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}; expected at least 0.")
        self.epoch = self.start_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimiser steps of an epoch."""
        return -(-self.num_rows // self.rows_per_step)

    def set_epoch(self, epoch: int, start_step: int | None = None) -> None:
        """Moves to an epoch and a step in it: by default to its first, or nowhere if it is in that epoch already."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}; expected at least 0.")
        if start_step is None:
            start_step = self.start_step if epoch == self.epoch else 0
        self.epoch = epoch
        self.set_start_step(start_step)

    def set_start_step(self, step: int) -> None:
        """Begins this epoch at a step (others at their first); rows before it are neither read nor collated."""
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"step={step} is not in the epoch; expected 0 to {self.steps_per_epoch}.")
        self.start_step = step

    def parts(self) -> Iterator[tuple[list[int], float]]:
        """
        Gives the rows of each micro-batch of this process, and its weight in its step (0: a filler), from `start_step`.
        """
        return self._parts(epoch_order(self.num_rows, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle))

    def weights(self) -> Iterator[float]:
        """Gives the weight of each micro-batch, in the order of iteration; weights follow from sizes, not from rows."""
        return (weight for _, weight in self._parts(np.arange(self.num_rows)))

    def _parts(self, order: np.ndarray) -> Iterator[tuple[list[int], float]]:
        mine = slice(self.process_index * self.micro_batches, (self.process_index + 1) * self.micro_batches)
        for step in range(self.start_step, self.steps_per_epoch):
            rows = order[step * self.rows_per_step : (step + 1) * self.rows_per_step]
            yield from step_parts(rows, self.num_processes * self.micro_batches)[mine]

    def __iter__(self) -> Iterator[list[int]]:
        return (rows for rows, _ in self.parts())

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.micro_batches


class TokenBatchSampler(StepBatchSampler):
    """
    Gives the micro-batches of one process, as [`StepBatchSampler`] does, of about equal numbers of tokens and with rows
    of alike length, which need little padding.

    The rows of an epoch are shuffled. Those of 16 steps are sorted by the length of their longest sequence and cut into
    steps of equal tokens, which follow in random order; a step is cut into its micro-batches alike. The number of steps
    is the same in every epoch, and lengths are asked for a window of 16 steps at a time.

    Steps have different numbers of rows. The weight of a micro-batch is its rows over the mean of all steps, so that
    every row counts the same, and the gradients of an epoch add up to those of steps of equal rows.

    Args:
        lengths (callable): Takes the numbers of rows, int64 of shape `(n,)`, and the epoch; gives the tokens of their
            sequences, integers of shape `(n, sequences)`.
        num_rows (`int`): Rows of an epoch.
        num_tokens (`int`): Tokens that an epoch has, or is expected to have.
        tokens_per_batch (`int`): Tokens of one optimiser step, over all processes and micro-batches.
        options: `micro_batches`, `seed`, `process_index`, `num_processes` and `shuffle` of [`StepBatchSampler`].

    Raises:
        `ValueError`: an argument is out of its range, or steps have fewer rows than micro-batches.
    """

    def __init__(
        self,
        lengths: Callable[[np.ndarray, int], np.ndarray],
        num_rows: int,
        *,
        num_tokens: int,
        tokens_per_batch: int,
        **options: Any,
    ):
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch={tokens_per_batch}; expected at least 1.")
        self._steps = max(1, round(num_tokens / tokens_per_batch))
        super().__init__(num_rows, rows_per_step=max(1, num_rows // self._steps), **options)
        self.lengths = lengths
        self.tokens_per_batch = tokens_per_batch
        self.num_parts = self.num_processes * self.micro_batches
        if num_rows < self._steps * self.num_parts:
            raise ValueError(
                f"tokens_per_batch={tokens_per_batch}: the steps have {num_rows / self._steps:.1f} rows of "
                f"{num_tokens / num_rows:.0f} tokens on average, which do not fill {self.num_parts} micro-batches over "
                f"all processes; expected at least {-(-num_tokens * self.num_parts // num_rows)}."
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimiser steps of an epoch, which is that of every epoch."""
        return self._steps

    @property
    def mean_rows(self) -> float:
        """The rows of a micro-batch, on average."""
        return self.num_rows / (self._steps * self.num_parts)

    def weights(self) -> Iterator[float]:
        """Gives the weight of each micro-batch, in the order of iteration; the lengths are asked for again."""
        return (weight for _, weight in self.parts())

    def _parts(self, order: np.ndarray) -> Iterator[tuple[list[int], float]]:
        mine = slice(self.process_index * self.micro_batches, (self.process_index + 1) * self.micro_batches)
        for first in range(0, self._steps, STEPS_PER_WINDOW):
            count = min(STEPS_PER_WINDOW, self._steps - first)
            if first + count > self.start_step:
                window = order[slice(*(self.num_rows * step // self._steps for step in (first, first + count)))]
                for rows, tokens in self._steps_of(window, first, count)[max(0, self.start_step - first) :]:
                    cuts = cut_evenly(tokens, self.num_parts)
                    for begin, end in list(pairwise(cuts))[mine]:
                        weight = (end - begin) * self._steps / self.num_rows
                        yield rows[begin:end].tolist(), float(weight)

    def _steps_of(self, rows: np.ndarray, first: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Makes the steps of a window, which begins with step `first`, each as its rows and their tokens."""
        lengths = self.lengths(rows, self.epoch)
        longest, tokens = lengths.max(axis=1), lengths.sum(axis=1)
        by_length = np.lexsort((tokens, longest))
        rows, tokens = rows[by_length], tokens[by_length]
        steps = [slice(*cut) for cut in pairwise(cut_evenly(tokens, count, least=self.num_parts))]
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch, first, SALT]).shuffle(steps)
        return [(rows[step], tokens[step]) for step in steps]


class StreamBatchSampler(StepBatchSampler):
    """
    Gives the micro-batches of one process of a stream, of which each process has its own part: numbers of rows in that
    part, one after another.

    Args:
        max_steps (`int`): Optimiser steps; they count as one epoch.
        rows_per_step (`int`): Rows of one step, over all processes and micro-batches.
        options: `micro_batches`, `seed`, `process_index` and `num_processes` of [`StepBatchSampler`].

    Raises:
        `ValueError`: an argument is out of its range, or the rows of a step are not as many for each process, or do not
            fill its micro-batches.
    """

    def __init__(self, max_steps: int, *, rows_per_step: int, **options: Any):
        super().__init__(max_steps * rows_per_step, rows_per_step=rows_per_step, shuffle=False, **options)
        self.rows_of_process = rows_per_step // self.num_processes
        if rows_per_step % self.num_processes or self.rows_of_process < self.micro_batches:
            raise ValueError(
                f"train_batch_size={rows_per_step}: in a stream each of {self.num_processes} processes has as many of "
                f"them, and one for each of its {self.micro_batches} micro-batches at least; expected a multiple of "
                f"{self.num_processes} from {self.num_processes * self.micro_batches} on."
            )

    def parts(self) -> Iterator[tuple[list[int], float]]:
        """Gives the rows of each micro-batch of this process, and its weight in the step of all processes."""
        for step in range(self.start_step, self.steps_per_epoch):
            rows = step * self.rows_of_process + np.arange(self.rows_of_process)
            for numbers, weight in step_parts(rows, self.micro_batches):
                yield numbers, weight / self.num_processes

    def weights(self) -> Iterator[float]:
        """Gives the weight of each micro-batch, in the order of iteration."""
        return (weight for _, weight in self.parts())


class GivenRows(Dataset[Any]):
    """Gives on the rows of a batch sampler that gives rows, not their numbers, since it made them to announce them."""

    def __getitem__(self, row: Any) -> Any:
        return row


class ReadAhead(Sampler[list[Any]]):
    """
    Gives the batches of a sampler, each announced one batch before it is given, for `DataLoader(batch_sampler=…)`: the
    disk then reads what the next batch needs while this one is made and computed on.

    Args:
        batches (iterable, such as a `Sampler`): Gives lists of the numbers of rows, or of the rows themselves to be
            given on by [`GivenRows`].
        announce (callable): Takes a batch, such as `lambda rows: store.will_need(image_ids[row] for row in rows)`.
    """

    def __init__(self, batches: Iterable[list[Any]], announce: Callable[[list[Any]], Any]):
        self.batches, self.announce = batches, announce

    def __iter__(self) -> Iterator[list[Any]]:
        for batch, following in pairwise(chain(self.batches, [[]])):
            if following:
                self.announce(following)
            yield batch

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]
