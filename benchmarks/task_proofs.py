"""Proves on rendered scenes that tasks are learned, and by looking: each seed with all, without regions, and elsewhere.

    python benchmarks/task_proofs.py vqa --output proofs

Runs examples/run_TASK.py on the scenes once for each seed and for each thing that it is left without, and prints what
the last step reaches on scenes never seen. The same command goes on with what is missing. A run takes minutes, of one
that is left without something as many epochs as `--control_epochs` says.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
BLIND = {"grounding": "expression"}  # what a task is left without, by default its regions
# What a task starts from: new weights learn these from yes and no alone too slowly.
START = {"entailment": "vqa", "nlvr2": "vqa"}
LAST_STEP = ["--load_best_model_at_end", "False", "--save_strategy", "no", "--disable_tqdm", "true"]


def run(task: str, seed: int, without: str, folder: Path, options: list[str]) -> dict[str, float]:
    """Trains once, or reads what a run before left: its metrics, and the seconds that it took."""
    output = folder / f"{task}-{seed}-{without}"
    done = output / "proof.json"
    if not done.exists():
        shared = folder / f"{task}-scenes"  # drawn once
        shared.mkdir(parents=True, exist_ok=True)
        output.mkdir(exist_ok=True)
        if not (output / "_data").exists():
            (output / "_data").symlink_to(shared.absolute(), target_is_directory=True)
        begin = time.perf_counter()
        words = ["--output_dir", str(output), "--seed", str(seed), "--without", without, *LAST_STEP, *options]
        if task in START:
            run(START[task], seed, "nothing", folder, [])
            words += ["--model_name_or_path", str(folder / f"{START[task]}-{seed}-nothing")]
        subprocess.run(
            [sys.executable, EXAMPLES / f"run_{task}.py", *words],
            check=True,
            stdout=sys.stderr,  # the table alone goes to the output
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        metrics = json.loads((output / "eval_results.json").read_text())
        metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        done.write_text(json.dumps(metrics | {"seconds": round(time.perf_counter() - begin)}))
    return json.loads(done.read_text())


def main(argv: list[str] | None = None) -> None:
    """Runs the proofs of `argv`, by default those of the command line; further options go to the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", help="vqa, entailment, nlvr2 or grounding")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--control_epochs", help="epochs of those without something (default: as of those with all)")
    args, options = parser.parse_known_args(argv)
    for task in args.tasks:
        print(f"| {task} | metric |", " | ".join(f"seed {seed}" for seed in args.seeds), "|")
        print("|---|---|" + "--:|" * len(args.seeds))
        for without in ("nothing", BLIND.get(task, "regions"), "photo"):
            words = f"`--without {without}`"
            control = without != "nothing" and args.control_epochs
            shorter = ["--num_train_epochs", args.control_epochs] if control else []
            found = [run(task, seed, without, args.output, [*options, *shorter]) for seed in args.seeds]
            for name in found[0]:
                scale = 1 if name == "seconds" else 100
                print(
                    f"| {words} | {name} |", " | ".join(f"{scale * each[name]:.1f}" for each in found), "|", flush=True
                )


if __name__ == "__main__":
    main()
