"""Work spread over the machines of a Ray cluster. Needs the extra `cluster`.

What was under way on a machine that dies is done again on another, and every item has one result. Ray carries the calls;
the machines must have reslab installed and see the same files.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from reslab.errors import CallError, WorkError, needs_extra, shown

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 4  # after which an item is what kills its machine
ANSWERED_WITHIN = 5.0  # seconds; Ray itself asks a silent address for minutes
AHEAD = 3  # items handed out for every core of the cluster


class Pool(Executor):
    """The cores of a cluster, used like the processes of `concurrent.futures.ProcessPoolExecutor`: each call has a core.

    `address` is a cluster's, such as 10.0.0.1:6379 or ray://10.0.0.1:10001; "auto" finds the one that this machine is part
    of, "local" makes one of this machine alone. `begin` is called before each call, where it is done. A future raises what
    its call raises, and WorkError when it has lost its machine five times. Raises WorkError when there is no cluster.
    """

    def __init__(self, address: str, begin: Callable[[], None] | None = None) -> None:
        self._held = ExitStack()
        self._ray, self._begin = self._held.enter_context(connected(address)), begin
        self._call = self._ray.remote(_call).options(num_cpus=1, max_retries=RETRIES)

    @property
    def cores(self) -> int:
        """Of all machines together, now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, function: Callable[..., R], /, *arguments: Any) -> Future[R]:  # type: ignore[override]
        """The call's result to be. `function` and what it takes and gives must be picklable."""
        future: Future[R] = Future()

        def hand_on(found: Future[R]) -> None:
            error = found.exception()
            if error:
                future.set_exception(self._ours(error))
            else:
                future.set_result(found.result())

        self._call.remote(self._begin, function, arguments).future().add_done_callback(hand_on)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the connection, and with it the calls that are not done."""
        self._held.close()

    def _ours(self, error: BaseException) -> BaseException:
        if isinstance(error, self._ray.exceptions.RayTaskError):
            cause = error.cause
            return cause if isinstance(cause, CallError | WorkError) else WorkError(f"a part of the work failed: {_line(cause)}")
        return WorkError(f"a part of the work lost its machine {1 + RETRIES} times: {_line(error)}")


def spread(work: Callable[[T], R], items: Iterable[T], address: str) -> Iterator[tuple[T, R]]:
    """(item, work(item)) for each item, in order, by the cores of a `Pool`.

    Only so many items are under way at a time, so a million of them need no more memory here than a hundred.
    """
    with Pool(address) as pool:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            while len(waiting) >= AHEAD * pool.cores:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to that cluster; a connection that there was before is used and left open."""
    ray = _require_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        if address not in ("auto", "local"):
            place = urlsplit(address if "://" in address else f"//{address}")
            socket.create_connection((place.hostname or "", place.port or 0), ANSWERED_WITHIN).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False if address == "local" else None)
    except (OSError, RuntimeError, ValueError) as error:
        raise WorkError(f"--cluster must be the address of a running Ray cluster, auto or local; {shown(address)} gave: {_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _call(begin: Callable[[], None] | None, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    if begin:
        begin()
    return function(*arguments)


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
