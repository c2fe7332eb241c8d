"""3x3 convolutions by Winograd's algorithm, F(4x4, 3x3) of Lavin & Gray 2015 (1509.09308): a quarter of the multiplications.

The image is cut into overlapping tiles of 6x6 pixels; tiles and filters are transformed, multiplied point by point, which
for all channels together is 36 matrix products, and transformed back to 4x4 pixels of output. On a CPU in fp32 it pays for
wide layers, where those products outweigh the transforms. Rounding differs from the direct convolution's: about 4e-6
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

INPUT = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))
FILTER = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class WideConv(nn.Conv2d):
    """A padded 3x3 convolution with stride 1 that can be done by Winograd's algorithm; it is not unless `winograd` is set.

    Where it would not pay (few or small images, bf16, another device) the convolution is direct all the same.
    """

    winograd = False

    def forward(self, x: Tensor) -> Tensor:
        if self.winograd and pays(x):
            y: Tensor = Winograd.apply(x, self.weight)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias[:, None, None]
        return super().forward(x)


def use_winograd(net: nn.Module, on: bool) -> bool:
    """Sets how the wide convolutions of a net are done. Returns whether it has any."""
    wide = [module for module in net.modules() if isinstance(module, WideConv)]
    for module in wide:
        module.winograd = on
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
    def tiles(self) -> int:
        return self.n * self.down * self.across


class Winograd(torch.autograd.Function):
    """(N, C, H, W) and filters (O, C, 3, 3) -> (N, O, H, W) channels-last, zero-padded by one pixel. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        n, inputs, height, width = x.shape
        s = _Shape(n, inputs, len(weight), height, width, _tiles(height), _tiles(width))
        to_tiles, to_filters, to_output = _transforms(x.dtype)
        tiles = (to_tiles @ _overlapping(x, s)).view(36, s.tiles, inputs)
        filters = (to_filters @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, s.outputs)
        products = torch.bmm(tiles, filters)
        y = (to_output @ products.view(36, -1)).view(4, 4, n, s.down, s.across, s.outputs)
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(n, 4 * s.down, 4 * s.across, s.outputs)
        ctx.save_for_backward(x, filters)  # the tiles, three times as large as x, are made again
        ctx.shape = s
        return y[:, :height, :width].permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, filters = ctx.saved_tensors
        s: _Shape = ctx.shape
        to_tiles, to_filters, to_output = _transforms(dy.dtype)
        g = F.pad(dy.permute(0, 2, 3, 1), (0, 0, 0, 4 * s.across - s.width, 0, 4 * s.down - s.height))
        g = g.reshape(s.n, s.down, 4, s.across, 4, s.outputs).permute(2, 4, 0, 1, 3, 5).reshape(16, -1)
        d_products = (to_output.T @ g).view(36, s.tiles, s.outputs)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            d_tiles = torch.bmm(d_products, filters.transpose(1, 2)).view(36, -1)
            dx = _overlapped((to_tiles.T @ d_tiles).view(6, 6, s.n, s.down, s.across, s.inputs), s)
        if ctx.needs_input_grad[1]:
            tiles = (to_tiles @ _overlapping(x, s)).view(36, s.tiles, s.inputs)
            d_filters = torch.bmm(tiles.transpose(1, 2), d_products).view(36, -1)
            dw = (to_filters.T @ d_filters).view(3, 3, s.inputs, s.outputs).permute(3, 2, 0, 1)
        return dx, dw


@cache
def _transforms(dtype: torch.dtype) -> list[Tensor]:
    """Both axes of each transform at once: (36, 36), (36, 9), (16, 36)."""
    matrices = (torch.tensor(rows, dtype=torch.float64) for rows in (INPUT, FILTER, OUTPUT))
    return [torch.kron(m, m).to(dtype) for m in matrices]


def _overlapping(x: Tensor, s: _Shape) -> Tensor:
    """Every sixth of 6x6 pixels of every tile, tiles four pixels apart: (36, tiles x channels)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * s.across - s.width + 1, 1, 4 * s.down - s.height + 1))
    image, row, pixel, _ = padded.stride()
    tiles = padded.as_strided((6, 6, s.n, s.down, s.across, s.inputs), (row, pixel, image, 4 * row, 4 * pixel, 1))
    return tiles.reshape(36, -1)


def _overlapped(tiles: Tensor, s: _Shape) -> Tensor:
    """The adjoint: 6x6 pixels of every tile added up where tiles overlap, as (N, C, H, W)."""
    held = tiles.new_zeros(s.n, s.down + 1, 4, s.across + 1, 4, s.inputs)
    for i, rows in enumerate((tiles[:4], tiles[4:])):  # a tile's last two rows and columns lie in its neighbours
        for j, part in enumerate((rows[:, :4], rows[:, 4:])):
            target = held[:, i : i + s.down, : len(part), j : j + s.across, : part.shape[1]]
            target += part.permute(2, 3, 0, 4, 1, 5)
    whole = held.view(s.n, 4 * s.down + 4, 4 * s.across + 4, s.inputs)
    return whole[:, 1 : s.height + 1, 1 : s.width + 1].permute(0, 3, 1, 2)
