"""Runs the training scripts one after another, for torchrun: `two_processes.py runs.json`.

`runs.json` lists {"script": …, "arguments": […], "examples": file, "plain_descent": bool}. Each process writes to
`<examples>-<rank>` the epoch and the row of each example that it trains on, to `<examples>-<rank>.pid` its id, and
prints the size of the world.
"""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from unicoder_vl_hf import DataCollatorForUnicoderVLPreTraining, DataCollatorForUnicoderVLRetrieval

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


@contextlib.contextmanager
def examples_recorded(path: str | Path):
    """Writes the epoch and the row of what is trained on: groups, or pairs with mismatches and masks."""
    recorded = Path(f"{path}-{os.environ.get('RANK', 0)}")

    def recording(collate):
        def call(self, rows):
            if "negative_captions" in rows[0] or ("mismatch_image_id" in rows[0] and self.mlm_probability > 0):
                with recorded.open("a") as file:
                    file.write("".join(f"{row['epoch']} {row['row_index']}\n" for row in rows))
            return collate(self, rows)

        return call

    Path(f"{recorded}.pid").write_text(str(os.getpid()))
    with pytest.MonkeyPatch.context() as patch:
        for collator in (DataCollatorForUnicoderVLPreTraining, DataCollatorForUnicoderVLRetrieval):
            patch.setattr(collator, "__call__", recording(collator.__call__))
        yield


@contextlib.contextmanager
def plain_descent():
    """Replaces AdamW, to which gradients that are too large by any factor look the same."""
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr)
    try:
        yield
    finally:
        torch.optim.AdamW = adamw


def run(script: str, arguments: list[str]):
    """The `main` of a script, as if in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    importlib.import_module(script).main(arguments)


if __name__ == "__main__":
    # Between runs: a second group would look for its peers where the first one's were, and fail in connectFullMesh.
    PartialState.destroy_process_group = lambda self, group: None
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        descent = plain_descent() if entry["plain_descent"] else contextlib.nullcontext()
        with examples_recorded(entry["examples"]), descent:
            run(entry["script"], entry["arguments"])
        print(f"{entry['script']}: world size {PartialState().num_processes}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
