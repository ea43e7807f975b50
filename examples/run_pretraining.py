"""Pre-trains Unicoder-VL with Accelerate.

`accelerate launch examples/run_pretraining.py --output_dir runs/scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.pretraining.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.pretraining.run:main")
