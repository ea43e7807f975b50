"""The commands that begin with photos: they extract regions, and prepare captions."""

from argparse import Namespace

from .commands import (
    GO_ON,
    Add,
    Commands,
    add_caption_ids,
    add_detector_option,
    add_growth,
    add_restart,
    add_shares,
    check_paths,
    detector_options,
    removed,
    share_of,
    stored,
)

commands = Commands()


def _extract_arguments(add: Add) -> None:
    add(
        "photos",
        help="photos: a folder, .tar, .txt of file names, .parquet, folder of a dataset, or a URL such as s3://…",
    )
    add("store", help="folder of the store")
    add(
        "--detector",
        required=True,
        metavar="FAMILY:NAME",
        help="detector of the family visual-genome, torchvision, transformers or grid; or MODULE:CLASS",
    )
    add_detector_option(add, "max_regions=36")
    add(
        "--ids",
        default="stem",
        help="source of the photos' ids: stem (default: file names without suffix), path, key (webdataset's), coco, a "
        ".csv (source_id, image_id), or CAPTIONS:COLUMN",
    )
    add("--skip-unmapped", action="store_true", help="leave out photos that --ids does not cover")
    add("--image-column", default="image", help="column of a dataset's photos (default: image)")
    add("--id-column", default="image_id", help="column of a dataset's ids (default: image_id)")
    add("--split", help="split of a dataset")
    add("--boxes", help="boxes to pool features in: a .npz, or a .jsonl of image_id and boxes")
    add("--batch-size", type=int, help="photos at a time (default: 1 on a CPU, 8 on a GPU)")
    add("--num-workers", type=int, default=2, help="reading processes (default: 2)")
    add("--device", help="device such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--precision", default="auto", help="precision: auto (what the device is fast in), no, bf16 or fp16")
    add("--dtype", default="float16", help="type of the stored features (default: float16)")
    add_growth(add, "photos")
    add_restart(add)
    add_shares(add)
    add("--engine", default="local", choices=("local", "ray"), help="processes: local (default), or ray, a cluster's")
    add("--share-size", type=int, default=256, help="photos in a share of --engine ray (default: 256)")
    add("--detectors", type=int, help="detectors of --engine ray (default: one for each GPU, or for every two CPUs)")


@commands.register("extract", "Photos → a store, by a detector; run again, it goes on", _extract_arguments, GO_ON)
def _extract(args: Namespace) -> object:
    check_paths(args, "photos", "boxes")
    options = detector_options(args, "output", "shard_size", "name", "rename")
    from ..data.image_ids import photo_ids
    from ..regions.extraction import extract

    store = extract(
        args.photos,
        args.store,
        args.detector,
        skip_unmapped=args.skip_unmapped,
        image_column=args.image_column,
        id_column=args.id_column,
        split=args.split,
        boxes=args.boxes,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
        precision=args.precision,
        dtype=args.dtype,
        add=args.add,
        remove=removed(args),
        restart=args.restart,
        share=share_of(args),
        engine=args.engine,
        share_size=args.share_size,
        detectors=args.detectors,
        **photo_ids(args.ids),
        **options,
    )
    return stored(store)


def _prepare_arguments(add: Add) -> None:
    add("photos", help="photos as `extract` takes them, or the store that it wrote")
    add("captions", help="caption file in any layout")
    add("output", help="new .jsonl of image_id, caption and split")
    add("--ids", default="stem", help="source of the photos' ids, as --ids of `extract` (default: stem)")
    add_caption_ids(add)
    add(
        "--splits",
        type=_shares,
        metavar="SHARES",
        help="draw splits anew: shares of train, val and test (default: those of the captions, else 0.8,0.1,0.1)",
    )
    add("--split-list", action="append", default=[], metavar="NAME=FILE", help="file of a split's images, one a line")
    add("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    add("--restart", action="store_true", help="write anew where other prepared captions are")


@commands.register(
    "prepare",
    "Captions with the ids of photos and with splits, in a file that every script takes",
    _prepare_arguments,
    "Run again.",
)
def _prepare(args: Namespace) -> object:
    check_paths(args, "photos", "captions")
    from ..data.preparation import prepare

    lists = dict(text.partition("=")[::2] for text in args.split_list)
    if not all(lists) or not all(lists.values()) or len(lists) < len(args.split_list):
        raise ValueError(f"--split-list is {args.split_list}, expected NAME=FILE, each name once.")
    return prepare(
        args.photos,
        args.captions,
        args.output,
        ids=args.ids,
        caption_ids=args.caption_ids,
        splits=args.splits,
        split_lists=lists,
        seed=args.seed,
        restart=args.restart,
    )


def _shares(text: str) -> tuple[float, ...]:
    """Reads numbers between commas; argparse reports what is no number."""
    return tuple(map(float, text.split(",")))
