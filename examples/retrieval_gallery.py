"""Draws a gallery of a search in two stages.

`python examples/retrieval_gallery.py --model runs/search --captions CAPTIONS --regions REGIONS --output gallery.html`;
without a checkout `python -m unicoder_vl_hf.tasks.retrieval.run_gallery`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Calls `unicoder_vl_hf.tasks.retrieval.run_gallery.main`, see there."""
    # Imported here, so that Ctrl-C meanwhile ends in one line, too.
    from unicoder_vl_hf.tasks.retrieval.run_gallery import main

    main(argv)


if __name__ == "__main__":
    run_script(main)
