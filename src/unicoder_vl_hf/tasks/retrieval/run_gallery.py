"""Draws a gallery of a search in two stages on your photos: captions with the best five images, as one HTML file.

    python -m unicoder_vl_hf.tasks.retrieval.run_gallery --model runs/search --captions dataset_flickr8k.json \
        --regions regions --photos photos --output gallery.html

So many captions of the split, drawn evenly, are asked among all of its images: of these half of the gallery is drawn at
random by `--seed`, a quarter is what went best and a quarter what went worst. Without `--photos` the surest regions are
drawn on a blank page, which may be published where the photos may not. What the first stage proposes is ordered by the
weight of its similarity that was measured when the checkpoint was trained, unless `--similarity_weight` gives another.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.captions import check_tokens, join, read_captions
from ...errors import run_script
from ...pictures import GalleryItem, draw_regions, write_gallery
from ...records_unicoder_vl import RegionRecord
from ...regions.store import RegionStore
from ...runs.arguments import make_parser
from ...scoring.checkpoints import load_for_store
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import DualEncoder, Photos, UnicoderVLDualEncoder, open_dual_encoder
from ...search.index import build_index
from ...search.two_stage import SimilarityWeight, search
from .protocols import retrieval_test

WIDTH = 240  # of a page of regions, in pixels


@dataclass
class GalleryArguments:
    model: str = field(metadata={"help": "Checkpoint with its processor, which scores pairs."})
    captions: str = field(metadata={"help": "Caption file in any layout that read_captions reads."})
    regions: str = field(metadata={"help": "RegionStore."})
    output: str = field(metadata={"help": "HTML file."})
    dual_encoder: str | None = field(
        default=None,
        metadata={"help": "First stage: another Unicoder-VL; or CLIP or alike, on --photos. Default: the model's own."},
    )
    photos: str | None = field(default=None, metadata={"help": "Folder, .tar, or folder of a dataset."})
    photo_ids: str = field(default="stem", metadata={"help": "How photos get their ids, as --ids of `extract`."})
    split: str | None = field(default="test", metadata={"help": "Split of the captions."})
    caption_ids: str | None = field(
        default=None, metadata={"help": "Other ids for the captions' images: stem, coco, a .csv, or CAPTIONS:COLUMN."}
    )
    asked: int = field(default=200, metadata={"help": "Captions that are asked."})
    shown: int = field(default=20, metadata={"help": "Of these in the gallery."})
    candidates: int = field(default=50, metadata={"help": "Of the first stage, to be scored."})
    similarity_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the first stage's similarity in the order, score + weight x similarity. Default: the "
            "one that was measured when the checkpoint was trained, else 0."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the half that is drawn at random."})
    max_regions: int = field(
        default=8, metadata={"help": "Regions on a blank page, the best by score; without scores none are drawn."}
    )


def main(argv: list[str] | None = None):
    (args,) = make_parser(GalleryArguments).parse_args_into_dataclasses(argv)
    store = RegionStore(args.regions)
    captions, _ = join(read_captions(args.captions, split=args.split, ids=args.caption_ids), store, skip_option=None)
    (fold,) = retrieval_test(captions).folds
    model, processor = load_for_store(args.model, store)
    check_tokens(captions, processor.tokenizer, args.captions)
    encoder: DualEncoder
    if args.dual_encoder is None:
        encoder = UnicoderVLDualEncoder(model, processor, store, args.model)
    else:
        encoder = open_dual_encoder(args.dual_encoder, store, args.photos, args.photo_ids)

    count = min(args.asked, len(fold.captions))
    rows = np.arange(count) * len(fold.captions) // count
    texts = [fold.captions[row] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(encoder, store, Path(folder) / "index", image_ids=fold.image_ids)
        scorer = ImageTextScorer(model, processor, store)
        weight = SimilarityWeight.of(args.similarity_weight, encoder, scorer)
        found = search(
            texts, index, encoder, scorer,
            top_k=args.candidates, candidates=args.candidates, similarity_weight=weight.value,
        )  # fmt: skip
    right = [fold.image_ids[image] for image in fold.image_of_caption[rows]]
    items = [
        GalleryItem.from_hits(
            text, image_id, [(hit.name, hit.score) for hit in hits], notes={hit.name: hit.summands for hit in hits}
        )
        for text, image_id, hits in zip(texts, right, found, strict=True)
    ]
    photos = None if args.photos is None else Photos(args.photos, args.photo_ids)
    class_names = store.provenance.get("class_names") or None

    def picture(image_id: str) -> Image.Image:
        record = store[image_id]
        return photos.of(record) if photos else diagram(record, class_names, args.max_regions)

    random, best, worst = choose(items, args.shown, args.seed)
    write_gallery(
        args.output,
        [*random, *best, *worst],
        picture,
        title="Search in two stages",
        intro=f"{len(random)} of {len(items):,} captions, drawn at random, then the {len(best)} that went best and the "
        f"{len(worst)} that went worst. The first stage proposes {args.candidates} of {len(fold.image_ids):,} images, "
        f"and they are ordered by {weight}. The best five are shown, "
        + ("whole." if photos else f"as the boxes of their {args.max_regions} surest regions, if these have scores."),
    )
    print(f"{args.output}: {len(random) + len(best) + len(worst)} captions.")


def choose(
    items: Sequence[GalleryItem], count: int, seed: int
) -> tuple[list[GalleryItem], list[GalleryItem], list[GalleryItem]]:
    """
    Half of `count` drawn at random, and of the rest a quarter that went best (first, by the widest margin over the
    second) and a quarter that went worst (the last rank; those that were no candidate rank after all).
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
    """The surest regions, if any are, on a blank page of the image's shape, in few colours: some 2 kB."""
    width, height = record.image_width or 1, record.image_height or 1
    page = Image.new("RGB", (WIDTH, max(1, round(WIDTH * height / width))), "white")
    if record.object_scores is None:  # such as the cells of a grid, none of which stands out
        return page
    drawn = draw_regions(page, record, class_names=class_names, max_regions=max_regions, min_width=WIDTH)
    return drawn.quantize(16)


if __name__ == "__main__":
    run_script(main)
