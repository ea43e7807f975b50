"""`unicoder-vl index` and `unicoder-vl search`: from names of files to an index, and to what was found in it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import logging
from ..data.captions import check_tokens, is_blank, join, read_captions
from ..records_unicoder_vl import RegionRecord
from ..regions.store import RegionStore
from .checkpoints import load_for_store
from .encoders import (
    DualEncoder,
    Photos,
    TransformersDualEncoder,
    UnicoderVLDualEncoder,
    open_transformers_encoder,
)
from .index import SearchIndex, build_index
from .scoring import ImageTextScorer
from .two_stage import Hit, search

logger = logging.get_logger(__name__)

# Drawn on a photo of the gallery: more would hide it.
REGIONS_DRAWN = 10


@dataclass(frozen=True)
class SearchResult:
    """The hits of one query; `str` of it is a table, and where the gallery is."""

    query: str
    hits: list[Hit]
    gallery: Path | None = None
    similarity_weight: float = 0.0

    def __str__(self) -> str:
        score = "score" + f" + {self.similarity_weight:g} similarity" * bool(self.similarity_weight)
        width = max(8, len(score))
        lines = [self.query, f"rank  {score:>{width}}  similarity"]
        for rank, hit in enumerate(self.hits, start=1):
            similarity = "" if hit.similarity is None else f"{hit.similarity:.3f}"
            lines.append(f"{rank:4}  {hit.score:+{width}.3f}  {similarity:>10}  {hit.name}")
        return "\n".join([*lines, *([] if self.gallery is None else [f"Gallery: {self.gallery}"])])


def make_index(
    store: str,
    output: str,
    *,
    model: str | None = None,
    dual_encoder: str | None = None,
    photos: str | None = None,
    photo_ids: str = "stem",
    captions: str | None = None,
    caption_ids: str | None = None,
    split: str | None = None,
    faiss: str | None = None,
) -> str:
    """
    Indexes the images of a store, or captions of these, by a checkpoint of ours or by a dual encoder of transformers.

    Raises:
        `ValueError`: not exactly one of `model` and `dual_encoder`; images for a dual encoder without `photos`; a
        `model` whose first stage was not trained; or as [`build_index`].
    """
    if (model is None) == (dual_encoder is None):
        raise ValueError("Give either --model, a checkpoint of ours, or --dual-encoder, one of transformers.")
    regions = RegionStore(store)
    encoder: UnicoderVLDualEncoder | TransformersDualEncoder
    if model is not None:
        encoder = UnicoderVLDualEncoder(*load_for_store(model, regions), regions, model)
    else:
        encoder = open_transformers_encoder(str(dual_encoder), photos, captions is None, photo_ids)
    texts = None
    if captions is not None:
        texts = _captions(captions, caption_ids, split, regions, encoder.processor.tokenizer)
    index = build_index(encoder, regions, output, captions=texts, faiss=faiss)
    return f"{output} is complete: {len(index):,} {index.items}, {encoder.dim} numbers each, by {encoder.name}."


def run_search(
    text: str | None = None,
    *,
    image: str | None = None,
    index: str | None = None,
    exhaustive: bool = False,
    regions: str | None = None,
    model: str | None = None,
    dual_encoder: str | None = None,
    photos: str | None = None,
    photo_ids: str = "stem",
    captions: str | None = None,
    caption_ids: str | None = None,
    split: str | None = None,
    candidates: int = 100,
    similarity_weight: float = 0.0,
    top_k: int = 10,
    gallery: str | None = None,
) -> SearchResult:
    """
    Images for a text, or captions for an image, from an index or among all there are. Arguments are those of
    `unicoder-vl search`.

    Raises:
        `ValueError`: arguments that do not go together, an index of the other kind, or one that was made by another
        checkpoint or from another store.
    """
    if (text is None) == (image is None):
        raise ValueError("Give either a sentence, to search images, or --image, to search captions.")
    if (index is None) != exhaustive:
        raise ValueError("Give either --index, to search it in two stages, or --exhaustive, to score every pair.")
    if gallery is not None and text is None:
        raise ValueError("--gallery shows the images that a sentence finds: give a sentence, not --image.")
    if text is not None and is_blank(text):
        raise ValueError("The sentence is empty: say what the images should show.")
    for option, value in (("--top-k", top_k), ("--candidates", candidates)):
        if value < 1:
            raise ValueError(f"{option} is {value}, expected at least 1.")
    if exhaustive and similarity_weight:
        raise ValueError(
            "--exhaustive has no first stage whose similarity could be added: leave --similarity-weight out."
        )
    photo = (
        None if gallery is None or photos is None else Photos(photos, photo_ids)
    )  # where there are none, before the search
    if index is None:
        if model is None or regions is None or (image is not None and captions is None):
            raise ValueError("--exhaustive needs --model and --regions, and with --image --captions.")
        store = RegionStore(regions)
        query = _query(text, image, store)
        loaded, processor = load_for_store(model, store)
        names = list(store)
        if image is not None:
            names = _captions(str(captions), caption_ids, split, store, processor.tokenizer)
        hits = _score_all(query, image is not None, ImageTextScorer(loaded, processor, store), names)
    else:
        opened = SearchIndex(index)
        wanted = "captions" if text is None else "images"
        if opened.items != wanted:
            raise ValueError(f"{index} holds {opened.items}, but what is sought are {wanted}: give an index of these.")
        store = RegionStore(regions or _place(opened, "store", "--regions"))
        query = _query(text, image, store)
        encoder, scorer = _two_stages(opened, store, model, dual_encoder, photos, photo_ids)
        (hits,) = search(
            [query], opened, encoder, scorer,
            top_k=top_k, candidates=candidates, similarity_weight=similarity_weight,
        )  # fmt: skip
    hits = hits[:top_k]
    shown = query if isinstance(query, str) else query.image_id
    path = None if gallery is None else _write_gallery(gallery, shown, hits, store, photo)
    return SearchResult(shown, hits, path, similarity_weight)


def _two_stages(
    index: SearchIndex,
    store: RegionStore,
    model: str | None,
    dual_encoder: str | None,
    photos: str | None,
    photo_ids: str,
) -> tuple[DualEncoder, ImageTextScorer]:
    """The encoder that made the index, unless another is named, which `search` checks; and the scorer."""
    made_by = index.facts["encoder"]
    ours = made_by["family"] == "unicoder-vl" and dual_encoder is None
    name = _place(index, "encoder", "--model") if ours and model is None else model
    if name is None:
        raise ValueError(f"{index.path} was made by {made_by['name']}: give --model, a checkpoint of ours that scores.")
    loaded, processor = load_for_store(name, store)
    scorer = ImageTextScorer(loaded, processor, store, verbose=False)
    if ours:
        return UnicoderVLDualEncoder(loaded, processor, store, name), scorer
    needs_photos = index.items == "captions"  # which are searched by an image
    first = dual_encoder or _place(index, "encoder", "--dual-encoder")
    return open_transformers_encoder(first, photos, needs_photos, photo_ids), scorer


def _place(index: SearchIndex, made: str, option: str) -> str:
    """Where the encoder or the store of an index was when it was made. Raises ValueError where it is not any more."""
    name = index.facts[made]["name"]
    if os.path.isabs(name) and not os.path.exists(name):
        raise ValueError(f"{index.path} was made with {name}, which is not there any more: say where it is, {option}.")
    return name


def _captions(path: str, ids: str | None, split: str | None, store: RegionStore, tokenizer: Any) -> list[str]:
    """The captions of a file whose images are in the store, each text once."""
    rows, _ = join(read_captions(path, split=split, ids=ids), store, skip_missing=True)
    check_tokens(rows, tokenizer, path)
    return list(dict.fromkeys(rows["caption"][:]))


def _query(text: str | None, image: str | None, store: RegionStore) -> str | RegionRecord:
    """The sentence; or an image id, which may also be the name of its photo; or a record that was saved."""
    if image is None:
        return str(text)
    if image in store:
        return image
    path = Path(image)
    if str(path) != path.stem and not path.is_file():
        raise FileNotFoundError(f"--image {image}: there is no such file, nor an image of that id in {store.path}.")
    if path.suffix == ".npz":
        return RegionRecord.load(path)
    if path.stem in store:
        Photos(path)(path.stem)  # says of a file that is no photo what it is
        return path.stem
    raise ValueError(
        f"--image is {image!r}: neither an image of {store.path}, nor a photo of one, nor a saved record (.npz). Find "
        "its regions first, with `unicoder-vl extract` and the detector that the store is of."
    )


def _score_all(query: str | RegionRecord, by_image: bool, scorer: ImageTextScorer, names: Sequence[str]) -> list[Hit]:
    """Every name with the query, the best first; the scorer says before how long it takes."""
    scores = scorer.score(names, [query])[:, 0] if by_image else scorer.score([str(query)], names)[0]
    return [Hit(names[place], float(scores[place]), None) for place in np.argsort(-scores, kind="stable")]


def _write_gallery(
    path: str | os.PathLike[str], query: str, hits: Sequence[Hit], store: RegionStore, photo: Photos | None
) -> Path:
    from PIL import Image

    from ..pictures import GalleryItem, draw_regions, write_gallery

    class_names = store.provenance.get("class_names") or None
    problems: list[str] = []

    def picture(image_id: str) -> Image.Image:
        record = store[image_id]
        image = Image.new("RGB", (record.image_width or 640, record.image_height or 480), "white")
        if photo is not None:
            try:
                image = photo(image_id)
            except (KeyError, ValueError) as error:
                problems.append(error.args[0])
        if record.boxes is None:
            return image
        return draw_regions(image, record, class_names=class_names, max_regions=REGIONS_DRAWN, min_width=500)

    item = GalleryItem(query, best=tuple((hit.name, hit.score) for hit in hits))
    intro = f"The best of {len(store):,} images, by score, each with its {REGIONS_DRAWN} surest regions."
    written = write_gallery(path, [item], picture, title="Image search", intro=intro, picture_width=640)
    if problems:
        some = "\n".join(problems[:3]) + "\n…" * (len(problems) > 3)
        logger.warning(f"{len(problems)} of {len(hits)} found images get a blank page:\n{some}")
    return written
