"""Batch norm, the skip addition and ReLU as one pass over memory, in C (fused.c).

Between its convolutions a net does little arithmetic and moves much memory, which torch does operation by operation. These
kernels are for training on a CPU, on channels-last tensors in fp32 or bf16; without a C compiler torch's own operations do the work.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reslab.nets.compiler import FAILURES, LANES, TYPES, at, compiled, takes, told
from reslab.nets.once import once_differentiable
from reslab.nets.pool import MaxPool, usable

SOURCE = Path(__file__).with_name("fused.c")
WIDE = 64  # channels that keep the registers busy


class Norm(nn.BatchNorm2d):
    """Batch norm over (N, C, H, W), by the fused kernels where `use_fused` has set them and they can.

    In training `together` images at a time are normalised, where that divides N (Hoffer et al. 2017, 1705.08741, ghost batch norm);
    the running statistics move once, by the mean over these groups.
    """

    fused = False
    together = 0  # 0: all

    def forward(self, x: Tensor) -> Tensor:
        if _suits(self, x):
            return _NormReLU.apply(x, None, self.weight, self.bias, self, False)  # type: ignore[no-untyped-call, no-any-return]
        groups = self.groups(x.shape[0])  # len(x) would fix the batch of an exported graph
        if groups == 1:
            return super().forward(x)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        with self.statistics(groups) as each:
            parts = [
                nn.functional.batch_norm(part, *running, self.weight, self.bias, True, self.momentum, self.eps)
                for part, running in zip(x.chunk(groups), each, strict=True)
            ]
        return torch.cat(parts)

    @property
    def quick(self) -> bool:
        """Whether the kernels are to do it, where they can. They read parameters and statistics as fp32, one behind the other."""
        if not (self.fused and self.training and self.affine and self.track_running_stats and self.momentum is not None):
            return False
        own, running = self._parameters, self._buffers  # as attributes of the module they take ten times as long to find
        held = own.get("weight"), own.get("bias"), running.get("running_mean"), running.get("running_var")  # one that is pruned has other names
        dense = (tensor is not None and tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous() for tensor in held)
        return all(dense) and all(tensor.numel() == self.num_features for tensor in held if tensor is not None)

    def groups(self, images: int) -> int:
        """How many are normalised one after the other."""
        return max(1, images // self.together) if self.training and self.together and images % self.together == 0 else 1

    def moved(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics by those of a batch."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)

    @contextmanager
    def statistics(self, groups: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Running mean and variance for each group to move; afterwards the norm's own are the mean of these."""
        assert self.running_mean is not None and self.running_var is not None
        if groups == 1:
            yield [(self.running_mean, self.running_var)]
            return
        mean, var = (own.repeat(groups, 1) for own in (self.running_mean, self.running_var))
        yield list(zip(mean, var, strict=True))
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))


def norm_relu(norm: nn.Module | None, relu: nn.Module | None, x: Tensor) -> Tensor:
    """relu(norm(x)); either may be missing."""
    if isinstance(norm, Norm) and isinstance(relu, nn.ReLU) and _suits(norm, x) and not hooked(norm, relu):
        return _NormReLU.apply(x, None, norm.weight, norm.bias, norm, True)  # type: ignore[no-untyped-call, no-any-return]
    x = x if norm is None else norm(x)
    return x if relu is None else relu(x)


def norm_add_relu(norm: nn.Module | None, add: nn.Module | None, relu: nn.Module | None, x: Tensor, shortcut: Callable[[], Tensor]) -> Tensor | None:
    """relu(norm(x) + shortcut()) in one pass, or None, and nothing done, where that cannot be."""
    if not (isinstance(norm, Norm) and isinstance(relu, nn.ReLU) and _suits(norm, x) and not hooked(norm, add, relu)):
        return None
    added = shortcut().expand(x.shape).to(x.dtype).contiguous(memory_format=torch.channels_last)
    y: Tensor
    y, y.twin = _NormReLU.apply(x, added, norm.weight, norm.bias, norm, True)  # type: ignore[no-untyped-call, attr-defined]
    return y


def twin(x: Tensor) -> Tensor:
    """x again, for the second of its two uses. What `norm_add_relu` or `conv_norm_add_relu` gave then gets both gradients apart, and adds
    them as it reads them; so the gradient that is seen of x is that of the first use.
    """
    found: Tensor = getattr(x, "twin", x)
    return found


def use_fused(net: nn.Module, on: bool) -> None:
    """Sets whether a net that trains uses these, where they can be made, and the ways that need no compiler (`Pointwise`, `Conv3x3`).

    All are for the CPU; a net that is elsewhere does without. Where a hook looks between a norm and its ReLU, the net does not use them there.
    """
    on = on and all(parameter.device.type == "cpu" for parameter in net.parameters())
    for module in net.modules():
        if isinstance(module, Norm):
            module.fused = on and not reason_against()
        elif isinstance(module, MaxPool):
            module.fused = on and usable()
        elif hasattr(module, "fused"):
            module.fused = on  # type: ignore[assignment]


def norm_together(net: nn.Module, images: int) -> None:
    """Sets how many images the batch norms of a net that trains normalise at a time; 0: all that go through it."""
    for module in net.modules():
        if isinstance(module, Norm):
            module.together = images


