"""`unicoder-vl`: region features, from photos or from files of other tools, and search with them, from the shell."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import package_version
from .errors import USER_ERRORS, end_with, stopped

if TYPE_CHECKING:
    from PIL import Image

GO_ON = "Run again, it goes on; --restart begins anew."


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command. Returns 0, 1 after an error that the user can mend, which is said in one line, or 130 after Ctrl-C.

    What a command needs is imported when it runs: Ctrl-C is caught meanwhile, and the others need not wait for it.
    """
    program, go_on = "unicoder-vl", ""
    try:
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        program, go_on = f"{program} {args.command}", GO_ON if "restart" in args else ""
        return args.run(args) or 0
    except USER_ERRORS as error:
        return end_with(error, program)
    except KeyboardInterrupt:
        return stopped(program, go_on)


def _parser() -> argparse.ArgumentParser:
    from .regions.conversion import EXPORTS

    parser = argparse.ArgumentParser(prog="unicoder-vl", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unicoder-vl-hf {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(run, help: str, *positional: tuple[str, str]) -> argparse.ArgumentParser:
        name = run.__name__.strip("_").replace("_", "-")
        added = commands.add_parser(
            name, help=help, description=help if help.endswith("?") else f"{help}.", allow_abbrev=False
        )
        added.set_defaults(run=run, parser=added)
        for argument, text in positional:
            added.add_argument(argument, help=text)
        return added

    extract = command(
        _extract,
        "Photos → a store, by a detector; run again, it goes on",
        ("photos", "folder, .tar, .txt of file names, .parquet, or folder of a dataset"),
        ("store", "its folder"),
    )
    extract.add_argument(
        "--detector", required=True, metavar="FAMILY:NAME", help="visual-genome:, torchvision:, transformers: or grid:"
    )
    extract.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="of the detector, as max_regions=36"
    )
    extract.add_argument(
        "--ids",
        default="stem",
        help="how photos get their ids: stem (default: file names without suffix), path, key (webdataset's), coco, a "
        ".csv (source_id, image_id), or CAPTIONS:COLUMN",
    )
    extract.add_argument("--skip-unmapped", action="store_true", help="leave out photos that --ids does not cover")
    extract.add_argument("--image-column", default="image", help="of a dataset")
    extract.add_argument("--id-column", default="image_id", help="of a dataset")
    extract.add_argument("--split", help="of a dataset")
    extract.add_argument("--boxes", help="pool features in these boxes: a .npz, or a .jsonl of image_id and boxes")
    extract.add_argument("--batch-size", type=int, help="photos a call (default: 1 on a CPU, 8 on a GPU)")
    extract.add_argument("--num-workers", type=int, default=2, help="reading processes (default: 2)")
    extract.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    extract.add_argument("--precision", default="auto", help="auto (what the device is fast in), no, bf16 or fp16")
    extract.add_argument("--dtype", default="float16", help="of the stored features (default: float16)")
    _add_restart(extract)

    prepare = command(
        _prepare,
        "Captions with the ids of photos and with splits, in a file that every script takes",
        ("photos", "what `extract` takes, or the store that it wrote"),
        ("captions", "caption file in any layout"),
        ("output", "new .jsonl of image_id, caption and split"),
    )
    prepare.add_argument("--ids", default="stem", help="how photos get their ids, as --ids of `extract` (stem)")
    _add_caption_ids(prepare)
    prepare.add_argument(
        "--splits",
        type=_shares,
        metavar="SHARES",
        help="draw splits anew: shares of train, val and test (default: those of the captions, else 0.8,0.1,0.1)",
    )
    prepare.add_argument(
        "--split-list", action="append", default=[], metavar="NAME=FILE", help="a split's images, one a line"
    )
    prepare.add_argument("--seed", type=int, default=0, help="of the draw")
    _add_restart(prepare)

    convert = command(
        _convert, "Feature files of another tool → a store", ("source", "file or folder"), ("store", "its new folder")
    )
    _add_format(convert)
    convert.add_argument(
        "--ids", help="other names for the images: stem, coco, a .csv (source_id, image_id), or CAPTIONS:COLUMN"
    )
    convert.add_argument("--skip-unmapped", action="store_true", help="leave out images that --ids does not cover")
    convert.add_argument(
        "--skip-broken", action="store_true", help="leave out images that are damaged, and list them in skipped.jsonl"
    )
    convert.add_argument("--dtype", default="float16", help="of the features: float16 (default), bfloat16 or float32")
    convert.add_argument("--workers", type=int, default=1, help="processes")
    convert.add_argument("--resume", action="store_true", help="add what a finished store lacks of the source")
    _add_restart(convert)
    convert.add_argument("--source-detector", metavar="NAME@REVISION", help="what found the regions, as you declare it")
    convert.add_argument("--num-classes", type=int, help="object classes of the detector, without background")

    export = command(
        _export,
        "A store → files that other tools read",
        ("store", "its folder"),
        ("path", "new folder; for lxmert-tsv a .tsv, for uniter-lmdb named such as feat_th0.2_max100_min10"),
    )
    export.add_argument("--format", required=True, help=f"one of {', '.join(EXPORTS)}")

    inspect = command(_inspect, "What a store or a feature file holds", ("source", "store, file or folder"))
    _add_format(inspect)
    inspect.add_argument("--max-images", type=int, help="look at so many (default: all of a store, 1,000 of a file)")
    inspect.add_argument("--image-id", help="show the regions of this image")
    inspect.add_argument("--photo", help="draw the boxes of --image-id on this file, which must be its photo")
    inspect.add_argument("--output", default="regions.png", help="where the drawing goes (default: regions.png)")

    command(_validate, "Look for damage in a store, and name the images", ("store", "its folder"))

    compare = command(
        _compare, "Do the features of two stores agree?", ("a", "a store"), ("b", "another of the same images")
    )
    compare.add_argument("--min-iou", type=float, default=0.5, help="boxes that overlap less do not match")
    compare.add_argument("--max-images", type=int, help="compare the first so many")

    label = command(
        _label,
        "Object classes for a store that has none, by the classifier of the detector that its features are of",
        ("store", "its folder"),
        ("output", "folder of the labelled store"),
    )
    label.add_argument("--detector", required=True, help="visual-genome:NAME, the same that found the regions")
    label.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="of the detector, as revision=main"
    )
    _add_restart(label, resume=True)

    merge = command(_merge, "Several stores → one, or one that is told its number of classes")
    merge.add_argument("stores", nargs="+", help="of different images and one provenance")
    merge.add_argument("--output", required=True, help="folder of the new store")
    merge.add_argument("--num-classes", type=int, help="object classes of the detector, for stores that do not tell")
    _add_restart(merge)

    mine = command(
        _mine,
        "Hard negatives for fine-tuning, by the current model",
        ("model", "checkpoint with its processor"),
        ("captions", "caption file"),
        ("regions", "store"),
        ("output", "new folder of captions with their negatives, for run_retrieval.py"),
    )
    mine.add_argument("--split", default="train", help="of the captions (default: train)")
    _add_caption_ids(mine)
    mine.add_argument("--num-negatives", type=int, default=3, help="captions, and images, of each pair (default: 3)")
    mine.add_argument("--images-per-set", type=int, default=100, help="images that meet one another (default: 100)")
    mine.add_argument(
        "--candidates", type=int, help="instead of sets, so many of the whole split, by the checkpoint's first stage"
    )
    mine.add_argument("--range-min", type=int, default=0, help="pass over so many of the hardest")
    mine.add_argument("--range-max", type=int, help="look at so many of the hardest")
    for name, text in (
        ("min-score", "sigmoid(score) at least"),
        ("max-score", "sigmoid(score) at most"),
        ("absolute-margin", "so far below the lowest match of the query"),
        ("relative-margin", "so far below it, as a share of it"),
    ):
        mine.add_argument(f"--{name}", type=float, help=text)
    mine.add_argument("--sampling-strategy", choices=("top", "random"), default="top", help="the hardest, or any left")
    mine.add_argument("--duplicates", help="photos that show the same: .jsonl or .csv, a group a line")
    mine.add_argument("--seed", type=int, default=0, help="of sets and draws")
    mine.add_argument("--max-length", type=int, default=44, help="tokens of a caption")
    mine.add_argument("--skip-missing", action="store_true", help="leave out captions whose image has no regions")
    _add_restart(mine)

    first_stage = command(
        _train_first_stage,
        "A first stage of search for a checkpoint, by training its projection alone",
        ("model", "checkpoint with its processor"),
        ("captions", "caption file, with both splits"),
        ("regions", "store"),
        ("output", "new folder of the checkpoint with its first stage"),
    )
    first_stage.add_argument("--split", default="train", help="to train on (default: train)")
    first_stage.add_argument("--validation-split", default="val", help="to choose the best epoch by (default: val)")
    _add_caption_ids(first_stage)
    first_stage.add_argument("--projection-dim", type=int, default=256, help="width of the embeddings (default: 256)")
    first_stage.add_argument("--epochs", type=int, default=20, help="default: 20")
    first_stage.add_argument("--batch-size", type=int, default=512, help="pairs (default: 512)")
    first_stage.add_argument("--learning-rate", type=float, default=2e-3, help="default: 2e-3")
    first_stage.add_argument("--duplicates", help="photos that show the same: .jsonl or .csv, a group a line")
    first_stage.add_argument("--seed", type=int, default=0, help="of new weights and shuffles")
    first_stage.add_argument("--max-length", type=int, default=44, help="tokens of a caption")
    first_stage.add_argument(
        "--skip-missing", action="store_true", help="leave out captions whose image has no regions"
    )

    index = command(_index, "A store, or captions, embedded for search", ("store", "its folder"))
    index.add_argument("--output", required=True, help="folder of the index; run again, it goes on")
    _add_encoder(index)
    index.add_argument("--captions", help="index the captions of this file, whose images are in the store, instead")
    index.add_argument("--split", help="split of --captions (default: all)")
    index.add_argument(
        "--images-of", metavar="CAPTIONS[:SPLIT]", help="index the images of a caption file alone, or those of a split"
    )
    index.add_argument(
        "--restart", action="store_true", help="begin anew; an index that is there stays until the new one is complete"
    )
    index.add_argument("--faiss", help="an approximate structure in FAISS's words, such as HNSW32 (default: exact)")

    search = command(_search, "The images that match a sentence best, or the sentences that match an image")
    search.add_argument("text", nargs="?", help="the sentence")
    search.add_argument(
        "--image",
        metavar="FILE",
        help="search captions instead, by a photo of the store (see --photos), or a saved record",
    )
    search.add_argument("--image-id", metavar="ID", help="search captions instead, by an image of the store")
    search.add_argument("--index", help="index of images, or of captions for --image and --image-id")
    search.add_argument("--exhaustive", action="store_true", help="score every image of --regions instead, or caption")
    search.add_argument("--regions", help="store (default: that of the index)")
    _add_encoder(search)
    search.add_argument("--captions", help="caption file, for --exhaustive with --image or --image-id")
    search.add_argument("--split", help="split of the captions (default: all)")
    search.add_argument(
        "--candidates",
        type=int,
        default=100,
        help="images, or captions, of the first stage that are scored (default: 100)",
    )
    search.add_argument(
        "--similarity-weight",
        type=float,
        help="weight in the order, score + weight x similarity (default: as measured in training, else 0)",
    )
    search.add_argument("--top-k", type=int, default=10, help="hits that are shown (default: 10)")
    search.add_argument(
        "--gallery", help="HTML file of what was found: each of --photos whole, then its surest regions"
    )

    vcr_check = command(_vcr_check, "Would VCR's leaderboard take this submission?", ("submission", "CSV"))
    vcr_check.add_argument("--annotations", required=True, metavar="FILE", help="VCR's test.jsonl")
    return parser


