"""Measures what a search in two stages loses and saves: first stage, its ceiling, and recall after re-ranking.

    python -m unicoder_vl_hf.tasks.retrieval.run_two_stage --model runs/search --captions dataset_flickr30k.json \
        --regions flickr30k-regions --protocol flickr30k --output flickr30k_two_stage.json
    python -m unicoder_vl_hf.tasks.retrieval.run_two_stage --model runs/flickr30k --captions dataset_flickr30k.json \
        --regions flickr30k-regions --dual_encoder openai/clip-vit-base-patch32 --photos flickr30k-images

The first stage proposes K candidates a query, in both directions, and the cross-encoder scores these pairs alone, each
once: the table has a row for each of `--candidates` and of `--similarity_weight`, which by default are 0 and the weight
that was measured when the checkpoint was trained. The first stage is the model's own, which must have been trained
(`unicoder-vl train-first-stage`, or `run_retrieval.py --contrastive_weight`), that of another Unicoder-VL, or a dual
encoder of transformers. `--num_queries 1000` asks with that many captions and images only, among all there are, where
200 pairs for each caption take too long. `--scores_dir` keeps what is done: the same command goes on after a kill.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...data.captions import check_tokens, join, read_captions
from ...errors import run_script
from ...processes import start_processes
from ...regions.store import RegionStore
from ...runs.arguments import make_parser
from ...scoring.checkpoints import checkpoint_provenance, load_for_store
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import DualEncoder, UnicoderVLDualEncoder, open_dual_encoder
from ...search.two_stage import SimilarityWeight
from .protocols import PROTOCOLS, retrieval_test
from .two_stage_report import two_stage_report


@dataclass
class TwoStageArguments:
    model: str = field(metadata={"help": "Checkpoint with its processor: a folder or a repository of the Hub."})
    captions: str = field(metadata={"help": "Caption file in any layout that read_captions reads."})
    regions: str = field(metadata={"help": "RegionStore."})
    dual_encoder: str | None = field(
        default=None,
        metadata={"help": "First stage: another Unicoder-VL; or CLIP or alike, on --photos. Default: the model's own."},
    )
    photos: str | None = field(default=None, metadata={"help": "Folder, .tar, or folder of a dataset."})
    photo_ids: str = field(default="stem", metadata={"help": "How photos get their ids, as --ids of `extract`."})
    protocol: str | None = field(
        default=None, metadata={"help": f"{', '.join(PROTOCOLS)}, of one fold. Default: all images of the split."}
    )
    split: str | None = field(default="test", metadata={"help": "Split of the captions."})
    caption_ids: str | None = field(
        default=None, metadata={"help": "Other ids for the captions' images: stem, coco, a .csv, or CAPTIONS:COLUMN."}
    )
    num_images: int | None = field(default=None, metadata={"help": "The first so many images only."})
    num_queries: int | None = field(
        default=None, metadata={"help": "Ask with so many captions and images only, drawn evenly, among all there are."}
    )
    candidates: list[int] = field(
        default_factory=lambda: [10, 50, 100, 200], metadata={"help": "K: how many the first stage proposes a query."}
    )
    similarity_weight: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Weights of the first stage's similarity in the order, score + weight x similarity; a row for "
            "each. Default: 0, and the one that was measured when the checkpoint was trained."
        },
    )
    bf16: bool = field(default=False, metadata={"help": "Score in bfloat16."})
    scores_dir: str | None = field(default=None, metadata={"help": "Folder for the scores, to go on after a kill."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the table and its provenance."})


def main(argv: list[str] | None = None):
    (args,) = make_parser(TwoStageArguments).parse_args_into_dataclasses(argv)
    state, store = start_processes(), RegionStore(args.regions)
    captions, _ = join(read_captions(args.captions, split=args.split, ids=args.caption_ids), store, skip_option=None)
    test = retrieval_test(captions, args.protocol, num_images=args.num_images)
    if len(test.folds) > 1:
        raise ValueError(f"{test.title}: the report is of one fold; give another protocol, or none.")
    model, processor = load_for_store(args.model, store)
    check_tokens(captions, processor.tokenizer, args.captions)
    encoder: DualEncoder
    if args.dual_encoder is None:
        encoder = UnicoderVLDualEncoder(model, processor, store, args.model)
    else:
        encoder = open_dual_encoder(args.dual_encoder, store, args.photos, args.photo_ids)
    scorer = ImageTextScorer(model, processor, store, dtype=torch.bfloat16 if args.bf16 else None)
    weight = SimilarityWeight.of(None, encoder, scorer)
    weights = args.similarity_weight or sorted({0.0, weight.value})
    report = two_stage_report(
        encoder, scorer, test.folds[0], args.candidates, args.num_queries, args.scores_dir, weights
    )
    if not state.is_main_process:
        return
    title = test.title
    if args.num_queries is not None:
        captions_asked, images_asked = report.num_queries["image_retrieval"], report.num_queries["text_retrieval"]
        title += f", asked with {captions_asked:,} captions and {images_asked:,} images, drawn evenly"
    print(f"{title}; first stage {encoder.name}\nA search orders by {weight}.\n\n{report}")
    if args.output is not None:
        values = {
            "test": title,
            "arguments": dataclasses.asdict(args),
            "first_stage": encoder.identity(),
            "order_of_a_search": str(weight),
            "checkpoint": checkpoint_provenance(args.model, model),
            "report": report.as_dict(),
        }
        Path(args.output).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, go_on="With --scores_dir the same command goes on.")
