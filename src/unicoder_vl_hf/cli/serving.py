"""The command of the server."""

from argparse import Namespace
from collections.abc import Iterator

from .commands import Add, Commands, Result, add_detector, check_paths, detector_options

commands = Commands()


def _serve_arguments(add: Add) -> None:
    add("model", help="checkpoint with its processor")
    add("--regions", help="folder of the store in which image ids are looked up")
    add_detector(add)
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="port to listen on, 0 for any that is free (default: 8000)")
    add("--max-length", type=int, default=44, help="most tokens of a sentence (default: 44)")
    add("--max-waiting", type=int, default=64, help="requests taken at a time; further ones get 429 (default: 64)")
    add("--max-bytes", type=int, default=32 << 20, help="most bytes of a request (default: 32 MiB)")
    add("--max-pixels", type=int, default=50_000_000, help="most pixels of a photo (default: 50 million)")
    add("--max-documents", type=int, default=1000, help="most documents of a request (default: 1000)")
    add("--photo-hosts", nargs="+", default=[], metavar="HOST", help="hosts whose photos are fetched (default: none)")


@commands.register("serve", "Ranks images by sentences, and sentences by images, over HTTP", _serve_arguments)
def _serve(args: Namespace) -> Iterator[Result]:
    check_paths(args, "regions")
    options = detector_options(args, "trained_on")
    import os
    import socket

    from ..extras import optional_import

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        optional_import(module, "serve")
    from ..processes import KERNELS_KEPT
    from ..serving.reading import Limits
    from ..serving.server import open_app, serve

    # The lengths of requests never repeat: with a quarter of what trainings keep, scoring grows by 300 MB less, and is
    # as fast.
    for variable in KERNELS_KEPT:
        os.environ.setdefault(variable, "32")
    limits = Limits(args.max_waiting, args.max_bytes, args.max_pixels, args.max_documents, args.photo_hosts)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listening:
        app = open_app(
            args.model,
            args.regions,
            detector=args.detector,
            detector_options=options,
            cache=args.cache,
            limits=limits,
            max_length=args.max_length,
        )
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        yield Result(f"Serving {args.model} on {url}; Ctrl-C stops it.", {"url": url, **app.state.facts})
        serve(app, listening)
