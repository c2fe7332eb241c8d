"""Work on a GPU as one launch: a CUDA graph, recorded once and replayed.

A small net lets a GPU wait for Python, which launches the hundreds of kernels of a pass one by one. A recording reads and
writes the same memory every time: what goes in is copied to where it was found, and what comes out is overwritten by the next.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
WARM = 3  # runs before a recording, in which libraries set themselves up


def shared_pool() -> Any:
    """Memory for recordings that never run at once."""
    return torch.cuda.graph_pool_handle()


class Recording(Generic[T]):
    """Recording work does not do it. `pool` is a `shared_pool`."""

    def __init__(self, work: Callable[[], T], pool: Any = None) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # threads that load data may use the GPU meanwhile
            self.result = work()

    def __call__(self) -> T:
        """Does the work; the result is the same tensors every time."""
        self.graph.replay()
        return self.result


def warm_up(work: Callable[[], Any]) -> None:
    """Does the work a few times beside the current stream, as a recording asks for."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(aside)
