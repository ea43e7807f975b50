"""Measures visual entailment on SNLI-VE: accuracy, and of each class.

    python -m unicoder_vl_hf.tasks.entailment.run_evaluation --model runs/snli-ve --annotations snli_ve_test.jsonl \
        --regions flickr30k-regions --output test.json
"""

from dataclasses import dataclass

from ...errors import run_script
from ...processes import start_processes
from ...regions.store import RegionStore
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import TaskEvaluationArguments, write_metrics
from .collator import DataCollatorForUnicoderVLVisualEntailment
from .data import read_entailment
from .training import load_for_entailment, measure


@dataclass(kw_only=True)
class EntailmentEvaluationArguments(TaskEvaluationArguments):
    """Names a checkpoint, and the hypotheses that it judges."""

    annotations: str = option(..., "Hypotheses: snli_ve_dev.jsonl or snli_ve_test.jsonl.")


def main(argv: list[str] | None = None) -> None:
    """
    Measures with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the checkpoint or the regions do not fit, or a file has a fault.
    """
    args = parse_evaluation(EntailmentEvaluationArguments, argv)
    state = start_processes()
    store = RegionStore(args.regions)
    rows = args.joined(read_entailment(args.annotations, ids=args.image_ids), store, "hypotheses")
    model, processor = load_for_entailment(args.model, store)
    collator = DataCollatorForUnicoderVLVisualEntailment(processor, store, args.length_for(model))
    metrics = measure(args.logits(model, collator, rows, "Judging"), rows)
    if not state.is_main_process:
        return
    for name, value in metrics.items():
        print(f"{name:24}{100 * value:6.2f} %")
    write_metrics(args, metrics | {"hypotheses": len(rows)})


if __name__ == "__main__":
    run_script(main)
