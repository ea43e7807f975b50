"""Evaluates a pre-trained checkpoint.

`python examples/evaluate_pretraining.py --model runs/scenes --captions CAPTIONS --regions REGIONS`;
without a checkout `python -m unicoder_vl_hf.scripts.evaluate_pretraining`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.scripts.evaluate_pretraining:main")
