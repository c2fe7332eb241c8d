"""`reslab serve`: the processes that answer HTTP requests with a classifier, from the bound port to the last answer.

One process serves by itself; of several, each binds the port with SO_REUSEPORT and the system spreads connections over
them. On SIGTERM or Ctrl-C no new connection is taken, every request that was accepted is answered, and open connections
are asked to end with their next answer.
"""

import asyncio
import contextlib
import errno
import gc
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reslab.errors import CallError, WorkError, needs_extra, shown
from reslab.host import cores
from reslab.run import Run, located
from reslab.use.classifier import Classifier, load

try:
    import starlette  # noqa: F401
    import uvicorn
except ModuleNotFoundError as error:
    raise needs_extra(error.name or "uvicorn", "serve") from error

from reslab.serve.guard import LINGER_SECONDS, is_loopback
from reslab.serve.metrics import Metrics, shared_rows
from reslab.serve.parser import parser
from reslab.serve.service import Limits, Published, Service
from reslab.serve.uploads import BODY_SECONDS
from reslab.serve.workers import supervise

TOKEN_LENGTH = 16
STALE_SECONDS = 20.0  # a connection that has been without a whole request so long is closed
DRAIN_SECONDS = 2.0  # for clients with open connections to send what they were about to
# A forward pass takes Python's interpreter lock a hundred times, and by default may wait 5 ms for it each time while the
# event loop is busy. A shorter interval raised the throughput and lowered p99 at half load (docs/log.md).
SWITCH_SECONDS = 5e-4
FACTS = ("n", "top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high", "ece", "loss")


@dataclass(frozen=True)
class Settings:
    """One server. `token` guards it; without one it answers on loopback only, unless `public`."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    public: bool = False
    workers: int = 1
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        limits = self.limits
        if not 0 <= self.port <= 65535:
            raise CallError(f"--port must be from 0 (any free one) to 65535; received {self.port}")
        if not 1 <= self.workers <= 256:
            raise CallError(f"--workers must be from 1 to 256; received {self.workers}")
        if self.workers > 1 and not hasattr(socket, "SO_REUSEPORT"):
            raise CallError("several workers share a port through SO_REUSEPORT, which this system has not: leave --workers out")
        if not (1 <= limits.batch <= 4096 and 1 <= limits.queue <= 1 << 20 and 0 < limits.seconds <= 3600 and 0 < limits.body <= 1 << 32):
            raise CallError(
                "--batch must be from 1 to 4096, --queue to 2^20, --timeout to 3600 s and --max-body to 4096 MiB; "
                f"received {limits.batch}, {limits.queue}, {limits.seconds:g}, {limits.body / 2**20:g}"
            )
        if self.token is not None and (len(self.token) < TOKEN_LENGTH or not self.token.isascii() or not self.token.isprintable() or " " in self.token):
            raise CallError(
                f"a token must have at least {TOKEN_LENGTH} printable ASCII characters and no space; received {len(self.token)}: openssl rand -hex 16"
            )
        if not is_loopback(self.host) and self.token is None and not self.public:
            raise CallError(
                f"--host {shown(self.host)} can be reached from other machines, so requests must bring a secret: "
                "set RESLAB_TOKEN or --token, or let anyone in with --open"
            )


def serve(settings: Settings, say: Callable[[str], None] = print) -> None:
    """Serves until SIGTERM or Ctrl-C, and says where once it can be reached.

    Raises CallError for a wrong host or model, WorkError for a port in use or a process that cannot start.
    """
    with _bind(settings) as listener, _claim(settings, listener):
        port = listener.getsockname()[1]
        _allow_many_connections()
        classifier = load(settings.model)  # what is wrong with it is said here, in one line
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        ready = f"serving {shown(settings.model)} at http://{host}:{port} (Ctrl-C ends it)"
        rows = shared_rows(settings.workers)
        if settings.workers == 1:
            _serve(settings, classifier, listener, Metrics(rows), lambda: say(ready))
        else:
            _serve_several(settings, port, listener, rows, lambda: say(ready))


def _bind(settings: Settings, port: int | None = None, *, shared: bool = False) -> socket.socket:
    """The port; listened to, for else two that are not yet ready could have the same. `shared` lets other workers bind it too, unheard."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port if port is None else port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise CallError(f"--host must be an address of this machine; received {shown(settings.host)}: try 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if not shared:
            listener.listen()
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError):
            raise WorkError(f"port {settings.port} may not be used by this user: give --port from 1024 on") from error
        if error.errno == errno.EADDRINUSE:
            raise _in_use(settings) from error
        raise CallError(f"--host must be an address of this machine; received {shown(settings.host)} ({error.strerror}): try 127.0.0.1") from error
    return listener


