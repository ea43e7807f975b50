"""Measures visual entailment on SNLI-VE.

`python examples/evaluate_entailment.py --model runs/snli-ve --annotations snli_ve_test.jsonl --regions …`;
without a checkout `python -m unicoder_vl_hf.tasks.entailment.run_evaluation`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.entailment.run_evaluation:main")