@cache
def reason_against() -> str:
    """Why the kernels cannot be used here; empty where they can."""
    try:
        for dtype in TYPES:
            _library(dtype)
    except FAILURES as error:
        return told(error)
    return ""


def gated(dy: Tensor, other: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients through a ReLU that gave y: dy + other where y is positive; and each channel's sum, fp32, of what is not yet rounded.

    Without y the first is dy, which may then be any images. All (N, C, H, W), channels-last, C a multiple of LANES.
    """
    g, channels = dy if y is None else torch.empty_like(dy), dy.shape[1]
    total = torch.empty(channels, dtype=torch.float32, device=dy.device)
    rows = dy.numel() // channels
    _checked(_library(dy.dtype).gated(at(dy), at(other), at(y), at(None if y is None else g), rows, channels, at(total), torch.get_num_threads()))
    return g, total


def _suits(norm: Norm, x: Tensor) -> bool:
    if not (norm.quick and x.dtype in TYPES and takes(x) and x.shape[1] == norm.num_features):
        return False
    pixels = x.numel() // x.shape[1] // norm.groups(len(x))
    return pixels > 1 and _fold(x.shape[1], pixels) > 0


def _fold(channels: int, pixels: int) -> int:
    """How many pixels lie side by side in a row of the kernels, so that rows are whole vectors; 0 where the pixels do not divide."""
    least = LANES // gcd(channels, LANES)
    wanted = least
    while wanted * channels < WIDE:
        wanted *= 2
    return next((fold for fold in (wanted, least) if pixels % fold == 0), 0)


def hooked(*modules: nn.Module | None) -> bool:
    """Whether someone looks at what goes in or comes out of any of these."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules if m)


class _NormReLU(torch.autograd.Function):
    """relu(norm(x) + added), without either where there is none. Moves the running statistics. Once differentiable.

    With an addition the output comes twice, as two tensors of one memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, norm: Norm, rectify: bool) -> Tensor | tuple[Tensor, Tensor]:
        assert norm.num_batches_tracked is not None
        x = x.contiguous(memory_format=torch.channels_last)
        groups, channels = norm.groups(len(x)), len(weight)
        y, mean, invstd = torch.empty_like(x), weight.new_empty(groups, channels), weight.new_empty(groups, channels)
        norm.num_batches_tracked.add_(1)
        pixels = x.numel() // (groups * channels)
        fold = _fold(channels, pixels)
        with norm.statistics(groups) as each:
            for x_, added_, y_, mean_, invstd_, (running_mean, running_var) in zip(*_chunks(groups, x, added, y, mean, invstd), each, strict=True):
                _checked(
                    _library(x.dtype).norm_forward(
                        at(x_), at(added_), at(y_), pixels // fold, channels * fold, fold, at(weight), at(bias), norm.eps, norm.momentum,
                        at(running_mean), at(running_var), at(mean_), at(invstd_), rectify, torch.get_num_threads(),
                    )
                )  # fmt: skip
        ctx.save_for_backward(x, y if added is not None else None, weight, bias, mean, invstd)
        ctx.fold, ctx.rectify = fold, rectify
        ctx.set_materialize_grads(False)
        return y if added is None else (y, y.data)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, invstd = ctx.saved_tensors
        if all(g is None for g in gradients):
            return (None,) * 6
        dy, other, *_ = *(g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None), None
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_added = None if y is None else torch.empty_like(x)
        d_weight, d_bias = torch.empty_like(mean), torch.empty_like(mean)
        groups, channels = len(mean), len(weight) * ctx.fold
        rows = x.numel() // (groups * channels)
        for dy_, other_, x_, y_, dx_, d_added_, mean_, invstd_, d_weight_, d_bias_ in zip(
            *_chunks(groups, dy, other, x, y, dx, d_added, mean, invstd, d_weight, d_bias), strict=True
        ):
            _checked(
                _library(x.dtype).norm_backward(
                    at(dy_), at(other_), at(x_), at(y_), at(dx_), at(d_added_), rows, channels, ctx.fold, at(weight), at(bias),
                    at(mean_), at(invstd_), at(d_weight_), at(d_bias_), ctx.rectify, torch.get_num_threads(),
                )
            )  # fmt: skip
        return dx, d_added, *(d[0] if groups == 1 else d.sum(0) for d in (d_weight, d_bias)), None, None


def _chunks(groups: int, *tensors: Tensor | None) -> list[Sequence[Tensor | None]]:
    """Each tensor's rows, images or statistics, in so many groups."""
    if groups == 1:
        return [[tensor] for tensor in tensors]
    return [[None] * groups if tensor is None else tensor.chunk(groups) for tensor in tensors]


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the sums of a batch norm")


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for tensors of a dtype. Raises one of FAILURES where they cannot be made."""
    library = compiled(SOURCE, *TYPES[dtype])
    p, n = c_void_p, c_int64
    library.norm_forward.argtypes = [p, p, p, n, n, n, p, p, c_float, c_float, p, p, p, p, c_int, c_int]
    library.norm_backward.argtypes = [p, p, p, p, p, p, n, n, n, p, p, p, p, p, p, c_int, c_int]
    library.gated.argtypes = [p, p, p, p, n, n, p, c_int]
    return library
