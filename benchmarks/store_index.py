"""
What a store of a million ids costs: writing it, opening it, finding an id. Prints a table and writes JSON.

    python benchmarks/store_index.py [--images 1000000] [--output store_index.json]

Each image has one region of 4 features, so that ids are all that weighs. Each step runs in a process of its own, which
reports how much its resident memory grew at the most.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from unicoder_vl_hf import RegionRecord, RegionStore, RegionStoreWriter
from unicoder_vl_hf.regions.editing import merge_stores

GOALS = {"seconds": 1.0, "megabytes": 200.0}


def name(number: int) -> str:
    return f"COCO_train2014_{number:012d}"


def write(folder: Path, images: int) -> None:
    features = np.arange(4, dtype=np.float16)[None]
    with RegionStoreWriter(folder) as writer:
        for number in range(images):
            writer.write(RegionRecord(name(number), features=features + np.float16(number % 1000)))


def resume(folder: Path, images: int) -> None:
    """As a conversion that is run again: passes over all that is there."""
    with RegionStoreWriter(folder, resume=True) as writer:
        for number in np.random.default_rng(0).integers(0, images, 10_000).tolist():
            assert name(number) in writer.resumed
            assert f"other {number}" not in writer.resumed


def open_and_find(folder: Path, images: int) -> None:
    store = RegionStore(folder)
    assert len(store) == images
    assert store[name(images * 7 // 9)].features[0, 0] == images * 7 // 9 % 1000
    assert name(images - 1) in store
    assert "nothing" not in store


def find_many(folder: Path, images: int) -> None:
    store = RegionStore(folder)
    for number in np.random.default_rng(0).integers(0, images, 100_000).tolist():
        assert name(number) in store


def merge(folder: Path, images: int) -> None:
    merge_stores([folder], folder.with_name("merged"))


def measure(function, *arguments) -> dict[str, float]:
    """Seconds, and megabytes that the peak of resident memory grew by, of a call in a forked process."""

    def child(pipe) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        function(*arguments)
        seconds = time.perf_counter() - begin
        pipe.send(
            {"seconds": seconds, "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}
        )

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    process.join()
    return receiver.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path("store_index.json"))
    arguments = parser.parse_args()
    temporary = Path(tempfile.mkdtemp())
    try:
        steps = (write, resume, open_and_find, find_many, merge)
        results = {step.__name__: measure(step, temporary / "store", arguments.images) for step in steps}
        index = (temporary / "store" / "index.safetensors").stat().st_size
    finally:
        shutil.rmtree(temporary)
    print(f"{arguments.images:,} images, an index of {index / 1e6:.0f} MB\n")
    print(f"{'':15}{'seconds':>10}{'MB grown':>10}")
    for step, result in results.items():
        print(f"{step:15}{result['seconds']:10.3f}{result['megabytes']:10.1f}")
    found = results["open_and_find"]
    met = all(found[name] < goal for name, goal in GOALS.items())
    print(f"\nOpening and finding the first ids in under {GOALS}: {'met' if met else 'missed'}")
    report = {"images": arguments.images, "index_bytes": index, "goals": GOALS, "met": met, "steps": results}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
