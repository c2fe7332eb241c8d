"""The gradient of a 3x3 filter over small maps, laid side by side.

On a processor with AMX, oneDNN multiplies 32 pixels of a row at a time for this gradient, and a map of 8 has only 8 in a row. With
a column of zeros behind each, many maps are one with long rows, and what a filter sees of its own map is the same. In bf16 that
takes half the time at 8 pixels and a fifth at 4, copies included (docs/log.md); in fp32 it gains nothing.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = 8  # pixels in a row of a map
LONG = 96  # and of several side by side, at most


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution with stride 1. While a net that is `fused` trains in bf16, its filters' gradient is found as above."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and self.training and self.bias is None and x.shape[3] <= NARROW and torch.is_autocast_enabled("cpu") and has_amx():
            return _Conv.apply(x.bfloat16(), self.weight.bfloat16())  # type: ignore[no-untyped-call, no-any-return]
        return super().forward(x)


@cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of matrices (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


class _Conv(torch.autograd.Function):
    """(N, C, H, W) and filters (O, C, 3, 3) -> (N, O, H, W). Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        n, width = x.shape[0], x.shape[3]
        count = max(divisor for divisor in range(1, max(1, LONG // (width + 1)) + 1) if n % divisor == 0)
        dx = _gradient(dy, x, weight, 0) if ctx.needs_input_grad[0] else None
        return dx, _gradient(_side_by_side(dy, count), _side_by_side(x, count), weight, 1)


def _gradient(dy: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    """Of x (0) or of the filters (1)."""
    wanted = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted)
    gradient: Tensor = found[which]
    return gradient


def _side_by_side(x: Tensor, count: int) -> Tensor:
    """(N, C, H, W) -> (N / count, C, H, count x (W + 1)), channels-last: a column of zeros behind each map."""
    n, channels, height, width = x.shape
    rows = x.new_zeros(n // count, height, count, width + 1, channels)
    rows[:, :, :, :width] = x.permute(0, 2, 3, 1).view(n // count, count, height, width, channels).transpose(1, 2)
    return rows.view(n // count, height, -1, channels).permute(0, 3, 1, 2)
