"""Fine-tunes Unicoder-VL for questions about images.

`accelerate launch examples/run_vqa.py --output_dir runs/vqa-scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.vqa.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.vqa.run:main")
