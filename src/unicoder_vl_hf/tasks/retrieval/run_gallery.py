"""Draws a gallery of a search in two stages on your photos: captions with the best five images, as one HTML file.

    python -m unicoder_vl_hf.tasks.retrieval.run_gallery --model runs/search --captions dataset_flickr8k.json \
        --regions regions --photos photos --output gallery.html

`--asked` captions of the split, drawn evenly, are asked among all of its images. Half of the gallery is drawn from them
at random by `--seed`, a quarter are those that went best and a quarter those that went worst. Without `--photos` the
surest regions are drawn on a blank page, which may be published where the photos may not. Candidates are ordered by the
weight of the similarity that was measured when the checkpoint was trained, unless `--similarity_weight` gives another.
"""

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import run_script
from ...pictures import GalleryItem, draw_regions, write_gallery
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import option, parse_evaluation
from ...runs.evaluation import evaluation_dtype
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import DualEncoder, Photos
from ...search.index import SearchIndex, build_index
from ...search.two_stage import SimilarityWeight, search
from .protocols import RetrievalFold, retrieval_test
from .search_arguments import SearchArguments

WIDTH = 240  # of a page of regions, in pixels


@dataclass(kw_only=True)
class GalleryArguments(SearchArguments):
    """Names a search in two stages, and says how much of it the gallery shows."""

    output: str = option(..., "HTML file to write.")
    asked: int = option(200, "Captions that are asked, drawn evenly.")
    shown: int = option(20, "Captions that the gallery shows, of those that are asked.")
    candidates: int = option(50, "Candidates of the first stage, to be scored.")
    similarity_weight: float | None = option(
        None,
        "Weight of the first stage's similarity in the order, score + weight x similarity. Default: the "
        "one that was measured when the checkpoint was trained, else 0.",
    )
    seed: int = option(0, "Seed of the half that is drawn at random.")
    max_regions: int = option(8, "Regions on a blank page, the best by score; without scores none are drawn.")


def main(argv: list[str] | None = None) -> None:
    """
    Draws a gallery with the options of `argv`, by default those of the command line.

    Raises:
        `ValueError`: the checkpoint, the regions or the photos do not fit, or the first stage was not trained.
    """
    args = parse_evaluation(GalleryArguments, argv)
    store, captions = args.open_data()
    (fold,) = retrieval_test(captions).folds
    model, processor = args.load_scoring(store, captions)
    scorer = ImageTextScorer(model, processor, store, dtype=evaluation_dtype(args.mixed_precision, model))
    encoder = args.open_first_stage(model, processor, store)
    weight = SimilarityWeight.of(args.similarity_weight, encoder, scorer)
    count = min(args.asked, len(fold.captions))
    rows = np.arange(count) * len(fold.captions) // count
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(encoder, store, Path(folder) / "index", image_ids=fold.image_ids)
        items = ask(fold, rows, index, encoder, scorer, args.candidates, weight)
    photos = None if args.photos is None else Photos(args.photos, args.photo_ids)
    random, best, worst = choose(items, args.shown, args.seed)
    shown = "whole" if photos else f"as the boxes of their {args.max_regions} surest regions, if these have scores"
    write_gallery(
        args.output,
        [*random, *best, *worst],
        functools.partial(picture, store, photos, args.max_regions),
        title="Search in two stages",
        intro=f"{len(random)} of {len(items):,} captions, drawn at random, then the {len(best)} that went best and the "
        f"{len(worst)} that went worst. The first stage proposes {args.candidates} of {len(fold.image_ids):,} images, "
        f"and they are ordered by {weight}. The best five are shown, {shown}.",
    )
    print(f"{args.output}: {len(random) + len(best) + len(worst)} captions.")


def ask(
    fold: RetrievalFold,
    rows: np.ndarray,
    index: SearchIndex,
    encoder: DualEncoder,
    scorer: ImageTextScorer,
    candidates: int,
    weight: SimilarityWeight,
) -> list[GalleryItem]:
    """Searches the images of an index by the captions in these rows of the fold."""
    captions = [fold.captions[row] for row in rows]
    found = search(
        captions, index, encoder, scorer,
        top_k=candidates, candidates=candidates, similarity_weight=weight.value,
    )  # fmt: skip
    return [
        GalleryItem.from_hits(
            caption,
            fold.image_ids[image],
            [(hit.name, hit.score) for hit in hits],
            notes={hit.name: hit.summands for hit in hits},
        )
        for caption, image, hits in zip(captions, fold.image_of_caption[rows], found, strict=True)
    ]


def picture(store: RegionStore, photos: Photos | None, max_regions: int, image_id: str) -> Image.Image:
    """Opens the photo of an image, or, without photos, draws its regions on a blank page."""
    record = store[image_id]
    if photos is not None:
        return photos.of(record)
    return diagram(record, store.provenance.get("class_names") or None, max_regions)


def choose(
    items: Sequence[GalleryItem], count: int, seed: int
) -> tuple[list[GalleryItem], list[GalleryItem], list[GalleryItem]]:
    """
    Chooses half of `count` at random, and from the rest a quarter that went best (in first place, by the widest margin
    over the second) and a quarter that went worst (in the last place; those that were no candidate come last of all).
    """
    drawn = np.random.default_rng(seed).permutation(len(items))
    half, quarter = count - count // 4 * 2, count // 4
    random = [items[row] for row in sorted(drawn[:half])]

    def quality(item: GalleryItem) -> tuple[float, float]:
        others = [score for image_id, score in item.best if image_id != item.image_id]
        return -(item.rank or np.inf), item.score - max(others, default=item.score)

    rest = sorted((items[row] for row in sorted(drawn[half:])), key=quality, reverse=True)
    return random, rest[:quarter], rest[quarter:][::-1][:quarter]


def diagram(record: RegionRecord, class_names: Sequence[str] | None, max_regions: int) -> Image.Image:
    """Draws the surest regions, if regions have scores, on a blank page of the image's shape, in few colours (2 kB)."""
    width, height = record.image_width or 1, record.image_height or 1
    page = Image.new("RGB", (WIDTH, max(1, round(WIDTH * height / width))), "white")
    if record.object_scores is None:  # such as the cells of a grid, none of which stands out
        return page
    drawn = draw_regions(page, record, class_names=class_names, max_regions=max_regions, min_width=WIDTH)
    return drawn.quantize(16)


if __name__ == "__main__":
    run_script(main)
