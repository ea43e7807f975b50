"""
What a machine with a GPU shows: tests, speed, memory and the largest batch, written to `gpu.json`.

    make gpu-check                                                      # a GPU, under 7 minutes
    PYTHONPATH=src python3 benchmarks/gpu_check.py --device cpu --tiny  # a miniature of it, on any machine

It runs from the checkout with whatever `python3` holds, and needs neither network nor `.venv`, `datasets` or
`evaluate`; inputs are made here. Each stage is written as it ends, and the same command goes on with those that are
missing; `--restart` measures anew. A way of computing attention that is not installed or does not run is named with its
reason.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from work import (
    SIZES,
    Job,
    Training,
    TrainingJob,
    VisualBert,
    gemm_peak,
    in_turn,
    machine,
    our_scorer,
    spread,
    synchronize,
    training_flops,
    without_plans_for_shapes,
)

from unicoder_vl_hf.files import write_json
from unicoder_vl_hf.scoring.packed import pair_flops

ROOT = Path(__file__).parents[1]
Measured = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """Where and how much is measured."""

    device: str = "cuda"
    size: str = "base"
    images: int = 100
    captions: int = 200
    batch_size: int = 256  # of the rival's scoring
    rows: int = 256  # of a training step
    rounds: int = 5
    most_rows: int = 4096  # of the largest batch that is tried
    patience: int = 45  # seconds for one way of computing, whose kernels may have to be compiled
    patience_with_tests: int = 180  # seconds
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


TINY = Check(
    "cpu", "tiny", images=3, captions=4, batch_size=4, rows=6, rounds=1, most_rows=16, dtypes=(torch.bfloat16,)
)  # fmt: skip


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def peak_memory(device: str, run: Callable[[], object]) -> int | None:
    """The most bytes of the GPU's memory that a call holds; None on a CPU."""
    if device != "cuda":
        run()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated()


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError within a block that takes longer, so that one way of computing does not use up the time."""

    def over(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak(check: Check, result: Measured) -> Measured:
    """FLOP/s of a large matrix product in each dtype, float32 without TF32."""
    seconds = 0.5 if check.device == "cuda" else 0.02
    return {named(dtype): gemm_peak(dtype, check.device, seconds) for dtype in (torch.float32, *check.dtypes)}


def tests(check: Check, result: Measured) -> Measured:
    """The tests marked `gpu`, and what of them failed or was skipped, and why."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # Without addopts, among which an older pytest would take unknown settings for errors.
        options = ["-v", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu", f"--junitxml={report}"]
        paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"UNICODER_VL_DEVICE": check.device, "PYTHONPATH": paths}
        command = [sys.executable, "-m", "pytest", *options, "tests/test_gpu.py"]
        said = Path(folder, "said.txt")
        with said.open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=ROOT, env=environment, stdout=output, timeout=check.patience_with_tests)
        if not report.exists():  # they could not begin, or one of them hangs
            text = said.read_text()
            return {"failed": {"pytest": text[-2000:]}, "passed": text.count(" PASSED"), "skipped": {}}
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    found: Measured = {"passed": 0, "skipped": {}, "failed": {}}
    for case in cases:
        for kind, tags in (("skipped", ["skipped"]), ("failed", ["failure", "error"])):
            for told in (child for tag in tags for child in case.findall(tag)):
                last = (told.text or "").strip().rpartition("\n")[2]  # of a module that could not be imported, say
                found[kind][case.get("name")] = f"{told.get('message') or ''} {last}".strip()[:400]
    found["passed"] = len(cases) - len(found["skipped"]) - len(found["failed"])
    return found


# Attention alone


