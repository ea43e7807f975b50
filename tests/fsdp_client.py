"""A script of two_processes.py that runs another one as examples/launching/fsdp2.yaml says: `main([script, …])`.

accelerate shards on GPUs alone: on CPUs it forgets FSDP without a word. PyTorch's FSDP2 shards on CPUs, too, so that
our part can be tested once accelerate takes these processes for those of GPUs.
"""

import os

import places
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from unicoder_vl_hf.processes import start_processes


def main(arguments: list[str]):
    name, *words = arguments
    config = str(places.EXAMPLES / "launching" / "fsdp2.yaml")
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, name]))
    environment = prepare_multi_gpu_env(launch)
    os.environ |= {key: value for key, value in environment.items() if "FSDP" in key}
    start_processes()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    places.script(name).main(words)
