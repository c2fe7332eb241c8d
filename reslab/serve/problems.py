"""Errors of the HTTP interface, as problem documents (RFC 9457)."""

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "application/problem+json"
BODY_ENDED = "reslab.body_ended"  # in an ASGI scope: whether all of the request's body was received
LINGER_BYTES = 256 << 20
LINGER_SECONDS = 5.0


class Problem(Exception):
    """A request that gets no result. `detail` is one line: the rule, what was received, the fix; `facts` go beside it."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None, **facts: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.facts = status, detail, headers, facts

    def response(self) -> Response:
        """The document, with its status."""
        document = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status, "detail": self.detail, **self.facts}
        kind = _Lingering if (self.headers or {}).get("connection") == "close" else Response
        return kind(json.dumps(document), self.status, self.headers, MEDIA_TYPE)


class _Lingering(Response):
    """An answer to a body that was not read: the connection stays open until the client has had time to see it.

    Closed at once with bytes unread, the system would reset it, and the client would lose the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        dropped = 0
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not scope.get(BODY_ENDED) and dropped < LINGER_BYTES:
                    dropped += len((await receive()).get("body", b""))
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
