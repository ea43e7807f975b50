"""
The table of docs/performance.md: what scoring and training cost beside VisualBERT, and beside the machine's own peak.

    make bench                                            # the rows that this machine can measure, 10 to 15 minutes
    python benchmarks/table.py --rows scoring-float32 memory
    python benchmarks/table.py --rows blocks              # which takes minutes of its own

Each row first checks that both sides do the same work, then measures rounds in which they take turns; what counts is
the ratio within a round, as minimum, median and maximum. One core is pinned, but for rows that say otherwise. Run
nothing beside it. Results go to `bench.json` after every row, and the same command goes on with the rows that are
missing there; `--restart` measures anew. A row that needs what the machine lacks is named as open.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from work import (
    SIZES,
    VOCABULARY,
    Job,
    OnnxVisualBert,
    Training,
    TrainingJob,
    VisualBert,
    gemm_peak,
    in_turn,
    machine,
    our_scorer,
    record,
    spread,
    training_flops,
)

from unicoder_vl_hf import RegionStore, RegionStoreWriter
from unicoder_vl_hf.files import write_json
from unicoder_vl_hf.scoring.packed import pair_flops

ROOT = Path(__file__).parents[1]
Measured = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large a row's job is. A miniature only shows that rows run."""

    size: str = "base"
    rounds: int = 3
    captions: int = 1000  # of the job whose batches are sampled
    images: int = 200
    batches: int = 2  # of the rival, in a round
    batch_size: int = 32
    rows: int = 12  # of a training step
    memory_rows: int = 64
    memory_layers: int = 4
    tokens: int = 4096
    peak_seconds: float = 1.0
    store_images: int = 300
    grid: tuple[int, int] = (25_000, 5_000)


