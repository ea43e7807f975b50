"""The command of the app."""

from argparse import Namespace
from collections.abc import Iterator

from .commands import Add, Commands, Result, add_detector_option, check_paths, detector_options

commands = Commands()


def _app_arguments(add: Add) -> None:
    add("--model", required=True, help="checkpoint with its processor, whose first stage was trained")
    add("--regions", required=True, help="folder of the store that is searched")
    add("--photos", help="photos of the store: folder, .txt of files, .tar, or dataset (default: blank pages)")
    add("--photo-ids", default="stem", help="source of the photos' ids, as --ids of `extract` (default: stem)")
    add("--index", help="index of images to search (default: one of the whole store, made at the start)")
    add("--captions-index", help="index of captions, to be found by a photo (default: none)")
    add("--detector", metavar="FAMILY:NAME", help="detector of uploaded photos (default: that of the training)")
    add_detector_option(add, "grid_size=7")
    add("--host", help="address to listen at (default: this machine alone)")
    add("--port", type=int, help="port (default: the first free one from 7860)")


@commands.register("app", "Searches, scores, explains and browses in a browser", _app_arguments)
def _app(args: Namespace) -> Iterator[Result]:
    check_paths(args, "regions", "photos", "index", "captions_index")
    options = detector_options(args)
    from ..app import PhotoApp, build_page, launch

    app = PhotoApp(
        args.model,
        args.regions,
        args.photos,
        photo_ids=args.photo_ids,
        index=args.index,
        captions_index=args.captions_index,
        detector=args.detector,
        detector_options=options,
    )
    page = build_page(app)
    url = launch(page, args.host, args.port)
    facts = {"url": url, "model": args.model, "images": len(app.names)}
    yield Result(f"Searching {len(app.names):,} photos on {url}; Ctrl-C stops it.", facts)
    page.block_thread()
