"""
Serves a checkpoint over HTTP: `/v1/rerank` as Jina, Cohere and vLLM have it, `/v1/score`, `/health` and `/metrics`.
Left out: who may ask, and encryption, which are a proxy's work.
"""

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import logging
from .._version import __version__
from ..processes import StopSignal
from ..regions.finding import RegionFinder
from ..scoring.scorer import ImageTextScorer
from .batching import Batcher, Scored
from .reading import Item, Limits, Reader, RerankRequest, ScoreRequest, content

logger = logging.get_logger(__name__)

DEFAULT_LIMITS = Limits()
SCORED = ("/v1/rerank", "/v1/score")
# A client that still writes does not read the answer: so long, what it writes is read away.
DRAIN_SECONDS = 5


def open_app(
    model: str,
    regions: str | None = None,
    *,
    detector: str | None = None,
    detector_options: Mapping[str, Any] | None = None,
    cache: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    max_length: int = 44,
) -> FastAPI:
    """
    Loads a checkpoint, with its detector where there is one, and makes the application that serves it.

    Args:
        model, regions, detector, detector_options, cache: See [`ImageTextScorer.from_pretrained`].
        limits ([`Limits`], *optional*): The most that is taken.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a sentence; longer ones are cut.

    Raises:
        `ValueError`, `OSError`: see [`ImageTextScorer.from_pretrained`]; or `detector` cannot be loaded. Without
            `detector`, that of the training is loaded if it can be; else photos are refused, which is warned of.
    """
    scorer = ImageTextScorer.from_pretrained(model, regions, verbose=False)
    trained_on = scorer.processor.feature_extractor.region_provenance
    finder = RegionFinder(
        detector, trained_on=trained_on, device=scorer.model.device, cache=cache, **(detector_options or {})
    )
    takes_photos = True
    try:
        finder.load()
    except (ValueError, OSError, ImportError) as error:
        if detector is not None:
            raise
        takes_photos = False
        logger.warning(f"Photos will be refused, and images served by their ids alone. {error}")
    name = os.path.basename(os.path.abspath(model)) if Path(model).exists() else model
    return create_app(scorer, name, finder if takes_photos else None, limits=limits, max_length=max_length)


def create_app(
    scorer: ImageTextScorer,
    name: str,
    finder: RegionFinder | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    max_length: int = 44,
) -> FastAPI:
    """
    Makes the application that serves a scorer, for any server of ASGI applications; of a process it is the only one
    that computes with this scorer.

    Args:
        scorer ([`ImageTextScorer`]): The scorer, whose weights change no more.
        name (`str`): The name that requests may give as `model`.
        finder ([`RegionFinder`], *optional*): Finds the regions of photos, which are refused without it.
        limits ([`Limits`], *optional*): The most that is taken.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a sentence; longer ones are cut.

    Raises:
        `ValueError`: the calibration of the checkpoint is of other weights, or `max_length` leaves no token, or more
            than the model has positions for.
    """
    positions = scorer.model.config.max_position_embeddings
    if not 3 <= max_length <= positions:
        raise ValueError(f"max_length={max_length}; expected 3 to {positions}, the positions of {name}.")
    temperature = 1.0 if scorer.model.config.calibration is None else scorer.calibration.temperature
    store: Mapping[str, Any] = {} if scorer.store is None else scorer.store
    reader = Reader(store, limits)
    metrics = _Metrics()
    batcher = Batcher(scorer, finder, max_length=max_length, note=metrics.note)

    @contextlib.asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    app = FastAPI(title="unicoder-vl", version=__version__, lifespan=closing)
    app.state.facts = {"model": name, "images": len(store)}
    app.add_middleware(_Gate, limits=limits, metrics=metrics)

    async def scored(model: str | None, queries: list[str | Item], documents: list[str | Item]) -> Scored:
        if model not in (None, name):
            raise HTTPException(404, f"There is no model {model!r}: this server has {name!r}.")
        pairs = await run_in_threadpool(reader.pairs, queries, documents)
        try:
            return await asyncio.wrap_future(batcher.submit(pairs))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    @app.post("/v1/rerank")
    async def rerank(request: RerankRequest) -> dict[str, Any]:
        """Orders documents by how well they match the query, the best first."""
        scores, tokens = await scored(request.model, [request.query], request.documents)
        relevance = np.exp(-np.logaddexp(0, -scores.astype(np.float64) / temperature))
        _, by_image = content(request.query, False)
        results: list[dict[str, Any]] = []
        for place in np.argsort(-scores, kind="stable")[: request.top_n].tolist():
            results.append({"index": place, "relevance_score": float(relevance[place])})
            if request.return_documents:
                document, _ = content(request.documents[place], not by_image)
                results[-1]["document"] = {"text" if by_image else "image": document}
        return _answer("rerank", name, tokens, results=results)

    @app.post("/v1/score")
    async def score(request: ScoreRequest) -> dict[str, Any]:
        """Scores a query with every document, or each query with its own."""
        scores, tokens = await scored(request.model, _several(request.queries), _several(request.documents))
        data = [{"index": place, "object": "score", "score": value} for place, value in enumerate(scores.tolist())]
        return _answer("score", name, tokens, object="list", data=data)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Tells whether the server can score."""
        if not batcher.is_alive():
            raise HTTPException(503, "The thread that scores has ended.")
        return {"status": "ok", "model": name}

    @app.get("/metrics")
    async def measured() -> Response:
        """Gives figures in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        told = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()[:5]]
        return _error(422, "; ".join(told))

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _error(500, "The server failed, and its log says why.")

    return app


