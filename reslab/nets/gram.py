"""A 1x1 convolution and the batch norm behind it as one matrix product, for training in bf16 on a processor with AMX.

Let y = x W', with pixels as rows. Then the mean of y is W times that of x, and its variance the diagonal of W S W', S being the
covariance of x, which is x'x, the Gram matrix, but for the mean. So y need not be made to be normalised: scale and shift go into
the filters, and the skip addition and ReLU into the product. On the way back the sums that a norm takes over y follow from the
gradient of the filters, and what it adds to that of x is x times a small matrix. Where the filters make many channels of few, as
at the end of a bottleneck, moving y through memory takes most of the time; here it is written once, normalised, added and rectified.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reslab.nets import tiles
from reslab.nets.fused import Norm, gated, hooked
from reslab.nets.once import once_differentiable
from reslab.nets.parts import Pointwise, every
from reslab.nets.product import PAIR, product, usable

PIXELS = 16  # for each channel of the images, from which the small matrices cost less than they save


def entry(conv: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """conv(x), and x for the shortcut; or None, and nothing done, where that cannot be.

    The gradients of both are added in one product. Where `conv_norm_add_relu` gave x, that product is its ReLU's way back, too, so that
    what is seen of x's gradient in between is zero where x is.
    """
    if not (isinstance(conv, Pointwise) and conv.stride == (1, 1) and _suits(conv, x)):
        return None
    y: Tensor
    carried: Tensor
    y, carried = _Entry.apply(x, conv.weight, getattr(x, "gate", None))  # type: ignore[no-untyped-call]
    return y, carried


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor | None:
    """norm(conv(x)) without what lies between, or None, and nothing done, where that cannot be or would not pay."""
    if not (isinstance(conv, Pointwise) and isinstance(norm, Norm) and _pays(conv, norm, x)):
        return None
    y: Tensor = _ConvNorm.apply(every(conv.stride[0], x), None, conv.weight, norm.weight, norm.bias, norm, None)  # type: ignore[no-untyped-call]
    return y


def conv_norm_add_relu(
    conv: nn.Module | None, norm: nn.Module | None, add: nn.Module | None, relu: nn.Module | None, x: Tensor, shortcut: Callable[[], Tensor]
) -> Tensor | None:
    """relu(norm(conv(x)) + shortcut()) likewise."""
    if not (isinstance(conv, Pointwise) and isinstance(norm, Norm) and isinstance(relu, nn.ReLU) and _pays(conv, norm, x)) or hooked(add, relu):
        return None
    x, gate = every(conv.stride[0], x), _Gate()
    added = shortcut().expand(len(x), conv.out_channels, *x.shape[2:]).bfloat16().contiguous(memory_format=torch.channels_last)
    y: Tensor
    y, y.twin = _ConvNorm.apply(x, added, conv.weight, norm.weight, norm.bias, norm, gate)  # type: ignore[no-untyped-call, attr-defined]
    y.gate = gate  # type: ignore[attr-defined]
    return y


def _suits(conv: Pointwise, x: Tensor) -> bool:
    if not (conv.fused and conv.training and conv.bias is None and conv.weight.dtype == torch.float32) or hooked(conv):
        return False
    if not (x.dim() == 4 and x.dtype == torch.bfloat16 and x.shape[1] == conv.in_channels and tiles.suits(x) and usable()):
        return False
    return conv.in_channels % PAIR == conv.out_channels % PAIR == 0 and _pixels(conv, x) >= PAIR


def _pays(conv: Pointwise, norm: Norm, x: Tensor) -> bool:
    if not (_suits(conv, x) and norm.quick and norm.groups(x.shape[0]) == 1) or hooked(norm):
        return False
    return conv.out_channels > conv.in_channels and _pixels(conv, x) >= PIXELS * conv.in_channels


def _pixels(conv: Pointwise, x: Tensor) -> int:
    n, _, height, width = x.shape
    return n * -(-height // conv.stride[0]) * -(-width // conv.stride[0])


class _Gate:
    """The ReLU at the end of one block, in one forward pass."""


def _tell(g: Tensor, gate: _Gate | None, total: Tensor) -> None:
    """Notes at a gradient the sums of its channels, and that it has been through that ReLU."""
    if gate:
        g.told = gate, g._version, total  # type: ignore[attr-defined]


def _told(g: Tensor, gate: _Gate | None) -> Tensor | None:
    """The sums noted at a gradient that nothing was added to since, and that has been through that ReLU, if there is one."""
    passed, version, total = getattr(g, "told", (None, None, None))
    return total if version == g._version and gate in (None, passed) else None


class _Entry(torch.autograd.Function):
    """x W', and x once more. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: _Gate | None) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        filters = weight.flatten(1).bfloat16()
        ctx.save_for_backward(x, filters)
        ctx.gate = gate
        return product(x, filters)[0], x.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, carried: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, filters = ctx.saved_tensors
        dy, carried = (g.contiguous(memory_format=torch.channels_last) for g in (dy, carried))
        dx = None
        if ctx.needs_input_grad[0]:
            dx, total = product(dy, filters, back=True, added=carried, gate=x if ctx.gate else None)
            _tell(dx, ctx.gate, total)
        return dx, tiles.filter_gradient(x, dy, 1) if ctx.needs_input_grad[1] else None, None


