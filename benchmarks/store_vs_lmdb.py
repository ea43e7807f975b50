"""
RegionStore against LMDB as UNITER uses it, over records of 100 x 2048 float16. Prints a table and writes JSON.

    python benchmarks/store_vs_lmdb.py [--images 2000] [--rounds 7] [--output store_vs_lmdb.json]

UNITER's layout: a value is msgpack with msgpack_numpy; a read-only environment of default options, one transaction
with buffers that stays open, `msgpack.loads` of the value. Its class probabilities are left out, which would slow it
down further. Every byte of the features goes into the new tensor of its batch, by PyTorch's `default_collate`:

    store           `get_many`, batches of float16, as our feature extractor makes them; the batch after it is
                    announced by `ReadAhead`, as in pre-training
    LMDB            batches of float32, as UNITER makes them
    LMDB, float16   the same without UNITER's conversion: the least that an LMDB can do

A `DataLoader` reads 16 images a batch, in random order; it is open, and its workers run, when the clock starts. Two
processes share the images, each with a loader of its own, as in training with two; two workers also send each batch to
the main process, through shared memory, whatever it was read from. Warm: all images, out of the page cache. Cold: the
kernel was told to drop the files' pages before (`posix_fadvise`; the share that stayed is reported), and an eighth of
the images is read, as of a dataset larger than the memory: what the kernel reads ahead of a random place is then of no
use. The disk itself: the cold images one after another, around the page cache (`O_DIRECT`). Systems take turns within a
round; what counts is the median over rounds of the ratio within a round, so that whatever else runs on the machine
weighs on all.
"""

import argparse
import ctypes
import functools
import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from unicoder_vl_hf import RegionRecord, RegionStore, RegionStoreWriter
from unicoder_vl_hf.data.samplers import ReadAhead
from unicoder_vl_hf.regions.tensor_files import DATA_START

msgpack_numpy.patch()
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
BATCH = 16
WARM_UP = 4 * BATCH  # images of their own, which let every worker open its files
GOALS = {"warm": 3.0, "cold": 6.0}


def record(number: int) -> RegionRecord:
    rng = np.random.default_rng(number)
    corners = np.sort(rng.random((100, 2, 2), dtype=np.float32), axis=1)
    return RegionRecord(
        f"COCO_train2014_{number:012d}",
        image_width=640,
        image_height=480,
        boxes=(corners * np.float32((640, 480))).reshape(100, 4),
        features=rng.standard_normal((100, 2048), dtype=np.float32).astype(np.float16),
        object_scores=rng.random(100, dtype=np.float32),
    )


class OurImages(Dataset):
    def __init__(self, folder: Path, ids: Sequence[str]):
        self.store, self.ids = RegionStore(folder), ids

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        records = self.store.get_many([self.ids[row] for row in rows])
        return [(torch.from_numpy(record.features), torch.from_numpy(record.boxes)) for record in records]

    def announce(self, rows: list[int]) -> None:
        self.store.will_need(self.ids[row] for row in rows)

    def close(self) -> None:
        """Lets go of the files, so that their pages can be dropped."""
        del self.store


class UniterImages(Dataset):
    def __init__(self, folder: Path, ids: Sequence[str], convert: bool):
        self.folder, self.ids, self.convert = folder, ids, convert
        self.environment = self.transaction = None

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.transaction is None:  # in the worker, as an environment must not be forked
            self.environment = lmdb.open(str(self.folder), readonly=True, create=False)
            self.transaction = self.environment.begin(buffers=True)
        arrays = msgpack.loads(self.transaction.get(f"{self.ids[row]}.npz".encode()), raw=False)
        if self.convert:
            return torch.tensor(arrays["features"]).float(), torch.tensor(arrays["norm_bb"]).float()
        return torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["norm_bb"])

    def close(self) -> None:
        if self.environment is not None:
            self.transaction = None
            self.environment.close()


