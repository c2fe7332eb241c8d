"""3x3 convolutions by Winograd's algorithm, F(4x4, 3x3) of Lavin & Gray 2015 (1509.09308): a quarter of the multiplications.

The image is cut into overlapping tiles of 6x6 pixels; tiles and filters are transformed, multiplied point by point, which
for all channels together is 36 matrix products, and transformed back to 4x4 pixels of output. On a CPU it pays for wide
layers, where those products outweigh the transforms, and as long as what lies between two steps stays in the cache: the
images go through a few at a time. In bf16, where the processor has dot products for it, all of it is in C (dots.py), which pays
for narrow layers too. Rounding differs from the direct convolution's: forward and backward at most 2e-6
relative in fp32, in bf16 0.013 in C and 0.017 by torch's operations (benchmarks/results/winograd-amd.txt, docs/log.md).
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reslab.nets import dots
from reslab.nets.compiler import takes
from reslab.nets.conv3x3 import Conv3x3, computed_in
from reslab.nets.once import once_differentiable

WIDE = 128  # channels in and out, their geometric mean, below which torch's transforms cost what the products save
NARROWEST = 64
FEW_TILES = 64  # below so many, reading the transformed filters takes longest
WASTE = 1.8  # of tiles that reach over the edge
CACHED = 1 << 17  # bytes at one of a tile's 36 points that go through at a time: 4.5 MiB for all points
TALL = 128  # tiles at a time that a matrix product needs to be fast

POINTS = (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)  # where polynomials are evaluated, infinity beside; half the rounding of the usual 0, 1, -1, 2, -2


class WinogradConv(Conv3x3):
    """A padded 3x3 convolution with stride 1 that can be done by Winograd's algorithm; it is not unless `winograd` is set.

    Where it would not pay (few or small images, another device) the convolution is direct all the same. `keep` spends
    memory for time: by torch's operations the transformed tiles, 2.25 times as large as the input or more, wait for the backward pass.
    """

    winograd = False
    keep = True

    def forward(self, x: Tensor) -> Tensor:
        if not (self.winograd and pays(x) and x.shape[1] == self.in_channels):
            return super().forward(x)
        dtype = computed_in(x)
        if self._by_dots(dtype):
            y: Tensor = dots.Dots.apply(x.to(dtype), self.weight.float())  # type: ignore[no-untyped-call]
        elif _wide(self.in_channels, self.out_channels):
            y = Winograd.apply(x.to(dtype), self.weight, self.keep)  # type: ignore[no-untyped-call]
        else:
            return super().forward(x)
        return y if self.bias is None else y + self.bias.to(dtype)[:, None, None]

    def able(self, dtype: torch.dtype) -> bool:
        """Whether the algorithm may pay for these channels."""
        return _wide(self.in_channels, self.out_channels) or self._by_dots(dtype)

    def _by_dots(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and dots.fills(self.in_channels, self.out_channels) and dots.usable()


def use_winograd(net: nn.Module, on: bool, keep: bool = True) -> None:
    """Sets how the convolutions of a net are done that can be done so."""
    for module in net.modules():
        if isinstance(module, WinogradConv):
            module.winograd, module.keep = on, keep


def has_winograd(net: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a net has convolutions for which the algorithm may pay."""
    return any(module.able(dtype) for module in net.modules() if isinstance(module, WinogradConv))


