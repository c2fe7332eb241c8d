"""What a server counts, as Prometheus text (exposition format 0.0.4). Several processes count side by side.

All numbers lie in one flat array that the processes share: each adds to a row of its own, and any of them can sum the
rows. So whichever process a scrape reaches, it answers for all.
"""

from bisect import bisect_left
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # upper bounds of latency buckets
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # upper bounds of batch-size buckets
STATUSES = (200, 400, 401, 404, 405, 408, 413, 415, 421, 422, 500, 503, 504)

COUNTERS = {
    "images_total": "Images classified.",
    "heat_maps_total": "Heat maps drawn.",
}
GAUGES = {
    "waiting_images": "Images accepted and not yet in a batch.",
    "body_bytes": "Bytes of request bodies held in memory.",
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "request_seconds": ("Time from the request's head to its answer, for /predict.", SECONDS),
    "batch_images": ("Images that went through the net together.", SIZES),
    "batch_seconds": ("Time to decode and classify a batch.", SECONDS),
}


def _slots() -> dict[str, int]:
    names = [*(f"status {status}" for status in STATUSES), *COUNTERS, *GAUGES]
    starts = {name: i for i, name in enumerate(names)}
    end = len(names)
    for name, (_, bounds) in HISTOGRAMS.items():
        starts[name] = end
        end += len(bounds) + 3  # one more bucket, then the sum and the count
    return {**starts, "": end}


SLOTS = _slots()


def shared_rows(processes: int) -> Any:
    """The array for so many processes; it can be handed to a process that is being started."""
    return get_context("spawn").RawArray("d", SLOTS[""] * processes)


class Metrics:
    """The numbers of one process, row `row` of `shared`. Only this process writes to its row."""

    def __init__(self, shared: Any, row: int = 0) -> None:
        self._all = shared
        self._start = row * SLOTS[""]
        for name in GAUGES:
            self.set(name, 0)  # the row may be that of a process that died

    def add(self, name: str, value: float = 1) -> None:
        """Counts."""
        self._all[self._start + SLOTS[name]] += value

    def set(self, name: str, value: float) -> None:
        """Says what is now."""
        self._all[self._start + SLOTS[name]] = value

    def answered(self, status: int) -> None:
        """Counts an answer by its HTTP status."""
        self.add(f"status {status if status in STATUSES else 500}")

    def observe(self, name: str, value: float) -> None:
        """Adds to a histogram."""
        bounds = HISTOGRAMS[name][1]
        start = self._start + SLOTS[name]
        self._all[start + bisect_left(bounds, value)] += 1
        self._all[start + len(bounds) + 1] += value
        self._all[start + len(bounds) + 2] += 1

    def text(self) -> str:
        """All processes together, as Prometheus reads it."""
        return "\n".join(self._lines()) + "\n"

    def _sum(self, slot: int) -> float:
        return float(sum(self._all[row + slot] for row in range(0, len(self._all), SLOTS[""])))

    def _lines(self) -> Iterator[str]:
        yield from _head("answers_total", "Answers by HTTP status.", "counter")
        for status in STATUSES:
            yield f'reslab_answers_total{{status="{status}"}} {self._sum(SLOTS[f"status {status}"]):.0f}'
        for kind, family in (("counter", COUNTERS), ("gauge", GAUGES)):
            for name, text in family.items():
                yield from _head(name, text, kind)
                yield f"reslab_{name} {self._sum(SLOTS[name]):.0f}"
        for name, (text, bounds) in HISTOGRAMS.items():
            yield from _head(name, text, "histogram")
            below = 0.0
            for i, bound in enumerate([*map(str, bounds), "+Inf"]):
                below += self._sum(SLOTS[name] + i)
                yield f'reslab_{name}_bucket{{le="{bound}"}} {below:.0f}'
            yield f"reslab_{name}_sum {self._sum(SLOTS[name] + len(bounds) + 1):.6f}"
            yield f"reslab_{name}_count {self._sum(SLOTS[name] + len(bounds) + 2):.0f}"


def _head(name: str, text: str, kind: str) -> tuple[str, str]:
    return f"# HELP reslab_{name} {text}", f"# TYPE reslab_{name} {kind}"