def attention(check: Check, result: Measured) -> Measured:
    """
    Seconds of attention forward and backward, of one layer and the rows of a training step in random order, and of the
    first time; and the largest difference from padded SDPA. None needs a wheel beside PyTorch's but `flash-attn`.
    """
    heads = SIZES[check.size]["num_attention_heads"]
    width = SIZES[check.size]["hidden_size"] // heads
    job = TrainingJob(check.rows)
    lengths = (job.words + job.regions).tolist()
    dtype = check.dtypes[0]
    shape = (3, sum(lengths), heads, width)
    states = torch.randn(shape, device=check.device, dtype=dtype).requires_grad_()
    ways = {
        "padded": padded_attention,
        "grouped": grouped_attention,
        "grouped, cuDNN": grouped_attention_of_cudnn,
        "nested": nested_attention,
        "varlen of PyTorch": varlen_attention,
        "flex": flex_attention,
        "flash-attn": flash_attention,
    }
    wanted = padded_attention(states.detach(), lengths).float()
    found: Measured = {}
    for name, way in ways.items():
        try:

            def run(way=way) -> None:
                way(states, lengths).float().square().sum().backward()

            with limited(check.patience):
                first, *seconds = [in_turn({"": run}, check.device)[""] for _ in range(1 + 2 * check.rounds)]
                with torch.no_grad():
                    difference = float((way(states.detach(), lengths).float() - wanted).abs().max())
                bytes_held = peak_memory(check.device, run)
            found[name] = {"seconds": spread(seconds), "first": first, "difference": difference, "bytes": bytes_held}
        except Exception as error:
            found[name] = {"does not run": reason(error)}
    return found


def by_sequence(states: torch.Tensor, lengths: Sequence[int]) -> Iterable[torch.Tensor]:
    return states.split(list(lengths), dim=1)


