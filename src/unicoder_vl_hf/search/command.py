"""Runs `unicoder-vl index` and `unicoder-vl search`: makes an index from named files, and finds hits in it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import logging
from ..data.caption_files import is_blank
from ..data.captions import check_tokens, join, read_captions
from ..files import make_folder
from ..modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from ..name_lists import did_you_mean
from ..records_unicoder_vl import RegionRecord
from ..regions.store import RegionStore
from ..scoring.checkpoints import load_for_store
from ..scoring.scorer import ImageTextScorer
from ..shares import Share
from .encoders import DualEncoder, Photos, TransformersDualEncoder, UnicoderVLDualEncoder, open_transformers_encoder
from .index import INDEX, SearchIndex, build_index, remove_items
from .two_stage import Hit, SimilarityWeight, search, search_similar

logger = logging.get_logger(__name__)

# Regions drawn on a photo of the gallery: more would hide it.
REGIONS_DRAWN = 10
ALIKE = "the similarity of two images in the first stage"


@dataclass(frozen=True)
class SearchResult:
    """
    The hits of one query; `str` makes a table of them, with the sum that orders them and the place of the gallery.

    Attributes:
        query (`str`): The query in words.
        hits (`list[Hit]`): The hits, the best first.
        gallery (`Path`, *optional*): The HTML file that shows them.
        weight ([`SimilarityWeight`], *optional*): The weight by which two stages ordered them; None if every pair was
            scored, or none.
    """

    query: str
    hits: list[Hit]
    gallery: Path | None = None
    weight: SimilarityWeight | None = None

    @property
    def similarity_weight(self) -> float:
        """The weight of the similarity in the order; 0 if every pair was scored."""
        return 0.0 if self.weight is None else self.weight.value

    def __str__(self) -> str:
        # Where the similarity adds nothing, what orders is the score itself; where there is no score, the similarity.
        alike = any(hit.is_alike for hit in self.hits)
        proposed = any(hit.similarity is not None for hit in self.hits)
        columns = [name for name, is_shown in (("score", not alike), ("similarity", proposed)) if is_shown]
        if self.weight is not None and self.weight.value > 0:
            columns.insert(0, self.weight.formula)
        rows = [["rank", *columns, ""]]
        for rank, hit in enumerate(self.hits, start=1):
            known = [f"{each:+.3f}" for each in (hit.score, hit.matching_score) if each is not None]
            scores = known[: len(columns) - columns.count("similarity")]
            similarity = [] if hit.similarity is None else [f"{hit.similarity:.3f}"]
            rows.append([str(rank), *scores, *similarity, hit.name])
        widths = [4, *(max(8, len(column)) for column in columns), 0]
        lines = [self.query]
        lines += [
            "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        if self.weight is not None or alike:
            lines.append(f"Ordered by {ALIKE if alike else self.weight}.")
        if self.gallery is not None:
            lines.append(f"Gallery: {self.gallery}")
        return "\n".join(lines)


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
    images_of: str | None = None,
    faiss: str | None = None,
    add: bool = False,
    remove: Sequence[str] | None = None,
    restart: bool = False,
    share: Share | None = None,
) -> str:
    """
    Indexes the images of a store, or captions of these, by a checkpoint of ours or by a dual encoder of transformers.
    Arguments are those of `unicoder-vl index`. Returns a line that describes the index.

    Raises:
        `ValueError`: not exactly one of `model` and `dual_encoder` is given, a dual encoder lacks `photos` of images,
        the first stage of `model` was not trained, options do not go together, or [`build_index`] raises it.
    """
    if remove is not None:
        others = {"--captions": captions, "--images-of": images_of, "--faiss": faiss}
        if given := [name for name, value in (others | {"--add": add, "--restart": restart}).items() if value]:
            raise ValueError(f"--remove takes items out of an index, and nothing else: leave {given[0]} out.")
        if not remove:
            raise ValueError("--remove names nothing to take out.")
        return f"{output} is complete: {len(remove_items(output, remove)):,} items, without {len(remove):,}."
    if (model is None) == (dual_encoder is None):
        raise ValueError("Give either --model, a checkpoint of ours, or --dual-encoder, one of transformers.")
    if captions is not None and images_of is not None:
        raise ValueError("Give either --captions, to index captions, or --images-of, to index the images of some.")
    if split is not None and captions is None:
        raise ValueError(
            f"--split {split} is of --captions, which are not given. --images-of CAPTIONS:{split} indexes the images "
            "of that split."
        )
    regions = RegionStore(store)
    image_ids = None if images_of is None else _images_of(images_of, caption_ids, regions)
    encoder: UnicoderVLDualEncoder | TransformersDualEncoder
    if model is not None:
        encoder = UnicoderVLDualEncoder(*load_for_store(model, regions), regions, model)
    else:
        encoder = open_transformers_encoder(
            str(dual_encoder), regions, photos, photo_ids=photo_ids, needs_photos=captions is None
        )
    texts = None
    if captions is not None:
        texts = _captions(captions, caption_ids, split, regions, encoder.processor.tokenizer)
    before = len(SearchIndex(output)) if not restart and Path(output, INDEX).exists() else None
    index = build_index(
        encoder,
        regions,
        output,
        image_ids=image_ids,
        captions=texts,
        faiss=faiss,
        add=add,
        restart=restart,
        share=share,
    )
    again = "" if before is None else f" There were {before:,} before."
    if before is not None and not add:
        again = " It was complete before; --add adds what is new, --restart begins anew."
    return f"{output} is complete: {len(index):,} {index.items}, {encoder.dim} numbers each, by {encoder.name}.{again}"


def run_search(
    text: str | None = None,
    *,
    image: str | os.PathLike[str] | None = None,
    image_id: str | None = None,
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
    similarity_weight: float | None = None,
    top_k: int = 10,
    gallery: str | None = None,
    detector: str | None = None,
    detector_options: Mapping[str, Any] | None = None,
    cache: str | None = None,
) -> SearchResult:
    """
    Finds images for a text, or captions or images for an image, in an index or among all there are. Arguments are those
    of `unicoder-vl search`.

    Raises:
        `ValueError`: arguments do not go together; the index is of the other kind, or was made by another checkpoint or
            from another store; or the regions of the photo `image` cannot be found.
        `FileNotFoundError`: `image` is no file.
    """
    by_text = text is not None
    if [text, image, image_id].count(None) != 2:
        raise ValueError(
            "Give either a sentence, to search images, or an image, to search captions or images: --image FILE or "
            "--image-id ID."
        )
    if (index is None) != exhaustive:
        raise ValueError("Give either --index, to search it in two stages, or --exhaustive, to score every pair.")
    if text is not None and is_blank(text):
        raise ValueError("The sentence is empty: say what the images should show.")
    for option, value in (("--top-k", top_k), ("--candidates", candidates)):
        if value < 1:
            raise ValueError(f"{option} is {value}, expected at least 1.")
    if exhaustive and similarity_weight:
        raise ValueError(
            "--exhaustive has no first stage whose similarity could be added: leave --similarity-weight out."
        )
    if exhaustive and dual_encoder is not None:
        raise ValueError("--exhaustive scores every pair, and has no first stage: leave --dual-encoder out.")
    if (captions or split) and (by_text or not exhaustive):
        raise ValueError("--captions and --split say what --exhaustive searches by an image: leave them out.")
    opened = None if index is None else SearchIndex(index)
    if opened is not None and by_text and opened.items != "images":
        raise ValueError(f"{index} holds captions, but what is sought are images: give an index of these.")
    by_similarity = opened is not None and opened.items == "images" and not by_text
    if gallery is not None and not (by_text or by_similarity):
        raise ValueError("--gallery shows images that are found, and an image finds captions here: leave it out.")
    if by_similarity and similarity_weight is not None:
        raise ValueError("An image finds images by their similarity alone: leave --similarity-weight out.")
    if gallery is not None:
        make_folder(Path(gallery).absolute().parent)
    # Where there are none, it is said before the search.
    opened_photos = None if photos is None or (gallery is None and image is None) else Photos(photos, photo_ids)
    finder: dict[str, Any] = {"detector": detector, "detector_options": detector_options, "cache": cache}
    weight = None
    if opened is None:
        if model is None or regions is None or not (by_text or captions):
            raise ValueError("--exhaustive needs --model and --regions, and to search captions --captions.")
        store = RegionStore(regions)
        query, shown = _query(text, image, image_id, store, opened_photos)
        scorer = _open_scorer(model, store, finder if isinstance(query, Path) else None, verbose=True)
        names = list(store)
        if not by_text:
            names = _captions(str(captions), caption_ids, split, store, scorer.processor.tokenizer)
        hits = _score_all(query, not by_text, scorer, names)
        searched = len(names)
    else:
        store = RegionStore(regions or _place(opened, "store", "--regions"))
        query, shown = _query(text, image, image_id, store, opened_photos)
        first_stage = dual_encoder, photos, photo_ids, image_id is not None
        of_photo = finder if isinstance(query, Path) else None
        encoder, two_stages = _stages(opened, store, model, *first_stage, of_photo, by_similarity)
        if two_stages is None:
            if outdated := opened.outdated(store):
                logger.warning(outdated)
            (hits,) = search_similar([query], opened, encoder, top_k=top_k)
        else:
            weight = SimilarityWeight.of(similarity_weight, encoder, two_stages)
            (hits,) = search(
                [query], opened, encoder, two_stages, top_k=top_k, candidates=candidates, similarity_weight=weight.value
            )
        searched = len(opened)
    hits = hits[:top_k]
    path = None
    if gallery is not None:
        ordered = ALIKE if by_similarity else "the score of every pair" if weight is None else str(weight)
        path = _write_gallery(gallery, shown, hits, store, opened_photos, f"{searched:,} images, ordered by {ordered}")
    return SearchResult(shown, hits, path, weight)


def _stages(
    index: SearchIndex,
    store: RegionStore,
    model: str | None,
    dual_encoder: str | None,
    photos: str | None,
    photo_ids: str,
    needs_photos: bool,
    finder: Mapping[str, Any] | None,
    by_similarity: bool,
) -> tuple[DualEncoder, ImageTextScorer | None]:
    """
    Opens the encoder that made the index, unless another is named, which `search` checks; and the scorer, where the
    similarity does not do alone.
    """
    made_by = index.facts["encoder"]
    if made_by["family"] == "unicoder-vl" and dual_encoder is None:
        name = model or _place(index, "encoder", "--model")
        scorer = _open_scorer(name, store, finder)
        loaded = cast(UnicoderVLForImageTextRetrieval, scorer.model)  # as from_pretrained makes it
        ours = UnicoderVLDualEncoder(loaded, scorer.processor, store, name)
        return ours, None if by_similarity else scorer
    if model is None and not by_similarity:
        raise ValueError(f"{index.path} was made by {made_by['name']}: give --model, a checkpoint of ours that scores.")
    first = dual_encoder or _place(index, "encoder", "--dual-encoder")
    encoder = open_transformers_encoder(first, store, photos, photo_ids=photo_ids, needs_photos=needs_photos)
    if model is None or by_similarity:
        return encoder, None
    return encoder, _open_scorer(model, store, finder)


def _open_scorer(
    model: str, store: RegionStore, finder: Mapping[str, Any] | None, verbose: bool = False
) -> ImageTextScorer:
    """Opens a scorer with the detector of a photo; without one names are ids of the store, whatever files there are."""
    scorer = ImageTextScorer.from_pretrained(model, store, verbose=verbose, **(finder or {}))
    if finder is None:
        scorer.processor.set_detector(None)
    return scorer


def _place(index: SearchIndex, made: str, option: str) -> str:
    """Gives the place of the encoder or store at the index's making. Raises ValueError if it is not there any more."""
    name = index.facts[made]["name"]
    if os.path.isabs(name) and not os.path.exists(name):
        raise ValueError(f"{index.path} was made with {name}, which is not there any more: say where it is, {option}.")
    return name


