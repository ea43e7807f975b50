"""Compares trainings that differ in one thing each, on the rendered scenes.

`python examples/ablations.py --output_dir runs/ablations`;
without a checkout `python -m unicoder_vl_hf.scripts.ablations`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.scripts.ablations:main", go_on="Run again, it goes on.")