def _add_restart(parser: argparse.ArgumentParser, resume: bool = False) -> None:
    """For a command that goes on when it is run again. Some once wanted `--resume` for that, and take it still."""
    parser.add_argument("--restart", action="store_true", help="begin anew; what was complete stays until this is")
    if resume:
        parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint of ours; to search, the one that scores (default: as in the index)")
    parser.add_argument("--dual-encoder", help="CLIP, SigLIP or alike as first stage, on --photos")
    parser.add_argument("--photos", help="photos of the store: folder, .tar, or folder of a dataset")
    parser.add_argument("--photo-ids", default="stem", help="how photos get their ids, as --ids of `extract` (stem)")
    _add_caption_ids(parser)


def _add_caption_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--caption-ids",
        help="other names for the images of the captions: stem, coco, a .csv (source_id, image_id), or CAPTIONS:COLUMN",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    from .regions.formats import FEATURE_DTYPES, FORMATS

    parser.add_argument("--format", help=f"found from the content by default; one of {', '.join(FORMATS)}")
    parser.add_argument("--class-names", help="file with the name of an object id a line, without background")
    parser.add_argument(
        "--feature-dtype",
        metavar="DTYPE",
        help=f"type of features that are only bytes: {', '.join(FEATURE_DTYPES)}",
    )
    parser.add_argument("--background", action="store_true", help="object ids count a background class as 0")
    parser.add_argument("--index", help="file that names the images, for formats that number them")


