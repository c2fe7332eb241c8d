"""The gradient of a wide 3x3 filter over maps of few pixels as one matrix product.

oneDNN goes over such maps row by row, and with rows of two to seven pixels is mostly busy with their edges; laid out as columns,
nine shifted copies of each map, they are one long product. On a processor with AMX, in bf16, it takes half the time or less
(docs/log.md); from 8 pixels a side on, the copies cost more than they save.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 49  # pixels of a map
WIDE = 256  # channels in and out


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """(N, C, H, W), padded by one pixel, and filters (O, C, 3, 3) -> (N, O, H, W), all in bf16. Once differentiable."""
    y: Tensor = _Conv.apply(x.bfloat16(), weight.bfloat16())  # type: ignore[no-untyped-call]
    return y


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the maps are few and the filters wide enough, and this is a machine on which that was measured."""
    outputs, inputs = weight.shape[:2]
    return x.shape[2] * x.shape[3] <= FEW and min(inputs, outputs) >= WIDE and torch.is_autocast_enabled("cpu") and _amx()


@cache
def _amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])[0]
        outputs, inputs = weight.shape[:2]
        rows = dy.permute(0, 2, 3, 1).reshape(-1, outputs)
        return dx, (rows.T @ _columns(x)).view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)


def _columns(x: Tensor) -> Tensor:
    """For every pixel its neighbours and itself: (N x H x W, 9 x C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    n, height, width, channels = padded.shape
    image, row, pixel, _ = padded.stride()
    return padded.as_strided((n, height - 2, width - 2, 3, 3, channels), (image, row, pixel, row, pixel, 1)).reshape(-1, 9 * channels)