def _captions(path: str, ids: str | None, split: str | None, store: RegionStore, tokenizer: Any) -> list[str]:
    """Reads the captions of a file whose images are in the store, each text once."""
    rows, _ = join(read_captions(path, split=split, ids=ids), store, skip_missing=True)
    check_tokens(rows, tokenizer, path)
    texts = list(dict.fromkeys(rows["caption"][:]))
    if repeated := len(rows) - len(texts):
        logger.warning(
            f"{path}: {repeated:,} of {len(rows):,} captions repeat an earlier one; each text is taken once."
        )
    return texts


def _images_of(source: str, ids: str | None, store: RegionStore) -> list[str]:
    """Reads the images of the store that a caption file names, in all its splits (`FILE`) or in one (`FILE:SPLIT`)."""
    path, split = source, None
    if not Path(source).exists() and ":" in source:
        path, _, split = source.rpartition(":")
    return join(read_captions(path, split=split, ids=ids), store, skip_missing=True)[0].unique("image_id")


def _query(
    text: str | None,
    image: str | os.PathLike[str] | None,
    image_id: str | None,
    store: RegionStore,
    photos: Photos | None,
) -> tuple[str | RegionRecord | Path, str]:
    """Makes the query of the arguments, a sentence, the id of a stored image, a saved record or a photo; its words."""
    if image is None and image_id is None:
        return str(text), str(text)
    if image is None:
        if image_id not in store:
            file = f" It is a file: --image {image_id}." if Path(str(image_id)).is_file() else ""
            raise ValueError(
                f"{store.path} has no image {image_id!r}; its ids are like {list(islice(store, 3))}."
                f"{file or did_you_mean(str(image_id), store)}"
            )
        return str(image_id), str(image_id)
    path, is_id = Path(image), isinstance(image, str) and image in store
    if not path.is_file():
        known = f" {store.path} has an image of that id: --image-id {image}." if is_id else ""
        raise FileNotFoundError(f"--image {image}: there is no such file.{known}")
    if is_id:
        raise ValueError(
            f"{image} is a file, and the id of an image of {store.path}: give --image ./{image} for the "
            f"file, or --image-id {image} for the stored image."
        )
    if path.suffix == ".npz":
        record = RegionRecord.load(path)
        return record, f"{path}, the saved regions of {record.image_id!r}"
    return _photo(path, store, photos)