def _format_options(args: argparse.Namespace) -> dict[str, Any]:
    from .name_lists import read_names

    options: dict[str, Any] = {}
    if args.class_names is not None:
        options["class_names"] = read_names(args.class_names)
    if args.feature_dtype is not None:
        options["feature_dtype"] = args.feature_dtype
    if args.background:
        options["background"] = True
    if args.index is not None:
        options["index"] = args.index
    return options


def _extract(args: argparse.Namespace) -> None:
    from .data.image_ids import photo_ids
    from .regions.extraction import extract

    options = _options(args, "output", "shard_size", "name", "rename") | photo_ids(args.ids)
    print(extract(output=args.store, **_arguments(args, "store", "option", "ids"), **options))


def _prepare(args: argparse.Namespace) -> None:
    from .data.prepare import prepare

    lists = dict(text.partition("=")[::2] for text in args.split_list)
    if not all(lists) or not all(lists.values()) or len(lists) < len(args.split_list):
        raise ValueError(f"--split-list is {args.split_list}, expected NAME=FILE, each name once.")
    print(prepare(**_arguments(args, "split_list"), split_lists=lists))


def _shares(text: str) -> tuple[float, ...]:
    """Numbers between commas; argparse says what is none."""
    return tuple(map(float, text.split(",")))


