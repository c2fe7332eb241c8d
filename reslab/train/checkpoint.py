"""Activation checkpointing: trades one more forward pass, of as few blocks as a memory budget demands, for activations.

The first blocks are grouped in segments. Of a segment only its input is kept; in the backward pass its blocks run
forward once more (Chen et al. 2016, 1604.06174). The blocks behind the last segment keep everything: their activations
are the first to be read and are gone when those of the segments come back, and in a residual net they are the smallest.

    forward    [ input ][ input ][ input ]  all of the last blocks      inputs + last blocks    <= budget
    backward   [ input ][ all    ]                                      inputs + one segment    <= budget

Loss, gradients and running statistics are those of the net without, on a CPU bit for bit: batch norm does not take the
same batch into its running statistics twice, and dropout and stochastic depth draw the same numbers again.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reslab.catalogue.memory import Stretch, stretches
from reslab.errors import CallError
from reslab.host import release_freed_memory, resident
from reslab.nets.torch import ResNet
from reslab.spec import Spec
from reslab.train.hardware import Machine
from reslab.train.recipe import Recipe

Segments = tuple[int, ...]  # how many blocks each has, from the first block on

MEMORIES = {"sgd": 1, "muon": 1, "adamw": 2}  # tensors that an optimiser remembers of each parameter
HEAP = 2.6  # of what activations need: with fewer holes allowed for, the heap is trimmed at every step, which costs more than it saves
MARGIN = 96 << 20  # bytes by which the heap may grow between two looks at it
LOADED_LATER = 128 << 20  # bytes: the part of torch that checkpointing loads, and the report
IN_FLIGHT = 4  # of the largest output: gradients on their way back, what runs forward, the workspace of a convolution
GIB = 2**30


class Checkpointed(nn.Module):
    """A net that forgets the activations of its first blocks and computes them again. Same parameters, same results.

    `memory` is what the process may hold. On a CPU the heap is trimmed when it grows beyond: between buffers that come and
    go lies what stays, and glibc's heap would grow to two or three times of what is in use.
    """

    def __init__(self, net: nn.Module, segments: Segments, memory: int | None = None) -> None:
        super().__init__()
        self.net, self.segments = net, segments
        ahead = MARGIN + 2 * sum(p.nbytes for p in net.parameters())  # what the optimiser works with comes after the last look
        self.limit = None if memory is None else memory - ahead

    def forward(self, x: Tensor) -> Tensor:
        if self.limit is None or not torch.is_grad_enabled():
            logits: Tensor = self.net(x)
            return logits
        assert isinstance(self.net, ResNet)
        blocks = list(self.net.blocks.values())
        x, begin = self.net.stem(x), 0
        for count in self.segments:
            segment = blocks[begin : begin + count]
            x = checkpoint(self._run, segment, x, use_reentrant=False, context_fn=partial(_contexts, segment))
            begin += count
        return self.net.head(self._run(blocks[begin:], x))

    def _run(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
            if x.device.type == "cpu":
                self._look()
                if x.requires_grad:
                    x.register_hook(self._look)  # type: ignore[no-untyped-call]  # once more, on the way back
        return x

    def _look(self, _: Tensor | None = None) -> None:
        """Trims the heap when the process has grown beyond its limit."""
        if self.limit is not None and resident() > self.limit:
            release_freed_memory()


def _contexts(segment: list[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a segment's first run, and around its second."""
    return nullcontext(), running_statistics_kept(segment)


@contextmanager
def running_statistics_kept(blocks: list[nn.Module]) -> Iterator[None]:
    """Batch norm works on copies of its running statistics and its counter, and what it does to them is forgotten.

    A momentum of zero would not do: 0 times a value that is not finite is not 0, and the counter would count.
    """
    norms = [m for block in blocks for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    own = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, own, strict=True):
        for name, tensor in buffers.items():
            setattr(norm, name, tensor.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            for name, tensor in buffers.items():
                setattr(norm, name, tensor)


def choose_segments(spec: Spec, recipe: Recipe, precision: str, memory: int | None, machine: Machine) -> Segments:
    """The segments with which a training step fits into `memory` bytes, less what the machine holds already; () if all fits.

    By arithmetic, for a `recipe` that is resolved. Raises CallError, with what is needed, when no segments do.
    """
    assert recipe.image_size is not None and recipe.micro_batch is not None
    if memory is None:
        return ()
    held = machine.agree(machine.held())
    parts = stretches(spec, recipe.image_size, recipe.micro_batch)
    parameters = 4 * spec.cost(recipe.image_size).params
    fixed = held + (2 + MEMORIES[recipe.optimizer] + (recipe.ema > 0) + (recipe.sam > 0)) * parameters  # gradients, and the copy on which steps are timed
    if precision == "bf16":
        parts = [Stretch(*(size // 2 for size in part)) for part in parts]
        fixed += parameters // 2
    fixed += IN_FLIGHT * max(part.largest for part in parts)
    if recipe.freeze == "trunk":
        parts = [Stretch(0, 0, 0) for _ in parts]  # nothing flows back through it
    on_cpu = machine.device.type == "cpu"
    fixed += LOADED_LATER * on_cpu
    waste = HEAP if on_cpu else 1.0
    segments = segments_within(parts, int((memory - fixed) / waste))
    if segments is None:
        need = fixed + int(waste * least(parts))
        raise CallError(
            f"--memory must hold a training step of {recipe.micro_batch} images, here {_up(need)} GiB ({_up(held)} are held before it, "
            f"{_up(need - fixed)} are activations with every block computed twice); received {memory / GIB:.2f}: raise it, or lower --batch-size"
        )
    return segments


def segments_within(parts: list[Stretch], budget: int) -> Segments | None:
    """The segments that keep at most `budget` bytes and compute the fewest blocks again; None when none are found.

    `parts` are the stem, the blocks and the head. Segments reach as far as they can, so that there are few inputs to keep: the
    best there is where no block gives more than the one before it, which holds for nets that halve the image as they double channels.
    """
    stem, blocks, head = parts[0], parts[1:-1], parts[-1]
    before = [0, *accumulate(block.kept for block in blocks)]  # kept by all blocks before one
    inputs = [part.output for part in parts[:-1]]  # of each block; the last is the head's
    total = stem.kept + head.kept + before[-1]
    if total <= budget:
        return ()
    segments: list[int] = []
    begin, held = 0, stem.kept
    while begin < len(blocks):
        held += inputs[begin]
        reach = bisect_right(before, budget - held + before[begin]) - 1
        for end in range(begin + 1, reach + 1):
            if held + inputs[end] + before[-1] - before[end] + head.kept <= budget:
                return (*segments, end - begin)
        if reach <= begin:
            return None
        segments.append(reach - begin)
        begin = reach
    return None


def least(parts: list[Stretch]) -> int:
    """The smallest budget that `segments_within` can meet, in bytes."""
    low, high = 0, sum(part.kept for part in parts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if segments_within(parts, middle) is not None else (middle + 1, high)
    return low


def _up(size: int) -> str:
    return f"{-(-size * 100 // GIB) / 100:.2f}"
