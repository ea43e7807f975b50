"""
Forks commands from a process that has imported what they need, which saves the imports of five seconds a start. A child
runs `python WORDS` as `runpy` does, with blocks and shards so small that tiny inputs have many, and tells what it did.

`python fork_server.py FAULTS_LIBRARY` reads a request of JSON a line, and answers each with a line.
"""

import ctypes
import functools
import json
import os
import runpy
import signal
import sys
import time
import traceback
import warnings
from importlib import import_module
from pkgutil import resolve_name

IMPORTED = """
torch torch.distributed datasets transformers.trainer accelerate.utils small_world region_stores photos uvicorn fastapi
unicoder_vl_hf.modeling_unicoder_vl unicoder_vl_hf.processing_unicoder_vl unicoder_vl_hf.cli.parser
unicoder_vl_hf.regions.extraction unicoder_vl_hf.regions.conversion unicoder_vl_hf.search.command
unicoder_vl_hf.tasks.pretraining.run unicoder_vl_hf.tasks.retrieval.run unicoder_vl_hf.tasks.retrieval.mining
unicoder_vl_hf.tasks.retrieval.run_evaluation unicoder_vl_hf.serving.server two_processes
""".split()
SECONDS = 600  # after which a command that hangs ends

unit = units = None  # the function that does a unit of a child's work, and the file that tells of them


def report(*lines: object) -> None:
    if units is not None:
        os.write(units, "".join(f"{line}\n" for line in lines).encode())


def make_blocks_small() -> None:
    from unicoder_vl_hf import ImageTextScorer, RegionStoreWriter
    from unicoder_vl_hf.regions import extraction
    from unicoder_vl_hf.search import index

    extraction.extract.__kwdefaults__["shard_size"] = 300
    RegionStoreWriter.__init__.__kwdefaults__["shard_size"] = 500
    ImageTextScorer.__init__.__kwdefaults__["block_pairs"] = 64
    index.BLOCK_ITEMS = 4


def let_tell(name: str, lines) -> None:
    """Lets a function, `module:name`, tell lines after each call, which `lines` makes of its arguments."""
    parent, _, attribute = name.replace(":", ".").rpartition(".")
    place = resolve_name(parent)
    function = getattr(place, attribute)

    @functools.wraps(function)
    def call(*arguments, **options):
        result = function(*arguments, **options)
        report(*lines(*arguments))
        return result

    setattr(place, attribute, call)


def units_of(name: str, of, *arguments):
    return of(*arguments) if name == unit else ()


def work(request: dict, faults) -> None:
    """A child's life."""
    global unit, units
    unit = request["unit"]
    os.setpgid(0, 0)
    signal.alarm(SECONDS)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(target, stream)
    units = os.open(request["units"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.environ |= request["environment"]
    sys.argv = request["words"]
    os.chdir(request["folder"])
    if faults is not None:
        faults.arm(*request["fault"])
    code = 0
    try:
        with resolve_name("two_processes:examples_recorded")(request["examples"]):
            if sys.argv[0] == "-m":
                del sys.argv[0]
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if faults is not None:
        report(f"events {faults.counted_events()}", f"renames {faults.counted_renames()}")
    os._exit(code)


def ended(pids: list[int], seconds: float, codes: dict[int, int]) -> list[int | None]:
    """Waits until all have ended, or one by an error, or the time is over; gives the exit codes so far."""
    until = time.monotonic() + seconds
    while True:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        found = [codes.get(pid) for pid in pids]
        if None not in found or any(found) or time.monotonic() > until:
            return found
        time.sleep(0.005)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for module in IMPORTED:
        import_module(module)
    from chaos_commands import COMMANDS

    make_blocks_small()
    for name, of in {command.unit: command.units for command in COMMANDS}.items():
        let_tell(name, functools.partial(units_of, name, of))
    world_size = resolve_name("torch.distributed:get_world_size")
    let_tell("torch.distributed:init_process_group", lambda *arguments: [f"world {world_size()}"])
    faults = ctypes.CDLL(sys.argv[1]) if sys.argv[1:] else None
    codes: dict[int, int] = {}
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            if (answer := os.fork()) == 0:
                work(request, faults)
        else:
            answer = ended(request["pids"], request["seconds"], codes)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
