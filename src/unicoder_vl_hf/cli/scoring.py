"""The commands of scoring: a photo with sentences, and what scores mean."""

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import Add, Commands, Result, add_caption_ids, add_detector, check_paths, detector_options

if TYPE_CHECKING:
    from ..scoring.scorer import ImageTextScorer

commands = Commands()


def _add_scorer(add: Add) -> None:
    """Adds the image and the options of [`_open_scorer`]."""
    add("image", help="photo, saved record (.npz), or image id of --regions")
    add("--model", required=True, help="checkpoint with its processor")
    add("--regions", help="folder of the store in which image ids are looked up")
    add_detector(add)


def _open_scorer(args: Namespace) -> "tuple[ImageTextScorer, str | Path]":
    """Opens the scorer, and gives the image: the file of a saved record as a path, any other by its name."""
    if args.regions is None and not Path(args.image).is_file():
        raise FileNotFoundError(f"{args.image} is no file; if it is an image id, name its store: --regions FOLDER.")
    options = detector_options(args, "trained_on")
    from ..scoring.scorer import ImageTextScorer

    scorer = ImageTextScorer.from_pretrained(
        args.model,
        args.regions,
        detector=args.detector,
        detector_options=options,
        cache=args.cache,
        verbose=False,
    )
    is_record = args.image.endswith(".npz") and Path(args.image).is_file()
    return scorer, Path(args.image) if is_record else args.image


def _score_arguments(add: Add) -> None:
    _add_scorer(add)
    add("captions", nargs="+", metavar="caption", help="sentence to score the image with")


@commands.register("score", "Scores a photo with sentences", _score_arguments)
def _score(args: Namespace) -> object:
    check_paths(args, "regions")
    scorer, image = _open_scorer(args)
    if scorer.model.config.calibration is None:
        scores = scorer.score(args.captions, [image])[:, 0]
        lines = [f"{score:+8.3f}  {caption}" for caption, score in zip(args.captions, scores, strict=True)]
        return Result("\n".join(lines), {"captions": _rows(caption=args.captions, score=scores)})
    found = scorer.match(args.captions, [image])
    columns = (args.captions, found.scores[:, 0], found.probabilities[:, 0], found.matches[:, 0])
    lines = [
        f"{score:+8.3f}  {probability:6.1%}  {'match' if match else 'no match':8}  {caption}"
        for caption, score, probability, match in zip(*columns, strict=True)
    ]
    rows = _rows(**dict(zip(("caption", "score", "probability", "match"), columns, strict=True)))
    return Result("\n".join([*lines, str(found.calibration)]), {"captions": rows, "calibration": found.calibration})


def _rows(**columns: Iterable[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _explain_arguments(add: Add) -> None:
    _add_scorer(add)
    add("caption", help="sentence whose score is explained")
    add(
        "--photos",
        help="photos of the store, to draw on: folder, .txt, .tar, or dataset (default: a blank page)",
    )
    add("--photo-ids", default="stem", help="source of the photos' ids, as --ids of `extract` (default: stem)")
    add("--output", required=True, help="HTML file to write")


@commands.register(
    "explain", "Shows which regions mattered for each word of a sentence and its score", _explain_arguments
)
def _explain(args: Namespace) -> object:
    check_paths(args, "regions", "photos")
    from ..search.encoders import Photos
    from ..search.explaining import explain_on_photo

    photos = None if args.photos is None else Photos(args.photos, args.photo_ids)
    explanation, page = explain_on_photo(*_open_scorer(args), args.caption, photos, title="Why this score")
    Path(args.output).write_text(page, encoding="utf-8")
    text = f"{explanation.score:+8.3f}  {args.caption}\nExplained in {args.output}"
    return Result(text, {"caption": args.caption, "score": explanation.score, "path": args.output})


def _calibrate_arguments(add: Add) -> None:
    add("model", help="folder of the checkpoint, which is written to")
    add("captions", help="caption file")
    add("regions", help="folder of the store")
    add("--split", default="val", help="split to measure on, not trained on (default: val)")
    add_caption_ids(add)
    add("--seed", type=int, default=0, help="seed of the mismatches (default: 0)")
    add("--max-length", type=int, default=44, help="most tokens of a caption (default: 44)")
    add("--skip-missing", action="store_true", help="leave out captions whose image has no regions")


@commands.register("calibrate", "Measures the probability of a match by score, for a checkpoint", _calibrate_arguments)
def _calibrate(args: Namespace) -> object:
    check_paths(args, "captions", "regions")
    from ..tasks.retrieval.calibration import calibrate

    return calibrate(
        args.model,
        args.captions,
        args.regions,
        split=args.split,
        caption_ids=args.caption_ids,
        seed=args.seed,
        max_length=args.max_length,
        skip_missing=args.skip_missing,
    )


def _export_arguments(add: Add) -> None:
    add("model", help="checkpoint with its processor")
    add("output", help="new folder of model.onnx and the processor")


@commands.register("export-onnx", "A checkpoint → an ONNX graph, checked against PyTorch", _export_arguments)
def _export(args: Namespace) -> object:
    from ..scoring.onnx_export import export_onnx

    return export_onnx(args.model, args.output)
