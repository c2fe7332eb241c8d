"""Micro-batching against one forward pass a request, on the same code; latency at half load; and three times too much.

    python benchmarks/serving.py [RUN] [--smoke]       about five minutes

The server and the load generator share this machine's cores over loopback, so the throughput is what is left to the
server. `--batch 1` makes it a server with one forward pass a request; that one is measured with the threads it chooses,
with one and with all, and given its best. All servers take turns.
"""

import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from measure import keep
from served import load, model, serve

from reslab.host import cores

SMOKE = "--smoke" in sys.argv
SECONDS = 0.5 if SMOKE else 8.0
ROUNDS, HALF_ROUNDS = (1, 1) if SMOKE else (3, 7)
OVERLOAD_SECONDS = 1.0 if SMOKE else 30.0
CONNECTIONS = 64  # of the closed loop
BOUND = 512  # connections of the open loop


def throughput(found: dict[str, Any]) -> float:
    return float(found["ended"].get("200", 0) / found["seconds"])


def compare(run: Path) -> tuple[list[str], dict[str, float]]:
    """Images a second in a closed loop, by server."""
    threads_here = cores()
    servers = {
        "one forward pass a request": ["--batch", "1"],
        "micro-batching": [],
        f"micro-batching, {threads_here} workers": ["--workers", str(threads_here)],
    }
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, options in servers.items():
            for threads in ("by itself", "1", str(threads_here)) if name.startswith("one") and not SMOKE else ("by itself",):
                given = {} if threads == "by itself" else {"OMP_NUM_THREADS": threads}
                with serve(run, *options, **given) as server:
                    load(server.port, CONNECTIONS, SECONDS / 4)
                    taken.setdefault((name, threads), []).append(throughput(load(server.port, CONNECTIONS, SECONDS)))
    best = {name: max(statistics.median(values) for (each, _), values in taken.items() if each == name) for name in servers}
    lines = [
        f"{name}, threads {threads}: median {statistics.median(values):.0f} images/s of {', '.join(f'{v:.0f}' for v in values)}"
        for (name, threads), values in taken.items()
    ]
    first, second, third = best.values()
    return [*lines, f"throughput against one forward pass a request: {second / first:.2f}x; with workers {third / first:.2f}x"], best


def half_load(run: Path, sustainable: float) -> str:
    """A stall of the machine of a tenth of a second is one in a hundred requests of eight seconds, so there are several rounds."""
    with serve(run) as server:
        load(server.port, CONNECTIONS, SECONDS / 4)
        rounds = [load(server.port, BOUND, SECONDS, sustainable / 2) for _ in range(HALF_ROUNDS)]
    times = [f"p{q} {statistics.median(found[f'p{q}_ms'] for found in rounds):.1f} ms" for q in (50, 95, 99)]
    each = ", ".join(f"{found['p99_ms']:.0f}" for found in rounds)
    answers = Counter[str]()
    for found in rounds:
        answers.update(found["answers"])
    return f"at half load, {sustainable / 2:.0f} requests/s: medians of {HALF_ROUNDS} rounds {', '.join(times)}; p99 of each {each}; answers {dict(answers)}"


def overload(run: Path, sustainable: float) -> list[str]:
    """Three times the sustainable load: every answer 200 or 503, memory flat, every request answered."""
    with serve(run) as server:
        load(server.port, BOUND, SECONDS / 2, 3 * sustainable)
        before = server.resident()
        found = load(server.port, BOUND, OVERLOAD_SECONDS, 3 * sustainable)
        after, metrics = server.resident(), server.metrics()
        left = metrics["reslab_waiting_images"]
    answers = found["answers"]
    assert set(answers) <= {"200", "503"}, answers
    assert found["unanswered"] == 0 == left
    return [
        f"{OVERLOAD_SECONDS:.0f} s at three times the load, {3 * sustainable:.0f} requests/s: answers {answers}, unanswered {found['unanswered']}, "
        f"{found['unsent']} found none of {BOUND} connections free",
        f"of those answered with 200, {throughput(found):.0f}/s: p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms; memory {before:.0f} -> {after:.0f} MiB",
    ]


def main() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        run = model(Path(folder))
        lines, best = compare(run)
        sustainable = best["micro-batching"]
        return ["ResNet-20 at 32 px, PNGs, server and load generator on the same cores", *lines, half_load(run, sustainable), *overload(run, sustainable)]


if __name__ == "__main__":
    keep("serving", main())
