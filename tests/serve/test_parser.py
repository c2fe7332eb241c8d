"""Bytes of a connection -> requests, with each of the two parsers."""

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from reslab.serve.parser import WAITING, parser

BOTH = pytest.mark.parametrize("protocol", [parser(), H11Protocol])
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


class Echo:
    """An application that answers each request with its path and its body; `/slow` takes until all was sent."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.sent = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            self.asked.append(("/slow", b""))
            await self.sent.wait()
        else:
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body, more = body + message["body"], message["more_body"]
            self.asked.append((scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def exchange(protocol: Any, *segments: bytes) -> tuple[list[tuple[str, bytes]], bytes]:
    """What the application is asked, and what comes back, when these bytes arrive a moment apart."""

    async def main() -> tuple[list[tuple[str, bytes]], bytes]:
        app = Echo()
        config, loop = uvicorn.Config(app, ws="none", log_level="critical"), asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol(config, ServerState(), {}, loop), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        answer = b""
        try:
            for segment in segments:
                writer.write(segment)
                await writer.drain()
                await asyncio.sleep(0.05)
            app.sent.set()
            while part := await reader.read(1 << 16):
                answer += part
        except ConnectionError:
            pass
        finally:
            writer.close()
            server.close()
        return app.asked, answer

    return asyncio.run(asyncio.wait_for(main(), 20))


INNER = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
LENGTH, CHUNKED = b"Content-Length: %d" % len(INNER), b"Transfer-Encoding: chunked"


@BOTH
@pytest.mark.parametrize(
    ("first", "connection", "framing", "keeps"),
    [
        (b"POST /first HTTP/1.1", b"Upgrade, HTTP2-Settings", LENGTH, True),
        (b"POST /first HTTP/1.1", b"Upgrade", CHUNKED, True),
        (b"POST /first HTTP/1.1", b"close, upgrade", LENGTH, False),
        (b"POST /first HTTP/1.0", b"Upgrade", LENGTH, False),
    ],
)
def test_a_request_that_asks_to_upgrade_is_read_whole(protocol: Any, first: bytes, connection: bytes, framing: bytes, keeps: bool) -> None:
    head = b"\r\n".join([first, b"Host: x", b"Connection: " + connection, b"Empty:", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk", framing, b"", b""])
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER) if framing == CHUNKED else INNER
    for segments in ([head + body], [head, body], [head[:-20], head[-20:] + body[:5], body[5:]]):
        asked, answer = exchange(protocol, *segments[:-1], segments[-1] + LAST)
        assert asked == [("/first", INNER), *([("/last", b"")] if keeps else [])]
        assert answer.count(OK) == len(asked)


def test_several_requests_that_ask_to_upgrade_are_answered_in_order() -> None:
    asked, answer = exchange(parser(), b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" % i for i in range(9)) + LAST)
    assert [path for path, _ in asked] == [*(f"/{i}" for i in range(9)), "/last"]
    assert answer.count(OK) == 10


@pytest.mark.parametrize("target", [b"x:80", b"http://x/first"])
def test_a_tunnel_is_refused(target: bytes) -> None:
    asked, answer = exchange(parser(), b"CONNECT %b HTTP/1.1\r\nHost: x\r\n\r\n" % target + INNER, INNER)
    assert (asked, answer[:12]) == ([], b"HTTP/1.1 400")


def test_few_requests_of_a_connection_wait() -> None:
    asked, answer = exchange(parser(), b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", INNER * (WAITING - 1) + LAST)
    assert len(asked) == answer.count(OK) == 1 + WAITING
    asked, answer = exchange(parser(), b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", INNER * 10_000)
    assert (asked, answer) == ([("/slow", b"")], b""), "the connection ends"


@BOTH
def test_what_is_not_http_is_refused_and_never_as_the_answer_to_what_was_before_it(protocol: Any) -> None:
    post = b"POST /first HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for broken in (b"\x16\x03\x01\x02\0", post + b"no length\r\n"):
        asked, answer = exchange(protocol, broken)
        assert (asked, answer[:12]) == ([], b"HTTP/1.1 400")
    asked, answer = exchange(protocol, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\0")
    assert asked == [("/slow", b"")]
    assert answer[:12] in (b"", OK[:12])
