"""Proves on the rendered scenes what a cross-encoder is for: how things lie, which two vectors cannot say.

    python benchmarks/relations.py --output proofs/relations

For each seed the matching head learns in three steps: which object an expression means, then captions from their foils,
then retrieval with a first stage along. Two controls leave out the expressions, or the foils; a third trains two
vectors alone, for about as long. It writes `relations.json`, `relations.md` and `relations.png`: recall of 150 test
scenes by the first stage and by the score of its best 20, and foils told by either. 5 minutes a seed of one core, 13
of the controls. The same command goes on, and other seeds and controls join what is there; further options go to every
training, and want a folder of their own.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from unicoder_vl_hf.pictures import dot_chart

EXAMPLES = Path(__file__).parents[1] / "examples"
ALL, NO_EXPRESSIONS, NO_FOILS, ALONE = "all", "without expressions", "without foils", "two vectors alone"
WHOSE = ("first stage", "score")
KINDS = ("relation", "size", "colour", "shape")
RECALLS = ("image_retrieval_recall@1", "text_retrieval_recall@1")
LAST_STEP = ["--load_best_model_at_end", "False", "--save_strategy", "no", "--eval_strategy", "no"]
NEW = ["--initializer_range", "0.08", "--location_initializer_range", "1"]
BY_FOILS = ["--loss", "softmax", "--num_negative_captions", "0", "--num_negative_images", "0"]
BY_FOILS += ["--num_train_epochs", "1", "--max_validation_images", "0"]
STRONG = ["--recipe", "strong", "--learning_rate", "1e-3"]
RETRIEVAL = [*STRONG, "--scored_ratio", "0.25", "--num_train_epochs", "2"]
TWO_VECTORS = [*STRONG, "--loss", "none", "--num_hard_negatives", "0", "--num_train_epochs", "6", *NEW]


class Proof:
    """The runs of one seed, in a folder of its own."""

    def __init__(self, output: Path, seed: int, options: list[str]):
        self.output, self.folder, self.seed, self.options = output, output / f"seed-{seed}", seed, options
        self.train_foils, self.test_foils = output / "train_foils.jsonl", output / "foils.jsonl"

    def measure(self, name: str) -> dict:
        """Trains what `name` says, with whatever it begins with, and measures it; what is there already stays."""
        model = self.train("retrieval", name, TWO_VECTORS) if name == ALONE else self.matching_head(name)
        scenes = self.output / "_data" / "scenes"
        report, told = model / "two_stages.json", model / "foils.json"
        if not report.exists():
            words = ["--model", model, "--captions", scenes / "captions.jsonl", "--regions", scenes / "regions"]
            words += ["--split", "test", "--candidates", "20", "--output", report]
            run([EXAMPLES / "evaluate_two_stage.py", *words])
        if not told.exists():
            words = [model, self.test_foils, scenes / "regions", "--split", "test", "--output", told]
            run(["-m", "unicoder_vl_hf.cli", "foil-accuracy", *words])
        rows = json.loads(report.read_text())["report"]["rows"]
        accuracy = json.loads(told.read_text())["results"]
        return {
            whose: {recall: row["metrics"][recall] for recall in RECALLS}
            | {kind: accuracy[scorer][kind]["accuracy"] for kind in KINDS}
            for whose, row, scorer in zip(WHOSE, rows, ("first stage", "cross-encoder"), strict=False)
            if (name, whose) != (ALONE, "score")  # of a head that learned nothing
        }

    def matching_head(self, name: str) -> Path:
        """Trains a matching head in the steps that `name` leaves."""
        foils = [] if name == NO_FOILS else ["--foils", str(self.train_foils)]
        start = self.train("grounding", "expressions", ["--num_train_epochs", "3"]) if name != NO_EXPRESSIONS else None
        if foils:
            start = self.train("retrieval", f"foils {name}", [*BY_FOILS, *foils, *(begin(start) or NEW)])
        return self.train("retrieval", f"retrieval {name}", [*RETRIEVAL, *foils, *begin(start)])

    def train(self, task: str, name: str, options: list[str]) -> Path:
        """Trains into a folder, unless it was done before, and gives the folder."""
        output = self.folder / name.replace(" ", "-")
        if not (output / "trainer_state.json").exists():  # written at the end
            output.mkdir(parents=True, exist_ok=True)
            if not (output / "_data").exists():  # the scenes are drawn once
                (self.output / "_data").mkdir(exist_ok=True)
                (output / "_data").symlink_to((self.output / "_data").absolute(), target_is_directory=True)
            words = ["--output_dir", output, "--seed", self.seed, *LAST_STEP, *options, *self.options]
            if any(output.glob("checkpoint-*")):  # of Ctrl-C
                words += ["--resume_from_checkpoint", "latest"]
            run([EXAMPLES / f"run_{task}.py", *words])
        return output


def begin(start: Path | None) -> list[str]:
    """Gives the option that names the model to start from, if there is one."""
    return [] if start is None else ["--model_name_or_path", str(start)]


def run(words: list) -> None:
    """Runs Python with these words, on one thread where the environment says nothing else."""
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr, env={"OMP_NUM_THREADS": "1", **os.environ})


def table(found: dict[str, dict[str, dict]]) -> str:
    """Makes a table in percent, a line for what each model orders and tells by, its values those of the seeds."""
    lines = ["| trained | told by | image R@1 | text R@1 | " + " | ".join(KINDS) + " |", "|---|---|" + "--:|" * 6]
    for name, of_seeds in found.items():
        for whose in next(iter(of_seeds.values())):
            values = [[of_seed[whose][metric] for of_seed in of_seeds.values()] for metric in (*RECALLS, *KINDS)]
            cells = (", ".join(f"{100 * value:.1f}" for value in of_metric) for of_metric in values)
            lines.append(f"| {name} | {whose} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, dict]], path: Path) -> None:
    """Draws a dot for each seed: image recall, and relations told."""
    labels = {(ALL, "first stage"): "its first stage", (ALONE, "first stage"): ALONE}
    labels |= {(name, "score"): f"score, {name}" for name in (NO_EXPRESSIONS, NO_FOILS, ALL)}
    rows = {
        f"{words}: {label}": [100 * of_seed[whose][metric] for of_seed in found[name].values()]
        for metric, words in ((RECALLS[0], "image R@1"), ("relation", "relations told"))
        for (name, whose), label in labels.items()
        if name in found
    }
    dot_chart(rows, path, label="percent")


def main(argv: list[str] | None = None) -> None:
    """Runs the proof of `argv`, by default that of the command line; further options go to every training."""
    controls = (ALL, NO_EXPRESSIONS, NO_FOILS, ALONE)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--only", nargs="+", choices=controls, default=controls, help="what is trained (default: each)")
    args, options = parser.parse_known_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    proofs = {str(seed): Proof(args.output, seed, options) for seed in args.seeds}
    for file, more in ((args.output / "train_foils.jsonl", ["--for-training"]), (args.output / "foils.jsonl", [])):
        if not file.exists():
            run(["-m", "unicoder_vl_hf.cli", "foil", file, *more])
    path = args.output / "relations.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        before[name] = before.get(name, {}) | {seed: proof.measure(name) for seed, proof in proofs.items()}
    found = {name: before[name] for name in controls if name in before}
    path.write_text(json.dumps(found, indent=1))
    (args.output / "relations.md").write_text(table(found) + "\n")
    draw(found, args.output / "relations.png")
    print(table(found))


if __name__ == "__main__":
    main()