class _ConvNorm(torch.autograd.Function):
    """relu(norm(x W') + added), or norm(x W') where nothing is added. Moves the running statistics. Once differentiable.

    With an addition the output comes twice, as two tensors of one memory. Small products are in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, gamma: Tensor, beta: Tensor, norm: Norm, gate: _Gate | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            x = x.contiguous(memory_format=torch.channels_last)
            filters, pixels = weight.flatten(1), x.numel() // x.shape[1]
            level = gated(x, None, None)[1] / pixels
            spread = filters @ tiles.filter_gradient(x, x, 1).flatten(1).addr_(level, level, alpha=-pixels)  # times the pixels, as all sums here
            mean, squares = filters @ level, torch.linalg.vecdot(spread, filters).clamp(min=0)
            invstd = (squares / pixels + norm.eps).rsqrt()
            norm.moved(mean, squares / (pixels - 1))
            scale = gamma * invstd
            folded = torch.mul(filters, scale[:, None], out=torch.empty(filters.shape, dtype=x.dtype, device=x.device))
            y, _ = product(x, folded, shift=beta - scale * mean, added=added, rectify=added is not None)
            ctx.save_for_backward(x, y if added is not None else None, weight, folded, scale, level, spread, mean, invstd)
            ctx.set_materialize_grads(False)
            ctx.gate = gate
            return y if added is None else (y, y.data)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in gradients):
            return (None,) * 7
        with torch.autocast("cpu", enabled=False):
            x, y, weight, folded, scale, level, spread, mean, invstd = ctx.saved_tensors
            dy, other, *_ = *(g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None), None
            filters, pixels = weight.flatten(1), x.numel() // x.shape[1]
            g, total = dy, None if other is not None else _told(dy, ctx.gate)
            if total is None:
                g, total = gated(dy, other, y)
                _tell(g, ctx.gate, total)  # a norm of the shortcut needs them, too
            dw, dx = tiles.filter_gradient(x, g, 1).flatten(1), None
            slope = invstd * (torch.linalg.vecdot(dw, filters) - mean * total)  # the sum of g times the normalised y
            steep = (slope * invstd / pixels)[:, None]
            if ctx.needs_input_grad[0]:
                turn = folded.T @ torch.mul(filters, -steep, out=torch.empty_like(folded))
                shift = -(level @ turn.float() + (scale * total / pixels) @ filters)
                dx, _ = product(g, folded, back=True, second=(x, turn), shift=shift)
            dw.addr_(total, level, alpha=-1).addcmul_(spread, steep, value=-1).mul_(scale[:, None])
            return dx, g if y is not None else None, dw.view_as(weight), slope, total, None, None
