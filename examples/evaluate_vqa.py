"""Evaluates answers to questions about images, and writes the file of VQA's and GQA's servers.

`python examples/evaluate_vqa.py --model runs/vqa --questions … --annotations … --regions coco-regions`;
without a checkout `python -m unicoder_vl_hf.tasks.vqa.run_evaluation`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.vqa.run_evaluation:main")
