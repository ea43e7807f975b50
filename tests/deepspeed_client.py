"""
A script of two processes that trains a tiny model for two steps by DeepSpeed, as a file of examples/launching/ says:
`torchrun --nproc_per_node 2 deepspeed_client.py FILE FOLDER`. The main process saves the model to FOLDER.

accelerate takes DeepSpeed for GPUs alone; DeepSpeed itself also runs on CPUs. So the processes are started before
accelerate looks at them.
"""

import os
import sys

import tiny
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from unicoder_vl_hf import UnicoderVLForPreTraining

STEPS, RATE = 2, 0.5


def main(config: str, folder: str) -> None:
    from deepspeed import comm, ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles it for minutes; gloo does as well
    words = ["--config_file", config, "--mixed_precision", "no", "train.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    os.environ |= {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "DEEPSPEED_"))}
    PartialState(cpu=True)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    comm.init_distributed(dist_backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    accelerator = Accelerator(mixed_precision="no")
    plugin = accelerator.state.deepspeed_plugin
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    print(f"process {accelerator.process_index} of {accelerator.num_processes}, ZeRO-{plugin.zero_stage}", flush=True)

    model = tiny.model(UnicoderVLForPreTraining)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    half = {name: value[accelerator.process_index :: 2] for name, value in tiny.pretraining_batch().items()}
    for _ in range(STEPS):
        loss = model(**half).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
