"""Goes the whole way on the rendered scenes.

`python examples/run_demo.py --output_dir demo`;
without a checkout `python -m unicoder_vl_hf.scripts.demo`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Calls `unicoder_vl_hf.scripts.demo.main`, see there."""
    # Imported here, so that Ctrl-C meanwhile ends in one line, too.
    from unicoder_vl_hf.scripts.demo import main

    main(argv)


if __name__ == "__main__":
    run_script(main, go_on="Run again, it goes on.")
