"""Evaluates the retrieval of any checkpoint, zero-shot where it is a pre-trained one, beside the paper's figures.

    python -m unicoder_vl_hf.tasks.retrieval.run_evaluation --model runs/flickr30k --captions dataset_flickr30k.json \
        --regions flickr30k-regions --protocol flickr30k --bf16 --output flickr30k_test.json
    accelerate launch -m unicoder_vl_hf.tasks.retrieval.run_evaluation --model runs/coco --captions dataset_coco.json \
        --regions coco-regions --protocol coco-1k --scores_dir runs/coco/scores

Every caption is scored with every image of its fold: 5M pairs for Flickr30k, 25M for COCO 1K, 125M for COCO 5K; the
scorer says first how long it will take. `--scores_dir` keeps what is done: the same command goes on after a kill.
`--num_images 200` is a quick look, and named so.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

from ..._version import package_version
from ...data.captions import check_tokens, join, read_captions
from ...errors import run_script
from ...processes import start_processes
from ...regions.store import RegionStore
from ...runs.arguments import make_parser
from ...scoring.checkpoints import checkpoint_provenance, load_for_store
from ...scoring.scorer import ImageTextScorer
from .protocols import PROTOCOLS, chance, evaluate_folds, results_table, retrieval_test


@dataclass
class RetrievalArguments:
    model: str = field(metadata={"help": "Checkpoint with its processor: a folder or a repository of the Hub."})
    captions: str = field(metadata={"help": "Caption file in any layout that read_captions reads."})
    regions: str = field(metadata={"help": "RegionStore."})
    protocol: str | None = field(
        default=None, metadata={"help": f"{', '.join(PROTOCOLS)}. Default: all images of the split together."}
    )
    split: str | None = field(default="test", metadata={"help": "Split of the captions."})
    caption_ids: str | None = field(
        default=None, metadata={"help": "Other ids for the captions' images: stem, coco, a .csv, or CAPTIONS:COLUMN."}
    )
    num_images: int | None = field(default=None, metadata={"help": "The first so many images only."})
    captions_per_image: str | None = field(
        default=None, metadata={"help": "The first so many of each image, or all. Default: 5 under a protocol, or all."}
    )
    bf16: bool = field(default=False, metadata={"help": "Score in bfloat16 as well, to be compared with float32."})
    scores_dir: str | None = field(default=None, metadata={"help": "Folder for the scores, to go on after a kill."})
    output: str | None = field(default=None, metadata={"help": "JSON file for metrics, intervals and provenance."})


def main(argv: list[str] | None = None):
    (args,) = make_parser(RetrievalArguments).parse_args_into_dataclasses(argv)
    state = start_processes()
    store = RegionStore(args.regions)
    # No image is skipped for want of regions: with fewer candidates the test would be another, and easier.
    captions, _ = join(read_captions(args.captions, split=args.split, ids=args.caption_ids), store, skip_option=None)
    count = args.captions_per_image
    test = retrieval_test(
        captions,
        args.protocol,
        captions_per_image=int(count) if count not in (None, "all") else count,
        num_images=args.num_images,
    )
    model, processor = load_for_store(args.model, store)
    check_tokens(captions, processor.tokenizer, args.captions)
    checkpoint = checkpoint_provenance(args.model, model)

    def scores(dtype: torch.dtype, name: str) -> Iterator[np.ndarray]:
        scorer = ImageTextScorer(model, processor, store, dtype=dtype)
        for index, fold in enumerate(test.folds):
            folder = None if args.scores_dir is None else Path(args.scores_dir) / f"{name}-{index}"
            yield scorer.score(fold.captions, fold.image_ids, output_dir=folder)

    # One of retrieval may be fine-tuned, or a pre-trained one that was given a first stage of search.
    use = "zero-shot" if checkpoint["saved_by"] == "UnicoderVLForPreTraining" else "retrieval checkpoint"
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if args.bf16 else {})
    results = {f"{use}, {name}": evaluate_folds(test, scores(dtype, name)) for name, dtype in dtypes.items()}
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
                "unicoder_vl_hf": package_version(),
                **{module.__name__: module.__version__ for module in (torch, transformers)},
            },
            "results": {name: dataclasses.asdict(result) for name, result in results.items()},
            "chance": chance(test),
            "paper": dict(test.paper),
        }
        Path(args.output).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, go_on="With --scores_dir the same command goes on.")