def _photo(path: Path, store: RegionStore, photos: Photos | None) -> tuple[str | Path, str]:
    """
    Gives the id of the stored image whose photo a file is, if another file of its name in `photos` holds the same
    bytes; else the file itself. A name alone shows nothing.
    """
    parts = Path(os.path.abspath(path)).parts
    names = [*("/".join(parts[start:]) for start in range(1, len(parts))), path.stem]  # an id may be a path
    image_id = next((name for name in names if name in store), None)
    if image_id is None:
        return path, f"{path}, a photo"
    if photos is not None and image_id in photos:
        file = Path(photos.file(image_id))
        if not (file.is_file() and file.samefile(path)) and photos.read(image_id) == path.read_bytes():
            return image_id, f"{path}, the photo of the stored image {image_id!r}"
    return path, f"{path}, a photo whose regions are found anew (the stored image {image_id!r} has its name)"


def _score_all(
    query: str | RegionRecord | Path, by_image: bool, scorer: ImageTextScorer, names: Sequence[str]
) -> list[Hit]:
    """Scores every name with the query, the best first; the scorer says before how long it takes."""
    scores = scorer.score(names, [query])[:, 0] if by_image else scorer.score([str(query)], names)[0]
    return [Hit(names[at], float(scores[at]), None, float(scores[at])) for at in np.argsort(-scores, kind="stable")]


