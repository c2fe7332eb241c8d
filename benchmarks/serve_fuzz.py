"""What a server must survive: 10,000 mutated requests, image bombs, 100 MB bodies, slow clients, clients that leave.

    python benchmarks/serve_fuzz.py [RUN] [--smoke]        about a minute; with schemathesis where it is installed

Asked of it: no 500, no hang, flat memory, and afterwards the same answer to a good image as before.
"""

import http.client
import io
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measure import keep
from PIL import Image
from served import Server, model, serve

BODIES = 300 if "--smoke" in sys.argv else 10_000
THREADS = 4
MIB = 1 << 20
FORM = "multipart/form-data; boundary=xyz"
SCHEMATHESIS = '[checks]\npositive_data_acceptance.expected-statuses = ["2xx", 422]\n'  # a schema cannot say "a readable image"


def picture(seed: int, kind: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    file = io.BytesIO()
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    small.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def form(*bodies: bytes) -> bytes:
    parts = [b'--xyz\r\nContent-Disposition: form-data; name="a"; filename="%d.png"\r\nContent-Type: image/png\r\n\r\n%s\r\n' % p for p in enumerate(bodies)]
    return b"".join(parts) + b"--xyz--\r\n"


def bomb(width: int, height: int, whole: bool = True) -> bytes:
    """A PNG of few bytes and many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height if whole else 1)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SEEDS = [
    *((picture(i, kind), "image/*") for i, kind in enumerate(("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA", "JPEG2000"))),
    (picture(20, "JPEG", progressive=True), "image/jpeg"),
    (picture(21, "TIFF", compression="tiff_lzw"), "image/tiff"),
    (form(picture(22, "PNG"), picture(23, "JPEG")), FORM),
    (form(picture(24, "GIF")), FORM),
]


def mutate(body: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Bytes changed, put in, taken out, blown up, cut off, or crossed with another file."""
    held = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        at = rng.randrange(len(held) + 1)
        match rng.randrange(6):
            case 0:
                held[at : at + 1] = rng.randbytes(1)
            case 1:
                held[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
            case 2:
                del held[at : at + rng.choice((1, 4, 32))]
            case 3:
                held[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\r\n\r\n", b"--xyz"))
            case 4:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                held[at : at + 16] = other[start : start + rng.choice((16, 256))]
            case 5 if rng.random() < 0.2:
                del held[at:]
    return bytes(held)


def ask(connection: http.client.HTTPConnection, body: bytes, kind: str, heat: bool = False) -> int:
    connection.request("POST", f"/predict?heat_map={'true' if heat else 'false'}", body, {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        assert json.loads(text)["status"] == answer.status
    return answer.status


def fuzz(server: Server, part: int) -> tuple[Counter[int], float]:
    """A thread's share of the bodies -> statuses, and the slowest answer in seconds."""
    rng = random.Random(part)
    statuses: Counter[int] = Counter()
    slowest = 0.0
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(BODIES // THREADS):
        body, kind = rng.choice(SEEDS)
        kind = kind if rng.random() < 0.95 else rng.choice(("", "text/html", "multipart/form-data", "image", "multipart/form-data; boundary=", "\t;;=", FORM))
        start = time.perf_counter()
        statuses[ask(connection, mutate(body, rng, [seed for seed, _ in SEEDS]), kind, rng.random() < 0.05)] += 1
        slowest = max(slowest, time.perf_counter() - start)
    return statuses, slowest


def raw(server: Server, sent: bytes, wait: float = 10) -> bytes:
    """What comes back to bytes that need not be HTTP."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while more := connection.recv(65536):
                found += more
        except OSError:
            pass
        return found


def heads(server: Server, n: int) -> Counter[str]:
    """Mutated request heads -> first lines of the answers."""
    rng = random.Random(1)
    whole = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"
    answers = (raw(server, mutate(whole, rng, [whole])) for _ in range(n))
    return Counter(answer[9:12].decode("latin-1") or "closed" for answer in answers)


def leave_early(server: Server, n: int) -> None:
    """Clients that send a part and go, and clients that send all and do not wait."""
    whole = picture(0, "PNG")
    head = b"POST /predict?heat_map=true HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(whole)
    for i in range(n):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall((head + whole)[: [1, 20, len(head), len(head) + 9, len(head) + len(whole)][i % 5]])
            if i % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed


def slow(server: Server, n: int) -> list[socket.socket]:
    """Connections that have begun a request and never go on."""
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(n)]
    for i, connection in enumerate(held):
        connection.sendall((b"", b"POST /pre", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\nx")[i % 3])
    return held


def bombs(server: Server) -> Counter[int]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    made = [bomb(50_000, 50_000, whole=False), bomb(9_000, 9_000), bomb(60_000, 1), bomb(7_000, 7_000), bomb(7_000, 7_000, whole=False)]
    return Counter(ask(connection, body, "image/png") for body in [*made, form(*[made[1]] * 16), form(*[made[3]] * 4)])


def schema(server: Server) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as settings:
        settings.write(SCHEMATHESIS)
        settings.flush()
        command = [
            "schemathesis",
            "--config-file",
            settings.name,
            "run",
            f"http://127.0.0.1:{server.port}/openapi.json",
            "--max-examples",
            "300",
            "--seed",
            "1",
        ]
        program = Path(sys.executable).with_name("schemathesis")
        if not program.exists():
            return "schemathesis is not installed: pip install schemathesis"
        done = subprocess.run([str(program), *command[1:]], capture_output=True, text=True, cwd=tempfile.gettempdir())
    lines = [line.strip(" =") for line in done.stdout.splitlines() if "generated" in line or "No issues" in line or "failure" in line]
    return f"schemathesis (exit {done.returncode}): {'; '.join(lines)}"


def main() -> list[str]:
    with tempfile.TemporaryDirectory() as folder, serve(model(Path(folder))) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        good = picture(0, "PNG")
        assert ask(connection, good, "image/png", heat=True) == 200
        held = slow(server, 60)
        fuzz(server, part=99)  # brings every decoder in, so that what grows afterwards is a leak
        before, start = server.resident(), time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            shares = list(pool.map(lambda part: fuzz(server, part), range(THREADS)))
        lines = [
            f"{BODIES} mutated bodies in {time.perf_counter() - start:.0f} s: {dict(sorted(sum((s for s, _ in shares), Counter()).items()))}, "
            f"slowest {max(t for _, t in shares):.2f} s; memory {before:.0f} -> {server.resident():.0f} MiB"
        ]
        lines.append(f"{BODIES // 10} mutated heads: {dict(heads(server, BODIES // 10))}")
        leave_early(server, BODIES // 10)
        lines.append(f"{BODIES // 10} clients that left; memory {server.resident():.0f} MiB")
        for _ in range(4):
            start = time.perf_counter()
            bombed = bombs(server)
            lines.append(f"bombs, and images just within the limit: {dict(bombed)} in {time.perf_counter() - start:.1f} s; memory {server.resident():.0f} MiB")
        big = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(4)]
        lines.append(f"100 MB bodies: {dict(Counter(ask(each, bytes(100_000_000), 'image/png') for each in big))}; memory {server.resident():.0f} MiB")
        lines.append(schema(server))
        for each in held:
            each.close()
        assert ask(connection_to(server), good, "image/png", heat=True) == 200
        time.sleep(1)
        metrics = server.metrics()
        failed = metrics['reslab_answers_total{status="500"}']
        assert failed == 0
        lines.append(f"afterwards: {failed:.0f} answers of 500, {metrics['reslab_body_bytes']:.0f} bytes of bodies held, memory {server.resident():.0f} MiB")
    return lines


def connection_to(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)


if __name__ == "__main__":
    keep("serve_fuzz", main())
