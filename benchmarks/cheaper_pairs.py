"""
Two ways to cheaper pairs, neither of which the scorer has: int8 products, and a cascade of layers. See
docs/performance.md.

    OMP_NUM_THREADS=1 python benchmarks/cheaper_pairs.py speed --size base
    OMP_NUM_THREADS=1 python benchmarks/cheaper_pairs.py ranking demo/retrieval demo/_data/scenes --captions 150

`speed` scores pairs of real sizes by turns in float32 and in int8, in CPU time, which a busy machine lengthens less
than the clock's. `ranking` compares recalls and orders on the test scenes, of int8 and of cascades, in which all photos
are scored after the first layers, by the pooler and head that were trained behind the last, and the best by all layers.
"""

import argparse
import copy
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear
from torch.ao.quantization import per_channel_dynamic_qconfig
from work import SIZES, Job, our_scorer

from unicoder_vl_hf import ImageTextScorer, RegionStore
from unicoder_vl_hf.data import read_captions
from unicoder_vl_hf.modeling_unicoder_vl import UnicoderVLModel
from unicoder_vl_hf.scoring import packed
from unicoder_vl_hf.tasks.retrieval.metrics import retrieval_metrics
from unicoder_vl_hf.tasks.retrieval.protocols import DIRECTIONS, retrieval_test

ROUNDS = 3
FLOAT32, IN_FLOAT32 = packed.OneDNNLinear, packed.with_onednn


class Int8Linear(nn.Module):
    """
    A linear layer by oneDNN in int8: weights rounded by output channel, inputs as they come, those of a pass alike or,
    with `by_row`, each row by itself.
    """

    def __init__(self, linear: nn.Linear, activation: str = "none", by_row: bool = False):
        super().__init__()
        self.by_row = by_row
        plain = nn.Linear(linear.in_features, linear.out_features)
        plain.weight, plain.bias = linear.weight, nn.Parameter(torch.zeros_like(linear.bias))
        plain.qconfig = per_channel_dynamic_qconfig
        torch.backends.quantized.engine = "onednn"
        self.product, self.bias, self.activation = Linear.from_float(plain), linear.bias.detach(), activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.by_row:
            largest = inputs.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
            outputs = self.product(inputs / largest).mul_(largest).add_(self.bias)
        else:
            outputs = self.product(inputs).add_(self.bias)
        return nn.functional.gelu(outputs) if self.activation == "gelu" else outputs


# The layers of the encoder but the last, which computes [CLS] alone, and is in float32; and whether that is in int8.
KINDS = {
    "float32": (FLOAT32, False),
    "int8": (Int8Linear, True),
    "int8 by row": (partial(Int8Linear, by_row=True), True),
    "int8 by row but for the last layer": (partial(Int8Linear, by_row=True), False),
}


def take(kind: str) -> None:
    """Lets encoders that are made from now on compute by a kind of products."""
    linear, last_too = KINDS[kind]

    def made(bert: UnicoderVLModel) -> UnicoderVLModel:
        packed.OneDNNLinear = FLOAT32
        last = IN_FLOAT32(bert).encoder.layer[-1]
        packed.OneDNNLinear = linear
        bert = IN_FLOAT32(bert)
        if not last_too:
            bert.encoder.layer[-1] = last
        return bert

    packed.with_onednn = made


def speed(size: str, num_captions: int, num_images: int) -> None:
    """Prints CPU seconds of each kind, and how many times as fast as float32 it is, medians of interleaved rounds."""
    job, scorers = Job(num_captions, num_images), {}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(ROUNDS + 1):
        for kind in KINDS:
            take(kind)
            scorer = scorers.setdefault(kind, our_scorer(torch.float32, size))
            begin = time.process_time()
            scorer.score(job.captions, job.records)
            if turn:  # the first one makes the encoder
                taken[kind].append(time.process_time() - begin)
    for kind, seconds in taken.items():
        median = float(np.median(seconds))
        print(f"{size}, {kind}: {median:.2f} s, {np.median(taken['float32']) / median:.2f} times as fast as float32")


def recalls(scores: np.ndarray, own: np.ndarray) -> str:
    """Image and text R@1 in percent: row `c` of `scores` is of a caption of image `own[c]`."""
    found = retrieval_metrics(scores, own, ks=[1])
    text, image = (100 * found[f"{direction}_recall@1"] for direction in DIRECTIONS)
    return f"image R@1 {image:.1f}, text R@1 {text:.1f}"


def ranking(checkpoint: Path, scenes: Path, num_captions: int) -> None:
    """Prints recalls of int8 and of cascades on the test scenes, and how the order of the best 100 photos agrees."""
    store = RegionStore(scenes / "regions")
    (fold,) = retrieval_test(read_captions(scenes / "captions.jsonl", split="test")).folds
    some = slice(None, None, max(1, len(fold.captions) // num_captions))
    captions, image_ids, own = fold.captions[some], fold.image_ids, fold.image_of_caption[some]
    found = {}
    for kind in KINDS:
        take(kind)
        scorer = ImageTextScorer.from_pretrained(checkpoint, store, verbose=False)
        found[kind] = scorer.score(captions, image_ids)
        taus = []
        for reference, scores in zip(found["float32"], found[kind], strict=True):
            best = np.argsort(-reference)[:100]
            taus.append(kendalltau(reference[best], scores[best]).statistic)
        print(f"{kind}: {recalls(found[kind], own)}; Kendall's tau of the best 100 {np.mean(taus):.4f}", flush=True)
    take("float32")
    layers = scorer.model.bert.encoder.layer
    for count in range(1, len(layers)):
        early = copy.deepcopy(scorer.model)
        early.bert.encoder.layer = early.bert.encoder.layer[:count]
        early.config.num_hidden_layers = count
        first = ImageTextScorer(early, scorer.processor, store, verbose=False).score(captions, image_ids)
        for share in (0.1, 0.25, 0.5):
            kept = np.argsort(-first, axis=1)[:, : round(share * len(image_ids))]
            cascade = first - 1e4
            np.put_along_axis(cascade, kept, np.take_along_axis(found["float32"], kept, axis=1), axis=1)
            print(f"{count} of {len(layers)} layers, then the best {share:.0%} by all: {recalls(cascade, own)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_speed = commands.add_parser("speed")
    of_speed.add_argument("--size", choices=sorted(SIZES), default="base")
    of_speed.add_argument("--captions", type=int, default=10)
    of_speed.add_argument("--images", type=int, default=3)
    of_ranking = commands.add_parser("ranking")
    of_ranking.add_argument("checkpoint", type=Path)
    of_ranking.add_argument("scenes", type=Path)
    of_ranking.add_argument("--captions", type=int, default=150)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch's quantized tensors are to go
    if args.command == "speed":
        speed(args.size, args.captions, args.images)
    else:
        ranking(args.checkpoint, args.scenes, args.captions)


if __name__ == "__main__":
    main()
