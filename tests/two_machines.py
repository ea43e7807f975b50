"""
Runs the lines of docs/scale.md that start a training on two nodes, as they stand there, on two nodes that this machine
plays: network namespaces joined by a cable where root may make them, else two groups of processes on the loopback
address. Names of the Hub and of data are those of a small world.

    python tests/two_machines.py        # every line, with what it printed
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import small_world
from places import EXAMPLES, ROOT
from two_processes import free_port

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of torchrun and accelerate
# sbatch starts the job with what Slurm tells it; srun starts a command on each node, at once.
STAND_INS = {
    "sbatch": '#!/bin/bash\n[[ $1 == --nodes=* ]] || exit 9\nSLURM_NNODES="${1#--nodes=}" exec "${@:2}"\n',
    "srun": """\
#!/bin/bash
started=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$node $(eval echo "\\$ON_NODE_$node") "$@" & started+=($!)
done
for one in "${started[@]}"; do wait "$one" || exit 1; done
""",
    "scontrol": '#!/bin/bash\necho "$HEAD"\necho another\n',
}


def lines() -> list[str]:
    """The commands of the page that train on several nodes: those of Slurm, and those for each node by itself."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    section = page.partition("## Training on many GPUs")[2].partition("\n## ")[0]
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)).replace("\\\n", "")
    return [line for line in commands.splitlines() if "--nodes=" in line or "$NODE" in line]


@dataclass
class Nodes:
    """Two nodes: the words that start a command on each of them, the address of the first, and variables of both."""

    on_node: tuple[str, str] = ("", "")
    head: str = "127.0.0.1"
    variables: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def two_machines() -> Iterator[Nodes]:
    names = [f"node{number}-{os.getpid()}" for number in range(2)]
    cable = f"uvl{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
            ip("link", "add", cable, "type", "veth", "peer", "name", f"{cable}b")
            for number, (name, end) in enumerate(zip(names, (cable, f"{cable}b"), strict=True)):
                ip("link", "set", end, "netns", name, "name", "eth0")
                ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
                for interface in ("lo", "eth0"):
                    ip("-n", name, "link", "set", interface, "up")
        except (OSError, subprocess.CalledProcessError):
            yield Nodes()
            return
        first, second = (f"ip netns exec {name}" for name in names)
        yield Nodes((first, second), "10.77.0.1", {"GLOO_SOCKET_IFNAME": "eth0"})


def build(folder: Path) -> None:
    """The files that the lines name."""
    world = small_world.build(folder)
    for name in ("captions.jsonl", "regions"):
        (folder / name).symlink_to(world / name)
    (folder / "examples").symlink_to(EXAMPLES)
    small_world.save_bert(folder / "google-bert" / "bert-base-uncased", dropout=0.0)
    for name, text in STAND_INS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def start(line: str, folder: Path, nodes: Nodes, timeout: float = 600) -> str:
    """Runs a line, in Slurm's way once, else on each node; gives what it prints."""
    variables = {
        **os.environ,
        **nodes.variables,
        "ACCELERATE_USE_CPU": "true",
        "HEAD": nodes.head,
        "HF_HUB_OFFLINE": "1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "ON_NODE_0": nodes.on_node[0],
        "ON_NODE_1": nodes.on_node[1],
        "PATH": f"{folder / 'bin'}{os.pathsep}{PATH}",
        "PROCESSES_PER_NODE": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    starts = [("", {})] if line.startswith("sbatch") else [(nodes.on_node[n], {"NODE": str(n)}) for n in range(2)]
    shutil.rmtree(folder / "runs", ignore_errors=True)
    output = folder / "output"
    with output.open("w") as file:
        running = [
            subprocess.Popen(
                [*where.split(), "bash", "-c", line],
                cwd=folder,
                env=variables | more,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for where, more in starts
        ]
        try:
            codes = [each.wait(timeout) for each in running]
        finally:
            for each in running:
                each.kill()
    printed = output.read_text()
    assert codes == [0] * len(codes), printed
    return printed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made, two_machines() as nodes:
        build(Path(made))
        print(f"Nodes: {nodes.on_node}, the first at {nodes.head}")
        for line in lines():
            printed = start(line, Path(made), nodes)
            print(f"\n$ {line}")
            print(*(each for each in printed.splitlines() if "processes:" in each or "is complete" in each), sep="\n")
