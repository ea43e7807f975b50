"""Runs the demo on a small world, as the process that pre-trains beside test_run_demo.py does."""

import functools

from unicoder_vl_hf.errors import run_script
from unicoder_vl_hf.scenes import world
from unicoder_vl_hf.scripts import demo

SIZES = {"num_train": 40, "num_val": 6, "num_test": 8, "captions_per_image": 2}

if __name__ == "__main__":
    world.build_scenes = functools.partial(world.build_scenes, **SIZES)
    run_script(demo.main)
