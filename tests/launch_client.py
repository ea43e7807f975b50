"""A script for launchers, which says what world it woke up in."""

import os

from accelerate import Accelerator

if __name__ == "__main__":
    state = Accelerator().state
    kind = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "plain")
    print(
        f"process {state.process_index} of {state.num_processes} on {state.device.type}, {kind}\n", end="", flush=True
    )
    state.destroy_process_group()
