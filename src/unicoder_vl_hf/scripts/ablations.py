"""Compares trainings that differ in one thing each, as the paper's ablations do, on rendered scenes or on your photos.

    python -m unicoder_vl_hf.scripts.ablations --output_dir runs/ablations --only full scratch --seeds 0 1 2
    python -m unicoder_vl_hf.scripts.ablations --captions CAPTIONS --regions STORE --model_name_or_path BERT

Each run of `RUNS` pre-trains and fine-tunes a model, once for each seed, and measures retrieval and foils on held-out
images: a small model from new weights on the scenes, the first layers of a BERT on photos. Writes `ablations.json`,
`ablations.md` with the table and the orderings, those that did not come out, too, and `ablations.png`. Ctrl-C stops it,
and the same command goes on; what is measured is not done again, and other runs and seeds add to it. All runs with
three seeds take hours on two cores.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, set_seed

from ..configuration_unicoder_vl import UnicoderVLConfig
from ..data.captions import read_captions
from ..data.foils import Foil, read_foils
from ..errors import run_script
from ..files import write_json
from ..pictures import dot_chart
from ..processes import fast_precision
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
from ..tasks.retrieval.protocols import RetrievalFold, retrieval_test
from .demo import train


@dataclass(frozen=True)
class Run:
    """
    A training that is compared with others.

    Args:
        title (`str`): The run in words.
        pretrained (`bool`, *optional*): Whether it is pre-trained; if not, it is fine-tuned from the same new weights.
        share (`float`, *optional*): The share of the training images that it is pre-trained on, in as many steps.
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
    "data25": Run("pre-trained on 25 % of the images", share=0.25),
    "data50": Run("pre-trained on 50 % of the images", share=0.5),
    "layers6": Run("6 layers", layers=6),
    "scratch6": Run("6 layers, not pre-trained", pretrained=False, layers=6),
    "no_moc": Run("without masked object classification", options={"moc": False}),
    "no_img": Run("without [IMG]", options={"image_token": False}),
    "paper": Run("the paper's recipe", recipe="paper"),
}
# The better run, and the worse, as the paper has them or we expect.
ORDERINGS = [
    ("full", "scratch"),
    ("layers6", "scratch6"),
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
    """Names the runs, seeds and data that are compared, and says how long they train."""

    output_dir: str = option("ablations", "Folder of runs, table and plot.")
    only: list[str] = option(list(RUNS), f"Runs to do, of {', '.join(RUNS)}. Default: all.")
    seeds: list[int] = option([0, 1, 2], "Seeds of each run.")
    pretraining_epochs: int = option(1, "Passes over all images in pre-training; a share of them is passed more often.")
    fine_tuning_epochs: int = option(3, "Passes over all images in fine-tuning.")
    learning_rate: float = option(
        SCENES["learning_rate"], "Peak of the learning rate; the paper's recipe fine-tunes with half of it."
    )
    batch_size: int = option(SCENES["train_batch_size"], "Pairs of a step, of both trainings.")
    train_scenes: int = option(3000, "Training scenes.")
    held_out_scenes: int = option(150, "Validation scenes, and as many test scenes.")
    captions: str | None = option(None, "Captions of photos, in place of scenes, in any layout that is read.")
    regions: str | None = option(None, "Region store of these photos, with object ids.")
    model_name_or_path: str | None = option(None, "BERT that they begin with: its first 3 layers, or 6.")
    scale_features: bool = option(False, "Brings the features of these photos to mean 0 and variance 1.")
    foils: str | None = option(None, "Foils of these photos, from `unicoder-vl foil`. Default: none are measured.")
    test_split: str = option("test", "Split that is measured, in retrieval and by foils.")
    test_images: int | None = option(None, "Images of it, the first ones, of which all pairs are scored. Default: all.")

    def __post_init__(self):
        if unknown := [name for name in self.only if name not in RUNS]:
            raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(RUNS)}.")
        for name in ("pretraining_epochs", "fine_tuning_epochs", "learning_rate", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)}, expected above 0.")
        photos = ("captions", "regions", "model_name_or_path")
        given = [name for name in photos if getattr(self, name) is not None]
        if 0 < len(given) < len(photos) or (not given and (self.foils is not None or self.scale_features)):
            raise ValueError(
                f"--captions {self.captions}, --regions {self.regions}, --model_name_or_path "
                f"{self.model_name_or_path}: expected all three, to compare on photos, or none, and neither --foils "
                "nor --scale_features, on scenes."
            )


@dataclass(frozen=True)
class World:
    """
    Holds what all runs learn from and are measured by.

    Args:
        captions (`Path`): The captions, JSON Lines.
        regions (`Path`): The region store.
        test (`RetrievalFold`): The captions and images that are ranked among each other.
        foils (`Sequence[Foil]`): The foils to tell, of the same images; maybe none.
        settings (`Mapping[str, object]`): What all runs share, and results are of.
    """

    captions: Path
    regions: Path
    test: RetrievalFold
    foils: Sequence[Foil]
    settings: Mapping[str, object]


