"""Fine-tunes Unicoder-VL for sentences about two photos.

`accelerate launch examples/run_nlvr2.py --output_dir runs/nlvr2-scenes`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.nlvr2.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.nlvr2.run:main")
