"""The tests that retrieval papers report, as the field defines them, and the figures of Unicoder-VL's paper.

Karpathy's test splits of Flickr8k, Flickr30k and COCO. COCO 1K is the mean over five folds: images 0-999, 1000-1999, …
of the 5,000 in the order of Karpathy's file, each ranked among its own fold's candidates only. The field takes the
first 5 captions of each image, though COCO has images with 6 and 7: both counts are possible, and the title says which.
A part of a split is never called by the whole's name. Left out: scoring.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import datasets
import numpy as np
from numpy.typing import ArrayLike

from .metrics import chance_recalls, confidence_intervals, rank_queries, summarize

KS = (1, 5, 10)
DIRECTIONS = ("text_retrieval", "image_retrieval")  # the order of the paper's columns
# The heading of each recall in a table.
RECALLS = {f"{direction}_recall@{k}": f"{direction[0].upper()}R@{k}" for direction in DIRECTIONS for k in KS}


@dataclass(frozen=True)
class Protocol:
    """
    A test that papers report.

    Attributes:
        title (`str`): the name that papers call it by.
        num_images (`int`): images of the whole test split.
        num_folds (`int`): parts of equal size, ranked each by itself.
        paper (`Mapping[str, tuple]`): what Unicoder-VL's paper reports (percent): text retrieval R@1, 5, 10, then
            image retrieval R@1, 5, 10.
    """

    title: str
    num_images: int
    num_folds: int
    paper: Mapping[str, tuple[float, ...]]


# Tables of the paper. UNITER's and ViLT's papers print its image retrieval wrongly.
PROTOCOLS = {
    "flickr8k": Protocol("Flickr8k", 1_000, 1, {}),
    "flickr30k": Protocol(
        "Flickr30k",
        1_000,
        1,
        {
            "fine-tuned": (86.2, 96.3, 99.0, 71.5, 90.9, 94.9),
            "zero-shot": (64.3, 85.8, 92.3, 48.4, 76.0, 85.2),
            "without pre-training": (73.0, 89.0, 94.1, 57.8, 82.2, 88.9),
            "6 layers": (72.4, 93.1, 96.3, 58.1, 83.4, 90.2),
            "24 layers": (86.5, 97.6, 99.3, 73.6, 92.3, 95.8),
            "pre-trained on 3M pairs": (82.3, 95.1, 97.8, 68.3, 90.3, 94.6),
        },
    ),
    "coco-5k": Protocol("COCO 5K", 5_000, 1, {"fine-tuned": (62.3, 87.1, 92.8, 46.7, 76.0, 85.3)}),
    "coco-1k": Protocol(
        "COCO 1K",
        5_000,
        5,
        {
            "fine-tuned": (84.3, 97.3, 99.3, 69.7, 93.5, 97.2),
            "zero-shot": (54.4, 82.8, 90.6, 43.4, 76.0, 87.0),
            "without pre-training": (75.1, 94.3, 97.8, 63.9, 91.6, 96.5),
        },
    ),
}


def captions_of_images(captions: datasets.Dataset, max_images: int) -> datasets.Dataset:
    """Selects all captions of at most `max_images` images, drawn evenly."""
    image_ids = captions.unique("image_id")
    kept = set(image_ids[:: max(1, math.ceil(len(image_ids) / max_images))])
    return captions.select([row for row, image_id in enumerate(captions["image_id"]) if image_id in kept])


@dataclass(frozen=True)
class RetrievalFold:
    """Captions and images that are ranked among each other; `image_of_caption` are indices of `image_ids`."""

    captions: list[str]
    image_ids: list[str]
    image_of_caption: np.ndarray


@dataclass(frozen=True)
class RetrievalTest:
    """
    The captions and images to be scored, and the name by which the result may be reported.

    Attributes:
        title (`str`): the protocol, how many images and captions, and which.
        folds (`tuple[RetrievalFold, ...]`): one, where all is ranked together.
        paper (`Mapping[str, tuple]`): the paper's figures for this very test, see [`Protocol`]; empty for a part.
    """

    title: str
    folds: tuple[RetrievalFold, ...]
    paper: Mapping[str, tuple[float, ...]]

    def blocks(self, scores: np.ndarray) -> Iterator[np.ndarray]:
        """
        Cuts the scores of each fold out of one matrix of all captions with all images, both in the order of the folds.

        Raises:
            `ValueError`: the matrix has another shape.
        """
        captions = np.cumsum([0, *(len(fold.captions) for fold in self.folds)])
        images = np.cumsum([0, *(len(fold.image_ids) for fold in self.folds)])
        if scores.shape != (captions[-1], images[-1]):
            raise ValueError(f"scores have shape {scores.shape}; expected {(int(captions[-1]), int(images[-1]))}.")
        for i in range(len(self.folds)):
            yield scores[captions[i] : captions[i + 1], images[i] : images[i + 1]]


@dataclass(frozen=True)
class RetrievalResult:
    """
    The metrics of a test and their intervals.

    Attributes:
        metrics (`dict[str, float]`): see [`summarize`].
        intervals (`dict[str, tuple[float, float]]`): see [`confidence_intervals`], of 95 %.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def retrieval_test(
    captions: datasets.Dataset,
    protocol: str | None = None,
    *,
    captions_per_image: int | Literal["all"] | None = None,
    num_images: int | None = None,
) -> RetrievalTest:
    """
    Chooses the captions and images of a test, in the order of their rows.

    Args:
        captions (`datasets.Dataset`):
            All rows of the test split in the order of their file, as [`read_captions`] gives them: columns `image_id`
            and `caption`.
        protocol (`str`, *optional*):
            One of `PROTOCOLS`; by default all images are ranked together, under no other name than their number.
        captions_per_image (`int` or `"all"`, *optional*):
            Number of captions of each image, the first ones. Defaults to 5 under a protocol, as the field counts, else
            to `"all"`.
        num_images (`int`, *optional*):
            Number of images, the first ones, for a quick look; by default all. No figure of the paper compares to it:
            fewer candidates are easier to rank.

    Raises:
        `ValueError`: an unknown protocol, another number of images than it has, images out of the order of the file,
            fewer captions than asked for, or a part of a test that has several folds.

    Example:

    ```python
    >>> test = retrieval_test(read_captions("dataset_coco.json", split="test"), "coco-1k")
    >>> test.title
    'COCO 1K: mean over 5 folds of 1,000 images, the first 5 captions of each'
    >>> result = evaluate_folds(test, (scorer.score(fold.captions, fold.image_ids) for fold in test.folds))
    >>> print(results_table(test, {"ours": result}))
    ```
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is unknown; expected one of {', '.join(PROTOCOLS)}, or none.")
    spec = PROTOCOLS.get(protocol or "")
    if captions_per_image is None:
        captions_per_image = "all" if spec is None else 5
    if captions_per_image != "all" and captions_per_image < 1:
        raise ValueError(f"captions_per_image={captions_per_image}; expected at least 1, or 'all'.")

    rows_of_image: dict[str, list[int]] = {}
    for row, image_id in enumerate(captions["image_id"]):
        rows_of_image.setdefault(image_id, []).append(row)
    total = len(rows_of_image)
    if spec is not None and total != spec.num_images:
        raise ValueError(
            f"{spec.title} has {spec.num_images:,} test images, but the captions have {total:,}. Give its whole test "
            "split (split='test', nothing skipped), or evaluate without a protocol, under the number of your images."
        )
    if spec is not None and spec.num_folds > 1:
        _check_file_order(captions, [rows[0] for rows in rows_of_image.values()], spec)
        if num_images is not None:
            raise ValueError(f"num_images={num_images}, but {spec.title} is a mean over folds: take all of them.")
    if num_images is not None and not 1 <= num_images <= total:
        raise ValueError(f"num_images={num_images}; expected 1 to {total}, the images that have captions.")

    kept = dict(list(rows_of_image.items())[:num_images])
    if captions_per_image != "all":
        for image_id, rows in kept.items():
            if len(rows) < captions_per_image:
                raise ValueError(
                    f"Image {image_id!r} has {len(rows)} captions, fewer than captions_per_image="
                    f"{captions_per_image}; expected at least so many. Take fewer, or 'all'."
                )
        kept = {image_id: rows[:captions_per_image] for image_id, rows in kept.items()}
    texts, ids = captions["caption"][:], list(kept)
    size = len(ids) // (1 if spec is None else spec.num_folds)
    folds = tuple(_fold(texts, {i: kept[i] for i in ids[start : start + size]}) for start in range(0, len(ids), size))
    return RetrievalTest(
        title=_title(spec, folds, captions_per_image, num_images),
        folds=folds,
        paper={} if spec is None or num_images is not None else spec.paper,
    )


def evaluate_folds(test: RetrievalTest, scores: Iterable[ArrayLike]) -> RetrievalResult:
    """
    Ranks the captions and images of each fold among themselves, and measures the result.

    Args:
        test ([`RetrievalTest`]): the folds.
        scores (iterable of arrays of shape `(captions, images)`): one for each fold, taken one at a time, so that a
            generator never holds two; `test.blocks(scores)` cuts them out of one matrix.
    """
    ranked = [rank_queries(of_fold, fold.image_of_caption) for fold, of_fold in zip(test.folds, scores, strict=True)]
    return RetrievalResult(summarize(ranked, KS), confidence_intervals(ranked, KS))


def chance(test: RetrievalTest) -> dict[str, float]:
    """Computes the recalls that random scores reach on average, the mean over the folds; see [`chance_recalls`]."""
    of_folds = [chance_recalls(fold.image_of_caption, KS) for fold in test.folds]
    return {name: float(np.mean([recalls[name] for recalls in of_folds])) for name in of_folds[0]}


def results_table(test: RetrievalTest, results: Mapping[str, RetrievalResult]) -> str:
    """
    Makes a table of recalls in percent, in Markdown: the paper's rows, each result with its 95 % interval, and chance.

    Args:
        test ([`RetrievalTest`]): the test.
        results (`Mapping[str, RetrievalResult]`): name of the row -> result.
    """
    lines = [
        _line("percent", RECALLS.values(), "tied TR, IR"),
        _line("---", ["--:"] * len(RECALLS), "--:"),
        *(_line(f"paper, {name}", map(_percent, np.array(row) / 100), "") for name, row in test.paper.items()),
    ]
    for name, result in results.items():
        tied = ", ".join(f"{result.metrics[f'{direction}_tied_ranks']:,}" for direction in DIRECTIONS)
        bounds = (f"{_percent(low)}-{_percent(high)}" for low, high in (result.intervals[name] for name in RECALLS))
        lines += [
            _line(name, (_percent(result.metrics[recall]) for recall in RECALLS), tied),
            _line("95 % interval over images", bounds, ""),
        ]
    by_chance = chance(test)
    lines.append(_line("chance", (_percent(by_chance[name]) for name in RECALLS), ""))
    return f"{test.title}\n\n" + "\n".join(lines)


def _fold(texts: Sequence[str], rows_of_image: Mapping[str, Sequence[int]]) -> RetrievalFold:
    column = {row: i for i, rows in enumerate(rows_of_image.values()) for row in rows}
    rows = sorted(column)
    return RetrievalFold(
        captions=[texts[row] for row in rows],
        image_ids=list(rows_of_image),
        image_of_caption=np.array([column[row] for row in rows]),
    )


def _title(
    spec: Protocol | None, folds: Sequence[RetrievalFold], captions_per_image: int | str, num_images: int | None
) -> str:
    count = len(folds[0].image_ids)
    images = f"{count:,} images" if num_images is None else f"the first {count:,} images"
    if len(folds) > 1:
        images = f"mean over {len(folds)} folds of {images}"
    if captions_per_image == "all":
        captions = f"all {sum(len(fold.captions) for fold in folds):,} captions"
    else:
        captions = f"the first {'caption' if captions_per_image == 1 else f'{captions_per_image} captions'} of each"
    return f"{'Retrieval' if spec is None else spec.title}: {images}, {captions}"


def _check_file_order(captions: datasets.Dataset, first_rows: Sequence[int], spec: Protocol):
    """Checks that images are in the order of Karpathy's `imgid`, if there is one; other rows are taken as they are."""
    if "imgid" not in captions.column_names:
        return
    imgids = np.array(captions["imgid"][:])[first_rows]
    late = np.flatnonzero(np.diff(imgids) <= 0)
    if len(late):
        raise ValueError(
            f"imgid {imgids[late[0]]} stands before {imgids[late[0] + 1]}; expected the images in the order of "
            f"Karpathy's file, which makes the folds of {spec.title}. Do not shuffle or sort the rows."
        )


def _line(name: str, cells: Iterable[str], last: str) -> str:
    return f"| {name:<30} | " + " | ".join(f"{cell:>10}" for cell in cells) + f" | {last:>11} |"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