def padded_attention(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Pads, attends under a mask, and takes the padding out again, as a model with padding does once for all layers."""
    pad = torch.nn.utils.rnn.pad_sequence
    query, key, value = (
        pad([part[which] for part in by_sequence(states, lengths)], batch_first=True).transpose(1, 2)
        for which in range(3)
    )
    mask = torch.arange(max(lengths), device=states.device) < torch.tensor(lengths, device=states.device)[:, None]
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    return output.transpose(1, 2)[mask]


def grouped_attention(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Once for each group of equal length, as our packed path does; the rows are brought into that order before."""
    parts: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        parts.setdefault(length, []).append(number)
    sequences = by_sequence(states, lengths)
    outputs: list[Any] = [None] * len(lengths)
    for numbers in parts.values():
        query, key, value = torch.stack([sequences[number] for number in numbers], dim=1).transpose(2, 3)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        for number, one in zip(numbers, output, strict=True):
            outputs[number] = one
    return torch.cat(outputs)


def grouped_attention_of_cudnn(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """By cuDNN, which PyTorch may choose by itself on Hopper: what do its plans cost the first time?"""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(first, set_priority=True):
        return grouped_attention(states, lengths)


def borders(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def nested_attention(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Jagged nested tensors, for which SDPA takes FlashAttention's kernel within PyTorch."""
    offsets = borders(lengths, states.device)
    options = {"min_seqlen": min(lengths), "max_seqlen": max(lengths)}
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(part, offsets, **options).transpose(1, 2) for part in states
    )
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return output.transpose(1, 2).values()


def varlen_attention(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = borders(lengths, states.device).int()
    output = varlen_attn(*states, ends, ends, max(lengths), max(lengths))
    return output[0] if isinstance(output, tuple) else output


def flex_attention(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask = block_mask(tuple(lengths), str(states.device))
    query, key, value = (part.transpose(0, 1)[None] for part in states)
    return torch.compile(flex, dynamic=True)(query, key, value, block_mask=mask)[0].transpose(0, 1)


@cache
def block_mask(lengths: tuple[int, ...], device: str) -> Any:
    """The mask of flex attention, which a model makes once for all of its layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = torch.arange(sum(lengths), device=device)
    sequence = torch.searchsorted(borders(lengths, tokens.device), tokens, right=True)

    def same(batch, head, query, key):
        return sequence[query] == sequence[key]

    return create_block_mask(same, None, None, len(tokens), len(tokens), device=device)


def flash_attention(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    ends = borders(lengths, states.device).int()
    return flash_attn_varlen_func(*states, ends, ends, max(lengths), max(lengths))


# Scoring and training


def scoring(check: Check, result: Measured) -> Measured:
    """All pairs of captions and images, beside VisualBERT sorted and unsorted."""
    job = Job(check.captions, check.images)
    pairs, found = job.pairs(), {}
    for dtype in check.dtypes:
        scorer = our_scorer(dtype, check.size, check.device)
        peer = VisualBert(job, dtype, check.batch_size, check.size, check.device)
        by_length = peer.sorted(pairs)
        lengths = torch.tensor([peer.length(pair) for pair in pairs]).numpy()
        orders = {"sorted": by_length, "unsorted": pairs}
        systems = {"ours": partial(scorer.score, job.captions, job.records)}
        systems |= {name: partial(peer.score, of) for name, of in orders.items()}
        with torch.inference_mode():
            memory = {name: peak_memory(check.device, run) for name, run in systems.items()}
            # A GPU computes a batch in the time in which Python pads one: in the rounds they lie ready, padded.
            for name, of in orders.items():
                systems[name] = partial(peer.score_padded, [peer.inputs(batch) for batch in peer.batches(of)])
            for name, run in systems.items():  # warms up
                scores = run()
                if scores.size != len(pairs) or not torch.tensor(scores).isfinite().all():
                    raise RuntimeError(f"{name} gives {scores.shape}, expected {len(pairs)} finite scores.")
            rounds = [in_turn(systems, check.device) for _ in range(check.rounds)]
        ours = statistics.median(seconds["ours"] for seconds in rounds)
        rate = pair_flops(scorer.model.config, lengths).sum() / ours
        found[named(dtype)] = {
            "job": f"{check.captions} captions x {check.images} images, size {check.size}",
            "ratios": {name: spread(one[name] / one["ours"] for one in rounds) for name in orders},
            "padding": {name: peer.padded_length(of) / lengths.sum() for name, of in orders.items()},
            "pairs_per_second": len(pairs) / ours,
            "tokens_per_second": float(lengths.sum()) / ours,
            "share_of_peak": rate / result["peak"][named(dtype)],
            "bytes": memory,
        }  # fmt: skip
        result.setdefault("rates", {}).setdefault(named(dtype), {})["scoring"] = len(pairs) / ours
    return found


# Names of ways to train: attention, and whether padding is left out; None is VisualBERT.
WAYS_OF_TRAINING: dict[str, tuple[str, bool] | None] = {
    "VisualBertForPreTraining": None,
    "padded, SDPA": ("sdpa", False),
    "packed, SDPA in groups": ("sdpa", True),
    "packed, flash-attn": ("flash_attention_2", True),
    "packed, flex": ("flex_attention", True),
}


def training_of(check: Check, dtype: torch.dtype, way: tuple[str, bool] | None) -> Training:
    # Of attention's weights no dropout: flex, of transformers, has none.
    trained = Training(way is not None, check.size, dtype, check.device, attention_probs_dropout_prob=0.0)
    if way is not None:
        attention, packs = way
        trained.model.set_attn_implementation(attention)
        trained.model.bert.packs = lambda **_: packs  # which by itself asks for FlashAttention on a GPU
    return trained


def training(check: Check, result: Measured) -> Measured:
    """Steps of the same rows in random order and sorted by length, in every way, beside VisualBertForPreTraining."""
    job = TrainingJob(4 * check.rows)
    orders = {"random": list(range(len(job.words))), "sorted": job.sorted_rows()}
    found: Measured = {}
    batches = {
        name: [job.batch(order[at : at + check.rows], check.device) for at in (0, check.rows, 2 * check.rows)]
        for name, order in orders.items()
    }
    for dtype in check.dtypes:
        of_dtype: Measured = {}
        for way, options in WAYS_OF_TRAINING.items():
            try:
                with limited(check.patience):
                    trained = training_of(check, dtype, options)
                    of_dtype[way] = {
                        name: steps_of(check, trained, ready, options is None, result["peak"][named(dtype)])
                        for name, ready in batches.items()
                    }
            except Exception as error:
                of_dtype[way] = {"does not run": reason(error)}
        rival = of_dtype["VisualBertForPreTraining"]
        for measured in of_dtype.values():
            for name in orders:
                if name in measured and name in rival:
                    measured[name]["ratio"] = measured[name]["rows_per_second"] / rival[name]["rows_per_second"]
        found[named(dtype)] = of_dtype
        ours = [
            of_dtype[way]["random"]["rows_per_second"]
            for way, options in WAYS_OF_TRAINING.items()
            if options is not None and "random" in of_dtype[way]
        ]
        result.setdefault("rates", {}).setdefault(named(dtype), {})["training"] = max(ours, default=None)
    return found


def steps_of(check: Check, trained: Training, batches: Sequence[Any], rival: bool, peak: float) -> Measured:
    """Rows and tokens a second over these batches, in turn, the share of the peak, and the most memory."""
    inputs = [TrainingJob.of_rival(batch) if rival else batch for batch in batches]
    words = [batch["attention_mask"].sum(1).cpu().numpy() for batch in batches]
    regions = [batch["region_attention_mask"].sum(1).cpu().numpy() for batch in batches]
    targets = [int((batch["labels"] >= 0).sum()) for batch in batches]
    flops = sum(training_flops(check.size, *one) for one in zip(words, regions, targets, strict=True))
    memory = peak_memory(check.device, lambda: [trained.step(batch) for batch in inputs])  # which warms up, too
    seconds = []
    for _ in range(check.rounds):
        seconds.append(in_turn({"": lambda: [trained.step(batch) for batch in inputs]}, check.device)[""])
    middle = statistics.median(seconds)
    tokens = sum(int(one.sum()) for one in (*words, *regions))
    return {
        "rows_per_second": len(batches) * check.rows / middle,
        "tokens_per_second": tokens / middle,
        "share_of_peak": flops / middle / peak,
        "seconds": spread(seconds),
        "bytes": memory,
    }


def largest(check: Check, result: Measured) -> Measured:
    """
    The most rows of a step that fit, doubled from 64 on, of random lengths in the first dtype. Flex attention's mask is
    made of all words and regions at once and may be the first that does not.
    """
    found: Measured = {}
    whole = TrainingJob(check.most_rows).batch(range(check.most_rows), check.device)
    for way, options in WAYS_OF_TRAINING.items():
        rows, fits = min(64, check.most_rows // 4), 0
        try:
            with limited(check.patience):
                trained = training_of(check, check.dtypes[0], options)
                while rows <= check.most_rows:
                    batch = {name: tensor[:rows] for name, tensor in whole.items()}
                    trained.step(TrainingJob.of_rival(batch) if options is None else batch)
                    synchronize(check.device)
                    fits, rows = rows, 2 * rows
            found[way] = {"rows": fits, "ended by": f"the limit of {check.most_rows} rows"}
        except torch.OutOfMemoryError:
            found[way] = {"rows": fits, "ended by": "memory"}
        except Exception as error:
            found[way] = {"rows": fits, "ended by": reason(error)}
        trained = batch = None
        if check.device == "cuda":
            torch.cuda.empty_cache()
    return found


STAGES: dict[str, Callable[[Check, Measured], Measured]] = {
    "peak": peak,
    "tests": tests,
    "scoring": scoring,
    "training": training,
    "attention": attention,
    "largest": largest,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and jobs, to see that all stages run")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="file (default: gpu.json)")
    parser.add_argument("--restart", action="store_true", help="measure anew what the file holds")
    parser.add_argument("--minutes", type=float, default=6.5, help="begin no stage after so many (default: 6.5)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here. A miniature of the check: --device cpu --tiny", file=sys.stderr)
        return 1
    check = replace(TINY if args.tiny else Check(), device=args.device)
    without_plans_for_shapes(check.device)
    torch.manual_seed(0)
    told = machine(check.device) | {"size": check.size}
    result = json.loads(args.output.read_text()) if args.output.exists() and not args.restart else {"machine": told}
    if result["machine"] != told:
        print(f"{args.output} is of another machine or version: give another --output, or --restart.", file=sys.stderr)
        return 1
    started = time.perf_counter()
    for name, stage in STAGES.items():
        if name in result:
            continue
        if time.perf_counter() - started > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over before {name}: run again, it goes on.")
            return 1
        print(f"{name}: {(stage.__doc__ or '').strip().partition(chr(10))[0]}", flush=True)
        began = time.perf_counter()
        found = stage(check, result)
        result[name] = found
        result.setdefault("took", {})[name] = round(time.perf_counter() - began, 1)
        write_json(args.output, result)
    print(json.dumps(result, indent=2))
    failed = result["tests"]["failed"]
    print(f"{len(failed)} tests failed: {', '.join(failed)}" if failed else "No test failed.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
