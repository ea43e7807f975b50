"""Measures what a search in two stages loses and saves.

`python examples/evaluate_two_stage.py --model runs/search --captions CAPTIONS --regions REGIONS`;
without a checkout `python -m unicoder_vl_hf.tasks.retrieval.run_two_stage`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.retrieval.run_two_stage:main", go_on="With --scores_dir the same command goes on.")
