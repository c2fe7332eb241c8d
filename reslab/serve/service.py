"""The HTTP interface of a classifier, as a starlette application.

    POST /predict    images -> classes, and heat maps on request             GET /          the page
    GET  /model      what it is and how good                                 GET /report    the run's report
    GET  /health     the process lives        GET /ready   it takes requests
    GET  /metrics    Prometheus text          GET /openapi.json              all this, for programs

Whatever is served from a file is read at the start; no request reaches the file system.
"""

import asyncio
import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from reslab.data.decode import Pixels, Unreadable, dimensions
from reslab.errors import shown
from reslab.serve.batching import Batcher, Full, Late
from reslab.serve.guard import Guard
from reslab.serve.metrics import Metrics
from reslab.serve.openapi import describe
from reslab.serve.problems import Problem
from reslab.serve.uploads import Memory, Upload, read_uploads
from reslab.use.classifier import Classifier, Prediction

MAX_PIXELS = 50_000_000  # of an uploaded image: phones make 50 megapixels
LARGE_PIXELS = 8_000_000  # images above it are decoded one at a time, which bounds the memory
LARGE_BODY = 1 << 16  # bytes from which an image is worth a decoding thread of its own
IMAGES = 32  # in one request
HELD_BODIES = 256 << 20  # bytes of bodies in memory, at least
THREADS = 2  # that decode

SELF_ONLY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY = f"{SELF_ONLY}; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
REPORT_POLICY = f"{SELF_ONLY}; img-src data:; style-src 'unsafe-inline'"  # it has its styles inside, and no script
T = TypeVar("T")
PAGE = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}


@dataclass(frozen=True)
class Limits:
    """What a server takes on at most."""

    body: int = 32 << 20  # bytes of a request
    queue: int = 128  # images waiting
    batch: int = 32  # images through the net together
    seconds: float = 10.0  # from a request's last byte to its answer


@dataclass(frozen=True)
class Published:
    """What is known of the model beside the classifier: facts for /model, and the run's report."""

    facts: dict[str, Any]
    report: bytes | None = None


