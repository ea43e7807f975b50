"""Steps a second of pre-training, by precision and number of threads, all in one process and in turn.

    python benchmarks/training_step.py --model demo
    python benchmarks/training_step.py --model minilm --pairs 32

A step is forward, backward, clipping and AdamW on random pairs, each a match and a mismatch, without padding, as
examples/run_pretraining.py takes it on a CPU. Prints the median of the rounds, with minimum and maximum. Run nothing
beside it: a figure from a busy machine is none.
"""

import argparse
import contextlib
import statistics
import time

import torch

from unicoder_vl_hf import UnicoderVLConfig, UnicoderVLForPreTraining

SIZES = {
    "demo": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 30522},
}
NUM_TOKENS, NUM_REGIONS, FEATURE_DIM, NUM_CLASSES = 18, 12, 256, 80


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="demo")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a step (default: 32)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    args = parser.parse_args()

    torch.manual_seed(0)
    size = SIZES[args.model]
    config = UnicoderVLConfig(
        **size,
        intermediate_size=4 * size["hidden_size"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        region_feature_dim=FEATURE_DIM,
        num_region_classes=NUM_CLASSES,
        padding_free=True,
        sparse_prediction=True,
    )
    model = UnicoderVLForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = random_pairs(config, 2 * args.pairs)

    def step(precision: str):
        bf16 = precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ways = [(precision, threads) for threads in args.threads for precision in ("fp32", "bf16")]
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for round_number in range(args.rounds + 1):
        for precision, threads in ways:
            torch.set_num_threads(threads)
            step(precision)  # warms up
            started = time.perf_counter()
            for _ in range(args.steps):
                step(precision)
            if round_number > 0:
                seconds[precision, threads].append((time.perf_counter() - started) / args.steps)
    capabilities = torch.cpu.get_capabilities()
    told = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    print(f"{args.model}, {args.pairs} pairs a step; CPU: {', '.join(told) or 'none of the known capabilities'}")
    for (precision, threads), found in seconds.items():
        low, middle, high = (1e3 * value for value in (min(found), statistics.median(found), max(found)))
        print(
            f"{precision}, {threads} thread(s): {1e3 / middle:6.2f} steps/s ({middle:.1f} ms, {low:.1f} to {high:.1f})"
        )


def random_pairs(config: UnicoderVLConfig, rows: int) -> dict[str, torch.Tensor]:
    """A batch of so many rows of 9 to 18 tokens and 4 to 12 regions, 15 % of each to be predicted."""
    generator = torch.Generator().manual_seed(0)

    def mask(least: int, most: int) -> torch.Tensor:
        lengths = torch.randint(least, most + 1, (rows, 1), generator=generator)
        return (torch.arange(most) < lengths).long()

    def targets(values: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        chosen = (torch.rand(values.shape, generator=generator) < 0.15) & (attended == 1)
        return torch.where(chosen, values, -100)

    tokens, regions = mask(9, NUM_TOKENS), mask(4, NUM_REGIONS)
    input_ids = torch.randint(5, config.vocab_size, tokens.shape, generator=generator)
    classes = torch.randint(NUM_CLASSES, regions.shape, generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": tokens,
        "region_features": torch.randn(*regions.shape, FEATURE_DIM, generator=generator),
        "region_locations": torch.rand(*regions.shape, 5, generator=generator),
        "region_attention_mask": regions,
        "labels": targets(input_ids, tokens),
        "region_labels": targets(classes, regions),
        "matching_labels": torch.arange(rows) % 2,
    }


if __name__ == "__main__":
    main()
