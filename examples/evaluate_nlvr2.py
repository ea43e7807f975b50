"""Measures judgements of sentences about two photos on NLVR2.

`python examples/evaluate_nlvr2.py --model runs/nlvr2 --annotations dev.json --regions nlvr2-regions`;
without a checkout `python -m unicoder_vl_hf.tasks.nlvr2.run_evaluation`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.nlvr2.run_evaluation:main")
