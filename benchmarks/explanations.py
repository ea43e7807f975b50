"""Measures whether explanations tell what a model looked at, in the two sanity checks of such methods, and by names.

    python benchmarks/explanations.py --model demo/retrieval --captions demo/_data/scenes/captions.jsonl \
        --regions demo/_data/scenes/regions

- Deletion: regions are taken out of matches, the most relevant first, or at random, or the least relevant first. The
  sooner the score falls, the better the order.
- Randomisation (Adebayo et al., 2018): a model of the same shape with new weights must give another picture. Rank
  correlation of the relevances of a pair's regions, and of its words' regions, with those of the trained model.
- Names: of the words that are the class of exactly one region of the image, how many find it their most relevant one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from unicoder_vl_hf import ImageTextScorer, RegionRecord
from unicoder_vl_hf.data import read_captions
from unicoder_vl_hf.scoring import Explanation, explain

DELETED = (1, 2)  # of the 4 or 5 regions of a scene


@dataclass(frozen=True)
class Findings:
    """
    The figures.

    Attributes:
        scores (`dict[str, list[float]]`): Mean score of the pairs, whole and after each number of deletions, by order.
        correlation (`dict[str, float]`): Mean rank correlation with the model of new weights.
        named (`float`): Share of words that find the region of their name; NaN without such words.
        chance (`float`): The share by guessing a region.
    """

    scores: dict[str, list[float]]
    correlation: dict[str, float]
    named: float
    chance: float

    def __str__(self) -> str:
        counts = (0, *DELETED)
        lines = [f"| deleted, of matches | {' | '.join(map(str, counts))} |", f"|---|{'---|' * len(counts)}"]
        lines += [f"| {order} | {' | '.join(f'{x:+.2f}' for x in row)} |" for order, row in self.scores.items()]
        lines += [f"Rank correlation with new weights, {name}: {x:.2f}" for name, x in self.correlation.items()]
        return "\n".join(
            [*lines, f"Words that find the region of their name: {self.named:.0%}, chance {self.chance:.0%}"]
        )


def measure(scorer: ImageTextScorer, pairs: Sequence[tuple[str, str]], seed: int = 0) -> Findings:
    """Measures on `(image_id, caption)` pairs that match, each with more regions than are deleted."""
    explained = [explain(scorer.model, scorer.processor, scorer.store[image], caption) for image, caption in pairs]
    torch.manual_seed(seed)
    new = type(scorer.model)(scorer.model.config).to(scorer.model.device)
    others = [explain(new, scorer.processor, each.record, each.caption) for each in explained]
    found = names_found(explained, scorer.store.provenance["class_names"])

    def correlation(name: str) -> float:
        both = zip(explained, others, strict=True)
        return float(np.mean([spearman(getattr(known, name), getattr(other, name)) for known, other in both]))

    return Findings(
        scores=deletion(scorer, explained, seed),
        correlation={name: correlation(name) for name in ("region_relevance", "relevance_to_words")},
        named=float(np.mean([hit for hit, _ in found])) if found else float("nan"),
        chance=float(np.mean([1 / regions for _, regions in found])) if found else float("nan"),
    )


def deletion(scorer: ImageTextScorer, explained: Sequence[Explanation], seed: int = 0) -> dict[str, list[float]]:
    """Computes the mean score after each number of deletions, by the order in which regions are deleted."""
    rng = np.random.default_rng(seed)
    orders = {
        "most relevant first": [np.argsort(-each.region_relevance) for each in explained],
        "at random": [rng.permutation(len(each.record)) for each in explained],
        "least relevant first": [np.argsort(each.region_relevance) for each in explained],
    }
    at = np.arange(len(explained))
    captions = [each.caption for each in explained]

    def mean_score(order: Sequence[np.ndarray], count: int) -> float:
        left = [without(each.record, rows[:count]) for each, rows in zip(explained, order, strict=True)]
        return float(scorer.score_pairs(captions, left, at, at).mean())

    return {name: [mean_score(order, count) for count in (0, *DELETED)] for name, order in orders.items()}


def without(record: RegionRecord, rows: np.ndarray) -> RegionRecord:
    """Takes regions out of a record."""
    arrays = {name: np.delete(x, rows, axis=0) for name, x in record.to_dict().items() if isinstance(x, np.ndarray)}
    return replace(record, **arrays)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the rank correlation of two arrays without ties."""
    ranks = [np.argsort(np.argsort(x, axis=None)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def names_found(explained: Sequence[Explanation], class_names: Sequence[str]) -> list[tuple[bool, int]]:
    """Says for each word that names one region alone whether that is its most relevant one, and of how many."""
    found = []
    for each in explained:
        names = [class_names[index] for index in each.record.object_ids]
        for word, row in zip(each.words, each.relevance_to_words, strict=True):
            if names.count(word) == 1:
                found.append((names[row.argmax()] == word, len(names)))
    return found


def main(argv: list[str] | None = None) -> None:
    """Prints the figures of captions of a split, drawn evenly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "captions", "regions"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--asked", type=int, default=300)
    args = parser.parse_args(argv)
    rows = read_captions(args.captions, split=args.split)
    rows = rows.select(np.arange(min(args.asked, len(rows))) * len(rows) // min(args.asked, len(rows)))
    scorer = ImageTextScorer.from_pretrained(args.model, args.regions, verbose=False)
    print(f"{len(rows)} captions\n{measure(scorer, list(zip(rows['image_id'], rows['caption'], strict=True)))}")


if __name__ == "__main__":
    main()
