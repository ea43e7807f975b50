"""Evaluates visual commonsense reasoning.

`python examples/evaluate_vcr.py --model runs/vcr --annotations vcr1annots/val.jsonl --regions REGIONS`;
without a checkout `python -m unicoder_vl_hf.tasks.vcr.run_evaluation`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.vcr.run_evaluation:main")
