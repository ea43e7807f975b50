"""Evaluates the retrieval of a checkpoint.

`python examples/evaluate_retrieval.py --model runs/retrieval --captions CAPTIONS --regions REGIONS`;
without a checkout `python -m unicoder_vl_hf.tasks.retrieval.run_evaluation`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script(
        "unicoder_vl_hf.tasks.retrieval.run_evaluation:main", go_on="With --scores_dir the same command goes on."
    )
