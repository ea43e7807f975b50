"""Pre-trains a Unicoder-VL further on the text of VCR.

`accelerate launch examples/run_vcr_pretraining.py --output_dir runs/vcr-second-stage`;
without a checkout `accelerate launch -m unicoder_vl_hf.tasks.vcr.run_pretraining`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.tasks.vcr.run_pretraining:main")
