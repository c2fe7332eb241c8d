"""The HTTP parser of a server: the faster of uvicorn's two, where it is installed, with the bound on a request's head that the other has."""

from importlib.util import find_spec
from typing import Any

HEAD_BYTES = 1 << 16  # of a request, about: it is in memory before anyone has asked who sends it


def parser() -> Any:
    """What uvicorn takes as `http`."""
    if not find_spec("httptools"):
        return "h11"
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Bounded(HttpToolsProtocol):
        unfinished = 0  # bytes since the last end of a head, end of a request, or part of a body

        def data_received(self, data: bytes) -> None:
            self.unfinished += len(data)
            super().data_received(data)
            if self.unfinished > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("a request's head is too long")

        def on_headers_complete(self) -> None:
            self.unfinished = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.unfinished = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self.unfinished = 0
            super().on_message_complete()

    return Bounded
