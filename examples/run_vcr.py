"""Fine-tunes Unicoder-VL for visual commonsense reasoning.

`accelerate launch examples/run_vcr.py --output_dir runs/vcr-scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.vcr.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.vcr.run:main")
