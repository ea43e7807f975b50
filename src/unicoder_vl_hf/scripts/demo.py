"""Goes the whole way on the rendered scenes: draw, store, pre-train, train for retrieval, search. `make demo` runs it.

    python -m unicoder_vl_hf.scripts.demo --output_dir demo

Writes a pre-trained model, in `retrieval/` one for retrieval with a first stage of search, `curves.png`, `gallery.html`
(caption -> best five scenes, found in two stages) and `metrics.json`. Both trainings take the strong recipe, and both
begin with new weights: within minutes pre-training costs retrieval more than it gives (docs/matching_head.md). It fails
below 5 times chance, or where the matching head orders what the first stage proposes clearly worse than that did.
Ctrl-C stops it, and the same command goes on; what is trained already is not trained again.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.captions import read_captions
from ..errors import run_script
from ..pictures import GalleryItem, training_curves, write_gallery
from ..processes import Computing, start_processes
from ..regions.store import RegionStore
from ..runs.arguments import make_parser
from ..runs.checkpoints import CheckpointFolder
from ..runs.setup import DATA_FOLDER, SCENES_MODEL
from ..scoring.checkpoints import load_for_store
from ..scoring.scorer import ImageTextScorer
from ..search.encoders import UnicoderVLDualEncoder
from ..search.index import build_index
from ..search.two_stage import SimilarityWeight, search
from ..tasks.pretraining import run as run_pretraining
from ..tasks.pretraining.evaluation import metrics_table, pretraining_chance
from ..tasks.pretraining.loop import SCENES
from ..tasks.retrieval import run as run_retrieval
from ..tasks.retrieval.metrics import retrieval_metrics
from ..tasks.retrieval.protocols import DIRECTIONS, KS, RetrievalTest, chance, retrieval_test
from ..tasks.retrieval.two_stage_report import two_stage_report

# Rows of the table: the first stage's order, that of the matching head among its best, and that of both.
FIRST_STAGE, SCORED, BOTH_STAGES = "first stage", "its best, scored", "its best, both added"


@dataclass
class DemoArguments:
    """Names the folder of the demo, and says how its search is done and shown."""

    output_dir: str = field(default="demo", metadata={"help": "Folder that everything is written to."})
    candidates: int = field(
        default=20, metadata={"help": "Scenes that the first stage of a search proposes, to be scored."}
    )
    similarity_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the first stage's similarity in the order, score + weight x similarity. Default: the "
            "weight that the training measured on the validation scenes."
        },
    )
    num_queries: int = field(default=12, metadata={"help": "Captions in the gallery, drawn at random."})


@dataclass
class DemoFolders:
    """The folders that the demo writes, all below `output`, which is the output folder of pre-training, too."""

    output: Path

    @property
    def retrieval(self) -> Path:
        """The folder of the retrieval model, which has a first stage of search."""
        return self.output / "retrieval"

    @property
    def scenes(self) -> Path:
        """The folder of the rendered scenes: their captions, photos and regions."""
        return self.output / DATA_FOLDER / "scenes"

    @property
    def index(self) -> Path:
        """The folder of the search index of the test scenes."""
        return self.output / "test-scenes.index"


@dataclass
class SceneSearch:
    """A search in two stages among the test scenes, by the retrieval model."""

    test: RetrievalTest
    store: RegionStore
    encoder: UnicoderVLDualEncoder
    scorer: ImageTextScorer
    candidates: int
    weight: SimilarityWeight

    @classmethod
    def open(cls, args: DemoArguments, folders: DemoFolders) -> "SceneSearch":
        """Opens the scenes and loads the retrieval model; both must have been made by [`train_both`]."""
        store = RegionStore(folders.scenes / "regions")
        model, processor = load_for_store(folders.retrieval, store)
        encoder = UnicoderVLDualEncoder(model, processor, store, folders.retrieval)
        scorer = ImageTextScorer(model, processor, store)
        return cls(
            test=retrieval_test(read_captions(folders.scenes / "captions.jsonl", split="test")),
            store=store,
            encoder=encoder,
            scorer=scorer,
            candidates=args.candidates,
            weight=SimilarityWeight.of(args.similarity_weight, encoder, scorer),
        )


def main(argv: list[str] | None = None) -> None:
    """
    Runs the demo with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the model finds hardly more than chance does, see [`check_learned`].
    """
    (args,) = make_parser(DemoArguments).parse_args_into_dataclasses(argv)
    started, folders = time.perf_counter(), DemoFolders(Path(args.output_dir))
    train_both(folders)
    with Computing.choose("no", start_processes().device.type, SCENES_MODEL["hidden_size"]).threads():
        scenes = SceneSearch.open(args, folders)
        results = measure(scenes, folders)
        captions = draw_gallery(scenes, folders, args.num_queries, results)
    pretraining = draw_curves(folders)
    (folders.output / "metrics.json").write_text(json.dumps({"pretraining": pretraining, **results}, indent=2) + "\n")

    print(f"\nPre-training, validation scenes\n{metrics_table(pretraining, pretraining_chance(pretraining))}")
    print(f"\n{scenes.test.title} (percent)\n{recall_table(results)}\n{BOTH_STAGES}: {scenes.weight}")
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} s. Look at curves.png and gallery.html in {folders.output}, or search it:")
    print(
        f'unicoder-vl search "{captions[0]}" --index {folders.index} --photos {folders.scenes / "photos"} '
        "--gallery found.html"
    )
    check_learned(results)


def train_both(folders: DemoFolders) -> None:
    """Pre-trains, then trains for retrieval with a first stage; what is trained already is not trained again."""
    train(run_pretraining.main, CheckpointFolder(folders.output), recipe="strong", num_train_epochs=1)
    shutil.copytree(folders.scenes, folders.retrieval / folders.scenes.relative_to(folders.output), dirs_exist_ok=True)
    train(
        run_retrieval.main,
        CheckpointFolder(folders.retrieval, state_file="trainer_state.json"),
        recipe="strong",
        num_train_epochs=3,
        max_validation_images=0,
        learning_rate=SCENES["learning_rate"],
    )


def train(run: Callable[[list[str]], object], checkpoints: CheckpointFolder, **options: object) -> None:
    """Begins a training, goes on with one that was stopped, or leaves a finished one as it is."""
    if checkpoints.is_finished():
        print(f"{checkpoints.output_dir} was trained before. Delete it to train it anew.")
        return
    options |= {"output_dir": checkpoints.output_dir}
    if checkpoints.list():
        options["resume_from_checkpoint"] = "latest"
    run([word for name, value in options.items() for word in (f"--{name}", str(value))])
    if not checkpoints.is_finished():  # Ctrl-C, which the script took to leave a checkpoint
        raise KeyboardInterrupt


def measure(scenes: SceneSearch, folders: DemoFolders) -> dict[str, dict[str, float]]:
    """Measures the rows of the table on the test scenes: the metrics of each, in `[0, 1]`, chance among them."""
    (fold,) = scenes.test.folds
    zero_shot = ImageTextScorer(*load_for_store(folders.output, scenes.store), scenes.store)
    scores = zero_shot.score(fold.captions, fold.image_ids)
    results = {"zero-shot": retrieval_metrics(scores, fold.image_of_caption)}
    report = two_stage_report(
        scenes.encoder, scenes.scorer, fold, [scenes.candidates], similarity_weights=(0.0, scenes.weight.value)
    )
    for name, row in zip((FIRST_STAGE, SCORED, BOTH_STAGES), report.rows, strict=True):
        results[name] = row.metrics
    results["chance"] = chance(scenes.test)
    return results


def draw_gallery(
    scenes: SceneSearch, folders: DemoFolders, num_queries: int, results: dict[str, dict[str, float]]
) -> list[str]:
    """Draws the gallery of `num_queries` captions, drawn at random, and returns these captions."""
    (fold,) = scenes.test.folds
    shutil.rmtree(folders.index, ignore_errors=True)  # of an earlier run, perhaps of other models
    index = build_index(scenes.encoder, scenes.store, folders.index, image_ids=fold.image_ids)
    rows = np.random.default_rng(0).permutation(len(fold.captions))[:num_queries]
    captions, right = [fold.captions[row] for row in rows], fold.image_of_caption[rows]
    found = search(
        captions, index, scenes.encoder, scenes.scorer,
        top_k=scenes.candidates, candidates=scenes.candidates, similarity_weight=scenes.weight.value,
    )  # fmt: skip
    write_gallery(
        folders.output / "gallery.html",
        [
            GalleryItem.from_hits(
                caption,
                fold.image_ids[image],
                [(hit.name, hit.score) for hit in hits],
                notes={hit.name: hit.summands for hit in hits},
            )
            for caption, image, hits in zip(captions, right, found, strict=True)
        ],
        lambda image_id: Image.open(folders.scenes / "photos" / f"{image_id}.png"),
        title="Search in two stages among rendered scenes",
        intro="Captions drawn at random from the test scenes, each of which holds a colour and shape that never meet "
        f"in training. The first stage proposes {scenes.candidates} of {len(index)} scenes, and these are ordered by "
        f"{scenes.weight}. The best five are shown.",
        results=results,
    )
    return captions


def draw_curves(folders: DemoFolders) -> dict[str, float]:
    """Draws the losses and metrics of pre-training, and returns the metrics of its last evaluation."""
    log = folders.output / "log.jsonl"
    last = [json.loads(line) for line in log.read_text().splitlines() if '"eval_' in line][-1]
    metrics = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    curves = folders.output / "curves.png"
    training_curves(log, curves, chance=pretraining_chance(metrics), title="Pre-training on the scenes")
    return metrics


def check_learned(results: Mapping[str, Mapping[str, float]]) -> None:
    """
    Checks that the models find images of captions: against chance, and the scores against the first stage.

    Args:
        results (`Mapping[str, Mapping[str, float]]`): Metrics of each row of the table, as [`measure`] gives them.

    Raises:
        `ValueError`: a model finds hardly more than chance does, or scores order clearly worse than the first stage.
    """
    name = "image_retrieval_recall@1"
    by_chance = results["chance"][name]
    bars = {"zero-shot": 5 * by_chance, FIRST_STAGE: 5 * by_chance, SCORED: 0.9 * results[FIRST_STAGE][name]}
    below = [f"{row} is below {100 * bar:.1f} %" for row, bar in bars.items() if results[row][name] < bar]
    if below:
        raise ValueError(
            f"The model did not learn: {name} of {', of '.join(below)}. Delete the output folder to train it anew."
        )


def recall_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Makes a table of recall in percent: text retrieval (T), then image retrieval (I), a line for each result."""
    names = [f"{direction}_recall@{k}" for direction in DIRECTIONS for k in KS]
    lines = [f"{'':24}" + "".join(f"{letter + 'R@' + str(k):>8}" for letter in "TI" for k in KS)]
    lines += [f"{row:24}" + "".join(f"{100 * of[name]:8.1f}" for name in names) for row, of in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, go_on="Run again, it goes on.")
