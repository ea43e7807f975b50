"""The log of a run, with a line of JSON for each measurement, and the mean losses, shown beside a progress bar."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from ..files import complete, partial_path


class JsonLog:
    """
    A file with a JSON object a line: `step` and the values of that step. The trackers of accelerate get these, too.

    Args:
        path (`Path`): The file, which the main process makes and writes.
        accelerator ([`~accelerate.Accelerator`]): The accelerator of the run.
        resume_step (`int`, *optional*, defaults to 0): The step that the run goes on from. Lines after it are dropped,
            since a resumed run writes them again; by default all lines. Those of the step itself stay, and what the run
            measures again of them, such as its last evaluation, is not written twice.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resume_step: int = 0):
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process:
            lines = path.read_text().splitlines(keepends=True) if path.exists() and resume_step > 0 else []
            # A crash may have cut the last line short.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resume_step]
            self._kept = {(line["step"], *line) for line in map(json.loads, kept)}  # step and names of each
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial_path(path).open("w") as file:  # a kill here must not cost the lines that are there
                file.writelines(kept)
                complete(file, path)

    def write(self, step: int, values: dict[str, float]):
        """
        Adds a line for `step`, its values rounded to six decimals, to the file and to the trackers. Every process calls
        it.
        """
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process and (step, "step", *values) not in self._kept:
            with self.path.open("a") as file:
                file.write(
                    json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}) + "\n"
                )


MASKED_LOSSES = ("mlm_loss", "moc_loss")  # which the matches alone have


class LossMeter:
    """
    Measures the mean of the loss and of its parts since the last line of the log, over all processes. A checkpoint
    keeps its `state`.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The accelerator of the run.
        parts (sequence of `str`): Parts of the loss that are trained, by their names in the model's output.
    """

    def __init__(self, accelerator: Accelerator, parts: Sequence[str]):
        self.accelerator = accelerator
        self.losses = ("loss", *parts)
        # Of the losses, of the share of rows whose tokens and regions count, and of the weights.
        self._sums = torch.zeros(len(self.losses) + 2, device=accelerator.device)
        self._of_process = torch.zeros_like(self._sums)
        self.start_clock()

    def start_clock(self):
        """Starts the clock anew, so that an evaluation does not count as training."""
        self._since, self._rows = time.perf_counter(), 0

    def add(self, outputs: Mapping[str, torch.Tensor], matching_labels: torch.Tensor, weight: float):
        """
        Adds the losses of a micro-batch, without waiting for the device.

        Args:
            outputs (`Mapping[str, torch.Tensor]`): The model's output, with the losses.
            matching_labels (`torch.Tensor` of shape `(batch_size,)`): 0 = mismatch, whose tokens and regions do not
                count.
            weight (`float`): Share of the micro-batch in its step; over the steps these come to 1 a step.
        """
        losses = [outputs[name].detach().mean() for name in self.losses]  # one a GPU under DataParallel
        counted = (matching_labels != 0).float().mean()
        self._of_process += torch.stack([*losses, counted, torch.ones_like(counted)]) * weight
        self._rows += len(matching_labels)

    def gather(self):
        """Adds up the losses of all processes since the last call. Every process calls it, after whole steps."""
        self._sums += self.accelerator.reduce(self._of_process, reduction="sum")  # the same in every process
        self._of_process.zero_()

    def mean(self) -> dict[str, float]:
        """
        Takes the means since the last line, and begins anew.

        Returns:
            The mean of each loss over the steps by their weights, that of masked losses over the matches, as in
            evaluation; and `rows_per_second`, over all processes.
        """
        *sums, counted, weights = self._sums.tolist()
        rows = self._rows * self.accelerator.num_processes / (time.perf_counter() - self._since)
        self._sums.zero_()
        self.start_clock()
        means = {
            name: total / (counted if name in MASKED_LOSSES else weights)
            for name, total in zip(self.losses, sums, strict=True)
        }
        return means | {"rows_per_second": rows}

    def state(self) -> dict[str, float]:
        """The sums since the last line, by the names of the losses, for a checkpoint."""
        return dict(zip((*self.losses, "counted", "weights"), self._sums.tolist(), strict=True))

    def load(self, state: Mapping[str, float] | Sequence[float]):
        """Takes up the sums that a checkpoint kept as `state`; a sequence is that of a checkpoint without names."""
        if not isinstance(state, Mapping):  # of a checkpoint without names
            state = dict(zip(("loss", *MASKED_LOSSES, "matching_loss", "counted"), state, strict=True))
        state = {"weights": 2 * state["counted"], **state}  # older checkpoints: half of their rows were matches
        self._sums.copy_(torch.tensor([state[name] for name in (*self.losses, "counted", "weights")]))


def beside_the_bar(values: Mapping[str, float]) -> dict[str, str]:
    """Shortens the losses and the learning rate of a line of the log, so that they fit beside a progress bar."""
    losses = {name.removesuffix("_loss"): f"{value:.3f}" for name, value in values.items() if name.endswith("loss")}
    return losses | {"lr": f"{values['learning_rate']:.1e}"}


def in_a_line(step: int, metrics: Mapping[str, float]) -> str:
    """Writes the metrics of an evaluation in a line for the terminal."""
    return f"step {step:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def in_a_table(folder: object, training: object, metrics: Mapping[str, float]) -> str:
    """
    Makes the table that ends a training.

    Args:
        folder (`str` or `os.PathLike`): The folder of the run.
        training ([`TrainingRun`]): How it ran, of which `str` makes a list for the card.
        metrics (`Mapping[str, float]`): What the kept model reached.
    """
    rows = [line.removeprefix("- ").split(": ", 1) for line in str(training).splitlines()]
    rows += [[name.removeprefix("eval_"), f"{value:.4g}"] for name, value in metrics.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{folder} is complete.", *(f"  {name:{width}}  {value}" for name, value in rows)])