def _arguments(args: argparse.Namespace, *without: str) -> dict[str, Any]:
    """What was typed, as keyword arguments of the function that a command stands for."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "run", "parser", *without)}


def _options(args: argparse.Namespace, *taken: str) -> dict[str, Any]:
    """
    The detector's options; a value as JSON where it is some, else as text.

    Args:
        args (`argparse.Namespace`): `option` holds texts NAME=VALUE.
        taken (`str`): Further arguments of the functions that they pass through, which are none of the detector.
    """
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--option is {text!r}, expected NAME=VALUE.")
        if name in args:
            raise ValueError(f"--option {text}: {name} is an option of its own, and none of the detector.")
        if name in taken:
            raise ValueError(f"--option {text}: no detector has an option {name}.")
        if name in options:
            raise ValueError(f"--option {text}: {name} is given twice.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _convert(args: argparse.Namespace) -> None:
    from .data.image_ids import id_mapping
    from .regions.conversion import convert

    options: dict[str, Any] = {"dtype": args.dtype, "num_classes": args.num_classes}
    if args.source_detector is not None:
        name, at, revision = args.source_detector.rpartition("@")
        if not (name and at and revision):
            raise ValueError(f"--source-detector is {args.source_detector!r}, expected NAME@REVISION.")
        options |= {"detector": name, "detector_revision": revision, "detector_declared": True}
    store = convert(
        args.source,
        args.store,
        format=args.format,
        rename=None if args.ids is None else id_mapping(args.ids),
        skip_unmapped=args.skip_unmapped,
        skip_broken=args.skip_broken,
        workers=args.workers,
        resume=args.resume or None,
        restart=args.restart,
        format_options=_format_options(args),
        **options,
    )
    print(store)


def _export(args: argparse.Namespace) -> None:
    from .regions.conversion import export
    from .regions.store import RegionStore

    export(RegionStore(args.store), args.path, args.format)
    print(f"{args.path} written.")


def _inspect(args: argparse.Namespace) -> None:
    from .regions.formats import detect_format, read_records
    from .regions.inspection import check_photo_size, describe, inspect_records
    from .regions.shards import MANIFEST, UNFINISHED
    from .regions.store import RegionStore

    image_id = args.image_id
    if args.photo is not None and image_id is None:
        raise ValueError(f"Say with --image-id which image {args.photo} is a photo of: its name does not show it.")
    opened = None if args.photo is None else _open_photo(args.photo)
    store, format, options = None, args.format, _format_options(args)
    if any((Path(args.source) / name).exists() for name in (MANIFEST, UNFINISHED)):
        store = RegionStore(args.source)
        record = store.get(image_id)
    else:
        format = format or detect_format(args.source)
        every = read_records(args.source, format, **options) if image_id is not None else ()
        record = next((each for each in every if each.image_id == image_id), None)
    if image_id is not None and record is None:
        first = next(iter(read_records(args.source, format, **options) if store is None else store.values()), None)
        like = "" if first is None else f"; its first is {first.image_id!r}"
        raise ValueError(f"{args.source} has no image {image_id!r}{like}.")
    if record is not None and opened is not None:
        check_photo_size(record, args.photo, opened[1])
    if store is None:
        found = inspect_records(read_records(args.source, format, **options), args.max_images or 1000)
        print(f"format    {format}\n{found}")
    else:
        found = inspect_records(store.values(), args.max_images, total=args.max_images or len(store))
        known = {name: value for name, value in store.provenance.items() if value not in (None, [], {})}
        print(
            f"{store}\n{found}\n\nprovenance\n"
            + "\n".join(f"  {name:20} {value}"[:160] for name, value in known.items())
        )
    if record is None:
        return
    print(f"\n{describe(record)}")
    if opened is not None:
        from .pictures import draw_regions

        draw_regions(opened[0], record).save(args.output)
        checked = "" if record.image_width else " (whose size the record does not know, so it may be another photo)"
        print(f"\nBoxes of {record.image_id!r} drawn on {args.photo}{checked}: {args.output}")


def _open_photo(path: str) -> "tuple[Image.Image, tuple[int, int]]":
    """A photo and its size. Raises ValueError or OSError, both of which name the file."""
    from .regions.extraction import decode_photo

    try:
        return decode_photo(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"--photo {path}: {error}") from error


def _validate(args: argparse.Namespace) -> int:
    from .regions.validation import validate

    return _print_problems(validate(args.store))


def _compare(args: argparse.Namespace) -> None:
    from .regions.comparison import compare_stores
    from .regions.store import RegionStore

    print(compare_stores(RegionStore(args.a), RegionStore(args.b), min_iou=args.min_iou, max_images=args.max_images))


def _label(args: argparse.Namespace) -> None:
    from .regions.labelling import label, load_classifier
    from .regions.store import RegionStore

    store = RegionStore(args.store)
    classifier = load_classifier(store, args.detector, **_options(args, "name"))
    print(label(store, args.output, classifier, restart=args.restart))


def _merge(args: argparse.Namespace) -> None:
    from .regions.editing import merge_stores

    print(merge_stores(args.stores, args.output, num_classes=args.num_classes, restart=args.restart))


def _mine(args: argparse.Namespace) -> None:
    from .tasks.retrieval.mining import mine

    print(mine(**_arguments(args)))


def _train_first_stage(args: argparse.Namespace) -> None:
    from .tasks.retrieval.first_stage import train_first_stage

    metrics = train_first_stage(**_arguments(args))
    print("\n".join(f"{name:28} {value:.4g}" for name, value in metrics.items() if "recall" in name))


def _index(args: argparse.Namespace) -> None:
    from .search.command import make_index

    print(make_index(**_arguments(args)))


def _search(args: argparse.Namespace) -> None:
    from .search.command import run_search

    print(run_search(**_arguments(args)))


def _vcr_check(args: argparse.Namespace) -> int:
    from .tasks.vcr.metrics import check_submission

    return _print_problems(check_submission(args.submission, args.annotations))


def _print_problems(problems: Iterable[object]) -> int:
    """Prints each problem and their number. Returns 1 where there are any."""
    count = 0
    for problem in problems:
        count += 1
        print(problem)
    print(f"{count} problem{'s' * (count > 1)}." if count else "No problem found.")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
