"""Runs the pre-training scripts one after another, for torchrun: `two_processes.py runs.json`.

`runs.json` lists {"script": …, "arguments": […], "examples": file or null}; each process writes to `<examples>-<rank>`
the epoch and the row of each example that it trains on, and prints what the test asks for.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from unicoder_vl_hf import DataCollatorForUnicoderVLPreTraining

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def record_examples(path: str):
    """Writes the epoch and the row of what is collated with mismatches and masks: what is trained on."""
    collate = DataCollatorForUnicoderVLPreTraining.__call__

    def recording(self, rows):
        if "mismatch_image_id" in rows[0] and self.mlm_probability > 0:
            with open(f"{path}-{os.environ.get('RANK', 0)}", "a") as file:
                file.write("".join(f"{row['epoch']} {row['row_index']}\n" for row in rows))
        return collate(self, rows)

    DataCollatorForUnicoderVLPreTraining.__call__ = recording
    return collate


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text()):
        collate = record_examples(run["examples"])
        importlib.import_module(run["script"]).main(run["arguments"])
        print(f"{run['script']}: world size {PartialState().num_processes}", flush=True)
        DataCollatorForUnicoderVLPreTraining.__call__ = collate
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
    PartialState().destroy_process_group()
