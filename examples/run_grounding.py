"""Fine-tunes Unicoder-VL for expressions that refer to a region.

`accelerate launch examples/run_grounding.py --output_dir runs/grounding-scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.grounding.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.grounding.run:main")