def open_world(args: AblationArguments) -> World:
    """
    Opens the photos that are named, else draws the scenes.

    Raises:
        `ValueError`: a split or a file has a fault, or no foil is of an image that is measured.
    """
    output = Path(args.output_dir)
    if args.captions is None or args.regions is None:
        held_out = args.held_out_scenes
        folder = build_scenes(output / "scenes", num_train=args.train_scenes, num_val=held_out, num_test=held_out)
        captions, regions = folder / "captions.jsonl", folder / "regions"
        foils = [foil for number in range(held_out) for foil in scene_foils(sample_scene(number, args.test_split))]
    else:
        captions, regions = output / "captions_of_photos.jsonl", Path(args.regions)
        if captions.exists() and captions.samefile(args.captions):
            raise ValueError(f"--captions {args.captions} is a copy of this script, expected the file that it was of.")
        foils = [] if args.foils is None else read_foils(args.foils)
        rows = read_captions(args.captions).select_columns(["image_id", "caption", "split"])
        output.mkdir(parents=True, exist_ok=True)
        captions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (test,) = retrieval_test(read_captions(captions, split=args.test_split), num_images=args.test_images).folds
    kept = [foil for foil in foils if foil.image_id in set(test.image_ids)]
    if foils and not kept:
        raise ValueError(
            f"{args.foils} has no foil of the {len(test.image_ids)} images of the split {args.test_split!r} that are "
            "measured: give foils that have some."
        )
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "only", "seeds")}
    digest = hashlib.sha256(captions.read_bytes()).hexdigest()
    return World(captions, regions, test, kept, settings | {"sha256_of_captions": digest})


def main(argv: list[str] | None = None) -> None:
    """Does the runs that the options of `argv` ask for, by default those of the command line, and compares them."""
    (args,) = make_parser(AblationArguments).parse_args_into_dataclasses(argv)
    output = Path(args.output_dir)
    measured = output / "ablations.json"
    world = open_world(args)
    results = load_results(measured, world.settings)
    write_json(measured, {"settings": world.settings, "results": results})  # of trainings that are stopped, too
    for seed in args.seeds:
        for name in args.only:
            if str(seed) not in results.get(name, {}):
                folder = output / f"{name}-{seed}"
                train_run(RUNS[name], seed, folder, world, args)
                results.setdefault(name, {})[str(seed)] = measure_run(RUNS[name], folder, world)
                write_json(measured, {"settings": world.settings, "results": results})
    report = f"{results_table(results)}\n\n{orderings_table(results)}\n"
    (output / "ablations.md").write_text(report, encoding="utf-8")
    measured_runs = [name for name in RUNS if name in results]
    dot_chart(
        {RUNS[name].title: [100 * recall(values) for values in results[name].values()] for name in measured_runs},
        output / "ablations.png",
        label="recall@1 after fine-tuning, both directions (percent)",
    )
    print(report)


def load_results(path: Path, settings: Mapping[str, object]) -> Results:
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


def train_run(run: Run, seed: int, folder: Path, world: World, args: AblationArguments) -> None:
    """Pre-trains, if the run does, and fine-tunes; what is trained already is not trained again."""
    start: dict[str, object]
    if args.model_name_or_path is None:
        start = {"model_name_or_path": new_bert(folder / "bert", run, seed)}
    else:
        start = {"model_name_or_path": args.model_name_or_path, "num_hidden_layers": run.layers}
    shared = {"regions": world.regions, "scale_features": args.scale_features, "seed": seed, "recipe": run.recipe}
    if run.pretrained:
        train(
            run_pretraining.main,
            CheckpointFolder(folder / "pretrained"),
            captions=some_captions(world.captions, run.share, folder / "captions.jsonl"),
            num_train_epochs=round(args.pretraining_epochs / run.share),
            learning_rate=args.learning_rate,
            train_batch_size=args.batch_size,
            gradient_accumulation_steps=1,
            **start,
            **shared,
            **run.options,
        )
        start = {"model_name_or_path": folder / "pretrained"}
    train(
        run_retrieval.main,
        CheckpointFolder(folder / "fine_tuned", state_file="trainer_state.json"),
        captions=world.captions,
        num_train_epochs=args.fine_tuning_epochs,
        learning_rate=args.learning_rate if run.recipe == "strong" else args.learning_rate / 2,
        max_validation_images=0,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        **start,
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


def some_captions(captions: Path, share: float, path: Path) -> Path:
    """Writes these captions with the first images of the training split alone, this share of them."""
    rows = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines()]
    images = list(dict.fromkeys(row["image_id"] for row in rows if row["split"] == "train"))
    left_out = set(images[round(share * len(images)) :])
    kept = [json.dumps(row) + "\n" for row in rows if row["image_id"] not in left_out]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(kept), encoding="utf-8")
    return path


def measure_run(run: Run, folder: Path, world: World) -> dict[str, dict[str, float]]:
    """
    Measures the matching head on the test images: retrieval, and the share of foils that it tells. Pairs are scored in
    bfloat16 where a CPU is fast in it.

    Returns:
        The metrics after each stage, `"zero-shot"` (if the run is pre-trained) and `"fine-tuned"`, in `[0, 1]`; of the
        foils, where there are any, all together, and of each kind.
    """
    test, foils = world.test, world.foils
    kinds, images = [foil.kind for foil in foils], [foil.image_id for foil in foils]
    stages = {ZERO_SHOT: "pretrained"} if run.pretrained else {}
    found = {}
    for stage, name in (stages | {FINE_TUNED: "fine_tuned"}).items():
        hidden_size = UnicoderVLConfig.from_pretrained(folder / name).hidden_size
        dtype = torch.bfloat16 if fast_precision("cpu", hidden_size) == "bf16" else None
        scorer = ImageTextScorer.from_pretrained(folder / name, RegionStore(world.regions), dtype=dtype)
        found[stage] = retrieval_metrics(scorer.score(test.captions, test.image_ids), test.image_of_caption)
        if foils:
            told = accuracies_by_kind(foil_margins(foils, by_matching_head(scorer)), kinds, images)
            found[stage] |= {f"{FOILS} {kind}": accuracy.accuracy for kind, accuracy in told.items()}
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
            spread([values[stage][metric] for values in seeds.values() if metric in values.get(stage, {})])
            for stage, metric in columns
        ]
        lines.append(f"| {RUNS[name].title} | {', '.join(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Writes the mean of fractions in percent, and the standard deviation of several; a dash for none."""
    if not values:
        return "–"
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
