"""Compares trainings that differ in one thing each, as the paper's ablations do, on the rendered scenes.

    python -m unicoder_vl_hf.scripts.ablations --output_dir runs/ablations --only full scratch --seeds 0 1 2

Each run of `RUNS` pre-trains and fine-tunes a small model from new weights, once for each seed, and measures retrieval
and foils on the test scenes. Writes `ablations.json`, `ablations.md` with the table and the orderings, those that did
not come out, too, and `ablations.png`. Ctrl-C stops it, and the same command goes on; what is measured is not done
again, and other runs and seeds add to it. All runs with three seeds take hours on two cores.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import BertConfig, BertForMaskedLM, set_seed

from ..data.captions import read_captions
from ..errors import run_script
from ..files import write_json
from ..pictures import dot_chart
from ..regions.store import RegionStore
from ..runs.arguments import make_parser, option
from ..runs.checkpoints import CheckpointFolder
from ..runs.setup import SCENES_MODEL
from ..scenes.foils import scene_foils
from ..scenes.world import build_scenes, sample_scene, scene_tokenizer
from ..scoring.scorer import ImageTextScorer
from ..tasks.foil.margins import by_matching_head, foil_margins
from ..tasks.foil.metrics import accuracies_by_kind
from ..tasks.pretraining import run as run_pretraining
from ..tasks.pretraining.loop import SCENES, STRONG
from ..tasks.retrieval import run as run_retrieval
from ..tasks.retrieval.metrics import retrieval_metrics
from ..tasks.retrieval.protocols import retrieval_test
from ..tasks.retrieval.training import SCENES as SCENES_RETRIEVAL
from .demo import train


@dataclass(frozen=True)
class Run:
    """
    A training that is compared with others.

    Args:
        title (`str`): The run in words.
        pretrained (`bool`, *optional*): Whether it is pre-trained; if not, it is fine-tuned from the same new weights.
        share (`float`, *optional*): The share of the training scenes that it is pre-trained on, in as many steps.
        layers (`int`, *optional*): Its layers.
        recipe (`str`, *optional*): The recipe of both trainings.
        options (`Mapping[str, object]`, *optional*): Further options of pre-training.
    """

    title: str
    pretrained: bool = True
    share: float = 1.0
    layers: int = SCENES_MODEL["num_hidden_layers"]
    recipe: str = "strong"
    options: Mapping[str, object] = field(default_factory=dict)


RUNS = {
    "full": Run("all of it: 3 layers, strong recipe"),
    "scratch": Run("not pre-trained", pretrained=False),
    "data25": Run("pre-trained on 25 % of the scenes", share=0.25),
    "data50": Run("pre-trained on 50 % of the scenes", share=0.5),
    "layers6": Run("6 layers", layers=6),
    "no_moc": Run("without masked object classification", options={"moc": False}),
    "no_img": Run("without [IMG]", options={"image_token": False}),
    "paper": Run("the paper's recipe", recipe="paper"),
}
# The better run, and the worse, as the paper has them or we expect.
ORDERINGS = [
    ("full", "scratch"),
    ("data50", "data25"),
    ("full", "data50"),
    ("layers6", "full"),
    ("full", "no_moc"),
    ("full", "no_img"),
    ("full", "paper"),
]

ZERO_SHOT, FINE_TUNED, FOILS = "zero-shot", "fine-tuned", "foils"
IMAGE, TEXT = "image_retrieval_recall@1", "text_retrieval_recall@1"
Results = dict[str, dict[str, dict[str, dict[str, float]]]]  # of a run, a seed, a stage, a metric


@dataclass
class AblationArguments:
    """Names the runs and seeds that are compared, and says how long they train."""

    output_dir: str = option("ablations", "Folder of runs, table and plot.")
    only: list[str] = option(list(RUNS), f"Runs to do, of {', '.join(RUNS)}. Default: all.")
    seeds: list[int] = option([0, 1, 2], "Seeds of each run.")
    pretraining_epochs: int = option(1, "Passes over all scenes in pre-training; a share of them is passed more often.")
    fine_tuning_epochs: int = option(3, "Passes over all scenes in fine-tuning.")
    train_scenes: int = option(3000, "Training scenes.")
    held_out_scenes: int = option(150, "Validation scenes, and as many test scenes.")

    def __post_init__(self):
        if unknown := [name for name in self.only if name not in RUNS]:
            raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(RUNS)}.")


def main(argv: list[str] | None = None) -> None:
    """Does the runs that the options of `argv` ask for, by default those of the command line, and compares them."""
    (args,) = make_parser(AblationArguments).parse_args_into_dataclasses(argv)
    output = Path(args.output_dir)
    held_out = args.held_out_scenes
    world = build_scenes(output / "scenes", num_train=args.train_scenes, num_val=held_out, num_test=held_out)
    measured = output / "ablations.json"
    settings = {name: getattr(args, name) for name in ("pretraining_epochs", "fine_tuning_epochs")}
    results = load_results(measured, settings)
    for seed in args.seeds:
        for name in args.only:
            if str(seed) not in results.get(name, {}):
                folder = output / f"{name}-{seed}"
                train_run(RUNS[name], seed, folder, world, args)
                results.setdefault(name, {})[str(seed)] = measure_run(RUNS[name], folder, world, held_out)
                write_json(measured, {"settings": settings, "results": results})
    report = f"{results_table(results)}\n\n{orderings_table(results)}\n"
    (output / "ablations.md").write_text(report, encoding="utf-8")
    measured_runs = [name for name in RUNS if name in results]
    dot_chart(
        {RUNS[name].title: [100 * recall(values) for values in results[name].values()] for name in measured_runs},
        output / "ablations.png",
        label="recall@1 after fine-tuning, both directions (percent)",
    )
    print(report)


def load_results(path: Path, settings: Mapping[str, float]) -> Results:
    """
    Reads what was measured before, if anything.

    Raises:
        `ValueError`: it was measured with other settings, and so compares with nothing that these give.
    """
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["settings"] != settings:
        raise ValueError(f"{path} holds results of {before['settings']}, not of {settings}: take another --output_dir.")
    return before["results"]


def train_run(run: Run, seed: int, folder: Path, world: Path, args: AblationArguments) -> None:
    """Pre-trains, if the run does, and fine-tunes; what is trained already is not trained again."""
    start = new_bert(folder / "bert", run, seed)
    shared = {"regions": world / "regions", "seed": seed, "recipe": run.recipe}
    if run.pretrained:
        train(
            run_pretraining.main,
            CheckpointFolder(folder / "pretrained"),
            captions=some_captions(world, run.share, folder / "captions.jsonl"),
            model_name_or_path=start,
            num_train_epochs=round(args.pretraining_epochs / run.share),
            learning_rate=SCENES["learning_rate"],
            train_batch_size=SCENES["train_batch_size"],
            gradient_accumulation_steps=1,
            **shared,
            **run.options,
        )
        start = folder / "pretrained"
    train(
        run_retrieval.main,
        CheckpointFolder(folder / "fine_tuned", state_file="trainer_state.json"),
        captions=world / "captions.jsonl",
        model_name_or_path=start,
        num_train_epochs=args.fine_tuning_epochs,
        learning_rate=(SCENES if run.recipe == "strong" else SCENES_RETRIEVAL)["learning_rate"],
        max_validation_images=0,
        per_device_train_batch_size=SCENES_RETRIEVAL["train_batch_size"],
        gradient_accumulation_steps=1,
        **shared,
    )


def new_bert(folder: Path, run: Run, seed: int) -> Path:
    """Saves a BERT of new weights with the vocabulary of the scenes, from which both trainings can begin."""
    if not (folder / "model.safetensors").exists():
        set_seed(seed)
        tokenizer, spread = scene_tokenizer(), STRONG if run.recipe == "strong" else {}
        config = SCENES_MODEL | {"num_hidden_layers": run.layers, "vocab_size": len(tokenizer)} | spread
        tokenizer.save_pretrained(folder)
        BertForMaskedLM(BertConfig(**config)).save_pretrained(folder)
    return folder


def some_captions(world: Path, share: float, path: Path) -> Path:
    """Writes the captions of a world with the first scenes of the training split alone, this share of them."""
    rows = [json.loads(line) for line in (world / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    scenes = list(dict.fromkeys(row["image_id"] for row in rows if row["split"] == "train"))
    left_out = set(scenes[round(share * len(scenes)) :])
    kept = [json.dumps(row) + "\n" for row in rows if row["image_id"] not in left_out]
    path.write_text("".join(kept), encoding="utf-8")
    return path


def measure_run(run: Run, folder: Path, world: Path, num_scenes: int) -> dict[str, dict[str, float]]:
    """
    Measures the matching head on the test scenes: retrieval, and the share of foils that it tells.

    Returns:
        The metrics after each stage, `"zero-shot"` (if the run is pre-trained) and `"fine-tuned"`, in `[0, 1]`; of the
        foils all together, and of each kind.
    """
    (fold,) = retrieval_test(read_captions(world / "captions.jsonl", split="test")).folds
    foils = [foil for number in range(num_scenes) for foil in scene_foils(sample_scene(number, "test"))]
    kinds, images = [foil.kind for foil in foils], [foil.image_id for foil in foils]
    stages = {ZERO_SHOT: "pretrained"} if run.pretrained else {}
    found = {}
    for stage, name in (stages | {FINE_TUNED: "fine_tuned"}).items():
        scorer = ImageTextScorer.from_pretrained(folder / name, RegionStore(world / "regions"))
        scores = scorer.score(fold.captions, fold.image_ids)
        told = accuracies_by_kind(foil_margins(foils, by_matching_head(scorer)), kinds, images)
        found[stage] = retrieval_metrics(scores, fold.image_of_caption) | {
            f"{FOILS} {kind}": accuracy.accuracy for kind, accuracy in told.items()
        }
    return found


def recall(values: Mapping[str, Mapping[str, float]]) -> float:
    """Gives the mean of image and text recall@1 of a run after fine-tuning, by which runs are ordered."""
    return (values[FINE_TUNED][IMAGE] + values[FINE_TUNED][TEXT]) / 2


def results_table(results: Results) -> str:
    """Makes a table in Markdown: a line for each run, its means over the seeds in percent, ± a standard deviation."""
    columns = [(stage, metric) for stage in (ZERO_SHOT, FINE_TUNED) for metric in (IMAGE, TEXT, f"{FOILS} all")]
    titles = [f"{stage} {words}" for stage in (ZERO_SHOT, FINE_TUNED) for words in ("image R@1", "text R@1", FOILS)]
    lines = [f"| run | seeds | {' | '.join(titles)} |", f"|---|{'---:|' * (1 + len(titles))}"]
    for name in (name for name in RUNS if name in results):
        seeds = results[name]
        cells = [
            spread([values[stage][metric] for values in seeds.values()]) if stage in next(iter(seeds.values())) else "–"
            for stage, metric in columns
        ]
        lines.append(f"| {RUNS[name].title} | {', '.join(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Writes the mean of fractions in percent, and the standard deviation of several."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def orderings_table(results: Results) -> str:
    """Makes a table in Markdown of the orderings: the difference by seed, and in how many seeds it came out."""
    lines = ["| expected | difference of recall@1 (points) | came out |", "|---|---:|---|"]
    for better, worse in ORDERINGS:
        seeds = [seed for seed in results.get(better, {}) if seed in results.get(worse, {})]
        gains = [recall(results[better][seed]) - recall(results[worse][seed]) for seed in seeds]
        if gains:
            came_out = sum(gain > 0 for gain in gains)
            verdict = {len(gains): "yes", 0: "no"}.get(came_out, f"in {came_out} of {len(gains)} seeds")
            lines.append(f"| {RUNS[better].title} > {RUNS[worse].title} | {spread(gains)} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, go_on="Run again, it goes on.")
