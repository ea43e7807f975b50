"""
How jobs share two cores, and what the paper's jobs would cost. Prints two tables and writes JSON.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--output scaling.json] [--size minilm] [--items 1]

Runs the commands themselves, start-up included: each job at two sizes, by one process on a core and by two on two. A
time is taken for START + GATHER + items x SECONDS / (processes x EFFICIENCY), which four runs determine. The cost table
needs no run: it takes operations, and an efficiency from `--measured scaling.json`. Everything else that it assumes
stands in ASSUMED.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from work import SIZES

from unicoder_vl_hf import (
    UnicoderVLConfig,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.scenes.world import build_scenes, scene_tokenizer
from unicoder_vl_hf.scoring.packed import pair_flops

COMMAND = [sys.executable, "-m", "unicoder_vl_hf.cli"]
PRETRAINING = Path(__file__).parents[1] / "examples" / "run_pretraining.py"
CAPTIONS = 5  # of a scene
MINED, EMBEDDED, STEPS = 40, 2_000, 20  # scenes whose captions are mined, scenes embedded and steps, at size 1

# What the cost table assumes of a GPU and its network: an H100 at 3 dollars an hour, its dense bf16 rate, shares of it
# that larger models reach elsewhere, and bytes a second of all-reduce within a machine of 8 and between machines.
ASSUMED = {
    "peak": 989e12,
    "share, scoring and training": 0.35,
    "share, detector": 0.15,
    "dollars an hour": 3.0,
    "bytes a second, in a machine of 8": 300e9,
    "bytes a second, between machines": 40e9,
    "operations of a photo": 0.9e12,  # Visual Genome's Faster R-CNN (ResNet-101), 600 pixels
    "rows of a step on a GPU": 256,
}
PARAMETERS, WORDS, REGIONS = 110e6, 13, 44  # BERT-base; Flickr8k's captions, bottom-up regions


@dataclass
class Job:
    """A job: its items at size 1, and the commands of `processes` processes at a size, and of who gathers."""

    items: int
    commands: Callable[[int, int, Path], list[list[str]]]
    gather: Callable[[int, int, Path], list[str]] | None = None


def shares(words: Callable[[int, Path], list[str]]) -> dict[str, Callable]:
    """The commands of a job that is cut into shares, and the one that gathers."""
    return {
        "commands": lambda size, processes, folder: [
            [*COMMAND, *words(size, folder), "--share", f"{index}/{processes}"] for index in range(processes)
        ],
        "gather": lambda size, processes, folder: [*COMMAND, *words(size, folder), "--gather", str(processes)],
    }


def jobs(world: Path, items: int) -> dict[str, Job]:
    """The jobs, of `items` times a few minutes' work."""
    model, captions, regions = (str(world / name) for name in ("model", "captions.jsonl", "regions"))

    def mine(size: int, folder: Path) -> list[str]:
        some = f"{world}/{MINED * items * size}.jsonl"
        return ["mine", model, some, regions, f"{folder}/mined", "--images-per-set", "20"]

    def index(size: int, folder: Path) -> list[str]:
        some = f"{world}/{EMBEDDED * items * size}.jsonl:train"
        return ["index", regions, "--model", model, "--output", f"{folder}/index", "--images-of", some]

    def pretrain(size: int, processes: int, folder: Path) -> list[list[str]]:
        steps, rows = STEPS * items * size, 32 // processes
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
        options = ["--max_steps", str(steps), "--per_device_train_batch_size", str(rows), "--warmup_ratio", "0"]
        data = ["--captions", captions, "--regions", regions, "--model_name_or_path", model]
        return [[sys.executable, *launch, str(PRETRAINING), "--output_dir", f"{folder}/run", *data, *options]]

    return {
        "mine: pairs scored": Job(MINED * items * CAPTIONS * 20, **shares(mine)),
        "index: photos embedded": Job(EMBEDDED * items, **shares(index)),
        "pretrain: rows": Job(STEPS * items * 64, pretrain),
    }


def build_world(folder: Path, items: int, size: str) -> None:
    """Scenes, caption files of the jobs' sizes, and a model with new weights, whose speed is that of a trained one."""
    build_scenes(folder, num_train=2 * EMBEDDED * items, num_val=2, num_test=2)
    lines = (folder / "captions.jsonl").read_text().splitlines()
    for number in (MINED * items, 2 * MINED * items, EMBEDDED * items, 2 * EMBEDDED * items):
        (folder / f"{number}.jsonl").write_text("\n".join(lines[: number * CAPTIONS]) + "\n")
    config = UnicoderVLConfig(
        vocab_size=len(scene_tokenizer()),
        region_feature_dim=256,
        projection_dim=128,
        first_stage_trained=True,
        **SIZES[size],
    )
    UnicoderVLForImageTextRetrieval(config).save_pretrained(folder / "model")
    UnicoderVLProcessor(UnicoderVLFeatureExtractor(), scene_tokenizer()).save_pretrained(folder / "model")


