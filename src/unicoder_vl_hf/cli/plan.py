"""The command that turns measured rates into the hours of the paper's jobs."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from .commands import Add, Commands, Result

commands = Commands()

# Pairs that are scored, and rows that are trained on, in each job (paper: sections Pre-training, Image-Text Retrieval).
JOBS: list[tuple[str, str, int]] = [
    ("Flickr30k, the test split scored: 1,000 photos x 5,000 captions", "scoring", 1_000 * 5_000),
    ("COCO 1K, five folds scored: 5 x 1,000 x 5,000", "scoring", 5 * 1_000 * 5_000),
    ("COCO 5K, the test split scored: 5,000 x 25,000", "scoring", 5_000 * 25_000),
    ("COCO 5K in two stages: 100 candidates of each of 5,000 photos and 25,000 captions", "scoring", 100 * 30_000),
    ("Flickr30k, an epoch of fine-tuning: 145,000 pairs with 6 negatives", "training", 145_000 * 7),
    ("COCO, an epoch of fine-tuning: 566,435 pairs with 6 negatives", "training", 566_435 * 7),
    ("VQA v2, an epoch of fine-tuning: 443,757 questions", "training", 443_757),
    ("Conceptual Captions, an epoch of pre-training: 3.0M pairs, each with a mismatch", "training", 3_000_000 * 2),
    ("Conceptual Captions, the paper's 10 epochs", "training", 10 * 3_000_000 * 2),
]
UNITS = {"scoring": "pairs", "training": "rows"}


def _plan_arguments(add: Add) -> None:
    add("measured", nargs="+", type=Path, help="files that `make bench` or `make gpu-check` wrote")
    add("--processes", type=int, default=1, help="cores or GPUs that share a job evenly (default: 1)")


@commands.register("plan", "Measured rates → hours for Flickr30k, COCO and Conceptual Captions", _plan_arguments)
def _plan(args: Namespace) -> object:
    if args.processes < 1:
        raise ValueError(f"--processes is {args.processes}, expected at least 1.")
    lines, data = [], []
    for path in args.measured:
        measured = _read(path)
        told = measured["machine"]
        unit = f"{told['gpu']}, a GPU" if "gpu" in told else f"{told['cpu']}, a core"
        for dtype, rates in measured["rates"].items():
            each = ", ".join(f"{rate:,.4g} {UNITS[work]} a second" for work, rate in rates.items() if rate)
            lines.append(f"{unit}, {dtype}: {each}")
            for job, work, count in JOBS:
                if rates.get(work):
                    hours = count / rates[work] / args.processes / 3600
                    lines.append(f"{hours:>12,.1f} h  {job}")
                    data.append({"measured": path, "on": unit, "dtype": dtype, "job": job, "hours": hours})
    return Result("\n".join(lines), data)


def _read(path: Path) -> dict[str, Any]:
    """Reads a file of measured rates. Raises ValueError where it is none, or a miniature's."""
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        miniature = "tiny" in (measured["machine"].get("size"), measured.get("scale", {}).get("size"))
        rates = measured.get("rates", {})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: expected the JSON that `make bench` or `make gpu-check` writes.") from error
    if miniature or not rates:
        lacks = "is of a miniature, whose speed says nothing" if miniature else "holds no rate yet"
        raise ValueError(f"{path} {lacks}: run `make bench` (rows scoring-… and training-…) or `make gpu-check`.")
    return measured
