"""The commands of search: making an index of a store, and searching in it or among all images."""

from argparse import ArgumentParser, Namespace

from .commands import (
    GO_ON,
    Commands,
    add_caption_ids,
    add_detector_option,
    add_growth,
    check_paths,
    detector_options,
    removed,
)

commands = Commands()


def _index_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("store", help="folder of the store")
    parser.add_argument("--output", required=True, help="folder of the index; run again, it goes on")
    _add_encoder(parser)
    parser.add_argument("--captions", help="index the captions of this file, whose images are in the store, instead")
    parser.add_argument("--split", help="split of --captions (default: all)")
    parser.add_argument(
        "--images-of", metavar="CAPTIONS[:SPLIT]", help="index the images of a caption file alone, or those of a split"
    )
    add_growth(parser, "items")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew; an index that is there stays until the new one is complete"
    )
    parser.add_argument("--faiss", help="approximate structure in FAISS's words, such as HNSW32 (default: none, exact)")


@commands.register("index", "Embeds the images of a store, or captions, for search", _index_arguments, GO_ON)
def _index(args: Namespace) -> None:
    from ..search.command import make_index

    done = make_index(
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
    )
    print(done)


def _search_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="sentence to search images by")
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="search captions instead, by a photo, or a saved record (.npz)",
    )
    parser.add_argument("--image-id", metavar="ID", help="search captions instead, by an image of the store")
    parser.add_argument(
        "--detector",
        metavar="FAMILY:NAME",
        help="detector of the photo (default: that of the regions that --model was trained on)",
    )
    add_detector_option(parser, "grid_size=7")
    parser.add_argument("--index", help="index of images, or of captions for --image and --image-id")
    parser.add_argument("--exhaustive", action="store_true", help="score every image of --regions instead, or caption")
    parser.add_argument("--regions", help="folder of the store (default: that of the index)")
    _add_encoder(parser)
    parser.add_argument("--captions", help="caption file, for --exhaustive with --image or --image-id")
    parser.add_argument("--split", help="split of the captions (default: all)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=100,
        help="images, or captions, of the first stage that are scored (default: 100)",
    )
    parser.add_argument(
        "--similarity-weight",
        type=float,
        help="weight in the order, score + weight x similarity (default: as measured in training, else 0)",
    )
    parser.add_argument("--top-k", type=int, default=10, help="hits that are shown (default: 10)")
    parser.add_argument(
        "--gallery", help="HTML file of what was found: each of --photos whole, then its surest regions"
    )


@commands.register(
    "search", "Finds the images that match a sentence best, or the captions that match an image", _search_arguments
)
def _search(args: Namespace) -> None:
    check_paths(args, "index", "regions", "photos", "captions")
    if args.text == "":
        raise ValueError("The sentence is empty: say what the images should show.")
    from ..search.command import run_search

    found = run_search(
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
        detector_options=detector_options(args),
    )
    print(found)


def _add_encoder(parser: ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint of ours; to search, the one that scores (default: as in the index)")
    parser.add_argument("--dual-encoder", help="first stage instead: CLIP, SigLIP or alike, on --photos")
    parser.add_argument("--photos", help="photos of the store: folder, .tar, or folder of a dataset")
    parser.add_argument(
        "--photo-ids", default="stem", help="source of the photos' ids, as --ids of `extract` (default: stem)"
    )
    add_caption_ids(parser)