def _claim(settings: Settings, listener: socket.socket) -> socket.socket:
    """That no other of these servers takes the address while this one's workers are not yet listening: a name that ends with its process."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if sys.platform == "linux":
        try:
            claim.bind(f"\0reslab serve {listener.getsockname()[:2]}")
        except OSError as error:
            claim.close()
            raise _in_use(settings) from error
    return claim


def _in_use(settings: Settings) -> WorkError:
    return WorkError(f"{shown(settings.host)}:{settings.port} is in use: stop what uses it, or give another --port (0 takes a free one)")


def _allow_many_connections() -> None:
    """Each connection is an open file, of which a process may have few by default."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _serve(
    settings: Settings, classifier: Classifier, listener: socket.socket, metrics: Metrics, ready: Callable[[], None], parent: int | None = None
) -> None:  # fmt: skip
    """One process: answers until a signal, or until the process `parent` is gone."""
    sys.setswitchinterval(SWITCH_SECONDS)
    threads = max(1, cores() // settings.workers)
    lanes = min(2, threads)
    if "OMP_NUM_THREADS" not in os.environ and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads // lanes)
    local_only = settings.token is None and not settings.public
    service = Service(classifier, _published(settings.model), settings.limits, metrics, settings.token, local_only, lanes)
    service.warm_up()
    _Server(_config(service), service, ready, parent).run([listener])


def _config(service: Service) -> uvicorn.Config:
    """At a stop, what was accepted has the time that it has otherwise: to arrive, to be answered, and for the answer to be seen."""
    stop_seconds = math.ceil(BODY_SECONDS + service.limits.seconds + LINGER_SECONDS)
    return uvicorn.Config(
        service.app, log_level="error", access_log=False, server_header=False, proxy_headers=False, ws="none", lifespan="on",
        http=parser(), loop="auto",
        timeout_keep_alive=int(STALE_SECONDS), timeout_graceful_shutdown=stop_seconds,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn's, which also ends in an orderly way, says when it listens, and drops connections that only hold a place."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None], parent: int | None = None) -> None:
        super().__init__(config)
        self.service, self.ready, self.parent = service, ready, parent
        self.interrupts = 0
        self.quiet: dict[Any, tuple[Any, float]] = {}  # connection -> its last request and bytes unsent, and since when these are so

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            gc.collect()
            gc.freeze()  # torch and the model are half a million objects: to look through them again and again took 130 ms each time
            self.ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The second Ctrl-C waits for nothing."""
        self.interrupts += sig == signal.SIGINT
        self.force_exit = self.interrupts > 1
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        self.service.sample()
        if counter % 10 == 0:
            self._drop_stale(time.monotonic())
        return await super().on_tick(counter) or self.parent not in (None, os.getppid())

    def _drop_stale(self, now: float) -> None:
        """Closes connections that for STALE_SECONDS have sent no whole request head, nor read of an answer that waits for them."""
        quiet = {}
        for connection in list(self.server_state.connections):
            cycle = connection.cycle  # type: ignore[union-attr]  # both parsers that _serve chooses from have it
            if cycle is None or cycle.response_complete or connection.flow.write_paused:  # type: ignore[union-attr]
                state = cycle, connection.transport.get_write_buffer_size()
                before, since = self.quiet.get(connection, (None, now))
                quiet[connection] = (state, since if before == state else now)
                if now - quiet[connection][1] > STALE_SECONDS:
                    connection.transport.abort()
        self.quiet = quiet

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.closing = True  # from here on each answer asks its client to close
        for server in self.servers:
            server.close()
        until = time.monotonic() + DRAIN_SECONDS
        while self.server_state.connections and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.02)
        dropping = asyncio.create_task(self._go_on_dropping())  # or who reads nothing would hold up the stop for as long as an answer may take
        await super().shutdown(sockets)
        dropping.cancel()

    async def _go_on_dropping(self) -> None:
        while True:
            self._drop_stale(time.monotonic())
            await asyncio.sleep(1)


def _serve_several(settings: Settings, port: int, listener: socket.socket, rows: Any, ready: Callable[[], None]) -> None:
    listener.close()  # bound alone, it has shown that nobody else is there
    holder = _bind(settings, port, shared=True)  # keeps the port; as it never listens, it gets no connection
    try:
        supervise(partial(_work, settings, port, rows), settings.workers, ready)
    finally:
        holder.close()


def _work(settings: Settings, port: int, rows: Any, row: int, pipe: Connection) -> None:
    listener = _bind(settings, port, shared=True)
    if settings.model.suffix.lower() == ".onnx":  # its threads are set before it is loaded
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // settings.workers)))
    _serve(settings, load(settings.model), listener, Metrics(rows, row), lambda: pipe.send_bytes(b"ready"), os.getppid())


def _published(model: Path) -> Published:
    """What a run folder tells beside its model; of a model alone, its name."""
    model = located(model)
    run = Run(model)
    if not (model / "run.toml").is_file():
        return Published({"name": model.stem, "net": None, "data": None, "test": None})
    config, test, report = run.config, run.last("test"), model / "report.html"
    facts = {"name": model.resolve().name, "net": config.get("net"), "data": config.get("data", {}).get("name")}
    scores = {key: test[key] for key in FACTS if key in test} if test else None
    return Published({**facts, "test": scores}, report.read_bytes() if report.is_file() else None)
