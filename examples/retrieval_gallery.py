"""Draws a gallery of a search in two stages.

`python examples/retrieval_gallery.py --model runs/search --captions CAPTIONS --regions REGIONS --output gallery.html`;
without a checkout `python -m unicoder_vl_hf.tasks.retrieval.run_gallery`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.retrieval.run_gallery:main")
