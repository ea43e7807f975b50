"""Compares trainings that differ in one thing each, on the rendered scenes.

`python examples/ablations.py --output_dir runs/ablations`;
without a checkout `python -m unicoder_vl_hf.scripts.ablations`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Calls `unicoder_vl_hf.scripts.ablations.main`, see there."""
    # Imported here, so that Ctrl-C meanwhile ends in one line, too.
    from unicoder_vl_hf.scripts.ablations import main

    main(argv)


if __name__ == "__main__":
    run_script(main, go_on="Run again, it goes on.")