def _write_gallery(
    path: str | os.PathLike[str],
    query: str,
    hits: Sequence[Hit],
    store: RegionStore,
    photos: Photos | None,
    searched: str,
) -> Path:
    """Writes a gallery: each found image whole, then with its surest regions, on a blank page if there is no photo."""
    from PIL import Image

    from ..pictures import GalleryItem, blank_page, draw_regions, write_gallery

    class_names = store.provenance.get("class_names") or None
    problems: list[str] = []

    def pictures(image_id: str) -> list[Image.Image]:
        photo = None
        if image_id not in store:
            problems.append(f"{store.path} has no image {image_id!r} any more.")
            return []
        record = store[image_id]
        if photos is not None:
            try:
                photo = photos.of(record)
            except (KeyError, ValueError) as error:
                problems.append(error.args[0])
        page = photo or blank_page(record)
        if not _have_scores(record):
            return [page]
        drawn = draw_regions(page, record, class_names=class_names, max_regions=REGIONS_DRAWN, min_width=500)
        return [drawn] if photo is None else [photo, drawn]

    surest = f"its {REGIONS_DRAWN} surest regions"
    unscored = "regions are not drawn, since they have no scores by which some would stand out"
    shown = {
        (True, True): f"shown whole, then with {surest}",
        (True, False): f"shown whole; {unscored}",
        (False, True): f"shown as {surest} on a blank page, without --photos",
        (False, False): f"a blank page, without --photos; {unscored}",
    }[photos is not None, any(hit.name in store and _have_scores(store[hit.name]) for hit in hits)]
    item = GalleryItem(
        query,
        best=tuple((hit.name, hit.score) for hit in hits),
        notes={hit.name: hit.summands for hit in hits if hit.similarity is not None},
    )
    intro = f"The best {len(hits)} of {searched}. Each is {shown}."
    written = write_gallery(path, [item], pictures, title="Image search", intro=intro, picture_width=640)
    if problems:
        some = "\n".join([*problems[:3], "…"] if len(problems) > 3 else problems)
        logger.warning(f"{len(problems)} of {len(hits)} found images get a blank page:\n{some}")
    return written


def _have_scores(record: RegionRecord) -> bool:
    """Whether some regions stand out, to be drawn; the cells of a grid have no scores."""
    return record.boxes is not None and record.object_scores is not None
