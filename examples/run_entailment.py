"""Fine-tunes Unicoder-VL for visual entailment.

`accelerate launch examples/run_entailment.py --output_dir runs/entailment-scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.entailment.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.entailment.run:main")
