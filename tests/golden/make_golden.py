"""
Wrote the folder `9bccc44` beside it, with the code of that commit, in a checkout of it:

    cd tests && PYTHONPATH=../src:.:../examples python PATH/make_golden.py OUTPUT

What users of that version have on their disks: a store, checkpoints, an index, and the beginnings of what was stopped.
test_golden.py opens each with the code of today, and goes on.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import run_pretraining
import run_retrieval
import small_world
import test_extraction
import test_regions_conversion
import torch

from unicoder_vl_hf import ImageTextScorer, RegionStore
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.regions.conversion import convert
from unicoder_vl_hf.regions.extraction import extract
from unicoder_vl_hf.retrieval import mining
from unicoder_vl_hf.retrieval.blocks import BlockFolder
from unicoder_vl_hf.retrieval.checkpoints import load_for_store
from unicoder_vl_hf.retrieval.searching import make_index, run_search
from unicoder_vl_hf.scenes import build_scenes
from unicoder_vl_hf.training import StopSignal

QUERY = "a red circle above a blue square"


class Killed(BaseException):
    """Not an exception that any code takes care of."""


def dying(*_, **__):
    raise Killed


def killed(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (Killed, KeyboardInterrupt):
        return
    raise AssertionError("it came to its end")


def stopped_after(steps, main, arguments):
    """Runs a script that Ctrl-C stops after so many steps, with a checkpoint."""
    agreed, calls = StopSignal.agreed, []

    def stopping(self, accelerator):
        calls.append(None)
        self._is_set = self._is_set or len(calls) == steps
        return agreed(self, accelerator)

    StopSignal.agreed = stopping
    try:
        assert main(arguments) is False
    finally:
        StopSignal.agreed = agreed


def scores_killed_after(blocks, function, *arguments, **options):
    write, left = BlockFolder.write, [blocks]

    def dying(self, *block):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        write(self, *block)

    BlockFolder.write = dying
    try:
        killed(function, *arguments, **options)
    finally:
        BlockFolder.write = write


def main(output: Path):
    torch.set_num_threads(1)
    output.mkdir()
    os.chdir(output)
    build_scenes(Path("world"), num_train=10, num_val=4, num_test=3, captions_per_image=2)
    world, bert = Path("world"), small_world.save_bert(Path("bert"), dropout=0.1)

    # Runs of our own loop and of Trainer: whole, and stopped after 3 steps.
    loop = {"max_steps": 6, "train_batch_size": 4, "gradient_accumulation_steps": 1, "max_validation_pairs": 4}
    loop |= {"mixed_precision": "no", "seed": 5, "learning_rate": 1e-3}
    run_pretraining.main(small_world.arguments(world, bert, Path("pretrained"), **loop))
    stopped_after(3, run_pretraining.main, small_world.arguments(world, bert, Path("unfinished_pretraining"), **loop))
    trainer = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False}
    trainer |= {"contrastive_weight": 1, "projection_dim": 8, "max_validation_images": 4, "seed": 5}
    trainer |= {"learning_rate": 1e-3, "eval_strategy": "no", "save_strategy": "steps", "load_best_model_at_end": False}
    start = Path("pretrained")
    run_retrieval.main(small_world.arguments(world, start, Path("retrieval"), **trainer))
    stopped_after(3, run_retrieval.main, small_world.arguments(world, start, Path("unfinished_retrieval"), **trainer))

    # Indexes, mining, scoring.
    data = [str(world / "captions.jsonl"), str(world / "regions")]
    make_index(data[1], "index", model="retrieval")
    rule = {"num_negatives": 2, "images_per_set": 5, "split": "train"}
    mining.mine("retrieval", *data, "mined", **rule)
    table = datasets.Dataset.save_to_disk
    datasets.Dataset.save_to_disk = dying  # all is scored, nothing written
    killed(mining.mine, "retrieval", *data, "unfinished_mining", **rule)
    datasets.Dataset.save_to_disk = table
    store = RegionStore(data[1])
    captions = read_captions(data[0])["caption"][:]
    scorer = ImageTextScorer(*load_for_store("retrieval", store), store, block_pairs=40)
    np.save("scores.npy", scorer.score(captions, list(store)))
    scores_killed_after(3, scorer.score, captions, list(store), output_dir="unfinished_scores")
    found = run_search(QUERY, index="index", model="retrieval", regions=data[1], top_k=5, candidates=5)

    # Stores that were begun.
    source = test_regions_conversion.write_lines(Path("features.tsv"), range(1, 10), damaged=7)
    try:
        convert(source, "unfinished_conversion", shard_size=100)
    except ValueError:
        test_regions_conversion.write_lines(source, range(1, 10))
    photos = test_extraction.save_photos(Path("photos"), 12)
    killed(
        extract, photos, "unfinished_extraction", detector=test_extraction.Stopped(Path("computed-0")),
        batch_size=1, num_workers=0,
    )  # fmt: skip

    Path("expected.json").write_text(
        json.dumps({"captions": captions, "query": QUERY, "hits": [[hit.name, hit.score] for hit in found.hits]})
    )
    Path("computed-0").unlink()
    for folder in ("bert", "world/photos", "pretrained/checkpoint-6", "retrieval/checkpoint-6"):
        shutil.rmtree(folder)
    for code in Path().rglob("*_unicoder_vl.py"):  # one of them keeps it
        if code.parent.name != "pretrained":
            code.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
