"""Goes the whole way on the rendered scenes.

`python examples/run_demo.py --output_dir demo`;
without a checkout `python -m unicoder_vl_hf.scripts.demo`, whose file says more.
"""

from unicoder_vl_hf.errors import run_script

if __name__ == "__main__":
    run_script("unicoder_vl_hf.scripts.demo:main", go_on="Run again, it goes on.")
