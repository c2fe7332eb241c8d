"""3x3 convolutions by Winograd's algorithm, F(4x4, 3x3) of Lavin & Gray 2015 (1509.09308): a quarter of the multiplications.

The image is cut into overlapping tiles of 6x6 pixels; tiles and filters are transformed, multiplied point by point, which
for all channels together is 36 matrix products, and transformed back to 4x4 pixels of output. On a CPU in fp32 it pays for
wide layers, where those products outweigh the transforms, and as long as what lies between two steps stays in the cache: the
images go through a few at a time. Rounding differs from the direct convolution's: about 4e-6
relative, forward and backward (benchmarks/winograd.py).
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE = 128  # channels in and out, below which the transforms cost what the products save
FEW_TILES = 64  # below so many, reading the transformed filters takes longest
WASTE = 1.8  # of tiles that reach over the edge
CACHED = 1 << 15  # numbers at one of a tile's 36 points that go through at a time: 4.5 MiB for all points
TALL = 128  # tiles at a time that a matrix product needs to be fast

INPUT = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))
FILTER = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class WideConv(nn.Conv2d):
    """A padded 3x3 convolution with stride 1 that can be done by Winograd's algorithm; it is not unless `winograd` is set.

    Where it would not pay (few or small images, bf16, another device) the convolution is direct all the same. `keep` spends
    memory for time: the transformed tiles, 2.25 times as large as the input or more, wait for the backward pass.
    """

    winograd = False
    keep = True

    def forward(self, x: Tensor) -> Tensor:
        if self.winograd and pays(x):
            y: Tensor = Winograd.apply(x, self.weight, self.keep)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias[:, None, None]
        return super().forward(x)


def use_winograd(net: nn.Module, on: bool, keep: bool = True) -> bool:
    """Sets how the wide convolutions of a net are done. Returns whether it has any."""
    wide = [module for module in net.modules() if isinstance(module, WideConv)]
    for module in wide:
        module.winograd, module.keep = on, keep
    return bool(wide)


def suits(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> bool:
    """Whether a convolution is one that Winograd's algorithm makes faster."""
    return (kernel, stride, groups) == (3, 1, 1) and min(inputs, outputs) >= WIDE


def pays(x: Tensor) -> bool:
    """Whether images (N, C, H, W) are as many and as large as it takes."""
    n, _, height, width = x.shape
    down, across = _tiles(height), _tiles(width)
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return plain and n * down * across >= FEW_TILES and 16 * down * across <= WASTE * height * width


