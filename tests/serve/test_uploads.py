"""The body of a request as it comes in, or does not."""

import asyncio
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from reslab.serve import uploads
from reslab.serve.problems import Problem
from tests.serve.serving import make_run
from tests.serve.test_service import make


def test_a_body_that_stops_coming_is_answered_ends_its_connection_and_is_held_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "BODY_SECONDS", 0.2)
    service = make(make_run(tmp_path / "run"))
    headers = [(b"host", b"localhost"), (b"content-type", b"image/png"), (b"content-length", b"600")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1)}
    sent: list[dict[str, Any]] = []
    held: list[int] = []

    async def receive() -> dict[str, Any]:
        """The first part of the body, nothing for long, and the rest when it is too late."""
        held.append(service.memory.held)
        if len(held) == 2:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": bytes(300), "more_body": len(held) == 1}

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        async with service.app.router.lifespan_context(service.app):
            await service.app(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(main(), 30))
    start, *bodies = sent
    assert start["status"] == 408
    assert dict(start["headers"])[b"connection"] == b"close"
    assert "received 300 bytes by then" in json.loads(b"".join(part["body"] for part in bodies))["detail"]
    assert held == [0, 300, 0], "while the answer waits to be seen, nothing is held any more"


def test_a_body_of_many_tiny_parts_is_refused_before_it_is_taken_apart() -> None:
    body = b"--xyz\r\n\r\n" * (1 << 18) + b"--xyz--"
    tracemalloc.start()
    with pytest.raises(Problem) as problem:
        uploads._files(body, "multipart/form-data; boundary=xyz", 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problem.value.status == 400
    assert peak < 3 * len(body), "all the parts would take seven times as much"
