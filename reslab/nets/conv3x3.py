"""A padded 3x3 convolution and, for a net that trains, the fastest way to it: matrix tiles, dot products in C, one matrix, or torch's."""

from typing import Any

import torch
from torch import Tensor, nn

from reslab.nets import dots, tiles
from reslab.nets.compiler import takes
from reslab.nets.once import once_differentiable

WHOLE = 2  # pixels a side of a map in which every pixel sees every other


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution, stride 1 or 2. Where it is `fused` it may be done in other ways than torch's."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if not (self.fused and self.training and self.bias is None and takes(x) and x.shape[1] == self.in_channels):
            return super().forward(x)
        if tiles.suits(x):
            return tiles.convolution(x, self.weight, self.stride[0])
        if self.stride == (1, 1) and max(x.shape[2:]) <= WHOLE:
            y = _AsMatrix.apply(x.to(computed_in(x)), self.weight)  # type: ignore[no-untyped-call]
            return y
        if self.stride == (1, 1) and dots.narrow(*self.weight.shape[:2]) and computed_in(x) == torch.bfloat16 and not tiles.has_amx() and dots.usable():
            y = dots.Dots.apply(x.bfloat16(), self.weight.float())  # type: ignore[no-untyped-call]
            return y
        return super().forward(x)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x is done in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _AsMatrix(torch.autograd.Function):
    """(N, C, H, W), H and W at most 2, and filters (O, C, 3, 3) -> (N, O, H, W), channels-last, by one matrix: taps that meet only the
    padding, of nine at least five, are not multiplied. Once differentiable.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        n, _, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(n, -1)
        taps = weight.permute(0, 2, 3, 1).to(x.dtype)
        matrix = torch.stack([taps[:, rows, columns] for rows, columns in _seen(height, width)]).view(-1, pixels.shape[1])
        ctx.save_for_backward(pixels, matrix)
        ctx.shapes = x.shape, weight.shape
        return _images(pixels @ matrix.T, height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        pixels, matrix = ctx.saved_tensors
        (n, inputs, height, width), (outputs, *_) = ctx.shapes
        gradient, dx, dw = dy.permute(0, 2, 3, 1).reshape(n, -1), None, None
        if ctx.needs_input_grad[0]:
            dx = _images(gradient @ matrix, height, width)
        if ctx.needs_input_grad[1]:
            parts = (gradient.T @ pixels).view(height * width, outputs, height, width, inputs)
            dw = parts.new_zeros(outputs, 3, 3, inputs, dtype=torch.promote_types(dy.dtype, torch.float32))
            for (rows, columns), part in zip(_seen(height, width), parts, strict=True):
                dw[:, rows, columns] += part
            dw = dw.permute(0, 3, 1, 2)
        return dx, dw


def _seen(height: int, width: int) -> list[tuple[slice, slice]]:
    """For each pixel that comes out, the rows and columns of its filter that meet those that come in."""
    return [(slice(1 - i, 1 - i + height), slice(1 - j, 1 - j + width)) for i in range(height) for j in range(width)]


def _images(rows: Tensor, height: int, width: int) -> Tensor:
    return rows.view(len(rows), height, width, -1).permute(0, 3, 1, 2)