def _tiles(pixels: int) -> int:
    return -(-pixels // 4)


class _Shape(NamedTuple):
    """Images, channels in and out, pixels and tiles downwards and across."""

    n: int
    inputs: int
    outputs: int
    height: int
    width: int
    down: int
    across: int

    @property
    def stretches(self) -> list[slice]:
        """The images, as many at a time as the cache holds."""
        tiles = max(TALL, CACHED // max(self.inputs, self.outputs))
        step = max(1, round(tiles / (self.down * self.across)))
        return [slice(first, min(first + step, self.n)) for first in range(0, self.n, step)]


class Winograd(torch.autograd.Function):
    """(N, C, H, W) and filters (O, C, 3, 3) -> (N, O, H, W) channels-last, zero-padded by one pixel. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keep: bool = True) -> Tensor:
        n, inputs, height, width = x.shape
        s = _Shape(n, inputs, len(weight), height, width, _tiles(height), _tiles(width))
        _, to_filters, to_output = _transforms(x.dtype)
        filters = (to_filters @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, s.outputs)
        padded, kept = _padded(x, s), []
        y = x.new_empty(n, s.down, 4, s.across, 4, s.outputs)
        for part in s.stretches:
            tiles = _transformed(padded[part], s)
            products = torch.bmm(tiles, filters)
            cells = (to_output @ products.view(36, -1)).view(4, 4, -1, s.down, s.across, s.outputs)
            y[part] = cells.permute(2, 3, 0, 4, 1, 5)
            if keep and ctx.needs_input_grad[1]:
                kept.append(tiles)
        ctx.save_for_backward(filters, *(kept or [x]))
        ctx.shape, ctx.kept = s, bool(kept)
        return y.view(n, 4 * s.down, 4 * s.across, s.outputs)[:, :height, :width].permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        filters, *held = ctx.saved_tensors
        s: _Shape = ctx.shape
        to_tiles, to_filters, to_output = _transforms(dy.dtype)
        for_x, for_weight = ctx.needs_input_grad[:2]
        padded = _padded(held[0], s) if for_weight and not ctx.kept else None
        cells = F.pad(dy.permute(0, 2, 3, 1), (0, 0, 0, 4 * s.across - s.width, 0, 4 * s.down - s.height))
        cells = cells.reshape(s.n, s.down, 4, s.across, 4, s.outputs)
        dx = dy.new_empty(s.n, s.height, s.width, s.inputs) if for_x else None
        d_filters = torch.zeros_like(filters)
        for number, part in enumerate(s.stretches):
            g = cells[part].permute(2, 4, 0, 1, 3, 5).reshape(16, -1)
            d_products = (to_output.T @ g).view(36, -1, s.outputs)
            if dx is not None:
                d_tiles = torch.bmm(d_products, filters.transpose(1, 2)).view(36, -1)
                dx[part] = _overlapped((to_tiles.T @ d_tiles).view(6, 6, -1, s.down, s.across, s.inputs), s)
            if for_weight:
                tiles = held[number] if padded is None else _transformed(padded[part], s)
                d_filters.baddbmm_(tiles.transpose(1, 2), d_products)
        dw = (to_filters.T @ d_filters.view(36, -1)).view(3, 3, s.inputs, s.outputs).permute(3, 2, 0, 1) if for_weight else None
        return None if dx is None else dx.permute(0, 3, 1, 2), dw, None


@cache
def _transforms(dtype: torch.dtype) -> list[Tensor]:
    """Both axes of each transform at once: (36, 36), (36, 9), (16, 36)."""
    matrices = (torch.tensor(rows, dtype=torch.float64) for rows in (INPUT, FILTER, OUTPUT))
    return [torch.kron(m, m).to(dtype) for m in matrices]


def _padded(x: Tensor, s: _Shape) -> Tensor:
    """(N, height, width, C) with a pixel of zeros around it, and as many more as whole tiles take."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * s.across - s.width + 1, 1, 4 * s.down - s.height + 1))


def _transformed(padded: Tensor, s: _Shape) -> Tensor:
    """The tiles of 6x6 pixels, four pixels apart, transformed: (36, tiles, C)."""
    image, row, pixel, _ = padded.stride()
    strides = (row, pixel, image, 4 * row, 4 * pixel, 1)
    tiles = padded.as_strided((6, 6, len(padded), s.down, s.across, s.inputs), strides, padded.storage_offset())
    return (_transforms(padded.dtype)[0] @ tiles.reshape(36, -1)).view(36, -1, s.inputs)


def _overlapped(tiles: Tensor, s: _Shape) -> Tensor:
    """The adjoint of cutting: 6x6 pixels of every tile added up where tiles overlap, (images, height, width, C)."""
    n = tiles.shape[2]
    held = tiles.new_zeros(n, s.down + 1, 4, s.across + 1, 4, s.inputs)
    for i, rows in enumerate((tiles[:4], tiles[4:])):  # a tile's last two rows and columns lie in its neighbours
        for j, part in enumerate((rows[:, :4], rows[:, 4:])):
            target = held[:, i : i + s.down, : len(part), j : j + s.across, : part.shape[1]]
            target += part.permute(2, 3, 0, 4, 1, 5)
    whole = held.view(n, 4 * s.down + 4, 4 * s.across + 4, s.inputs)
    return whole[:, 1 : s.height + 1, 1 : s.width + 1]
