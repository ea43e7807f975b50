"""Pre-trains Unicoder-VL with transformers' Trainer.

`accelerate launch examples/run_pretraining_trainer.py --output_dir runs/scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.pretraining.run_trainer`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.pretraining.run_trainer:main")
