"""Winograd's convolutions in bf16 by AVX-512's dot products, in C (dots.c): for processors that have these and no matrix tiles.

By torch's operations (winograd.py) every step of the algorithm is written to memory and read again; here transforms and products
stay in the caches, and all sums are fp32. What it gains is in benchmarks/results/winograd-amd.txt.
"""

import ctypes
from ctypes import byref, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reslab.nets.compiler import FAILURES, at, compiled

SOURCE = Path(__file__).with_name("dots.c")
PANEL = 32  # channels that lie together; what is missing to the last is zeros
TILES, MORE = 48, 384  # at a time: for a convolution, for the gradient of its filters


def fills(*channels: int) -> bool:
    """Whether channels fill panels well enough: at most a quarter is empty."""
    return all(3 * -(-count // PANEL) * PANEL <= 4 * count for count in channels)


@cache
def usable() -> bool:
    """Whether the processor has dot products of bf16 and a compiler makes the library."""
    try:
        return bool(_library())
    except FAILURES:
        return False


class Dots(torch.autograd.Function):
    """(N, C, H, W) in bf16 and fp32 filters (O, C, 3, 3) -> (N, O, H, W) in bf16, channels-last, zero-padded by one pixel. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = _convolved(dy, weight, back=True) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight, memory_format=torch.channels_last)
            if _library().filter_gradient(at(x), at(dy), at(dw), byref(_conv(x, weight)), MORE, torch.get_num_threads()):
                raise MemoryError("no memory for the sums of a filter's gradient")
        return dx, dw


def _convolved(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = torch.empty((len(x), weight.shape[1 if back else 0], *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
    if _library().convolve(at(x), at(weight), at(y), byref(_conv(x, weight)), back, TILES, torch.get_num_threads()):
        raise MemoryError("no memory for the tiles of a convolution")
    return y


def _conv(x: Tensor, weight: Tensor) -> "_Conv":
    return _Conv(len(x), *x.shape[2:], weight.shape[1], weight.shape[0])


class _Conv(ctypes.Structure):
    """As in dots.c."""

    _fields_ = [(name, c_int64) for name in ("images", "height", "width", "inputs", "outputs")]


@cache
def _library() -> ctypes.CDLL:
    """Raises one of FAILURES where it cannot be made."""
    library = compiled(SOURCE)
    library.convolve.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int64, c_int]
    library.filter_gradient.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int]
    return library
