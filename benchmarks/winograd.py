"""3x3 convolutions, forward and backward: Winograd's algorithm, or another way that a net that trains takes, against torch's direct one.
In turns, medians.

python winograd.py            about a minute
python winograd.py --smoke    seconds; figures that mean nothing
"""

import math
import statistics
import sys
import time

import torch
from measure import keep
from torch import nn
from torch.nn.functional import conv2d

from reslab.host import keep_freed_memory
from reslab.nets.fused import use_fused
from reslab.nets.parts import conv
from reslab.nets.winograd import use_winograd
from reslab.spec import Conv

SMOKE = "--smoke" in sys.argv
ROUNDS = 1 if SMOKE else 9
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SHAPES = ((16, 128, 128, 8),) if SMOKE else (
    (128, 32, 32, 16), (128, 64, 64, 8), (128, 64, 64, 16), (128, 64, 256, 16), (128, 128, 128, 16), (128, 256, 256, 8),
    (128, 16, 16, 32), (500, 64, 64, 2), (500, 512, 512, 2), (32, 64, 64, 56), (32, 128, 128, 28), (32, 256, 256, 14), (32, 512, 512, 7), (32, 512, 512, 8),
)  # fmt: skip


def one(dtype: torch.dtype, n: int, channels: int, outputs: int, size: int) -> str:
    shape = f"{DTYPES[dtype]} {n} x {channels} x {size} x {size} to {outputs}"
    torch.manual_seed(0)
    x = torch.randn(n, channels, size, size).to(dtype, memory_format=torch.channels_last).requires_grad_()
    layer = conv(channels, Conv(outputs, 3, 1), bias=False).train().to(memory_format=torch.channels_last)
    use_winograd(layer, True)
    use_fused(layer, True)
    weight = layer.weight
    nn.init.normal_(weight, std=1 / math.sqrt(9 * channels))
    dy = torch.randn(n, outputs, size, size).to(dtype, memory_format=torch.channels_last)
    ways = (lambda: conv2d(x, weight.to(dtype), padding=1), lambda: layer(x))
    if type(layer(x).grad_fn).__name__ == "ConvolutionBackward0":
        return f"{shape}: direct"
    direct, ours = ([y, *torch.autograd.grad(y, (x, weight), dy)] for y in (way() for way in ways))
    off = max(((a - b).float().norm() / a.float().norm()).item() for a, b in zip(direct, ours, strict=True))
    forward: list[list[float]] = [[], []]
    whole: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for number, way in enumerate(ways):
            start = time.perf_counter()
            y = way()
            between = time.perf_counter()
            torch.autograd.grad(y, (x, weight), dy)
            forward[number].append(between - start)
            whole[number].append(time.perf_counter() - start)
    (a, b), (c, d) = ([1000 * statistics.median(times) for times in pair] for pair in (forward, whole))
    return f"{shape}: forward {a:.1f} / {b:.1f} ms, {a / b:.2f}x; with backward {c:.1f} / {d:.1f} ms, {c / d:.2f}x; relative difference {off:.1e}"


if __name__ == "__main__":
    keep_freed_memory()
    lines = [f"3x3 convolution, channels-last: torch direct / ours, medians of {ROUNDS} in turns"]
    keep("winograd", lines + [one(dtype, *shape) for dtype in DTYPES for shape in SHAPES])
