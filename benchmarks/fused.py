"""What lies between convolutions, forward and backward: the kernels of reslab/nets/fused.c against torch's operations. In turns, medians.

    python benchmarks/fused.py            two minutes
    python benchmarks/fused.py --smoke    seconds; figures that mean nothing

Also convolutions in bf16, with their way back, and the gradient of filters by itself, by matrix tiles where the processor has them.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from measure import keep
from torch import Tensor, nn
from torch.nn import functional as F

from reslab.host import keep_freed_memory
from reslab.nets.conv3x3 import Conv3x3
from reslab.nets.fused import Norm, norm_add_relu, norm_relu, reason_against, use_fused
from reslab.nets.gram import conv_norm_add_relu
from reslab.nets.parts import Add, Pointwise
from reslab.nets.pool import MaxPool
from reslab.nets.tiles import filter_gradient, usable

SMOKE = "--smoke" in sys.argv
ROUNDS = 1 if SMOKE else 15
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MAPS = ((2, 16, 8),) if SMOKE else ((128, 16, 32), (128, 64, 8), (500, 64, 16), (500, 256, 8), (32, 64, 112), (32, 256, 56), (32, 512, 28), (32, 2048, 7))
POOLED = ((2, 16, 8, 2, 2, 0),) if SMOKE else ((500, 64, 32, 2, 2, 0), (500, 256, 16, 2, 2, 0), (32, 64, 112, 3, 2, 1))
POINTWISE = ((2, 16, 32, 8),) if SMOKE else ((32, 64, 256, 56), (32, 256, 64, 56), (32, 512, 128, 28), (32, 1024, 256, 14), (32, 512, 2048, 7))
ENDS = ((8, 64, 128, 12),) if SMOKE else ((32, 64, 256, 56), (32, 128, 512, 28), (32, 256, 1024, 14))
SQUARE = (
    ((4, 32, 16, 4),)
    if SMOKE
    else ((128, 64, 64, 8), (500, 128, 384, 16), (500, 384, 384, 8), (500, 384, 384, 4), (500, 384, 384, 2), (32, 64, 64, 56), (32, 512, 512, 7))
)


def image(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def race(name: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor], inputs: list[Tensor]) -> str:
    """Both ways in turns, with their way back."""
    took: list[list[tuple[float, float]]] = [[], []]
    in_bf16 = torch.autocast("cpu", torch.bfloat16, enabled=inputs[0].dtype == torch.bfloat16)
    with in_bf16:
        dy = torch.randn_like(theirs())
    for number in range(ROUNDS + 2):
        for times, way in zip(took, (theirs, ours), strict=True):
            start = time.perf_counter()
            with in_bf16:
                y = way()
            between = time.perf_counter()
            torch.autograd.grad(y, inputs, dy)
            if number > 1:  # the first two pay for new memory
                times.append((1000 * (between - start), 1000 * (time.perf_counter() - start)))
    (a, c), (b, d) = ([statistics.median(column) for column in zip(*times, strict=True)] for times in took)
    return f"{name}: forward {a:.2f} / {b:.2f} ms, {a / b:.2f}x; with backward {c:.2f} / {d:.2f} ms, {c / d:.2f}x"


def norms(dtype: torch.dtype, n: int, channels: int, size: int, joined: bool) -> str:
    x, shortcut = image(dtype, n, channels, size, size).requires_grad_(), image(dtype, n, channels, size, size).requires_grad_()
    norm, relu, add = Norm(channels).train(), nn.ReLU(), Add()
    norm.fused = True
    plain = nn.BatchNorm2d(channels).train()
    inputs = [x, shortcut] if joined else [x]

    def theirs() -> Tensor:
        y = plain(x)
        return relu(y + shortcut if joined else y)  # type: ignore[no-any-return]

    def ours() -> Tensor:
        y = norm_add_relu(norm, add, relu, x, lambda: shortcut) if joined else norm_relu(norm, relu, x)
        assert y is not None
        return y

    return race(f"{DTYPES[dtype]} norm, {'addition, ' * joined}ReLU {n} x {channels} x {size} x {size}", theirs, ours, inputs)


def pools(dtype: torch.dtype, n: int, channels: int, size: int, side: int, stride: int, padding: int) -> str:
    x, pool = image(dtype, n, channels, size, size).requires_grad_(), MaxPool(side, stride, padding).train()
    pool.fused = True
    return race(f"{DTYPES[dtype]} max-pool of {side} {n} x {channels} x {size} x {size}", lambda: F.max_pool2d(x, side, stride, padding), lambda: pool(x), [x])


def convolutions(kind: type[nn.Conv2d], n: int, inputs: int, outputs: int, size: int) -> str:
    side = 1 if kind is Pointwise else 3
    x, made = image(torch.bfloat16, n, inputs, size, size).requires_grad_(), kind(inputs, outputs, side, padding=side // 2, bias=False).train()
    made.to(memory_format=torch.channels_last)
    made.fused = True  # type: ignore[assignment]
    name = f"bf16 {side}x{side} convolution {n} x {inputs} x {size} x {size} to {outputs}"
    return race(name, lambda: F.conv2d(x, made.weight, padding=side // 2), lambda: made(x), [x, made.weight])


def ends(n: int, inputs: int, outputs: int, size: int) -> str:
    """The end of a bottleneck: a 1x1 convolution, its norm, the addition and ReLU."""
    x, shortcut = (image(torch.bfloat16, n, channels, size, size).requires_grad_() for channels in (inputs, outputs))
    conv, norm, relu, add = Pointwise(inputs, outputs, 1, bias=False).train(), Norm(outputs).train(), nn.ReLU(), Add()
    use_fused(nn.ModuleList([conv, norm]), True)
    plain = nn.BatchNorm2d(outputs).train()

    def ours() -> Tensor:
        y = conv_norm_add_relu(conv, norm, add, relu, x, lambda: shortcut)
        assert y is not None
        return y

    name = f"bf16 1x1 convolution, norm, addition, ReLU {n} x {inputs} x {size} x {size} to {outputs}"
    return race(name, lambda: relu(plain(F.conv2d(x, conv.weight)) + shortcut), ours, [x, shortcut, conv.weight])


def gradients(n: int, inputs: int, outputs: int, size: int, side: int) -> str:
    """Of the filters, oneDNN's way and by tiles."""
    x, dy, weight = (
        image(torch.bfloat16, n, inputs, size, size),
        image(torch.bfloat16, n, outputs, size, size),
        image(torch.bfloat16, outputs, inputs, side, side),
    )
    padding, took = [side // 2] * 2, [[], []]  # type: tuple[list[int], list[list[float]]]
    ways = (
        lambda: torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [False, True, False]),
        lambda: filter_gradient(x, dy, side),
    )
    for number in range(ROUNDS + 2):
        for times, way in zip(took, ways, strict=True):
            start = time.perf_counter()
            way()
            if number > 1:
                times.append(time.perf_counter() - start)
    a, b = (statistics.median(times) for times in took)
    products = 2 * dy.numel() * inputs * side**2
    name = f"bf16 gradient of {side}x{side} filters {n} x {inputs} x {size} x {size} to {outputs}"
    return f"{name}: {1e3 * a:.2f} / {1e3 * b:.2f} ms, {a / b:.2f}x; {products / b / 1e12:.2f} TFLOP/s"


if __name__ == "__main__":
    keep_freed_memory()
    if reason_against():
        sys.exit(f"the kernels cannot be made here: {reason_against()}")
    lines = [f"channels-last: torch's operations / ours, medians of {ROUNDS} in turns"]
    lines += [norms(dtype, *shape, joined) for dtype in DTYPES for joined in (False, True) for shape in MAPS]
    lines += [pools(dtype, *shape) for dtype in DTYPES for shape in POOLED]
    lines += [convolutions(Pointwise, *shape) for shape in POINTWISE] + [convolutions(Conv3x3, *shape) for shape in SQUARE]
    if usable():
        lines += [ends(*shape) for shape in ENDS]
        lines += [gradients(*shape, 1) for shape in POINTWISE] + [gradients(*shape, 3) for shape in SQUARE]
    keep("fused", lines)