def suits(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> bool:
    """Whether a convolution is one that Winograd's algorithm may make faster."""
    return (kernel, stride, groups) == (3, 1, 1) and (_wide(inputs, outputs) or dots.fills(inputs, outputs))


def _wide(inputs: int, outputs: int) -> bool:
    return min(inputs, outputs) >= NARROWEST and inputs * outputs >= WIDE**2


def pays(x: Tensor) -> bool:
    """Whether x are images (N, C, H, W), as many and as large as it takes."""
    if not (takes(x) and computed_in(x) in (torch.float32, torch.float64, torch.bfloat16)):
        return False
    n, _, height, width = x.shape
    down, across = _tiles(height), _tiles(width)
    return n * down * across >= FEW_TILES and 16 * down * across <= WASTE * height * width


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

    def stretches(self, dtype: torch.dtype) -> list[slice]:
        """The images, as many at a time as the cache holds."""
        tiles = max(TALL, CACHED // dtype.itemsize // max(self.inputs, self.outputs))
        step = max(1, round(tiles / (self.down * self.across)))
        return [slice(first, min(first + step, self.n)) for first in range(0, self.n, step)]


class Winograd(torch.autograd.Function):
    """(N, C, H, W) and filters (O, C, 3, 3) -> (N, O, H, W) channels-last, zero-padded by one pixel. Once differentiable.

    The output has the images' dtype. In bf16, filters and their gradients are transformed and added up in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keep: bool = True) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # which else would transform the filters in bf16
            n, inputs, height, width = x.shape
            s = _Shape(n, inputs, len(weight), height, width, _tiles(height), _tiles(width))
            exact = torch.promote_types(weight.dtype, torch.float32)
            filters = (_transforms(exact).filter @ weight.to(exact).permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, s.outputs).to(x.dtype)
            y, kept = x.new_empty(n, s.down, 4, s.across, 4, s.outputs), []
            for part in s.stretches(x.dtype):
                tiles = _transformed(x[part], s)
                products = torch.bmm(tiles, filters)
                cells = (_transforms(x.dtype).output @ products.view(36, -1)).view(4, 4, -1, s.down, s.across, s.outputs)
                y[part] = cells.permute(2, 3, 0, 4, 1, 5)
                if keep and ctx.needs_input_grad[1]:
                    kept.append(tiles)
            ctx.save_for_backward(filters, *(kept or [x]))
            ctx.shape, ctx.kept, ctx.exact, ctx.dtype = s, bool(kept), exact, weight.dtype
            return y.view(n, 4 * s.down, 4 * s.across, s.outputs)[:, :height, :width].permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        with torch.autocast("cpu", enabled=False):
            filters, *held = ctx.saved_tensors
            s: _Shape = ctx.shape
            by = _transforms(dy.dtype)
            for_x, for_weight = ctx.needs_input_grad[:2]
            below, right = 4 * s.down - s.height, 4 * s.across - s.width
            dx = dy.new_empty(s.n, s.height, s.width, s.inputs) if for_x else None
            d_filters = torch.zeros_like(filters, dtype=ctx.exact)
            for number, part in enumerate(s.stretches(dy.dtype)):
                cells = dy[part].permute(0, 2, 3, 1)
                cells = F.pad(cells, (0, 0, 0, right, 0, below)) if below or right else cells
                cells = cells.reshape(-1, s.down, 4, s.across, 4, s.outputs).permute(2, 4, 0, 1, 3, 5)
                d_products = (by.output.T @ cells.reshape(16, -1)).view(36, -1, s.outputs)
                if dx is not None:
                    d_tiles = torch.bmm(d_products, filters.transpose(1, 2)).view(36, -1)
                    dx[part] = _overlapped((by.input.T @ d_tiles).view(6, 6, -1, s.down, s.across, s.inputs), s)
                if for_weight:
                    tiles = held[number] if ctx.kept else _transformed(held[0][part], s)
                    if dy.dtype == ctx.exact:
                        d_filters.baddbmm_(tiles.transpose(1, 2), d_products)
                    else:
                        d_filters += torch.bmm(tiles.transpose(1, 2), d_products)
            dw = None
            if for_weight:
                dw = _transforms(ctx.exact).filter.T @ d_filters.view(36, -1)
                dw = dw.view(3, 3, s.inputs, s.outputs).permute(3, 2, 0, 1).to(ctx.dtype)
            return None if dx is None else dx.permute(0, 3, 1, 2), dw, None


class _Transforms(NamedTuple):
    """Of both axes at once: tiles (36, 36), filters (36, 9), what comes out (16, 36)."""

    input: Tensor
    filter: Tensor
    output: Tensor


@cache
def _transforms(dtype: torch.dtype) -> _Transforms:
    """By Toom and Cook: two polynomials' values at the points are multiplied, and the product is found from its values.

    A filter as a polynomial has 3 coefficients, a row of output 4, their product 6; what correlates is the transpose of that.
    """
    filters, output, product = (_values(count) for count in (3, 4, 6))
    matrices = (np.linalg.inv(product).T, filters, output.T)
    return _Transforms(*(torch.kron(m, m).to(dtype) for m in map(torch.from_numpy, matrices)))


def _values(count: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """What gives a polynomial's values at the points, and its highest coefficient as that at infinity, from its coefficients."""
    return np.vstack([np.vander(POINTS, count, increasing=True), np.eye(count)[-1]])


def _transformed(x: Tensor, s: _Shape) -> Tensor:
    """Tiles of 6x6 pixels, four pixels apart, of images with a pixel of zeros around them and as many more as whole tiles take, transformed.

    (images, C, height, width) -> (36, tiles, C).
    """
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * s.across - s.width + 1, 1, 4 * s.down - s.height + 1)).contiguous()
    image, row, pixel, _ = padded.stride()
    tiles = padded.as_strided((6, 6, len(padded), s.down, s.across, s.inputs), (row, pixel, image, 4 * row, 4 * pixel, 1))
    return (_transforms(x.dtype).input @ tiles.reshape(36, -1)).view(36, -1, s.inputs)


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
