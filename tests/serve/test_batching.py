"""The micro-batcher without HTTP: what it puts together, what it refuses, and that it owes nobody an answer."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from reslab.serve.batching import Batcher, Full, Late


class Worker:
    """Doubles numbers; each batch waits until `go` is set."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.seconds = seconds

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.go.wait(10)
        time.sleep(self.seconds)
        if -1 in items:
            raise RuntimeError("minus one")
        return [2 * item for item in items]


def run(work: Worker, test: Callable[[Batcher[int, int]], Awaitable[Any]], **limits: Any) -> Any:
    async def main() -> Any:
        batcher: Batcher[int, int] = Batcher(work, **{"largest": 8, "places": 100, **limits})
        try:
            return await test(batcher)
        finally:
            work.go.set()
            await batcher.close()

    return asyncio.run(main())


async def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never became true")


def test_an_idle_batcher_starts_at_once_with_what_came() -> None:
    """No clock holds an item back: it is in a batch before anything else is done. benchmarks/serving.py measures latencies."""
    work = Worker()

    async def test(batcher: Batcher[int, int]) -> None:
        for i in range(20):
            asked = asyncio.create_task(batcher.ask([i], 10))
            await asyncio.sleep(0)  # one turn of the event loop
            assert batcher.waiting == 0
            assert await asked == [2 * i]

    run(work, test)
    assert work.batches == [[i] for i in range(20)]


def test_what_comes_while_it_is_busy_goes_together() -> None:
    work = Worker()

    async def test(batcher: Batcher[int, int]) -> list[list[int]]:
        work.go.clear()
        asked = [asyncio.create_task(batcher.ask([i], 10)) for i in range(12)]
        await until(lambda: batcher.waiting == 11)
        work.go.set()
        return await asyncio.gather(*asked)

    assert run(work, test) == [[2 * i] for i in range(12)]
    assert work.batches == [[0], list(range(1, 9)), [9, 10, 11]]


def test_answers_of_one_request_keep_their_order_over_batches() -> None:
    work = Worker()
    assert run(work, lambda b: b.ask(list(range(20)), 10), largest=3) == [2 * i for i in range(20)]
    assert max(map(len, work.batches)) == 3


def test_a_full_queue_refuses_whole_requests_and_says_when_to_come_back() -> None:
    work = Worker()

    async def test(batcher: Batcher[int, int]) -> None:
        work.go.clear()
        first = asyncio.create_task(batcher.ask([0], 10))
        await until(lambda: work.batches != [])
        rest = asyncio.create_task(batcher.ask([1, 2, 3], 10))
        await until(lambda: batcher.waiting == 3)
        with pytest.raises(Full) as full:
            await batcher.ask([4, 5], 10)
        assert full.value.retry_after >= 1
        assert batcher.waiting == 3, "of a refused request nothing stays"
        last = asyncio.create_task(batcher.ask([6], 10))
        await until(lambda: batcher.waiting == 4)
        work.go.set()
        assert await asyncio.gather(first, rest, last) == [[0], [2, 4, 6], [12]]

    run(work, test, places=4)


def test_what_would_wait_too_long_is_refused_before_the_queue_is_full() -> None:
    work = Worker(seconds=0.05)

    async def test(batcher: Batcher[int, int]) -> None:
        await batcher.ask([0], 10)  # now it knows that an item takes 0.05 s
        asked = [asyncio.create_task(batcher.ask([i], 10)) for i in range(8)]
        await until(lambda: batcher.waiting >= 5 or batcher.wait > 0.1)
        with pytest.raises(Full):
            for _ in range(20):
                asked.append(asyncio.create_task(batcher.ask([1], 10)))
                await asyncio.sleep(0)
                batcher.check_room()
        assert batcher.waiting < 15
        await asyncio.gather(*asked, return_exceptions=True)

    run(work, test, largest=1, patience=0.3)


def test_a_late_answer_is_late_and_what_nobody_waits_for_is_not_computed() -> None:
    work = Worker()

    async def test(batcher: Batcher[int, int]) -> None:
        work.go.clear()
        first = asyncio.create_task(batcher.ask([0], 10))
        await until(lambda: work.batches != [])
        start = time.perf_counter()
        with pytest.raises(Late):
            await batcher.ask([1, 2], 0.05)
        assert time.perf_counter() - start < 5
        gone = asyncio.create_task(batcher.ask([3], 10))
        await until(lambda: batcher.waiting == 1)
        gone.cancel()
        await until(lambda: batcher.waiting == 0)
        work.go.set()
        assert await first == [0]

    run(work, test)
    assert work.batches == [[0]]


def test_a_failed_batch_fails_its_own_items_only() -> None:
    work = Worker()

    async def test(batcher: Batcher[int, int]) -> None:
        with pytest.raises(RuntimeError, match="minus one"):
            await batcher.ask([-1, 14, 15], 10)
        assert await batcher.ask([1], 10) == [2]

    run(work, test)


@pytest.mark.parametrize("lanes", [1, 3])
def test_closing_answers_all_that_was_accepted_and_takes_no_more(lanes: int) -> None:
    work = Worker(seconds=0.01)

    async def test(batcher: Batcher[int, int]) -> list[list[int]]:
        work.go.clear()
        asked = [asyncio.create_task(batcher.ask([i], 10)) for i in range(40)]
        await until(lambda: batcher.waiting == 40 - lanes)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.ask([99], 10)
        work.go.set()
        await closing
        assert batcher.waiting == 0
        return await asyncio.gather(*asked)

    assert run(work, test, lanes=lanes) == [[2 * i] for i in range(40)]
    assert 99 not in [item for batch in work.batches for item in batch]
