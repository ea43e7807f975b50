"""Evaluates visual commonsense reasoning.

`python examples/evaluate_vcr.py --model runs/vcr --annotations vcr1annots/val.jsonl --regions REGIONS`;
without a checkout `python -m unicoder_vl_hf.tasks.vcr.run_evaluation`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Calls `unicoder_vl_hf.tasks.vcr.run_evaluation.main`, see there."""
    # Imported here, so that Ctrl-C meanwhile ends in one line, too.
    from unicoder_vl_hf.tasks.vcr.run_evaluation import main

    main(argv)


if __name__ == "__main__":
    run_script(main)
