"""Pre-trains Unicoder-VL with Accelerate.

`accelerate launch examples/run_pretraining.py --output_dir runs/scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.pretraining.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script


def main(argv: list[str] | None = None) -> bool:
    """Calls `unicoder_vl_hf.tasks.pretraining.run.main`, see there."""
    # Imported here, so that Ctrl-C meanwhile ends in one line, too.
    from unicoder_vl_hf.tasks.pretraining.run import main

    return main(argv)


if __name__ == "__main__":
    run_script(main)
