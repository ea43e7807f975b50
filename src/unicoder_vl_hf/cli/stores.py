"""The commands of stores: they convert, export, inspect, validate, compare, label and merge."""

import argparse
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import (
    GO_ON,
    Add,
    Commands,
    Result,
    add_detector_option,
    add_restart,
    detector_options,
    problems,
    stored,
)

if TYPE_CHECKING:
    from PIL import Image

commands = Commands()


def _convert_arguments(add: Add) -> None:
    add("source", help="feature file or folder of these")
    add("store", help="folder of the new store")
    _add_format(add)
    add("--ids", help="other names for the images: stem, coco, a .csv (source_id, image_id), or CAPTIONS:COLUMN")
    add("--skip-unmapped", action="store_true", help="leave out images that --ids does not cover")
    add("--skip-broken", action="store_true", help="leave out images that are damaged, and list them in skipped.jsonl")
    add("--keep-first", action="store_true", help="take the first of images of one id that differ, and list the others")
    add("--dtype", default="float16", help="type of the features: float16 (default), bfloat16 or float32")
    add("--workers", type=int, default=1, help="number of processes (default: 1)")
    add("--resume", action="store_true", help="add images of the source that a finished store lacks")
    add_restart(add)
    add("--source-detector", metavar="NAME@REVISION", help="detector that found the regions, as you declare it")
    add("--num-classes", type=int, help="object classes of the detector, without background")


@commands.register("convert", "Feature files of another tool → a store", _convert_arguments, GO_ON)
def _convert(args: Namespace) -> object:
    from ..data.image_ids import id_mapping
    from ..regions.conversion import convert

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
        keep_first=args.keep_first,
        workers=args.workers,
        resume=args.resume or None,
        restart=args.restart,
        format_options=_format_options(args),
        **options,
    )
    return stored(store)


def _export_arguments(add: Add) -> None:
    from ..regions.conversion import EXPORTS

    add("store", help="folder of the store")
    add("path", help="new folder; for lxmert-tsv a .tsv, for uniter-lmdb named such as feat_th0.2_max100_min10")
    add("--format", required=True, help=f"format of the files, one of {', '.join(EXPORTS)}")


@commands.register("export", "A store → files that other tools read", _export_arguments)
def _export(args: Namespace) -> object:
    from ..regions.conversion import export
    from ..regions.store import RegionStore

    export(RegionStore(args.store), args.path, args.format)
    return Result(f"{args.path} written.", {"path": args.path, "format": args.format})


def _inspect_arguments(add: Add) -> None:
    add("source", help="store, or feature file or folder of these")
    _add_format(add)
    add("--max-images", type=int, help="images looked at (default: all of a store, 1,000 of a file)")
    add("--image-id", help="image whose regions are shown")
    add("--photo", help="photo of --image-id, on which its boxes are drawn")
    add("--output", default="regions.png", help="file of the drawing (default: regions.png)")


@commands.register("inspect", "The contents of a store or a feature file", _inspect_arguments)
def _inspect(args: Namespace) -> object:
    from ..name_lists import NAMES_LOOKED_AT, did_you_mean
    from ..regions.formats import detect_format, read_items, read_records
    from ..regions.inspection import check_photo_size, describe, inspect_records
    from ..regions.shards import MANIFEST, PLAN, UNFINISHED, parts_of
    from ..regions.store import RegionStore

    image_id = args.image_id
    if args.photo is not None and image_id is None:
        raise ValueError(f"Say with --image-id which image {args.photo} is a photo of: its name does not show it.")
    opened = None if args.photo is None else _open_photo(args.photo)
    store, format, options = None, args.format, _format_options(args)
    source = Path(args.source)
    begun = not source.exists() or (source / PLAN).exists()
    if any((source / name).exists() for name in (MANIFEST, UNFINISHED)) or (begun and parts_of(source)):
        store = RegionStore(args.source)
        record = store.get(image_id)
    else:
        format = format or detect_format(args.source)
        every = read_records(args.source, format, **options) if image_id is not None else ()
        record = next((each for each in every if each.image_id == image_id), None)
    if image_id is not None and record is None:
        ids = (item.image_id for item in read_items(args.source, format, **options)) if store is None else store
        known_ids = list(islice(ids, NAMES_LOOKED_AT))
        like = f"; its first is {known_ids[0]!r}" if known_ids else ""
        raise ValueError(f"{args.source} has no image {image_id!r}{like}.{did_you_mean(image_id, known_ids)}")
    if record is not None and opened is not None:
        check_photo_size(record, args.photo, opened[1])
    if store is None:
        found = inspect_records(read_records(args.source, format, **options), args.max_images or 1000)
        told, known = [f"format    {format}\n{found}"], {}
    else:
        found = inspect_records(store.values(), args.max_images, total=args.max_images or len(store))
        known = {name: value for name, value in store.provenance.items() if value not in (None, [], {})}
        told = [f"{store}\n{found}\n\nprovenance"]
        told += [f"  {name:20} {value}"[:160] for name, value in known.items()]
    if record is not None:
        told.append(f"\n{describe(record)}")
    if record is not None and opened is not None:
        from ..pictures import draw_regions

        draw_regions(opened[0], record).save(args.output)
        checked = "only its size could be compared"
        if record.image_width is None or record.image_height is None:
            checked = "the record does not know its size, so nothing could be compared"
        told.append(f"\nBoxes of {record.image_id!r} drawn on {args.photo} ({checked}): {args.output}")
    features = [{"dim": dim, "dtype": dtype, "images": count} for (dim, dtype), count in found.features.items()]
    counts = {name: vars(found)[name] for name in ("images", "complete", "repeated", "regions", "known")}
    data = {"source": args.source, "format": format, "provenance": known, **counts, "features": features}
    return Result("\n".join(told), data if record is None else data | {"image": record.to_dict() | {"features": None}})


