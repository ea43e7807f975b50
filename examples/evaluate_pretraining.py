"""Evaluates a pre-trained checkpoint.

`python examples/evaluate_pretraining.py --model runs/scenes --captions CAPTIONS --regions REGIONS`;
without a checkout `python -m unicoder_vl_hf.scripts.evaluate_pretraining`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Calls `unicoder_vl_hf.scripts.evaluate_pretraining.main`, see there."""
    # Imported here, so that Ctrl-C meanwhile ends in one line, too.
    from unicoder_vl_hf.scripts.evaluate_pretraining import main

    main(argv)


if __name__ == "__main__":
    run_script(main)