def seconds(job: Job, size: int, processes: int) -> float:
    """Runs a job from nothing, each process on a core of its own, and then gathers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        running, environment = [], {**os.environ, "TQDM_DISABLE": "1"}
        for core, command in enumerate(commands := job.commands(size, processes, folder)):
            cores = str(core) if len(commands) == processes else f"0-{processes - 1}"
            words = ["taskset", "-c", cores, *command]
            running.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment))
        for process in running:
            _, said = process.communicate()
            if process.returncode:
                raise ValueError(f"{' '.join(process.args)}\n{said.decode()}")
        if job.gather is not None:
            subprocess.run(job.gather(size, processes, folder), check=True, capture_output=True)
        return time.perf_counter() - begin


def measure(items: int, size: str, only: str | None) -> dict[str, dict[str, float]]:
    """Measures each job in four runs: seconds, what a start costs and an item, and how two processes share."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        world = Path(name) / "world"
        build_world(world, items, size)
        print("| job | n, 1 process | 2n, 1 | n, 2 | 2n, 2 | start | an item | strong | weak | efficiency |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
        for label, job in jobs(world, items).items():
            if not label.startswith(only or ""):
                continue
            one, twice, strong, weak = (seconds(job, scale, p) for scale, p in ((1, 1), (2, 1), (1, 2), (2, 2)))
            item = (twice - one) / job.items
            start = 2 * one - twice
            shared = max((weak - strong) / job.items, 1e-12)  # seconds of an item by two processes
            found[label] = {
                "items": job.items, "one": one, "twice": twice, "strong": strong, "weak": weak,
                "start": start, "item": item, "efficiency": item / (2 * shared),
            }  # fmt: skip
            print(
                f"| {label}, n = {job.items:,} | {one:.1f} | {twice:.1f} | {strong:.1f} | {weak:.1f} | {start:.1f} s | "
                f"{1000 * item:.2f} ms | {one / (2 * strong):.2f} | {one / weak:.2f} | {item / (2 * shared):.2f} |",
                flush=True,
            )
    return found


def hours(job: str, gpus: int, efficiency: float) -> float:
    """Hours of a job of the cost table on a number of GPUs."""
    pair = float(pair_flops(UnicoderVLConfig(), np.array(WORDS + REGIONS)))
    rate = ASSUMED["peak"] * ASSUMED["share, scoring and training"]
    if job.startswith("extract"):
        each = 3.8e6 * ASSUMED["operations of a photo"] / (ASSUMED["peak"] * ASSUMED["share, detector"])
        return each / (gpus * (efficiency if gpus > 1 else 1)) / 3600
    if job.startswith("pre-train"):
        rows = ASSUMED["rows of a step on a GPU"]
        steps = 10 * 2 * 3.8e6 / (rows * gpus)
        network = ASSUMED[f"bytes a second, {'in a machine of 8' if gpus <= 8 else 'between machines'}"]
        gradients = 2 * (gpus - 1) / gpus * 4 * PARAMETERS / network
        return steps * (rows * 3 * pair / rate + gradients) / 3600
    pairs = {"score": 125e6, "mine": 1e6 * 50}[job.split()[0]]
    return pairs * pair / rate / (gpus * (efficiency if gpus > 1 else 1)) / 3600


def costs(efficiency: float) -> None:
    """Prints hours and dollars on 1, 8 and 64 GPUs, with an efficiency of shares as measured."""
    names = [
        "extract 3.8M photos (Conceptual Captions and SBU)",
        "score 125M pairs (COCO 5K, every pair)",
        "mine over 1M captions, 50 candidates each",
        "pre-train 10 epochs of 3.8M pairs, each with a mismatch",
    ]
    print("| job | 1 GPU | 8 | 64 |\n|---|--:|--:|--:|")
    for name in names:
        cells = [(hours(name, gpus, efficiency), gpus) for gpus in (1, 8, 64)]
        print(
            f"| {name} |", " | ".join(f"{h:.2g} h, ${h * n * ASSUMED['dollars an hour']:,.0f}" for h, n in cells), "|"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--measured", type=Path, help="take this file of a run before, and run nothing")
    parser.add_argument("--size", choices=sorted(SIZES), default="minilm")
    parser.add_argument("--items", type=int, default=1, help="factor of the size of all jobs")
    parser.add_argument("--only", help="the job whose name begins so, alone")
    args = parser.parse_args()
    if args.measured is None:
        found = measure(args.items, args.size, args.only)
        args.output.write_text(json.dumps({"size": args.size, "jobs": found, "assumed": ASSUMED}, indent=2) + "\n")
    else:
        found = json.loads(args.measured.read_text())["jobs"]
    print()
    costs(found["mine: pairs scored"]["efficiency"])


if __name__ == "__main__":
    main()