class Order(Sampler):
    """Rows in an order that can be changed while workers run."""

    def __init__(self, rows: Sequence[int]):
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def write(folder: Path, images: int) -> tuple[list[str], float]:
    """Both systems' files; the ids, and the sum of all features but those of the warm-up."""
    ids, total = [], 0.0
    environment = lmdb.open(str(folder / "lmdb"), map_size=4 * images * 410_000)
    with RegionStoreWriter(folder / "store") as writer:
        for number in range(images):
            one = record(number)
            writer.write(one)
            boxes = np.concatenate([one.boxes, one.boxes[:, 2:] - one.boxes[:, :2]], axis=1).astype(np.float16)
            arrays = {"features": one.features, "norm_bb": boxes, "conf": one.object_scores[:, None]}
            with environment.begin(write=True) as transaction:
                transaction.put(f"{one.image_id}.npz".encode(), msgpack.dumps(arrays, use_bin_type=True))
            ids.append(one.image_id)
            if number >= WARM_UP:
                total += one.features.sum(dtype=np.float64)
    environment.close()
    return ids, total


def resident(paths: Sequence[Path]) -> float:
    """Which share of the files' pages is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = cached = 0
    for path in paths:
        size = path.stat().st_size
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as view,
        ):
            count = -(-size // mmap.PAGESIZE)
            vector = (ctypes.c_ubyte * count)()
            address = ctypes.addressof(anchor := ctypes.c_char.from_buffer(view))
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector):
                raise OSError(ctypes.get_errno(), "mincore")
            del anchor
        pages += count
        cached += sum(byte & 1 for byte in vector)
    return cached / pages


def drop(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def open_loader(images: Dataset, workers: int = 0) -> tuple[DataLoader, Order]:
    """A loader that has read the images of the warm-up, and the order of what it reads next."""
    options = {"multiprocessing_context": "fork", "persistent_workers": True} if workers else {}
    batches: Sampler[list[int]] = BatchSampler(order := Order(range(WARM_UP)), BATCH, drop_last=False)
    if isinstance(images, OurImages):
        batches = ReadAhead(batches, images.announce)
    loader = DataLoader(images, batch_sampler=batches, num_workers=workers, **options)
    for _ in loader:
        pass
    return loader, order


def total_of(loader: DataLoader, order: Order, rows: Sequence[int]) -> float:
    order.rows = rows
    return sum(float(features.sum(dtype=torch.float64)) for features, _ in loader)


def seconds_of(loader: DataLoader, order: Order, rows: Sequence[int]) -> float:
    order.rows = rows
    begin = time.perf_counter()
    batches = sum(1 for _ in loader)
    assert batches == len(loader)
    return time.perf_counter() - begin


def set_up(state: str, paths: Sequence[Path], cached: list[float]) -> None:
    """Makes the files warm or cold, and notes which share of their pages is cached."""
    (touch if state == "warm" else drop)(paths)
    cached.append(resident(paths))


def in_one_process(
    images: Callable[[], Dataset], rows: Sequence[int], prepare: Callable[[], None], workers: int = 0
) -> float:
    """Seconds; `prepare` is called between the warm-up and the clock."""
    dataset = images()
    loader, order = open_loader(dataset, workers)
    prepare()
    seconds = seconds_of(loader, order, rows)
    del loader  # and its workers
    dataset.close()
    return seconds


def in_two_processes(images: Callable[[], Dataset], rows: Sequence[int], prepare: Callable[[], None]) -> float:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)

    def read(rows: Sequence[int]) -> None:
        loader, order = open_loader(images())
        for _ in range(2):
            barrier.wait()
        seconds_of(loader, order, rows)
        barrier.wait()

    processes = [context.Process(target=read, args=(rows[part::2],), daemon=True) for part in range(2)]
    for process in processes:
        process.start()
    barrier.wait()
    prepare()
    barrier.wait()
    begin = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - begin
    for process in processes:
        process.join()
    return seconds


MEASURES: dict[str, Callable[..., float]] = {
    "1 process": in_one_process,
    "2 processes": in_two_processes,
    "2 workers, sending": functools.partial(in_one_process, workers=2),
}


def seconds_of_disk(store: RegionStore, image_ids: Sequence[str]) -> float:
    """The features of these images, one after another in disk order, around the page cache."""
    places = []
    for shard, row in (store.shards.find(number) for number in sorted(map(store.number_of, image_ids))):
        first, last = shard.region_offsets[row : row + 2].tolist()
        row_bytes = shard.features.strides[0]
        assert row_bytes % mmap.PAGESIZE == 0  # and so are the places, as O_DIRECT needs
        places.append((shard.path, DATA_START + first * row_bytes, (last - first) * row_bytes))
    handles = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in {path for path, _, _ in places}}
    buffer = memoryview(mmap.mmap(-1, max(size for _, _, size in places)))
    begin = time.perf_counter()
    for path, start, size in places:
        assert os.preadv(handles[path], [buffer[:size]], start) == size
    seconds = time.perf_counter() - begin
    for handle in handles.values():
        os.close(handle)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("store_vs_lmdb.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    temporary = Path(tempfile.mkdtemp())
    try:
        report = compare(temporary, arguments.images, arguments.rounds)
    finally:
        shutil.rmtree(temporary)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def compare(folder: Path, num_images: int, rounds: int) -> dict:
    ids, total = write(folder, num_images)
    store_files, lmdb_files = sorted((folder / "store").iterdir()), [folder / "lmdb" / "data.mdb"]
    systems: dict[str, tuple[Callable[[], Dataset], list[Path]]] = {
        "store": (lambda: OurImages(folder / "store", ids), store_files),
        "LMDB": (lambda: UniterImages(folder / "lmdb", ids, convert=True), lmdb_files),
        "LMDB, float16": (lambda: UniterImages(folder / "lmdb", ids, convert=False), lmdb_files),
    }
    rows = range(WARM_UP, num_images)
    for images, _ in systems.values():
        dataset = images()
        assert np.isclose(total_of(*open_loader(dataset), rows), total, rtol=1e-9)
        dataset.close()

    print(f"{len(rows)} records of 100 x 2048 float16 ({len(rows) // 8} cold), {rounds} rounds, medians")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} of them for this\n")
    print(
        f"{'records a second':26}"
        + "".join(f"{name:>15}" for name in systems)
        + f"{'ratio':>8}{'goal':>6}{'float16':>9}"
    )
    report: dict = {"images": num_images, "rounds": rounds, "load": os.getloadavg(), "results": {}}
    rng = np.random.default_rng(0)
    for state in ("warm", "cold"):
        for label in MEASURES:
            seconds: dict[str, list[float]] = {name: [] for name in systems}
            cached: dict[str, list[float]] = {name: [] for name in systems}
            count = len(rows) if state == "warm" else len(rows) // 8
            for round_ in range(rounds):
                order = rng.permutation(rows)[:count].tolist()
                for name in np.roll(list(systems), round_):
                    images, paths = systems[name]
                    prepare = functools.partial(set_up, state, paths, cached[name])
                    seconds[name].append(MEASURES[label](images, order, prepare))
            label = f"{state}, {label}"
            ratios = {
                name: [theirs / ours for ours, theirs in zip(seconds["store"], seconds[name], strict=True)]
                for name in systems
            }
            median = {name: statistics.median(values) for name, values in ratios.items()}
            report["results"][label] = {
                "ratio": median["LMDB"],
                "ratio_float16": median["LMDB, float16"],
                "ratios": ratios,
                "seconds": seconds,
                "cached_before": cached,
            }
            speeds = "".join(f"{count / statistics.median(values):15.0f}" for values in seconds.values())
            print(
                f"{label:26}{speeds}{median['LMDB']:8.2f}{GOALS[state]:6.0f}"
                f"{median['LMDB, float16']:9.2f}   cached {max(map(max, cached.values())):.0%}",
                flush=True,
            )
    disk = []
    for _ in range(rounds):
        drop(store_files)
        disk.append(seconds_of_disk(RegionStore(folder / "store"), rng.permutation(ids)[: len(rows) // 8].tolist()))
    report["disk_seconds"] = disk
    print(f"{'the disk itself':26}{len(rows) // 8 / statistics.median(disk):15.0f}")
    return report


if __name__ == "__main__":
    main()
