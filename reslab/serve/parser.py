"""The HTTP parser of a server: the faster of uvicorn's two, where it is installed, with the bounds and the answer to Upgrade that the other has."""

import contextlib
from importlib.util import find_spec
from typing import Any

HEAD_BYTES = 1 << 16  # of a request, about: it is in memory before anyone has asked who sends it
WAITING = 16  # requests of one connection behind the one that is being answered


def parser() -> Any:
    """What uvicorn takes as `http`."""
    if not find_spec("httptools"):
        return "h11"
    from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Bounded(HttpToolsProtocol):
        unfinished = 0  # bytes since the last end of a head, end of a request, or part of a body

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            self.unfinished += len(data)
            try:
                self._feed(data)
            except (HttpParserError, HttpParserUpgrade):
                self.send_400_response("Invalid HTTP request received.")
                return
            if self.unfinished > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("a request's head is too long")

        def _feed(self, data: bytes) -> None:
            """A server may ignore Upgrade (RFC 9110, section 7.8), but httptools leaves out the body then: it gets the head again, without it.

            Raises HttpParserUpgrade for CONNECT, after which no head says what follows.
            """
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except HttpParserUpgrade as upgrade:
                    head, data = self._head_without_upgrade(), data[upgrade.args[0] :]
                self.parser = HttpRequestParser(self)  # the old one may take nothing more
                with contextlib.suppress(AttributeError):  # httptools before 0.6.3 is so by itself
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)

        def _head_without_upgrade(self) -> bytes:
            first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            return b"\r\n".join([first, *(b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"), b"", b""])

        def on_headers_complete(self) -> None:
            self.unfinished = 0
            if len(self.pipeline) >= WAITING:
                raise HttpParserError
            if not self.parser.should_upgrade():
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.unfinished = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self.unfinished = 0
            if not self.parser.should_upgrade():
                super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            """As the answer to the request that it is about; where one before it has still to be answered, there is none."""
            cycle = self.cycle
            unanswered = cycle is not None and not cycle.response_complete
            if unanswered and (self.pipeline or cycle.response_started or not cycle.more_body):
                self.transport.abort()
            else:
                super().send_400_response(msg)

    return Bounded