class Service:
    """A classifier that answers requests. `app` is the ASGI application; `closing` is set before it is shut down.

    With two `lanes` one batch is decoded while another is in the net, and neither waits for the other's threads.
    """

    def __init__(
        self, classifier: Classifier, published: Published, limits: Limits, metrics: Metrics, token: str | None, local_only: bool, lanes: int = 1
    ) -> None:  # fmt: skip
        self.lanes = lanes
        self.classifier, self.published, self.limits, self.metrics = classifier, published, limits, metrics
        self.closing = self.ready = False
        self.most_images = min(IMAGES, limits.queue)
        self.memory = Memory(max(HELD_BODIES, 4 * limits.body))
        self.decoders = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
        self.one_large = threading.Lock()
        guard = Middleware(Guard, token=token, local_only=local_only, metrics=metrics, is_closing=lambda: self.closing)
        self.app = Starlette(routes=self._routes(), middleware=[guard], exception_handlers=HANDLERS, lifespan=self._lifespan)
        self.app.router.redirect_slashes = False

    def _routes(self) -> list[Route]:
        page = {path: (files("reslab.serve").joinpath("page", name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

        def static(body: bytes, kind: str, policy: str) -> Any:
            async def give(request: Request) -> Response:
                return Response(body, headers={"content-security-policy": policy, "cache-control": "no-cache"}, media_type=kind)

            return give

        routes = [Route(path, static(body, kind, PAGE_POLICY)) for path, (body, kind) in page.items()]
        if self.published.report is not None:
            routes.append(Route("/report", static(self.published.report, "text/html", REPORT_POLICY)))
        document = describe(self.limits.body, self.most_images, report=self.published.report is not None)
        return [
            *routes,
            Route("/predict", self._predict, methods=["POST"]),
            Route("/model", _json(self.model())),
            Route("/openapi.json", _json(document)),
            Route("/health", _json({"status": "alive"})),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
        ]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        limits, patience = self.limits, self.limits.seconds / 2
        self.predictions: Batcher[bytes, tuple[Prediction, Pixels] | Unreadable] = Batcher(
            self._classify, largest=limits.batch, places=limits.queue, patience=patience, lanes=self.lanes, watch=self._watch
        )
        self.heat_maps: Batcher[tuple[Prediction, Pixels], str] = Batcher(self._draw, largest=1, places=2 * IMAGES, patience=patience)
        self.ready = True
        yield
        self.ready, self.closing = False, True
        await self.predictions.close()
        await self.heat_maps.close()
        self.decoders.shutdown()

    def model(self) -> dict[str, Any]:
        """What /model says."""
        c = self.classifier
        return {
            **self.published.facts,
            "spec": asdict(c.spec),
            "classes": list(c.classes),
            "sure_from": c.sure,
            "temperature": c.temperature,
            "image_size": c.preprocess.image_size,
            "canvas": c.preprocess.canvas,
            "channels": c.preprocess.channels,
            "heat_map": c.has_net,
            "report": self.published.report is not None,
            "max_body_bytes": self.limits.body,
            "max_images": self.most_images,
        }

    async def _ready(self, request: Request) -> Response:
        if not self.ready or self.closing:
            raise Problem(503, "the server is stopping, or not yet ready", {"retry-after": "1"})
        return _response({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        self.sample()
        return Response(self.metrics.text(), headers=NO_STORE, media_type="text/plain; version=0.0.4")

    def sample(self) -> None:
        """Notes what is now, for /metrics: of the other processes it has what they noted last."""
        self.metrics.set("waiting_images", self.predictions.waiting)
        self.metrics.set("body_bytes", self.memory.held)

    async def _predict(self, request: Request) -> Response:
        wants_heat = _heat_asked(request)
        if wants_heat and not self.classifier.has_net:
            raise Problem(422, "a heat map needs the net's gradients, which an exported model has not: leave heat_map out, or serve the run")
        try:
            self.predictions.check_room()  # before the body is read
            with self.memory.lease() as lease:
                uploads = await read_uploads(request, lease, self.limits.body, self.most_images)
                return await self._answer(request, uploads, wants_heat)
        except Full as full:
            raise Problem(503, f"the queue is full; try again in {full.retry_after} s", {"retry-after": str(full.retry_after)}) from None
        except Late:
            raise Problem(504, f"an answer must be ready within {self.limits.seconds:g} s; it was not: try again, or raise --timeout") from None

    async def _answer(self, request: Request, uploads: list[Upload], wants_heat: bool) -> Response:
        until = time.monotonic() + self.limits.seconds
        found = await _while_there(request, self.predictions.ask([upload.body for upload in uploads], self.limits.seconds))
        bad: list[dict[str, Any]] = [{"index": i, "name": uploads[i].name, "detail": str(f)} for i, f in enumerate(found) if isinstance(f, Unreadable)]
        if bad:
            raise Problem(422, f"every image must be readable; number {bad[0]['index'] + 1} is not: {bad[0]['detail']}", images=bad)
        good = [f for f in found if not isinstance(f, Unreadable)]
        maps: Sequence[str | None] = [None] * len(good)
        if wants_heat:
            maps = await _while_there(request, self.heat_maps.ask(good, until - time.monotonic()))
            self.metrics.add("heat_maps_total", len(maps))
        rows = [self._row(upload.name, f[0], heat) for upload, f, heat in zip(uploads, good, maps, strict=True)]
        return _response({"predictions": rows, "sure_from": self.classifier.sure})

    def _row(self, name: str | None, found: Prediction, heat: str | None) -> dict[str, Any]:
        row = {
            "name": name,
            "label": found.label,
            "probability": found.probability,
            "sure": found.probability >= self.classifier.sure,
            "top": [{"label": label, "probability": p} for label, p in found.top],
        }
        return row if heat is None else {**row, "heat_map": heat}

    def _classify(self, bodies: list[bytes]) -> list[tuple[Prediction, Pixels] | Unreadable]:
        """In a thread of the batcher: files -> classes, or why not."""
        in_threads = len(bodies) > 1 and any(len(body) > LARGE_BODY for body in bodies)
        decoded = list((self.decoders.map if in_threads else map)(self._decode, bodies))
        good = [pixels for pixels in decoded if not isinstance(pixels, Unreadable)]
        found = iter(self.classifier.predict_pixels(good) if good else [])
        return [pixels if isinstance(pixels, Unreadable) else (next(found), pixels) for pixels in decoded]

    def _decode(self, body: bytes) -> Pixels | Unreadable:
        try:
            width, height = dimensions(body)
            if width * height > MAX_PIXELS:
                return Unreadable(f"{width} x {height} px: the limit is {MAX_PIXELS / 1e6:.0f} megapixels")
            with self.one_large if width * height > LARGE_PIXELS else contextlib.nullcontext():
                return self.classifier.decode(body)
        except Unreadable as error:
            return error

    def _draw(self, predicted: list[tuple[Prediction, Pixels]]) -> list[str]:
        """In a thread of the batcher: what spoke for each label in what the net sees, as data URLs of 8-bit grey PNGs."""
        from reslab.use.explain import heat_map

        urls, frame = [], self.classifier.preprocess
        start, end = (frame.canvas - frame.image_size) // 2, (frame.canvas + frame.image_size) // 2
        for found, pixels in predicted:
            grey = np.rint(heat_map(self.classifier, pixels, label=found.label)[start:end, start:end] * 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(grey).save(png, "PNG")
            urls.append("data:image/png;base64," + base64.b64encode(png.getvalue()).decode())
        return urls

    def warm_up(self) -> None:
        """The first passes are slow; nobody shall wait for them. Raises WorkError where the classifier cannot do them."""
        size = self.classifier.preprocess.canvas
        blank: Pixels = np.zeros((size, size, self.classifier.preprocess.channels), np.uint8)
        for n in (1, self.limits.batch):
            self.classifier.predict_pixels([blank] * n)

    def _watch(self, found: Sequence[tuple[Prediction, Pixels] | Unreadable], seconds: float) -> None:
        if size := sum(not isinstance(f, Unreadable) for f in found):
            self.metrics.add("images_total", size)
            self.metrics.observe("batch_images", size)
        self.metrics.observe("batch_seconds", seconds)


async def _while_there(request: Request, asked: Coroutine[Any, Any, T]) -> T:
    """What is asked for, unless the client goes away, for whom then nothing more is computed. Raises Problem, which nobody reads."""
    answer, gone = asyncio.ensure_future(asked), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and gone.result()["type"] == "http.disconnect":
            raise Problem(400, "the connection ended before there was an answer")
        return await answer
    finally:
        gone.cancel()
        answer.cancel()


NO_STORE = {"cache-control": "no-store"}


def _response(value: Any) -> Response:
    return Response(json.dumps(value, allow_nan=False), headers=NO_STORE, media_type="application/json")


def _json(value: Any) -> Any:
    body = json.dumps(value, allow_nan=False, indent=1)

    async def give(request: Request) -> Response:
        return Response(body, headers=NO_STORE, media_type="application/json")

    return give


def _heat_asked(request: Request) -> bool:
    value = request.query_params.get("heat_map", "false")
    if value not in ("true", "false"):
        raise Problem(400, f"heat_map must be true or false; received {shown(value)[:40]}")
    return value == "true"


async def _show_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem.response()


async def _show_missing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(error.status_code, f"{request.method} {shown(request.url.path)[:80]} is not served; /openapi.json lists what is", error.headers).response()


HANDLERS: dict[Any, Any] = {Problem: _show_problem, HTTPException: _show_missing}
