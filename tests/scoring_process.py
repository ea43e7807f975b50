"""One process of a scoring job, for torchrun, as `scoring_process.py folder`, or with `work` as its target."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import tiny
import torch
from accelerate import PartialState

from unicoder_vl_hf import ImageTextScorer, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.scoring.blocks import BlockFolder


def world(num_captions=9, num_images=7):
    """Captions of 1 to 9 words and images of 1 to 12 regions, in no order of length."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(tiny.WORDS[5:], rng.integers(1, 10))) for _ in range(num_captions)]
    store = {f"image {i}": tiny.record(f"image {i}", num_regions=int(rng.integers(1, 13))) for i in range(num_images)}
    return captions, store


CAPTIONS, STORE = world()
IMAGES = list(STORE)


def score(folder: Path, seconds: float = 0.0) -> tuple[list[int], int]:
    """
    Scores into the folder, 36 blocks of which each takes so much longer; returns those that were computed here, and how
    often model and regions were hashed here.
    """
    write, written = BlockFolder.write, []
    job, hashed = ImageTextScorer._job, []

    def slow_write(self, block, values):
        time.sleep(seconds)
        write(self, block, values)
        written.append(block)

    BlockFolder.write = slow_write
    ImageTextScorer._job = lambda *arguments: (hashed.append(None), job(*arguments))[1]
    scorer().score(CAPTIONS, IMAGES, output_dir=folder)
    return written, len(hashed)


def scorer() -> ImageTextScorer:
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    return ImageTextScorer(model, tiny.processor(), STORE, block_pairs=2, verbose=False)


def work(folder: Path, rank: int, port: int, seconds: float):
    """What torchrun sets, without its start."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    score(folder, seconds)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    computed, hashed = score(target)
    state = PartialState()
    np.save(f"{target}-{state.process_index}.npy", scorer().score(CAPTIONS, IMAGES))
    print(f"world size {state.num_processes}, computed {len(computed)}, hashed {hashed}\n", end="", flush=True)
    state.destroy_process_group()