def serve(app: FastAPI, listening: socket.socket) -> None:
    """
    Serves an application until SIGTERM or Ctrl-C: it then takes no more, answers what it took, and returns. A second
    Ctrl-C ends at once.

    Args:
        app (`FastAPI`): The application, see [`open_app`].
        listening (`socket.socket`): The socket, as `socket.create_server` makes it.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    # uvicorn raises the signal again when it has stopped.
    with StopSignal("Stopped: all that was taken is answered."):
        uvicorn.Server(config).run(sockets=[listening])


class _Metrics:
    """Figures of the server and of its process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("unicoder_vl_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram("unicoder_vl_request_seconds", "Time to the answer.", ["path"], registry=registry)
        self.waiting = Gauge("unicoder_vl_requests_waiting", "Requests computed or waiting.", registry=registry)
        self.pairs = Counter("unicoder_vl_pairs", "Pairs scored.", registry=registry)
        self.together = Histogram(
            "unicoder_vl_requests_together",
            "Requests scored by one call.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )

    def note(self, requests: int, pairs: int) -> None:
        """Counts a call of the scorer."""
        self.together.observe(requests)
        self.pairs.inc(pairs)


class _Gate:
    """Lets in no more requests than may wait, and none that is too large, and counts them."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: _Metrics):
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))  # that of a server behind a prefix
        if scope["type"] != "http" or path not in SCORED:
            return await self.app(scope, receive, send)
        status, size, started = 500, 0, time.perf_counter()

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limits.max_bytes:
                await _drain(receive)
                raise HTTPException(413, f"The request has more than {self.limits.max_bytes:,} bytes.")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        if self.waiting >= self.limits.max_waiting:
            await _drain(receive)
            busy = f"{self.waiting} requests wait, as many as are taken: come again."
            await _error(429, busy, {"Retry-After": "1"})(scope, receive, noted)
        else:
            self.waiting += 1
            self.metrics.waiting.set(self.waiting)
            try:
                await self.app(scope, limited, noted)
            finally:
                self.waiting -= 1
                self.metrics.waiting.set(self.waiting)
                self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
        self.metrics.requests.labels(path, status).inc()


async def _drain(receive: Receive) -> None:
    """Reads away what is left of a request."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body"):
                pass


def _several(given: str | Item | list[str | Item]) -> list[str | Item]:
    return given if isinstance(given, list) else [given]


def _answer(kind: str, model: str, tokens: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "model": model, "usage": {"total_tokens": tokens}, **fields}


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": HTTPStatus(status).phrase, "code": status}
    return JSONResponse({"error": error}, status, headers)
