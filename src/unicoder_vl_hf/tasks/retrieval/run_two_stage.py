"""Measures the losses and savings of a search in two stages: first stage, its ceiling, and recall after re-ranking.

    python -m unicoder_vl_hf.tasks.retrieval.run_two_stage --model runs/search --captions dataset_flickr30k.json \
        --regions flickr30k-regions --protocol flickr30k --output flickr30k_two_stage.json
    python -m unicoder_vl_hf.tasks.retrieval.run_two_stage --model runs/flickr30k --captions dataset_flickr30k.json \
        --regions flickr30k-regions --dual_encoder openai/clip-vit-base-patch32 --photos flickr30k-images

The first stage proposes K candidates a query, in both directions, and the cross-encoder scores these pairs alone, each
once: the table has a row for each of `--candidates` and of `--similarity_weight`, which by default are 0 and the weight
that was measured when the checkpoint was trained. The first stage is the model's own, which must have been trained
(`unicoder-vl train-first-stage`, or `run_retrieval.py --contrastive_weight`), that of another Unicoder-VL, or a dual
encoder of transformers. `--num_queries 1000` asks with that many captions and images only, among all there are, if
200 pairs for each caption take too long. `--scores_dir` keeps what is done: the same command goes on after a kill,
or computes a `--share` of it as a task of an array, see docs/scale.md.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ...errors import run_script
from ...files import write_json
from ...processes import start_processes
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import KeptScoresArguments, evaluation_dtype
from ...scoring.checkpoints import checkpoint_provenance
from ...scoring.scorer import ImageTextScorer
from ...search.two_stage import SimilarityWeight
from .protocols import PROTOCOLS, retrieval_test
from .search_arguments import SearchArguments
from .two_stage_report import two_stage_report


@dataclass(kw_only=True)
class TwoStageArguments(KeptScoresArguments, SearchArguments):
    """Names a search in two stages, and says how much of it is measured."""

    protocol: str | None = option(
        None, f"Protocol of one fold: {', '.join(PROTOCOLS)}. Default: all images of the split."
    )
    num_images: int | None = option(None, "Images to take, the first of the split. Default: all.")
    num_queries: int | None = option(
        None, "Captions and images to ask with, drawn evenly, among all there are. Default: all."
    )
    candidates: list[int] = option(
        [10, 50, 100, 200], "Numbers K of candidates that the first stage proposes a query; a row for each."
    )
    similarity_weight: list[float] = option(
        [],
        "Weights of the first stage's similarity in the order, score + weight x similarity; a row for "
        "each. Default: 0, and the one that was measured when the checkpoint was trained.",
    )
    output: str | None = option(None, "JSON file to write, with the table and its provenance.")


def main(argv: list[str] | None = None):
    """
    Measures with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the test has several folds, the checkpoint or the regions do not fit, or the first stage was not
            trained.
    """
    args = parse_evaluation(TwoStageArguments, argv)
    share = args.share_of_scores()
    state = start_processes()
    store, captions = args.open_data()
    test = retrieval_test(captions, args.protocol, num_images=args.num_images)
    if len(test.folds) > 1:
        raise ValueError(f"{test.title}: the report is of one fold; give another protocol, or none.")
    model, processor = args.load_scoring(store, captions)
    dtype = evaluation_dtype(args.mixed_precision, model)
    scorer = ImageTextScorer(model, processor, store, dtype=dtype, share=share)
    encoder = args.open_first_stage(model, processor, store)
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
        write_json(Path(args.output), values)


if __name__ == "__main__":
    run_script(main, go_on="With --scores_dir the same command goes on.")
