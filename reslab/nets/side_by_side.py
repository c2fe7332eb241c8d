"""The gradient of a 3x3 filter over small maps, laid side by side; over tiny maps the whole convolution.

On a processor with AMX, oneDNN multiplies 32 pixels of a row at a time for this gradient, and a map of 8 has only 8 in a row. With
as many columns of zeros behind each as the stride, many maps are one with long rows, and what a filter sees of its own map is the
same. In bf16 that takes half the time at 8 pixels and a fifth at 4, copies included (docs/log.md); in fp32 it gains nothing.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = 8  # pixels in a row of a map of outputs
TINY = 4  # where the convolution and the gradient of its images gain too
LONG = 96  # and of several side by side, at most


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution, stride 1 or 2. While a net that is `fused` trains in bf16, it lays small maps side by side."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        (stride, _), of_ours = self.stride, self.fused and self.training and self.bias is None
        if of_ours and torch.is_autocast_enabled("cpu") and has_amx() and _suits(x, stride):
            return _Conv.apply(x.bfloat16(), self.weight.bfloat16(), stride)  # type: ignore[no-untyped-call, no-any-return]
        return super().forward(x)


@cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of matrices (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def _suits(x: Tensor, stride: int) -> bool:
    height, width = x.shape[2:]
    return width <= NARROW * stride and width % stride == height % stride == 0


class _Conv(torch.autograd.Function):
    """(N, C, H, W), filters (O, C, 3, 3) and a stride that divides H and W -> (N, O, H / stride, W / stride). Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride, ctx.count = stride, _count(len(x), x.shape[3] // stride)
        ctx.tiny = stride == 1 and x.shape[3] <= TINY
        x = _side_by_side(x, ctx.count, 1) if ctx.tiny else x
        ctx.save_for_backward(x, weight)
        y = F.conv2d(x, weight, stride=stride, padding=1)
        return _apart(y, ctx.count) if ctx.tiny else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), stride, count = ctx.saved_tensors, ctx.stride, ctx.count
        laid_dy, laid_x, dx = _side_by_side(dy, count, 1), x if ctx.tiny else _side_by_side(x, count, stride), None
        if ctx.needs_input_grad[0]:
            dx = _apart(_gradient(laid_dy, x, weight, 1, 0), count) if ctx.tiny else _gradient(dy, x, weight, stride, 0)
        return dx, _gradient(laid_dy, laid_x, weight, stride, 1), None


def _gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, which: int) -> Tensor:
    """Of x (0) or of the filters (1)."""
    wanted = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(dy, x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1, wanted)
    gradient: Tensor = found[which]
    return gradient


def _count(maps: int, width: int) -> int:
    """As many as fit into a long row and divide all maps."""
    return max(divisor for divisor in range(1, max(1, LONG // (width + 1)) + 1) if maps % divisor == 0)


def _side_by_side(x: Tensor, count: int, apart: int) -> Tensor:
    """(N, C, H, W) -> (N / count, C, H, count x (W + apart)), channels-last: so many columns of zeros behind each map."""
    n, channels, height, width = x.shape
    rows = x.new_zeros(n // count, height, count, width + apart, channels)
    rows[:, :, :, :width] = x.permute(0, 2, 3, 1).view(n // count, count, height, width, channels).transpose(1, 2)
    return rows.view(n // count, height, -1, channels).permute(0, 3, 1, 2)


def _apart(laid: Tensor, count: int) -> Tensor:
    """The inverse for one column between maps, whatever stands in it."""
    rows, channels, height, width = laid.shape
    maps = laid.permute(0, 2, 3, 1).view(rows, height, count, width // count, channels)[:, :, :, :-1]
    return maps.transpose(1, 2).reshape(rows * count, height, -1, channels).permute(0, 3, 1, 2)
