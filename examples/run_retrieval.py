"""Fine-tunes Unicoder-VL for image-text retrieval.

`accelerate launch examples/run_retrieval.py --output_dir runs/retrieval`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.retrieval.run`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.retrieval.run:main")
