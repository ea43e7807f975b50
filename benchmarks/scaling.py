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
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
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
# Photos extracted, scenes whose captions are mined, scenes embedded, and steps, at size 1.
PHOTOS, MINED, EMBEDDED, STEPS = 60, 40, 2_000, 20

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
    """A job: its items at size 1, its command at a size, by so many processes, and whether it is cut into shares."""

    items: int
    command: Callable[[int, int, Path], list[str]]
    has_shares: bool = True


def jobs(world: Path, items: int) -> dict[str, Job]:
    """The jobs, of `items` times a few minutes' work."""
    model, captions, regions = (str(world / name) for name in ("model", "captions.jsonl", "regions"))

    def extract(size: int, processes: int, folder: Path) -> list[str]:
        photos = f"{world}/photos{PHOTOS * items * size}"
        return [*COMMAND, "extract", photos, f"{folder}/store", "--detector", f"grid:{world}/encoder"]

    def mine(size: int, processes: int, folder: Path) -> list[str]:
        data = [model, f"{world}/{MINED * items * size}.jsonl", regions]
        return [*COMMAND, "mine", *data, f"{folder}/mined", "--images-per-set", "20"]

    def index(size: int, processes: int, folder: Path) -> list[str]:
        some = f"{world}/{EMBEDDED * items * size}.jsonl:train"
        return [*COMMAND, "index", regions, "--model", model, "--output", f"{folder}/index", "--images-of", some]

    def pretrain(size: int, processes: int, folder: Path) -> list[str]:
        # `accelerate launch --cpu` starts one process, whatever it is told.
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        options = ["--max_steps", str(STEPS * items * size), "--train_batch_size", "32", "--warmup_ratio", "0"]
        options += ["--gradient_accumulation_steps", "1"]
        data = ["--captions", captions, "--regions", regions, "--model_name_or_path", model]
        return [sys.executable, *launch, str(PRETRAINING), "--output_dir", f"{folder}/run", *data, *options]

    return {
        "extract: photos": Job(PHOTOS * items, extract),
        "mine: pairs scored": Job(MINED * items * CAPTIONS * 20, mine),
        "index: photos embedded": Job(EMBEDDED * items, index),
        "pretrain: rows": Job(STEPS * items * 64, pretrain, has_shares=False),
    }


def build_world(folder: Path, items: int, size: str) -> None:
    """
    Scenes, caption files of the jobs' sizes, photos, and a model and an image encoder (DINOv2, base) with new weights,
    whose speed is that of trained ones.
    """
    build_scenes(folder, num_train=2 * EMBEDDED * items, num_val=2, num_test=2)
    lines = (folder / "captions.jsonl").read_text().splitlines()
    for number in (MINED * items, 2 * MINED * items, EMBEDDED * items, 2 * EMBEDDED * items):
        (folder / f"{number}.jsonl").write_text("\n".join(lines[: number * CAPTIONS]) + "\n")
    for number in (PHOTOS * items, 2 * PHOTOS * items):
        (photos := folder / f"photos{number}").mkdir()
        for photo in range(number):
            Image.effect_noise((480, 360), 50).convert("RGB").save(photos / f"{photo}.jpg")
    Dinov2Model(Dinov2Config(image_size=224)).save_pretrained(folder / "encoder")
    BitImageProcessor(size={"shortest_edge": 224}).save_pretrained(folder / "encoder")
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
    with tempfile.TemporaryDirectory() as folder:
        command, begin = job.command(size, processes, Path(folder)), time.perf_counter()
        shares = [["--share", f"{index}/{processes}"] for index in range(processes)] if job.has_shares else [[]]
        running, environment = [], {**os.environ, "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
        for core, share in enumerate(shares):
            words = ["taskset", "-c", str(core) if share else f"0-{processes - 1}", *command, *share]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(subprocess.Popen(words, env=environment, **streams))
        for process in running:
            said, _ = process.communicate()
            if process.returncode or not (job.has_shares or f"; processes: {processes}," in said):
                raise ValueError(f"{' '.join(process.args)}\n{said}")
        if job.has_shares:
            subprocess.run([*command, "--gather", str(processes)], check=True, capture_output=True)
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
    if job.startswith("pre-train"):
        rate = ASSUMED["peak"] * ASSUMED["share, scoring and training"]
        rows = ASSUMED["rows of a step on a GPU"]
        steps = 10 * 2 * 3.8e6 / (rows * gpus)
        network = ASSUMED[f"bytes a second, {'in a machine of 8' if gpus <= 8 else 'between machines'}"]
        gradients = 2 * (gpus - 1) / gpus * 4 * PARAMETERS / network
        return steps * (rows * 3 * pair / rate + gradients) / 3600
    operations, share = {
        "extract": (3.8e6 * ASSUMED["operations of a photo"], "share, detector"),
        "score": (125e6 * pair, "share, scoring and training"),
        "mine": (1e6 * 50 * pair, "share, scoring and training"),
    }[job.split()[0]]
    return operations / (ASSUMED["peak"] * ASSUMED[share]) / (gpus * (efficiency if gpus > 1 else 1)) / 3600


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
    if mined := found.get("mine: pairs scored"):
        print()
        costs(mined["efficiency"])


if __name__ == "__main__":
    main()
