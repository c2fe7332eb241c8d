"""What surrounds every request: who may ask, the headers of every answer, that it reaches its client, and the count of answers."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reslab.errors import shown
from reslab.serve.metrics import Metrics
from reslab.serve.problems import Problem

BODY_ENDED = "reslab.body_ended"  # in an ASGI scope: whether all of the request's body was received
LINGER_BYTES = 256 << 20
LINGER_SECONDS = 5.0
UNGUARDED = ("/health", "/ready")  # what a load balancer asks
ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]


class Guard:
    """ASGI middleware. With a `token` every request must bring it; with `local_only` it must be for a loopback name.

    The latter stops a web page elsewhere from reading a server on this machine by pointing its own name here (DNS
    rebinding). While `is_closing()`, answers ask the client to close its connection.
    """

    def __init__(self, app: ASGIApp, token: str | None, local_only: bool, metrics: Metrics, is_closing: Callable[[], bool]) -> None:
        self.app, self.metrics, self.is_closing = app, metrics, is_closing
        self.token = token.encode() if token else None
        self.local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, started = time.perf_counter(), False
        scope[BODY_ENDED] = not any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *ALWAYS]
                if self.is_closing():
                    message["headers"].append((b"connection", b"close"))
                self.metrics.answered(message["status"])
                if scope["path"] == "/predict":
                    self.metrics.observe("request_seconds", time.perf_counter() - start)
            elif not message.get("more_body", False) and not scope[BODY_ENDED]:
                await send({**message, "more_body": True})
                await _drop_body(scope, take)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        async def take() -> Message:
            message = await receive()
            scope[BODY_ENDED] = not message.get("more_body", False)
            return message

        refusal = self._refusal(scope)
        try:
            await (refusal.response() if refusal else self.app)(scope, take, answer)
        except Exception:
            if not started:
                await Problem(500, "the server failed; its log says how").response()(scope, take, answer)
            raise

    def _refusal(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        hosts = len(headers.getlist("host"))
        if hosts > 1 or (not hosts and scope["http_version"] != "1.0"):  # RFC 9112, section 3.2
            return Problem(400, f"a request must have one Host header; received {hosts}")
        if self.local_only and not is_loopback(name := _host(headers.get("host", "localhost"))):
            return Problem(421, f"this server answers to localhost only; received {shown(name)[:80]}: start it with --token, or --open")
        if self.token and scope["path"] not in UNGUARDED and not self._knows(headers.get("authorization", "")):
            challenge = 'Bearer realm="reslab", Basic realm="reslab: any user name, the token as password"'
            return Problem(401, "this server needs its token: Authorization: Bearer TOKEN", {"www-authenticate": challenge})
        return None

    def _knows(self, authorization: str) -> bool:
        """Bearer as programs send it, or Basic as browsers ask for it."""
        assert self.token
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.token)


async def _drop_body(scope: Scope, receive: Receive) -> None:
    """Between an answer and its end: the rest of a body that nobody read, for the client to have time to see the answer.

    Closed at once with bytes unread, the system would reset the connection, and the client would lose the answer.
    """
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while not scope[BODY_ENDED] and dropped < LINGER_BYTES:
                dropped += len((await receive()).get("body", b""))


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine as only itself sees it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _host(header: str) -> str:
    """A Host header without its port."""
    name, colon, port = header.rpartition(":")
    return name if colon and port.isdecimal() else header
