"""Evaluates the retrieval of any checkpoint, zero-shot if it is a pre-trained one, beside the paper's figures.

    python -m unicoder_vl_hf.tasks.retrieval.run_evaluation --model runs/flickr30k --captions dataset_flickr30k.json \
        --regions flickr30k-regions --protocol flickr30k --mixed_precision bf16 --output flickr30k_test.json
    accelerate launch -m unicoder_vl_hf.tasks.retrieval.run_evaluation --model runs/coco --captions dataset_coco.json \
        --regions coco-regions --protocol coco-1k --scores_dir runs/coco/scores

Every caption is scored with every image of its fold: 5M pairs for Flickr30k, 25M for COCO 1K, 125M for COCO 5K; the
scorer says first how long it will take. `--scores_dir` keeps what is done: the same command goes on after a kill, or
computes a `--share` of it as a task of an array, see docs/scale.md. `--num_images 200` is a quick look, and named so.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers

from ..._version import __version__
from ...errors import run_script
from ...files import write_json
from ...processes import start_processes
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import EvaluationArguments, KeptScoresArguments, evaluation_dtype
from ...scoring.checkpoints import checkpoint_provenance
from ...scoring.scorer import ImageTextScorer
from ...shares import run_shares
from .protocols import PROTOCOLS, RetrievalTest, chance, evaluate_folds, results_table, retrieval_test


@dataclass(kw_only=True)
class RetrievalEvaluationArguments(KeptScoresArguments, EvaluationArguments):
    """Names a checkpoint and the test that it is evaluated on: a protocol, or the first images of a split."""

    protocol: str | None = option(None, f"Protocol: {', '.join(PROTOCOLS)}. Default: all images of the split together.")
    num_images: int | None = option(None, "Images to take, the first of the split. Default: all.")
    captions_per_image: str | None = option(
        None, "Captions of each image to take, from the first on, or all. Default: 5 under a protocol, else all."
    )
    mixed_precision: str = option(
        "no", "Precision to score in as well, to be compared with float32: auto, bf16 or fp16."
    )
    output: str | None = option(None, "JSON file to write, with metrics, intervals and provenance.")


def main(argv: list[str] | None = None) -> None:
    """
    Evaluates with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the checkpoint or the regions do not fit, or the captions are not those of the protocol.
    """
    args = parse_evaluation(RetrievalEvaluationArguments, argv)
    share = args.share_of_scores()
    state = start_processes()
    # No image is skipped for want of regions: with fewer candidates the test would be another, and easier.
    store, captions = args.open_data()
    count = args.captions_per_image
    test = retrieval_test(
        captions,
        args.protocol,
        captions_per_image=int(count) if count not in (None, "all") else count,
        num_images=args.num_images,
    )
    model, processor = args.load_scoring(store, captions)
    checkpoint = checkpoint_provenance(args.model, model)
    # One of retrieval may be fine-tuned, or a pre-trained one that was given a first stage of search.
    use = "zero-shot" if checkpoint["saved_by"] == "UnicoderVLForPreTraining" else "retrieval checkpoint"
    jobs = {}
    for dtype in dict.fromkeys([torch.float32, evaluation_dtype(args.mixed_precision, model) or torch.float32]):
        name = str(dtype).removeprefix("torch.")
        scorer = ImageTextScorer(model, processor, store, dtype=dtype, share=share)
        jobs[f"{use}, {name}"] = fold_jobs(scorer, test, args.scores_dir, name)
    if share is not None:
        run_shares(chain.from_iterable(jobs.values()), args.scores_dir)
    results = {name: evaluate_folds(test, (score() for score in folds)) for name, folds in jobs.items()}
    if not state.is_main_process:
        return
    print(results_table(test, results))
    if args.output is not None:
        values = {
            "test": test.title,
            "arguments": dataclasses.asdict(args),
            "checkpoint": checkpoint,
            "regions": {"path": args.regions, "provenance": store.provenance},
            "captions": {"scored": sum(len(fold.captions) for fold in test.folds), "folds": len(test.folds)},
            "versions": {
                "unicoder_vl_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "results": {name: dataclasses.asdict(result) for name, result in results.items()},
            "chance": chance(test),
            "paper": dict(test.paper),
        }
        write_json(Path(args.output), values)


def fold_jobs(
    scorer: ImageTextScorer, test: RetrievalTest, scores_dir: str | None, name: str
) -> list[Callable[[], np.ndarray]]:
    """Lists for each fold of a test a call that scores it, and keeps the scores in `{scores_dir}/{name}-{fold}`."""
    folders = [None if scores_dir is None else Path(scores_dir) / f"{name}-{index}" for index in range(len(test.folds))]
    return [
        partial(scorer.score, fold.captions, fold.image_ids, output_dir=folder)
        for fold, folder in zip(test.folds, folders, strict=True)
    ]


if __name__ == "__main__":
    run_script(main, go_on="With --scores_dir the same command goes on.")
