"""The commands of search: making an index of a store, and searching in it or among all images."""

from argparse import Namespace

from .commands import (
    GO_ON,
    Add,
    Commands,
    add_caption_ids,
    add_detector,
    add_growth,
    add_shares,
    check_paths,
    detector_options,
    removed,
    share_of,
)

commands = Commands()


def _index_arguments(add: Add) -> None:
    add("store", help="folder of the store")
    add("--output", required=True, help="folder of the index; run again, it goes on")
    _add_encoder(add)
    add("--captions", help="index the captions of this file, whose images are in the store, instead")
    add("--split", help="split of --captions (default: all)")
    add("--images-of", metavar="CAPTIONS[:SPLIT]", help="index the images of a caption file alone, or those of a split")
    add_growth(add, "items")
    add("--restart", action="store_true", help="begin anew; an index that is there stays until the new one is complete")
    add_shares(add)
    add("--faiss", help="approximate structure in FAISS's words, such as HNSW32 (default: none, exact)")


@commands.register("index", "Embeds the images of a store, or captions, for search", _index_arguments, GO_ON)
def _index(args: Namespace) -> object:
    from ..search.command import make_index

    return make_index(
        args.store,
        args.output,
        model=args.model,
        dual_encoder=args.dual_encoder,
        photos=args.photos,
        photo_ids=args.photo_ids,
        captions=args.captions,
        caption_ids=args.caption_ids,
        split=args.split,
        images_of=args.images_of,
        faiss=args.faiss,
        add=args.add,
        remove=removed(args),
        restart=args.restart,
        share=share_of(args),
    )


def _search_arguments(add: Add) -> None:
    add("text", nargs="?", help="sentence to search images by")
    add("--image", metavar="FILE", help="photo, or saved record (.npz), to search captions by, or images like it")
    add("--image-id", metavar="ID", help="image of the store, to search captions by, or images like it")
    add_detector(add)
    add("--index", help="index of images, or of captions for --image and --image-id")
    add("--exhaustive", action="store_true", help="score every image of --regions instead, or caption")
    add("--regions", help="folder of the store (default: that of the index)")
    _add_encoder(add)
    add("--captions", help="caption file, for --exhaustive with --image or --image-id")
    add("--split", help="split of the captions (default: all)")
    add(
        "--candidates",
        type=int,
        default=100,
        help="images, or captions, of the first stage that are scored (default: 100)",
    )
    add(
        "--similarity-weight",
        type=float,
        help="weight in the order, score + weight x similarity (default: as measured in training, else 0)",
    )
    add("--top-k", type=int, default=10, help="hits that are shown (default: 10)")
    add("--gallery", help="HTML file of what was found: each of --photos whole, then its surest regions")


@commands.register(
    "search", "Finds the images that match a sentence or are like an image, or an image's captions", _search_arguments
)
def _search(args: Namespace) -> object:
    check_paths(args, "index", "regions", "photos", "captions")
    if args.text == "":
        raise ValueError("The sentence is empty: say what the images should show.")
    options = detector_options(args, "trained_on")
    from ..search.command import run_search

    return run_search(
        args.text,
        image=args.image,
        image_id=args.image_id,
        index=args.index,
        exhaustive=args.exhaustive,
        regions=args.regions,
        model=args.model,
        dual_encoder=args.dual_encoder,
        photos=args.photos,
        photo_ids=args.photo_ids,
        captions=args.captions,
        caption_ids=args.caption_ids,
        split=args.split,
        candidates=args.candidates,
        similarity_weight=args.similarity_weight,
        top_k=args.top_k,
        gallery=args.gallery,
        detector=args.detector,
        detector_options=options,
        cache=args.cache,
    )


def _add_encoder(add: Add) -> None:
    add("--model", help="checkpoint of ours; to search, the one that scores (default: as in the index)")
    add("--dual-encoder", help="first stage instead: CLIP, SigLIP or alike, on --photos")
    add("--photos", help="photos of the store: folder, .txt of files, .tar, or dataset")
    add("--photo-ids", default="stem", help="source of the photos' ids, as --ids of `extract` (default: stem)")
    add_caption_ids(add)
