"""Micro-batching: what arrives while the net is busy goes through it together; what finds it idle starts at once.

No clock holds an item back, so an idle server adds no wait, and a busy one forms larger batches the busier it is. The
queue is bounded in number and in time: what would wait too long is refused when it comes, not after it has waited.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
SMOOTHING = 0.2  # weight of the newest batch in the running mean of seconds an item


class Full(Exception):
    """The queue takes no more; `retry_after` is in whole seconds, at least one."""

    def __init__(self, wait: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = max(1, math.ceil(wait))


class Late(Exception):
    """The time limit passed before there was an answer."""


class Batcher(Generic[Item, Answer]):
    """Calls `work` in its own threads, `lanes` at a time, with up to `largest` items; it returns one answer an item.

    At most `places` items wait, and none that would likely wait longer than `patience` seconds. An exception that `work`
    raises is the answer of every item of its batch. All methods belong to the event loop's thread.
    """

    def __init__(
        self, work: Callable[[list[Item]], Sequence[Answer]], *, largest: int, places: int, patience: float = math.inf, lanes: int = 1,
        watch: Callable[[Sequence[Answer], float], None] = lambda answers, seconds: None,
    ) -> None:  # fmt: skip
        self._work, self._watch = work, watch
        self._largest, self._places, self._patience, self._lanes = largest, places, patience, lanes
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="batch")
        self._waiting: OrderedDict[asyncio.Future[Answer], Item] = OrderedDict()  # by where the answer goes
        self._running = 0  # batches
        self._seconds_an_item = 0.0
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        """Items that are accepted and not yet in a batch."""
        return len(self._waiting)

    @property
    def wait(self) -> float:
        """Seconds that a new item would likely wait, by the speed so far."""
        return len(self._waiting) * self._seconds_an_item / self._lanes

    def check_room(self, items: int = 1) -> None:
        """Raises Full when so many more would be refused."""
        if self._closing or len(self._waiting) + items > self._places or self.wait > self._patience:
            raise Full(self.wait)

    async def ask(self, items: Sequence[Item], limit: float) -> list[Answer]:
        """One answer an item, in order; all items are accepted or none. Raises Full, or Late after `limit` seconds."""
        self.check_room(len(items))
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Answer]] = [loop.create_future() for _ in items]
        self._waiting.update(zip(answers, items, strict=True))
        self._start()
        try:
            async with asyncio.timeout(limit):
                return [await answer for answer in answers]
        except TimeoutError:
            raise Late from None
        finally:
            for answer in answers:
                self._waiting.pop(answer, None)  # what nobody waits for any more is not computed
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()  # seen, of however many: asyncio would complain of the rest

    def _start(self) -> None:
        while self._running < self._lanes and self._waiting:
            batch = dict(self._waiting.popitem(last=False) for _ in range(min(self._largest, len(self._waiting))))
            self._running += 1
            self._idle.clear()
            running = asyncio.get_running_loop().run_in_executor(self._pool, self._timed, list(batch.values()))
            running.add_done_callback(partial(self._finish, list(batch)))

    def _timed(self, items: list[Item]) -> tuple[Sequence[Answer], float]:
        start = time.perf_counter()
        return self._work(items), time.perf_counter() - start

    def _finish(self, batch: list["asyncio.Future[Answer]"], done: "asyncio.Future[tuple[Sequence[Answer], float]]") -> None:
        self._running -= 1
        error = done.exception()
        found, seconds = ([], 0.0) if error else done.result()
        for i, answer in enumerate(batch):
            if answer.done():
                continue
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(found[i])
        if not error:
            each = seconds / len(batch)
            self._seconds_an_item += (each - self._seconds_an_item) * (SMOOTHING if self._seconds_an_item else 1.0)
            self._watch(found, seconds)
        self._start()
        if not self._running:
            self._idle.set()

    async def close(self) -> None:
        """Accepts nothing more, answers what was accepted, and ends the threads."""
        self._closing = True
        await self._idle.wait()
        self._pool.shutdown()
