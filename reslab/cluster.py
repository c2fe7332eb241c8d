"""Work spread over the machines of a Ray cluster: items in, results out, in order. Needs the extra `cluster`.

What was under way on a machine that dies is done again on another, and every item has one result. Only so many items are
under way at a time, so a million of them need no more memory here than a hundred. Ray carries the calls; the machines
must have reslab installed and see the same files.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from reslab.errors import CallError, WorkError, needs_extra, shown

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 4  # after which an item is what kills its machine
AHEAD = 3  # items handed out for every core of the cluster


def spread(work: Callable[[T], R], items: Iterable[T], address: str) -> Iterator[tuple[T, R]]:
    """(item, work(item)) for each item, in order. `work` and what it takes and gives must be picklable; each call has a core.

    `address` is a cluster's, such as 10.0.0.1:6379 or ray://10.0.0.1:10001; "auto" finds the one that this machine is part
    of, "local" makes one of this machine alone. Raises what `work` raises, and WorkError when there is no cluster, or when
    an item has lost its machine five times.
    """
    with connected(address) as ray:
        call = ray.remote(_call).options(num_cpus=1, max_retries=RETRIES)
        waiting: deque[tuple[T, Any]] = deque()
        for item in items:
            waiting.append((item, call.remote(work, item)))
            while len(waiting) >= AHEAD * max(1, ray.cluster_resources().get("CPU", 1)):
                yield _taken(ray, *waiting.popleft())
        while waiting:
            yield _taken(ray, *waiting.popleft())


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to that cluster; a connection that there was before is used and left open."""
    ray = _require_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False if address == "local" else None)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise WorkError(f"--cluster must be the address of a running Ray cluster, auto or local; {shown(address)} gave: {_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _call(work: Callable[[T], R], item: T) -> R:
    return work(item)


def _taken(ray: Any, item: T, reference: Any) -> tuple[T, R]:
    try:
        result: R = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, CallError | WorkError) else WorkError(f"a part of the work failed: {_line(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise WorkError(f"a part of the work lost its machine {1 + RETRIES} times: {_line(error)}") from error
    return item, result


def _line(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def _require_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use otherwise
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise needs_extra("ray", "cluster") from error
    return ray