def _open_photo(path: str) -> "tuple[Image.Image, tuple[int, int]]":
    """Opens a photo, and gives it with its size. Raises ValueError or OSError, both of which name the file."""
    from ..regions.photos import decode_photo

    try:
        return decode_photo(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"--photo {path}: {error}") from error


def _validate_arguments(add: Add) -> None:
    add("store", help="folder of the store")


@commands.register("validate", "Look for damage in a store, and name the images", _validate_arguments)
def _validate(args: Namespace) -> object:
    from ..regions.validation import validate

    return problems(validate(args.store))


def _compare_arguments(add: Add) -> None:
    add("a", help="folder of a store")
    add("b", help="folder of another store of the same images")
    add("--min-iou", type=float, default=0.5, help="least overlap of boxes that match (default: 0.5)")
    add("--max-images", type=int, help="images compared, the first ones (default: all)")


@commands.register("compare", "Do the features of two stores agree?", _compare_arguments)
def _compare(args: Namespace) -> object:
    import numpy as np

    from ..regions.comparison import compare_stores
    from ..regions.store import RegionStore

    found = compare_stores(RegionStore(args.a), RegionStore(args.b), min_iou=args.min_iou, max_images=args.max_images)
    data = vars(found) | {
        "ious": np.quantile(found.ious, (0, 0.05, 0.5)) if len(found.ious) else None,
        "cosines": np.quantile(found.cosines, (0, 0.05, 0.5)) if len(found.cosines) else None,
        "same_class": found.same_class.mean() if len(found.same_class) else None,
    }
    return Result(str(found), data)


def _label_arguments(add: Add) -> None:
    add("store", help="folder of the store")
    add("output", help="folder of the labelled store")
    add("--detector", required=True, help="detector that found the regions, visual-genome:NAME")
    add_detector_option(add, "revision=main")
    add_restart(add)
    # It once had to be asked for to go on.
    add("--resume", action="store_true", help=argparse.SUPPRESS)


@commands.register(
    "label",
    "Object classes for a store that has none, by the classifier of the detector that its features are of",
    _label_arguments,
    GO_ON,
)
def _label(args: Namespace) -> object:
    options = detector_options(args, "name")
    from ..regions.labelling import label, load_classifier
    from ..regions.store import RegionStore

    store = RegionStore(args.store)
    classifier = load_classifier(store, args.detector, **options)
    return stored(label(store, args.output, classifier, restart=args.restart))


def _merge_arguments(add: Add) -> None:
    add("stores", nargs="+", help="folders of stores of different images and one provenance")
    add("--output", required=True, help="folder of the new store")
    add("--num-classes", type=int, help="object classes of the detector, for stores that do not tell")
    add_restart(add)


@commands.register("merge", "Several stores → one, or one that is told its number of classes", _merge_arguments, GO_ON)
def _merge(args: Namespace) -> object:
    from ..regions.editing import merge_stores

    return stored(merge_stores(args.stores, args.output, num_classes=args.num_classes, restart=args.restart))


def _add_format(add: Add) -> None:
    from ..regions.formats import FEATURE_DTYPES, FORMATS

    add("--format", help=f"format, found from the content by default; one of {', '.join(FORMATS)}")
    add("--class-names", help="file with a class name a line, in the order of object ids, without background")
    add("--feature-dtype", metavar="DTYPE", help=f"type of features that are only bytes: {', '.join(FEATURE_DTYPES)}")
    add("--background", action="store_true", help="say that object ids count a background class as 0")
    add("--index", help="file of image names, for formats that number images")


FORMAT_OPTIONS = ("class_names", "feature_dtype", "background", "index")


def _format_options(args: Namespace) -> dict[str, Any]:
    from ..name_lists import read_names

    options = {name: value for name in FORMAT_OPTIONS if (value := getattr(args, name)) not in (None, False)}
    if "class_names" in options:
        options["class_names"] = read_names(args.class_names)
    return options
