"""Which of several ways to compute the same is the fastest here and now."""

import statistics
import time
from collections.abc import Callable
from typing import Any

SECONDS, ROUNDS = 2.0, 15
REST = 0.05  # seconds: threads of onnxruntime spin for more than ten milliseconds after a call, on the cores of the next


def race(runs: dict[str, Callable[[], Any]], seconds: float = SECONDS, rounds: int = ROUNDS) -> dict[str, float]:
    """The median time of each call, measured in turns, so that what else the machine does meets all of them alike.

    Each begins when the others' threads have stopped spinning, and is called once unmeasured before, for its own are asleep by then.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        for name, call in runs.items():
            time.sleep(REST)
            call()
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
        done += 1
    return {name: statistics.median(times) for name, times in took.items()}
