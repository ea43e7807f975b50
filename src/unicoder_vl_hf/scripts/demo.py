"""The whole way on the rendered scenes: draw, store, pre-train, fine-tune, search. `make demo` runs it.

    python examples/run_demo.py --output_dir demo

Writes a pre-trained model, in `retrieval/` a fine-tuned one with a first stage of search, `curves.png`, `gallery.html`
(caption -> best five scenes, found in two stages) and `metrics.json`. It fails below 5 times chance, or where the
matching head orders what the first stage proposes hardly better than at random. Ctrl-C stops it, and the same command
goes on; what is trained already is not trained again.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import run_pretraining
import run_retrieval
from PIL import Image

from unicoder_vl_hf import ImageTextScorer, RegionStore
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.errors import USER_ERRORS, end_with, stopped
from unicoder_vl_hf.pictures import GalleryItem, training_curves, write_gallery
from unicoder_vl_hf.processes import Computing, start_processes
from unicoder_vl_hf.runs.arguments import make_parser
from unicoder_vl_hf.runs.checkpoints import CheckpointFolder
from unicoder_vl_hf.runs.setup import DATA_FOLDER, SCENES_MODEL
from unicoder_vl_hf.scoring.checkpoints import load_for_store
from unicoder_vl_hf.search.encoders import UnicoderVLDualEncoder
from unicoder_vl_hf.search.index import build_index
from unicoder_vl_hf.search.two_stage import SimilarityWeight, search
from unicoder_vl_hf.tasks.pretraining.evaluation import metrics_table, pretraining_chance
from unicoder_vl_hf.tasks.retrieval.metrics import retrieval_metrics
from unicoder_vl_hf.tasks.retrieval.protocols import DIRECTIONS, KS, chance, retrieval_test
from unicoder_vl_hf.tasks.retrieval.training import SCENES
from unicoder_vl_hf.tasks.retrieval.two_stage_report import two_stage_report

# Rows of the table: the first stage's order, that of the matching head among its best, and that of both.
FIRST_STAGE, SCORED, BOTH_STAGES = "first stage", "its best, scored", "its best, both added"


@dataclass
class DemoArguments:
    output_dir: str = field(default="demo", metadata={"help": "Where everything goes."})
    candidates: int = field(default=20, metadata={"help": "Of the first stage of the search, to be scored."})
    similarity_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of its similarity in the order, score + weight x similarity. Default: the one that "
            "fine-tuning measured on the validation scenes."
        },
    )
    num_queries: int = field(default=12, metadata={"help": "Captions in the gallery, drawn at random."})


def main(argv: list[str] | None = None) -> int:
    (args,) = make_parser(DemoArguments).parse_args_into_dataclasses(argv)
    try:
        return demo(args)
    except USER_ERRORS as error:
        return end_with(error, "run_demo.py")
    except KeyboardInterrupt:
        return stopped("run_demo.py", "Run again, it goes on.")


def demo(args: DemoArguments) -> int:
    started, output_dir = time.perf_counter(), Path(args.output_dir)
    fine_tuned, scenes = output_dir / "retrieval", output_dir / DATA_FOLDER / "scenes"
    train(run_pretraining.main, CheckpointFolder(output_dir))
    train(
        run_retrieval.main,
        CheckpointFolder(fine_tuned, state_file="trainer_state.json"),
        captions=scenes / "captions.jsonl",
        regions=scenes / "regions",
        model_name_or_path=output_dir,
        num_negative_captions=0,
        num_negative_images=0,
        num_hard_negatives=1,
        loss="softmax",
        contrastive_weight=1,
        num_train_epochs=1,
        max_validation_images=0,
        learning_rate=SCENES["learning_rate"],
        per_device_train_batch_size=SCENES["train_batch_size"],
        gradient_accumulation_steps=SCENES["gradient_accumulation_steps"],
    )
    with Computing.choose("no", start_processes().device.type, SCENES_MODEL["hidden_size"]).threads():
        return search_and_show(args, started)


def search_and_show(args: DemoArguments, started: float) -> int:
    """Measures the two models on the test scenes, and shows what they find there."""
    output_dir = Path(args.output_dir)
    fine_tuned, scenes = output_dir / "retrieval", output_dir / DATA_FOLDER / "scenes"
    store = RegionStore(scenes / "regions")
    test = retrieval_test(read_captions(scenes / "captions.jsonl", split="test"))
    (fold,) = test.folds
    zero_shot = ImageTextScorer(*load_for_store(output_dir, store), store)
    scores = zero_shot.score(fold.captions, fold.image_ids)
    results = {"zero-shot": retrieval_metrics(scores, fold.image_of_caption)}
    model, processor = load_for_store(fine_tuned, store)
    encoder = UnicoderVLDualEncoder(model, processor, store, fine_tuned)
    scorer = ImageTextScorer(model, processor, store)
    weight = SimilarityWeight.of(args.similarity_weight, encoder, scorer)
    report = two_stage_report(encoder, scorer, fold, [args.candidates], similarity_weights=(0.0, weight.value))
    for name, row in zip((FIRST_STAGE, SCORED, BOTH_STAGES), report.rows, strict=True):
        results[name] = row.metrics
    results["chance"] = chance(test)

    index_path = output_dir / "test-scenes.index"
    shutil.rmtree(index_path, ignore_errors=True)  # of an earlier run, perhaps of other models
    index = build_index(encoder, store, index_path, image_ids=fold.image_ids)
    rows = np.random.default_rng(0).permutation(len(fold.captions))[: args.num_queries]
    captions = [fold.captions[row] for row in rows]
    found = search(
        captions, index, encoder, scorer,
        top_k=args.candidates, candidates=args.candidates, similarity_weight=weight.value,
    )  # fmt: skip
    write_gallery(
        output_dir / "gallery.html",
        [
            GalleryItem.from_hits(
                fold.captions[row],
                fold.image_ids[image],
                [(hit.name, hit.score) for hit in hits],
                notes={hit.name: hit.summands for hit in hits},
            )
            for row, image, hits in zip(rows, fold.image_of_caption[rows], found, strict=True)
        ],
        lambda image_id: Image.open(scenes / "photos" / f"{image_id}.png"),
        title="Search in two stages among rendered scenes",
        intro="Captions drawn at random from the test scenes, each of which holds a colour and shape that never meet "
        f"in training. The first stage proposes {args.candidates} of {len(index)} scenes, and these are ordered by "
        f"{weight}. The best five are shown.",
        results=results,
    )

    log = output_dir / "log.jsonl"
    last = [json.loads(line) for line in log.read_text().splitlines() if '"eval_' in line][-1]
    pretraining = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    by_chance = pretraining_chance(pretraining)
    training_curves(log, output_dir / "curves.png", chance=by_chance, title="Pre-training on the scenes")
    (output_dir / "metrics.json").write_text(json.dumps({"pretraining": pretraining, **results}, indent=2) + "\n")

    print(f"\nPre-training, validation scenes\n{metrics_table(pretraining, by_chance)}")
    print(f"\n{test.title} (percent)\n{recall_table(results)}\n{BOTH_STAGES}: {weight}")
    print(
        f"\n{time.perf_counter() - started:.0f} s. Look at curves.png and gallery.html in {output_dir}, or search it:"
    )
    print(f'unicoder-vl search "{captions[0]}" --index {index_path} --photos {scenes / "photos"} --gallery found.html')
    name, failed = "image_retrieval_recall@1", False
    # Among the first stage's candidates, any order of them is right more often than chance.
    guessed = report.rows[1].ceiling["image_retrieval"] / args.candidates
    bars = {"zero-shot": 5 * results["chance"][name], SCORED: 2 * guessed, BOTH_STAGES: 5 * results["chance"][name]}
    for result, bar in bars.items():
        if results[result][name] < bar:
            print(f"{result}: {name} is below {100 * bar:.1f} %: the model did not learn.", file=sys.stderr)
            failed = True
    return int(failed)


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


def recall_table(results: Mapping[str, Mapping[str, float]]) -> str:
    names = [f"{direction}_recall@{k}" for direction in DIRECTIONS for k in KS]
    lines = [f"{'':24}" + "".join(f"{letter + 'R@' + str(k):>8}" for letter in "TI" for k in KS)]
    lines += [f"{row:24}" + "".join(f"{100 * of[name]:8.1f}" for name in names) for row, of in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
