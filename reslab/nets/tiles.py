"""Convolutions of nets that train in bf16 on a processor with AMX, by its matrix tiles in C (tiles.c), where oneDNN is slower.

That is the gradient of filters, for which oneDNN multiplies 32 pixels of a row at a time and small maps have no such rows, and
over small maps the convolution itself. Here pixels follow each other whatever the size of the map. What it gains is in
benchmarks/results/fused.txt. Without a C compiler the work is oneDNN's.
"""

import ctypes
from ctypes import byref, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reslab.nets.compiler import FAILURES, at, compiled
from reslab.nets.once import once_differentiable

SOURCE = Path(__file__).with_name("tiles.c")
LEAST = 64  # channels of the images; with fewer, laying them out costs what it saves
SHARE = 512  # pixels that a thread should have, for its sums to be worth adding up
SMALL, TINY = 8, 4  # pixels a row of maps that are convolved by tiles: small ones of many channels, tiny ones of any
MANY = 128


@cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of matrices (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def suits(x: Tensor) -> bool:
    """Whether the filters of a convolution of x are to get their gradient by tiles."""
    return x.shape[1] >= LEAST and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16 and usable()


@cache
def usable() -> bool:
    """Whether the processor has tiles, the kernel lends them and a compiler makes the library."""
    try:
        return has_amx() and not _library().tiles_allow()
    except FAILURES:
        return False


def convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """(N, C, H, W) and fp32 filters (O, C, 1, 1), stride 1, or (O, C, 3, 3), padded by 1 -> bf16, channels-last. Once differentiable."""
    x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    y: Tensor = _Convolution.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        filters = weight.bfloat16()
        ctx.save_for_backward(x, filters)
        ctx.stride = stride
        if filters.shape[2] == 1:
            return _product(x, filters.flatten(1))
        if _small(x, filters, stride):
            return _convolved(x, filters, back=False)
        return F.conv2d(x, filters, stride=stride, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, filters), stride, dx = ctx.saved_tensors, ctx.stride, None
        dy = dy.contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[0]:
            if filters.shape[2] == 1:
                dx = _product(dy, filters.flatten(1).T)
            elif _small(x, filters, stride):
                dx = _convolved(dy, filters, back=True)
            else:
                wanted = [True, False, False]
                dx = torch.ops.aten.convolution_backward(dy, x, filters, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, wanted)[0]
        return dx, filter_gradient(x, dy, filters.shape[2], stride) if ctx.needs_input_grad[1] else None, None


def filter_gradient(x: Tensor, dy: Tensor, side: int, stride: int = 1) -> Tensor:
    """Of images (N, C, H, W) and the gradient of what square filters with `side` // 2 of padding made of them, both bf16 and
    channels-last: (O, C, side, side), fp32, channels-last.
    """
    (n, inputs, height, width), (_, outputs, down, across) = x.shape, dy.shape
    dw = torch.empty((outputs, inputs, side, side), dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    walk = _Conv(n, height, width, inputs, down, across, outputs, side, stride, side // 2)
    if _library().filter_gradient(at(x), at(dy), at(dw), byref(walk), _parts(n * down * across)):
        raise MemoryError("no memory for the sums of a filter's gradient")
    return dw


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)


def _small(x: Tensor, filters: Tensor, stride: int) -> bool:
    return stride == 1 and (x.shape[3] <= TINY or (x.shape[3] <= SMALL and min(filters.shape[:2]) >= MANY))


def _convolved(x: Tensor, filters: Tensor, back: bool) -> Tensor:
    """x (N, C, H, W) by filters (O, C, 3, 3); or, of the gradient of what came out, that of what went in."""
    n, inputs, height, width = x.shape
    outputs = filters.shape[1 if back else 0]
    y = torch.empty((n, outputs, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    walk = _Conv(n, height, width, inputs, height, width, outputs, 3, 1, 1)
    filters = filters.contiguous(memory_format=torch.channels_last)
    if _library().convolve(at(x), at(filters), at(y), byref(walk), back, _parts(n * height * width)):
        raise MemoryError("no memory for the sums of a convolution")
    return y


def _parts(pixels: int) -> int:
    return max(1, min(torch.get_num_threads(), pixels // SHARE))


class _Conv(ctypes.Structure):
    """As in tiles.c."""

    _fields_ = [(name, c_int64) for name in ("images", "height", "width", "inputs", "down", "across", "outputs", "side", "stride", "padding")]


@cache
def _library() -> ctypes.CDLL:
    """Raises one of FAILURES where it cannot be made."""
    library = compiled(SOURCE)
    library.filter_gradient.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int]
    library.convolve.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int]
    return library
