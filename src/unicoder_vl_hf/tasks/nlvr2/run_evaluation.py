"""Measures judgements of sentences about two photos on NLVR2, and writes the file of its official evaluation.

    python -m unicoder_vl_hf.tasks.nlvr2.run_evaluation --model runs/nlvr2 --annotations dev.json \
        --regions nlvr2-regions --output dev_metrics.json --predictions dev.csv
"""

from dataclasses import dataclass

from ...data.masking import IGNORED
from ...errors import run_script
from ...processes import start_processes
from ...regions.store import RegionStore
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import TaskEvaluationArguments, write_metrics
from .collator import DataCollatorForUnicoderVLVisualReasoning
from .data import read_nlvr2
from .metrics import nlvr2_metrics, write_predictions
from .training import load_for_nlvr2


@dataclass(kw_only=True)
class NLVR2EvaluationArguments(TaskEvaluationArguments):
    """Names a checkpoint, the sentences that it judges, and the files that its judgements are written to."""

    annotations: str = option(..., "Sentences: NLVR2's dev.json or test1.json.")
    predictions: str | None = option(None, "CSV file of identifiers and judgements to write.")


def main(argv: list[str] | None = None) -> None:
    """
    Measures with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the checkpoint or the regions do not fit, or there are neither labels nor `--predictions`.
        `KeyError`: a photo has no regions.
    """
    args = parse_evaluation(NLVR2EvaluationArguments, argv)
    state = start_processes()
    store = RegionStore(args.regions)
    rows = read_nlvr2(args.annotations, ids=args.image_ids)
    labelled = IGNORED not in rows["label"]
    if not labelled and args.predictions is None:
        raise ValueError(f"{args.annotations} has no labels: give --predictions for the file of the evaluation.")
    model, processor = load_for_nlvr2(args.model, store)
    collator = DataCollatorForUnicoderVLVisualReasoning(processor, store, args.length_for(model))
    judged = args.logits(model, collator, rows, "Judging").argmax(axis=1)
    if not state.is_main_process:
        return
    if args.predictions is not None:
        write_predictions(args.predictions, rows["identifier"][:], judged)
        print(f"{args.predictions}: {len(rows):,} sentences")
    if labelled:
        metrics = nlvr2_metrics(judged, rows["label"][:], rows["identifier"][:])
        for name, value in metrics.items():
            print(f"{name:12}{100 * value:6.2f} %")
        write_metrics(args, metrics | {"sentences": len(rows)})


if __name__ == "__main__":
    run_script(main)
