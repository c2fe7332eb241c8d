"""Max-pools for training on a CPU that note in one byte where the largest was, in C (pool.c); `use_fused` turns them on."""

import ctypes
from ctypes import byref, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reslab.nets.compiler import FAILURES, LANES, TYPES, at, compiled, takes
from reslab.nets.once import once_differentiable

SOURCE = Path(__file__).with_name("pool.c")
SIDE = 15  # pixels a side of the largest window


class MaxPool(nn.MaxPool2d):
    """A max-pool over (N, C, H, W), by the kernels where it is `fused` and they can."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fused and self.training and x.dtype in TYPES and takes(x) and x.shape[1] % LANES == 0 and self._plain):
            return super().forward(x)  # type: ignore[no-any-return]
        out = nn.functional.max_pool2d(x[:1].to("meta"), self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode)
        return _MaxPool.apply(x, *out.shape[2:], self.kernel_size, self.stride, self.padding)  # type: ignore[no-untyped-call, no-any-return]

    @property
    def _plain(self) -> bool:
        """Whether its windows are of the kind that the kernels know: square, close, and a byte counts their pixels."""
        square = isinstance(self.kernel_size, int) and isinstance(self.stride, int) and isinstance(self.padding, int)
        return square and self.kernel_size <= SIDE and self.dilation == 1 and not self.return_indices  # type: ignore[operator]


@cache
def usable() -> bool:
    """Whether the kernels can be made here."""
    try:
        return all(_library(dtype) for dtype in TYPES)
    except FAILURES:
        return False


class _Pool(ctypes.Structure):
    """As in pool.c."""

    _fields_ = [(name, c_int64) for name in ("images", "height", "width", "channels", "down", "across", "side", "stride", "padding")]


class _MaxPool(torch.autograd.Function):
    """The largest of each window of side x side pixels, `down` x `across` of them. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: int, across: int, side: int, stride: int, padding: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        n, channels, height, width = x.shape
        ctx.pool = _Pool(n, height, width, channels, down, across, side, stride, padding)
        y = torch.empty((n, channels, down, across), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        where = torch.empty_like(y, dtype=torch.uint8)
        _library(x.dtype).pool_forward(at(x), at(y), at(where), byref(ctx.pool), torch.get_num_threads())
        ctx.save_for_backward(where)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (where,) = ctx.saved_tensors
        dy, pool = dy.contiguous(memory_format=torch.channels_last), ctx.pool
        dx = torch.empty((pool.images, pool.channels, pool.height, pool.width), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        _library(dy.dtype).pool_backward(at(dy), at(where), at(dx), byref(pool), torch.get_num_threads())
        return dx, None, None, None, None, None


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for tensors of a dtype. Raises one of FAILURES where they cannot be made."""
    library = compiled(SOURCE, *TYPES[dtype])
    library.pool_forward.argtypes = library.pool_backward.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int]
    return library
