"""3x3 convolutions in bf16 by AVX-512's dot products, in C: for processors that have these and no matrix tiles.

By Winograd's algorithm in winograd.c: by torch's operations (winograd.py) every step of it is written to memory and read again; here
transforms and products stay in the caches. From 16 channels to 16, where the transforms would cost what they save, directly in
narrow.c. All sums are fp32. What it gains is in benchmarks/results/winograd-amd.txt.
"""

import ctypes
from ctypes import byref, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reslab.nets.compiler import FAILURES, at, compiled
from reslab.nets.once import once_differentiable

WINOGRAD, DIRECT = (Path(__file__).with_name(name) for name in ("winograd.c", "narrow.c"))
NARROW = 16  # channels
PANEL = 32  # channels that lie together; what is missing to the last is zeros
TILES, MORE = 48, 384  # at a time: for a convolution, for the gradient of its filters


def fills(*channels: int) -> bool:
    """Whether channels fill panels well enough: at most a quarter is empty."""
    return all(3 * -(-count // PANEL) * PANEL <= 4 * count for count in channels)


def narrow(*channels: int) -> bool:
    """Whether channels are those of direct convolutions."""
    return all(count == NARROW for count in channels)


@cache
def usable() -> bool:
    """Whether the processor has dot products of bf16 and a compiler makes the libraries."""
    try:
        return bool(_winograd() and _direct())
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
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = _convolved(dy, weight, back=True) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight, memory_format=torch.channels_last)
            given, threads = (at(x), at(dy), at(dw), byref(_conv(x, weight))), torch.get_num_threads()
            direct = narrow(*weight.shape[:2])
            if _direct().filter_gradient(*given, threads) if direct else _winograd().filter_gradient(*given, MORE, threads):
                raise MemoryError("no memory for the sums of a filter's gradient")
        return dx, dw


def _convolved(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = torch.empty((len(x), weight.shape[1 if back else 0], *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    given, threads = (at(x), at(weight), at(y), byref(_conv(x, weight)), back), torch.get_num_threads()
    if _direct().convolve(*given, threads) if narrow(*weight.shape[:2]) else _winograd().convolve(*given, TILES, threads):
        raise MemoryError("no memory for the tiles of a convolution")
    return y


def _conv(x: Tensor, weight: Tensor) -> "_Conv":
    return _Conv(len(x), *x.shape[2:], weight.shape[1], weight.shape[0])


class _Conv(ctypes.Structure):
    """As in winograd.c."""

    _fields_ = [(name, c_int64) for name in ("images", "height", "width", "inputs", "outputs")]


@cache
def _winograd() -> ctypes.CDLL:
    """Raises one of FAILURES where it cannot be made."""
    library = compiled(WINOGRAD)
    library.convolve.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int64, c_int]
    library.filter_gradient.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int]
    return library


@cache
def _direct() -> ctypes.CDLL:
    """Raises one of FAILURES where it cannot be made."""
    library = compiled(DIRECT)
    library.convolve.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int]
    library.filter_gradient.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int]
    return library
