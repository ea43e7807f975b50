"""Measures expressions that refer to a region.

`python examples/evaluate_grounding.py --model runs/refcoco --refs … --instances … --regions …`;
without a checkout `python -m unicoder_vl_hf.tasks.grounding.run_evaluation`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.grounding.run_evaluation:main")