MINIATURE = Scale(
    "tiny", rounds=1, captions=20, images=6, batches=1, batch_size=4, rows=4, memory_rows=6, memory_layers=2,
    tokens=300, peak_seconds=0.02, store_images=12, grid=(300, 60),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """
    A row of the table.

    Args:
        what: The work and the rival, in words.
        run: Measures it.
        goals: For each of its figures the goal, and whether more is better.
        needs: What the CPU or the installation must have.
    """

    what: str
    run: Callable[[Scale], Measured]
    goals: dict[str, tuple[float, bool]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


ROWS: dict[str, Row] = {}


def row(name: str, what: str, *needs: str, **goals: float) -> Callable[[Callable[[Scale], Measured]], Any]:
    """Registers a row. A goal is a least figure; with a minus before it, a most."""

    def registered(run: Callable[[Scale], Measured]) -> Callable[[Scale], Measured]:
        bounds = {figure.replace("_", " "): (abs(goal), goal > 0) for figure, goal in goals.items()}
        ROWS[name] = Row(what, run, bounds, needs)
        return run

    return registered


def has(need: str) -> bool:
    """Whether the CPU has a capability, or Python a module."""
    if need in ("amx_bf16", "avx512_bf16"):
        return bool(torch.cpu.get_capabilities().get(need))
    return importlib.util.find_spec(need) is not None


@cache
def peak(dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of the machine's matrix product on the pinned core."""
    return gemm_peak(dtype, seconds=seconds)


def expect(condition: bool, what: str) -> None:
    """Ends a row whose sides do not do the same work."""
    if not condition:
        raise RuntimeError(f"The sides do not do the same work: {what}.")


def compared(real: int, padded: int) -> str:
    """What both sides had before them, and what the rival adds."""
    return f"{real:,} tokens and regions on both sides; padded, the rival computes {padded / real:.3f} times them"


# Scoring


def samples(peer: VisualBert, ordered: list[tuple[int, int]], scale: Scale) -> Iterator[list[tuple[int, int]]]:
    """For each round some of the rival's whole batches, evenly spaced over all of them."""
    batches = peer.batches(ordered)
    places = (np.arange(scale.rounds * scale.batches) + 0.5) / (scale.rounds * scale.batches) * len(batches)
    order = np.random.default_rng(0).permutation(places.astype(int)).reshape(scale.rounds, scale.batches)
    for chosen in order.tolist():
        yield [pair for number in chosen for pair in batches[number]]


def scoring(scale: Scale, dtype: torch.dtype) -> Measured:
    job = Job(scale.captions, scale.images)
    scorer, peer = our_scorer(dtype, scale.size), VisualBert(job, dtype, scale.batch_size, scale.size)
    pairs = job.pairs()
    figures: dict[str, list[float]] = {}
    checked, rate = {}, []
    with torch.inference_mode():
        scorer.score(job.captions[:1], job.records[:1])  # makes the encoder, once in a job
        for name, ordered in (("sorted", peer.sorted(pairs)), ("unsorted", pairs)):
            real = padded = 0
            for chosen in samples(peer, ordered, scale):
                captions, images = np.array(chosen).T
                results: dict[str, np.ndarray] = {}

                def ours(captions=captions, images=images, results=results):
                    results["ours"] = scorer.score_pairs(job.captions, job.records, captions, images)

                def rival(chosen=chosen, results=results):
                    results["rival"] = peer.score(chosen)

                if dtype == torch.bfloat16:  # kernels are made for each shape, and those of a whole job come again
                    in_turn({"ours": ours, "rival": rival})
                seconds = in_turn({"ours": ours, "rival": rival})
                for side, scores in results.items():
                    expect(scores.shape == (len(chosen),) and bool(np.isfinite(scores).all()), f"{side} of {name}")
                real += sum(map(peer.length, chosen))
                padded += peer.padded_length(chosen)
                figures.setdefault(name, []).append(seconds["rival"] / seconds["ours"])
                flops = pair_flops(scorer.model.config, np.array([peer.length(pair) for pair in chosen])).sum()
                figures.setdefault("share of peak", []).append(
                    flops / seconds["ours"] / peak(dtype, scale.peak_seconds)
                )
                rate.append(len(chosen) / seconds["ours"])
            checked[name] = (
                f"{real:,} tokens and regions on both sides; the rival computes {padded / real:.3f} times them"
            )
    return {
        "job": f"{len(rate) * scale.batches * scale.batch_size} pairs in whole batches of {scale.batch_size}, sampled "
        f"from {scale.images} images x {scale.captions:,} captions, size {scale.size}",
        "figures": {name: spread(values) for name, values in figures.items()},
        "checked": checked,
        "rate": spread(rate),  # pairs a second
    }


@row(
    "scoring-float32", "scoring N x M, float32: VisualBERT's time over ours", sorted=2.6, unsorted=5.0,
    share_of_peak=0.82,
)  # fmt: skip
def scoring_float32(scale: Scale) -> Measured:
    return scoring(scale, torch.float32)


@row(
    "scoring-bfloat16", "scoring N x M, bf16 on AMX: VisualBERT's time over ours", "amx_bf16", sorted=1.5, unsorted=2.7
)
def scoring_bfloat16(scale: Scale) -> Measured:
    return scoring(scale, torch.bfloat16)


@contextlib.contextmanager
def stored(job: Job) -> Iterator[RegionStore]:
    """Holds the images of a job in a store, in float16."""
    with tempfile.TemporaryDirectory() as folder:
        with RegionStoreWriter(folder, dtype="float16") as writer:
            for one in job.records:
                writer.write(one)
        yield RegionStore(folder)


def search(scale: Scale, dtype: torch.dtype) -> Measured:
    """One caption with 100 photos, from strings and a store, model loaded: over its products at the measured peak."""
    job = Job(1, min(100, scale.images))
    scorer = our_scorer(dtype, scale.size)
    ratios, all_seconds = [], []
    with stored(job) as store:
        scorer.store, ids = store, list(store)
        for number in range(scale.rounds + 1):
            scores: list[np.ndarray] = []
            seconds = in_turn({"": lambda scores=scores: scores.append(scorer.score(job.captions, ids))})[""]
            expect(scores[0].shape == (1, len(ids)), "a score for each photo")
            words = len(scorer.processor(text=job.captions)["input_ids"][0])
            lengths = words + store.region_counts(ids)
            flops = pair_flops(scorer.model.config, lengths).sum()
            flops += 2 * store.num_regions * 2048 * scorer.model.config.hidden_size
            if number:  # the first finds nothing ready
                ratios.append(seconds / (flops / peak(dtype, scale.peak_seconds)))
                all_seconds.append(seconds)
    return {
        "job": f"1 caption x {len(ids)} photos, size {scale.size}",
        "figures": {"over its products": spread(ratios), "seconds": spread(all_seconds)},
    }


@row("search-float32", "one caption x 100 photos, float32, over its products at the peak", over_its_products=-1.3)
def search_float32(scale: Scale) -> Measured:
    return search(scale, torch.float32)


@row(
    "search-bfloat16", "the same in bf16 on two cores with AMX", "amx_bf16", over_its_products=-1.3, seconds=-1.0
)  # fmt: skip
def search_bfloat16(scale: Scale) -> Measured:
    with on_cores(ALL_CORES[:2]):
        torch.set_num_threads(2)
        peak.cache_clear()
        try:
            return search(scale, torch.bfloat16)
        finally:
            torch.set_num_threads(1)
            peak.cache_clear()


@row(
    "search-onnx", "the same: time of VisualBERT exported to ONNX, its inputs ready, over ours", "onnxruntime",
    "onnxscript", sorted=1.1, padded=1.4,
)  # fmt: skip
def search_onnx(scale: Scale) -> Measured:
    """The rival takes the photos sorted, in batches, and all in one batch."""
    job, scorer = Job(1, min(100, scale.images)), our_scorer(torch.float32, scale.size)
    figures: dict[str, list[float]] = {"sorted": [], "padded": []}
    with stored(job) as store, tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        scorer.store, ids = store, list(store)
        peer = OnnxVisualBert(job, scale.batch_size, scale.size, folder)
        pairs = peer.sorted(job.pairs())
        inputs = peer.inputs(pairs[-3:])
        exported, wanted = peer.pooled(inputs), VisualBert.pooled(peer, inputs)
        expect(torch.allclose(exported, wanted, atol=1e-4), "the export gives other states")
        for number in range(scale.rounds + 1):
            for name, size in (("sorted", scale.batch_size), ("padded", len(pairs))):
                peer.batch_size, results = size, {}

                def ours(results=results):
                    results["ours"] = scorer.score(job.captions, ids)[0]

                def rival(results=results):
                    results["rival"] = peer.score(pairs)

                seconds = in_turn({"ours": ours, "rival": rival})
                for side, scores in results.items():
                    expect(scores.shape == (len(ids),) and bool(np.isfinite(scores).all()), f"{side} of {name}")
                if number:  # the first finds nothing ready
                    figures[name].append(seconds["rival"] / seconds["ours"])
    return {
        "job": f"1 caption x {len(ids)} photos, size {scale.size}; the rival sorted in batches of {scale.batch_size}, "
        "and all in one",
        "figures": {name: spread(values) for name, values in figures.items()},
    }


# Training


def training(scale: Scale, dtype: torch.dtype) -> Measured:
    job = TrainingJob(64 * scale.rows)
    ours, rival = Training(True, scale.size, dtype), Training(False, scale.size, dtype)
    orders = {"random": list(range(len(job.words))), "sorted": job.sorted_rows()}
    figures: dict[str, list[float]] = {}
    checked, rate = {}, []
    warm = job.batch(orders["random"][:2])
    ours.step(warm), rival.step(job.of_rival(warm))
    for name, order in orders.items():
        real = padded = 0
        for number in range(scale.rounds):
            first = int((number + 0.5) / scale.rounds * 64) * scale.rows
            rows = order[first : first + scale.rows]
            batch = job.batch(rows)
            same = job.of_rival(batch)
            masks = [batch["attention_mask"], batch["region_attention_mask"]]
            attended = [same["attention_mask"], same["visual_attention_mask"]]
            tokens = sum(int(mask.sum()) for mask in masks)
            expect(tokens == sum(int(mask.sum()) for mask in attended) == job.lengths(rows).sum(), "tokens")
            expect(int((same["labels"] >= 0).sum()) == int((batch["labels"] >= 0).sum()) > 0, "targets")
            real, padded = real + tokens, padded + sum(mask.numel() for mask in masks)
            seconds = in_turn({
                "ours": lambda batch=batch: ours.step(batch), "rival": lambda same=same: rival.step(same)
            })  # fmt: skip
            figures.setdefault(name, []).append(seconds["rival"] / seconds["ours"])
            rate.append(len(rows) / seconds["ours"])
        checked[name] = compared(real, padded)
    return {
        "job": f"steps of {scale.rows} rows, forward, backward, clipping and AdamW, size {scale.size}; ours predicts "
        "object classes, too",
        "figures": {name: spread(values) for name, values in figures.items()},
        "checked": checked,
        "rate": spread(rate),  # rows a second
    }


@row("training-float32", "training step, float32: VisualBertForPreTraining's time over ours", random=3.5, sorted=1.7)
def training_float32(scale: Scale) -> Measured:
    return training(scale, torch.float32)


@row("training-bfloat16", "the same in bf16", "avx512_bf16", random=3.5, sorted=1.7)
def training_bfloat16(scale: Scale) -> Measured:
    return training(scale, torch.bfloat16)


@row("minilm-bfloat16", "MiniLM, 12 regions, on AMX: our float32's time over our bf16's", "amx_bf16", ratio=2.0)
def minilm(scale: Scale) -> Measured:
    job, size = TrainingJob(64), "tiny" if scale.size == "tiny" else "minilm"
    job.regions = np.full_like(job.regions, 12)
    precise, fast = Training(True, size, torch.float32), Training(True, size, torch.bfloat16)
    batch = job.batch(range(64))
    ratios = []
    for number in range(scale.rounds + 1):
        seconds = in_turn({"float32": lambda: precise.step(batch), "bf16": lambda: fast.step(batch)})
        if number:
            ratios.append(seconds["float32"] / seconds["bf16"])
    return {"job": f"steps of 64 rows of 12 regions, size {size}", "figures": {"ratio": spread(ratios)}}


def share(scale: Scale, dtype: torch.dtype) -> Measured:
    """Forward and backward of about 4,096 tokens, without the optimiser."""
    job = TrainingJob(2 + scale.tokens // 57)
    model, rows = Training(True, scale.size, dtype), range(len(job.words))
    batch = job.batch(rows)
    targets = int((batch["labels"] >= 0).sum())
    flops = training_flops(scale.size, job.words, job.regions, targets)
    model.forward_backward(job.batch(rows[:2]))
    shares = []
    for _ in range(scale.rounds):
        seconds = in_turn({"": lambda: model.forward_backward(batch)})[""]
        model.optimizer.zero_grad()
        shares.append(flops / seconds / peak(dtype, scale.peak_seconds))
    return {
        "job": f"{int(job.lengths(rows).sum()):,} tokens and regions in {len(rows)} rows, size {scale.size}",
        "figures": {"training": spread(shares)},
    }


@row("share-float32", "share of the peak: training, forward and backward, float32", training=0.5)
def share_float32(scale: Scale) -> Measured:
    return share(scale, torch.float32)


@row("share-bfloat16", "the same in bf16", "avx512_bf16", training=0.5)
def share_bfloat16(scale: Scale) -> Measured:
    return share(scale, torch.bfloat16)


@row("cold-store", "pre-training from a cold store, 2 workers: its speed over that from memory", speed=0.95)
def cold_store(scale: Scale) -> Measured:
    from datasets import Dataset

    from unicoder_vl_hf.data import PairsWithMismatches, StepBatchSampler
    from unicoder_vl_hf.tasks.pretraining import DataCollatorForUnicoderVLPreTraining, PretrainingSetup

    rng, job = np.random.default_rng(0), Job(scale.store_images, scale.store_images)
    memory = {one.image_id: dataclasses.replace(one, features=one.features.astype(np.float16)) for one in job.records}
    pairs = Dataset.from_dict({"image_id": rng.permutation(list(memory)), "caption": job.captions})
    trained = Training(True, "tiny" if scale.size == "tiny" else "minilm", torch.float32, vocab_size=len(VOCABULARY))
    processor = our_scorer(torch.float32, "tiny").processor

    def epoch(store: Any) -> None:
        collator = DataCollatorForUnicoderVLPreTraining(processor, store, moc_probability=0.0)
        train = PairsWithMismatches(pairs, seed=0)
        setup = PretrainingSetup(trained.model, processor, collator, train, validation=None, data_name="")
        sampler = StepBatchSampler(len(pairs), rows_per_step=16, seed=0)
        for batch, _ in setup.train_batches(sampler, torch.device("cpu"), num_workers=2):
            trained.step(batch)

    ratios = []
    with tempfile.TemporaryDirectory(dir=ROOT) as folder, on_cores(ALL_CORES):
        with RegionStoreWriter(folder) as writer:
            for one in memory.values():
                writer.write(one)
        for number in range(scale.rounds + 1):
            for file in Path(folder).glob("*.safetensors"):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seconds = in_turn({"cold": lambda: epoch(RegionStore(folder)), "memory": lambda: epoch(memory)})
            if number:
                ratios.append(seconds["memory"] / seconds["cold"])
    return {
        "job": f"an epoch over {len(memory)} images, whose pages the kernel was told to drop; workers on all cores",
        "figures": {"speed": spread(ratios)},
    }


@row("demo", "`make demo` on 2 cores with AVX2 alone, in minutes", minutes=-4.0)
def demo(scale: Scale) -> Measured:
    """Newer instructions are switched off in PyTorch, oneDNN and MKL."""
    if scale.size == "tiny":
        return {"job": "none in a miniature", "figures": {"minutes": spread([0.0])}}
    avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | avx2
    with tempfile.TemporaryDirectory() as folder, on_cores(ALL_CORES[:2]):
        command = [sys.executable, str(ROOT / "examples" / "run_demo.py"), "--output_dir", f"{folder}/demo"]
        command += ["--mixed_precision", "no"]  # a CPU with AVX2 alone has no bfloat16
        seconds = in_turn(
            {"": lambda: subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)}
        )[""]
    return {"job": "drawing, training, evaluation, pictures", "figures": {"minutes": spread([seconds / 60])}}


# Memory, and several processes: each in processes of its own


def worker(name: str, scale: Scale, processes: int = 1) -> dict[str, float]:
    """What `--worker name` prints, of the first process."""
    command = [sys.executable, __file__, "--worker", name, "--scale", json.dumps(dataclasses.asdict(scale))]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def megabytes() -> float:
    """The most memory that this process has held. `ru_maxrss` would begin with that of the process that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 1024


@row("memory", "peak memory of a training step and of scoring: VisualBERT's over ours")
def memory(scale: Scale) -> Measured:
    peaks = {
        work: {side: worker(f"{work}-{side}", scale)["megabytes"] for side in ("ours", "rival")}
        for work in ("step", "scoring")
    }
    return {
        "job": f"a step of {scale.memory_rows} random rows with AdamW, float32, {scale.memory_layers} layers; scoring "
        f"{scale.memory_rows} pairs in batches of {scale.batch_size}; size {scale.size}; each in a process of its own",
        "figures": {work: spread([of["rival"] / of["ours"]]) for work, of in peaks.items()},
        "megabytes": peaks,
    }


def step_once(scale: Scale, ours: bool) -> None:
    job = TrainingJob(scale.memory_rows)
    model = Training(ours, scale.size, torch.float32, num_hidden_layers=scale.memory_layers)
    batch = job.batch(range(scale.memory_rows))
    model.step(batch if ours else job.of_rival(batch))


def score_once(scale: Scale, ours: bool) -> None:
    job = Job(scale.memory_rows // 4, 4)
    with torch.inference_mode():
        if ours:
            our_scorer(torch.float32, scale.size).score(job.captions, job.records)
        else:
            peer = VisualBert(job, torch.float32, scale.batch_size, scale.size)
            peer.score(peer.sorted(job.pairs()))


@row("blocks", "peak memory of 5,000 photos x 25,000 captions, held to blocks: over that of a hundredth")
def blocks(scale: Scale) -> Measured:
    """A model of one layer, captions of one word and photos of one region: the number of pairs is what counts."""
    found = {name: worker(f"grid-{name}", scale) for name in ("small", "whole")}
    return {
        "job": f"{scale.grid[0]:,} captions x {scale.grid[1]:,} photos, a model of one layer and hidden size 8, scores "
        "into a folder",
        "figures": {"memory": spread([found["whole"]["megabytes"] / found["small"]["megabytes"]])},
        "megabytes": {name: of["megabytes"] for name, of in found.items()},
        "seconds": {name: of["seconds"] for name, of in found.items()},
    }


def grid(num_captions: int, num_images: int) -> None:
    SIZES["dot"] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    rng = np.random.default_rng(0)
    scorer = our_scorer(torch.float32, "dot")
    scorer.max_tokens, scorer.block_pairs = 2**16, 2**16
    with tempfile.TemporaryDirectory() as folder:
        with RegionStoreWriter(f"{folder}/store") as writer:
            for number in range(num_images):
                writer.write(record(str(number), 1, rng))
        scorer.store = RegionStore(f"{folder}/store")
        scores = scorer.score(
            rng.choice(VOCABULARY[5:], num_captions).tolist(), list(scorer.store), output_dir=f"{folder}/scores"
        )
        expect(scores.shape == (num_captions, num_images), "a score for each pair")


@row("processes", "2 processes, a core each: the time of one over theirs, for twice the pairs", scoring=0.9)
def processes(scale: Scale) -> Measured:
    if len(ALL_CORES) < 2:
        raise RuntimeError("There is one core alone.")
    with on_cores(ALL_CORES[:2]):
        seconds = [[worker("shared", scale, count)["seconds"] for count in (1, 2)] for _ in range(scale.rounds)]
    return {
        "job": f"{scale.memory_rows} pairs a process, from the start of scoring to all scores, size {scale.size}",
        "figures": {"scoring": spread([one / two for one, two in seconds])},
        "seconds": seconds,
    }


def shared(scale: Scale) -> float:
    """Seconds of a job that grows with the processes; each has one core."""
    state = PartialState(cpu=True)
    os.sched_setaffinity(0, [ALL_CORES[state.local_process_index]])
    job, scorer = Job(scale.memory_rows // 4 * state.num_processes, 4), our_scorer(torch.float32, scale.size)
    scorer.block_pairs = scale.memory_rows // 2
    scorer.score(job.captions[:1], job.records)  # finds everything ready
    state.wait_for_everyone()
    return in_turn({"": lambda: scorer.score(job.captions, job.records)})[""]


def work_alone(name: str, scale: Scale) -> dict[str, float]:
    started = time.perf_counter()
    seconds = None
    match name.split("-"):
        case ["step", side]:
            step_once(scale, side == "ours")
        case ["scoring", side]:
            score_once(scale, side == "ours")
        case ["grid", part]:
            grid(*(count if part == "whole" else count // 10 for count in scale.grid))
        case ["shared"]:
            seconds = shared(scale)
    return {"megabytes": round(megabytes(), 1), "seconds": seconds or time.perf_counter() - started}


# The table

ALL_CORES = sorted(os.sched_getaffinity(0))


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Runs a block, and the processes that it starts, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(names: Sequence[str], output: Path, scale: Scale, restart: bool) -> dict[str, Any]:
    """Measures the rows that `output` lacks, and writes it after each."""
    before = json.loads(output.read_text()) if output.exists() and not restart else {}
    told = machine()
    if before and (before["machine"], before["scale"]) != (told, json.loads(json.dumps(dataclasses.asdict(scale)))):
        raise ValueError(f"{output} is of another machine, version or scale: give another --output, or --restart.")
    result: dict[str, Any] = before or {"machine": told, "scale": dataclasses.asdict(scale), "rows": {}}
    for name in names:
        missing = [need for need in ROWS[name].needs if not has(need)]
        if name in result["rows"] or missing:
            continue
        print(f"{name}: {ROWS[name].what} …", flush=True)
        started, load = time.perf_counter(), os.getloadavg()[0]
        with on_cores(ALL_CORES[-1:]):
            found = ROWS[name].run(scale)
        result["rows"][name] = found | {"took": round(time.perf_counter() - started, 1), "load": round(load, 1)}
        for dtype in (torch.float32, torch.bfloat16):
            if name.endswith(f"-{str(dtype)[6:]}"):
                result.setdefault("peak", {})[str(dtype)[6:]] = peak(dtype, scale.peak_seconds)
                rates = result.setdefault("rates", {}).setdefault(str(dtype)[6:], {})
                rates |= {name.split("-")[0]: found["rate"]["median"]} if "rate" in found else {}
        write_json(output, result)
    return result


def report(names: Sequence[str], result: dict[str, Any]) -> str:
    """The table in Markdown, and what is open."""
    lines = ["| row | figure | goal | min | median | max | |", "|---|---|---|---|---|---|---|"]
    opened = []
    for name in names:
        row = ROWS[name]
        if missing := [need for need in row.needs if not has(need)]:
            opened.append(f"{name} ({row.what}): needs {', '.join(missing)}. python benchmarks/table.py --rows {name}")
        for figure, found in result["rows"].get(name, {}).get("figures", {}).items():
            goal, more = row.goals.get(figure, (math.nan, True))
            reached = found["median"] >= goal if more else found["median"] <= goal
            verdict = "" if math.isnan(goal) else "reached" if reached else "not reached"
            told = "" if math.isnan(goal) else f"{'at least' if more else 'at most'} {goal:g}"
            values = " | ".join(f"{found[key]:.3g}" for key in ("min", "median", "max"))
            lines.append(f"| {name} | {figure} | {told} | {values} | {verdict} |")
    peaks = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in result.get("peak", {}).items())
    about = f"{result['machine']['cpu']}, {', '.join(result['machine']['features'])}; peak of a core: {peaks or '?'}"
    return "\n".join([about, "", *lines, *([""] if opened else []), *(f"Open: {line}" for line in opened)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in ROWS if name != "blocks"]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=usual, metavar="ROW", help=f"{', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="file (default: bench.json)")
    parser.add_argument("--restart", action="store_true", help="measure anew what the file holds")
    parser.add_argument("--miniature", action="store_true", help="tiny models and jobs, to see that all rows run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.worker is not None:
        print(json.dumps(work_alone(args.worker, Scale(**args.scale))), flush=True)
        return
    result = measure(args.rows, args.output, MINIATURE if args.miniature else Scale(), args.restart)
    print("\n" + report(args.rows, result))


if __name__ == "__main__":
    main()
