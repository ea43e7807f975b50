"""Goes the whole way on the rendered scenes: draw, store, pre-train, train for retrieval, search. `make demo` runs it.

    python -m unicoder_vl_hf.scripts.demo --output_dir demo

Writes a pre-trained model, in `retrieval/` one for retrieval with a first stage of search, `curves.png`, `gallery.html`
(caption -> best five scenes, found in two stages) and `metrics.json`. Both trainings take the strong recipe, and both
begin with new weights: within minutes pre-training costs retrieval more than it gives (docs/matching_head.md). So they
run at the same time, pre-training in a process of its own, which writes `pretraining.txt`. It fails below 5 times
chance, or where the matching head orders what the first stage proposes clearly worse than that did. Ctrl-C stops it,
and the same command goes on; what is trained already is not trained again.
"""

import _thread
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.captions import read_captions
from ..errors import run_script
from ..files import write_json
from ..pictures import training_curves, write_gallery
from ..processes import Computing, start_processes
from ..regions.store import RegionStore
from ..runs.arguments import make_parser, option
from ..runs.checkpoints import CheckpointFolder
from ..runs.setup import DATA_FOLDER, SCENES_MODEL
from ..scenes import world
from ..scoring.checkpoints import load_for_store
from ..scoring.scorer import ImageTextScorer
from ..search.encoders import UnicoderVLDualEncoder
from ..search.index import build_index
from ..search.two_stage import SimilarityWeight
from ..tasks.pretraining import run as run_pretraining
from ..tasks.pretraining.evaluation import metrics_table, pretraining_chance
from ..tasks.pretraining.loop import SCENES
from ..tasks.retrieval import run as run_retrieval
from ..tasks.retrieval.metrics import retrieval_metrics
from ..tasks.retrieval.protocols import DIRECTIONS, KS, RetrievalTest, chance, retrieval_test
from ..tasks.retrieval.run_gallery import ask
from ..tasks.retrieval.two_stage_report import two_stage_report

# The process that pre-trains runs this, with the options of the demo, and says by these exit codes that it was stopped.
PRETRAINING = [sys.executable, "-m", "unicoder_vl_hf.scripts.demo", "--pretraining_alone"]
STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)

# A quarter of the matches scored: what two cores with AVX2 alone train in four minutes (docs/matching_head.md).
RETRIEVAL = {"num_train_epochs": 2, "scored_ratio": 0.25, "learning_rate": SCENES["learning_rate"]}

# Rows of the table: the first stage's order, that of the matching head among its best, and that of both.
FIRST_STAGE, SCORED, BOTH_STAGES = "first stage", "its best, scored", "its best, both added"


@dataclass
class DemoArguments:
    """Names the folder of the demo, and says how its search is done and shown."""

    output_dir: str = option("demo", "Folder that everything is written to.")
    candidates: int = option(20, "Scenes that the first stage of a search proposes, to be scored.")
    similarity_weight: float | None = option(
        None,
        "Weight of the first stage's similarity in the order, score + weight x similarity. Default: the weight that "
        "the training measured on the validation scenes.",
    )
    num_queries: int = option(12, "Captions in the gallery, drawn at random.")
    seed: int | None = option(None, "Seed of both trainings. Default: each has its own.")
    max_steps: int = option(-1, "Steps of each training; -1 takes all of its epochs.")
    mixed_precision: str = option("auto", "Precision of both: auto (what the hardware is fast in), no or bf16.")
    pretraining_alone: bool = option(False, "Only pre-trains, and measures that model.")

    @property
    def options(self) -> dict[str, object]:
        """The options that go to both trainings by the same name."""
        return {"recipe": "strong", "max_steps": self.max_steps} | ({} if self.seed is None else {"seed": self.seed})


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
    def log(self) -> Path:
        """The file of what the process that pre-trains says."""
        return self.output / "pretraining.txt"

    @property
    def zero_shot(self) -> Path:
        """The file of the metrics that the pre-trained model has in retrieval."""
        return self.output / "zero-shot.json"

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
        """Opens the scenes and loads the retrieval model that [`train_for_retrieval`] made."""
        store = RegionStore(folders.scenes / "regions")
        model, processor = load_for_store(folders.retrieval, store)
        encoder = UnicoderVLDualEncoder(model, processor, store, folders.retrieval)
        scorer = ImageTextScorer(model, processor, store)
        return cls(
            test=test_scenes(folders),
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
        `ValueError`: the model finds hardly more than chance does, see [`check_learned`]; or pre-training failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    (args,) = make_parser(DemoArguments).parse_args_into_dataclasses(argv)
    started, folders = time.perf_counter(), DemoFolders(Path(args.output_dir))
    if args.pretraining_alone:
        pretrain(args, folders)
        return
    world.build_scenes(folders.scenes)  # before both trainings look for them
    print(f"Pre-training runs beside the training for retrieval: {folders.log}", flush=True)
    with beside([*PRETRAINING, *argv], folders.log):
        train_for_retrieval(args, folders)
        with computing().threads():
            scenes = SceneSearch.open(args, folders)
            found = measure(scenes)
    results = {"zero-shot": json.loads(folders.zero_shot.read_text()), **found}
    with computing().threads():
        captions = draw_gallery(scenes, folders, args.num_queries, results)
    pretraining = draw_curves(folders)
    write_json(folders.output / "metrics.json", {"pretraining": pretraining, **results})

    print(f"\nPre-training, validation scenes\n{metrics_table(pretraining, pretraining_chance(pretraining))}")
    print(f"\n{scenes.test.title} (percent)\n{recall_table(results)}\n{BOTH_STAGES}: {scenes.weight}")
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} s. Look at curves.png and gallery.html in {folders.output}, or search it:")
    print(
        f'unicoder-vl search "{captions[0]}" --index {folders.index} --photos {folders.scenes / "photos"} '
        "--gallery found.html"
    )
    check_learned(results)


