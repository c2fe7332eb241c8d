"""A load generator in a process of its own: PNGs to /predict over loopback, over a bounded number of connections.

    python benchmarks/load.py PORT CONNECTIONS SECONDS [RATE]      prints one line of JSON

Without a rate each connection asks again as soon as it is answered. With one, requests start at even intervals whether
or not earlier ones were answered, as people do who do not know of each other; latency then counts from that start, and
what finds no free connection is counted as not sent. Written on asyncio protocols, so that it takes little of the cores
that it shares with the server.
"""

import asyncio
import io
import json
import sys
import time
from collections import Counter, deque

import numpy as np
from PIL import Image

IMAGES = 256


def requests() -> list[bytes]:
    """Whole HTTP requests with CIFAR-10 test images, or noise where there is no CIFAR-10."""
    from reslab.data.source import open_images

    try:
        images = open_images("cifar10")
        assert images.array is not None
        pixels = images.array[-IMAGES:]
    except (RuntimeError, ValueError, OSError):
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    made = []
    for each in pixels:
        png = io.BytesIO()
        Image.fromarray(each).save(png, "PNG")
        body = png.getvalue()
        made.append(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return made


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time; `done(connection, status)` gets 0 for a lost one."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.buffer = b""
        self.started = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, request: bytes, started: float) -> None:
        self.busy, self.started, self.buffer = True, started, b""
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, body = self.buffer.partition(b"\r\n\r\n")
        if blank and len(body) >= int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]):
            self.busy = False
            self.load.answered(self, int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self.load.lost(self)


class Load:
    def __init__(self, port: int, connections: int, seconds: float, rate: float | None) -> None:
        self.port, self.seconds, self.rate = port, seconds, rate
        self.requests = requests()
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []
        self.free: deque[Connection] = deque()
        self.connections = connections
        self.sent = self.unsent = 0
        self.stopping = False

    async def run(self) -> dict[str, object]:
        loop = asyncio.get_running_loop()
        opened = [(await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.port))[1] for _ in range(self.connections)]
        self.free.extend(opened)
        start = time.perf_counter()
        if self.rate is None:
            while self.free:
                self.send(time.perf_counter())
            await asyncio.sleep(self.seconds)
        else:
            while (now := time.perf_counter()) < start + self.seconds:
                due = start + (self.sent + self.unsent) / self.rate
                if due <= now:
                    self.send(due)
                else:
                    await asyncio.sleep(due - now)
                if (self.sent + self.unsent) % 32 == 0:
                    await asyncio.sleep(0)
        self.stopping = True
        seconds = time.perf_counter() - start
        ended = dict(self.statuses)  # what comes from here on was answered after the clock had stopped
        for _ in range(1500):
            if not any(each.busy for each in opened):
                break
            await asyncio.sleep(0.01)
        taken = np.sort(self.latencies) if self.latencies else np.zeros(1)
        return {
            "seconds": seconds, "sent": self.sent, "unsent": self.unsent, "answers": dict(self.statuses), "ended": ended,
            "unanswered": sum(each.busy for each in opened),
            **{f"p{q}_ms": round(1e3 * float(np.percentile(taken, q)), 2) for q in (50, 95, 99)},
        }  # fmt: skip

    def send(self, started: float) -> None:
        if not self.free:
            self.unsent += 1
            return
        self.free.popleft().send(self.requests[self.sent % len(self.requests)], started)
        self.sent += 1

    def answered(self, connection: Connection, status: int) -> None:
        self.statuses[status] += 1
        now = time.perf_counter()
        if status == 200:
            self.latencies.append(now - connection.started)
        self.free.append(connection)
        if self.rate is None and not self.stopping:
            self.send(now)

    def lost(self, connection: Connection) -> None:
        if connection.busy:
            self.statuses[0] += 1
            connection.busy = False


if __name__ == "__main__":
    port, connections, seconds, *rate = sys.argv[1:]
    print(json.dumps(asyncio.run(Load(int(port), int(connections), float(seconds), float(rate[0]) if rate else None).run())))