@contextlib.contextmanager
def beside(command: Sequence[str], log: Path) -> Iterator[None]:
    """
    Runs a block while `command` runs in a process of its own, whose output goes to `log`, and then waits for it. Where
    the block ends early, by Ctrl-C or an error, the process gets SIGTERM; where the process fails, the block gets what
    Ctrl-C sends.

    Raises:
        `ValueError`: the process failed; the message has the last line of its output.
    """
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TQDM_DISABLE": "1"},
            start_new_session=True,  # Ctrl-C would reach it twice, which is "at once, without a checkpoint"
        )

    def interrupt_if_failed() -> None:
        if process.wait() not in (0, *STOPPED):
            _thread.interrupt_main()

    watch = threading.Thread(target=interrupt_if_failed, daemon=True)
    watch.start()
    try:
        yield
        watch.join()
        if process.returncode:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        if process.poll() in (None, 0, *STOPPED):
            raise
        said = log.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {process.returncode}"]
        raise ValueError(f"Pre-training failed, see {log}: {said[-1]}") from None
    finally:
        process.terminate()
        watch.join()


def computing() -> Computing:
    """Chooses how the models score."""
    return Computing.choose("no", start_processes().device.type, SCENES_MODEL["hidden_size"])


def pretrain(args: DemoArguments, folders: DemoFolders) -> None:
    """Pre-trains, unless it was done before, and measures what the model finds without training for retrieval."""
    options = args.options | {"num_train_epochs": 1, "mixed_precision": args.mixed_precision}
    train(run_pretraining.main, CheckpointFolder(folders.output), **options)
    store = RegionStore(folders.scenes / "regions")
    (fold,) = test_scenes(folders).folds
    with computing().threads():
        scorer = ImageTextScorer(*load_for_store(folders.output, store), store)
        scores = scorer.score(fold.captions, fold.image_ids)
    write_json(folders.zero_shot, retrieval_metrics(scores, fold.image_of_caption))


def train_for_retrieval(args: DemoArguments, folders: DemoFolders) -> None:
    """Trains for retrieval with a first stage, unless it was done before."""
    shutil.copytree(folders.scenes, folders.retrieval / folders.scenes.relative_to(folders.output), dirs_exist_ok=True)
    options = args.options | RETRIEVAL | {"max_validation_images": 0}
    if args.mixed_precision != "auto":
        options["bf16"] = args.mixed_precision == "bf16"
    train(run_retrieval.main, CheckpointFolder(folders.retrieval, state_file="trainer_state.json"), **options)


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


def test_scenes(folders: DemoFolders) -> RetrievalTest:
    """Opens the retrieval test of the test scenes."""
    return retrieval_test(read_captions(folders.scenes / "captions.jsonl", split="test"))


def measure(scenes: SceneSearch) -> dict[str, dict[str, float]]:
    """Measures the search in two stages on the test scenes: the metrics of each row, in `[0, 1]`, chance among them."""
    (fold,) = scenes.test.folds
    report = two_stage_report(
        scenes.encoder, scenes.scorer, fold, [scenes.candidates], similarity_weights=(0.0, scenes.weight.value)
    )
    names = (FIRST_STAGE, SCORED, BOTH_STAGES)
    results = {name: row.metrics for name, row in zip(names, report.rows, strict=True)}
    return results | {"chance": chance(scenes.test)}


def draw_gallery(
    scenes: SceneSearch, folders: DemoFolders, num_queries: int, results: dict[str, dict[str, float]]
) -> list[str]:
    """Draws the gallery of `num_queries` captions, drawn at random, and returns these captions."""
    (fold,) = scenes.test.folds
    shutil.rmtree(folders.index, ignore_errors=True)  # of an earlier run, perhaps of other models
    index = build_index(scenes.encoder, scenes.store, folders.index, image_ids=fold.image_ids)
    rows = np.random.default_rng(0).permutation(len(fold.captions))[:num_queries]
    items = ask(fold, rows, index, scenes.encoder, scenes.scorer, scenes.candidates, scenes.weight)
    write_gallery(
        folders.output / "gallery.html",
        items,
        lambda image_id: Image.open(folders.scenes / "photos" / f"{image_id}.png"),
        title="Search in two stages among rendered scenes",
        intro="Captions drawn at random from the test scenes, each of which holds a colour and shape that never meet "
        f"in training. The first stage proposes {scenes.candidates} of {len(index)} scenes, and these are ordered by "
        f"{scenes.weight}. The best five are shown.",
        results=results,
    )
    return [item.caption for item in items]


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
