"""A gradient that has none itself, said where it would be asked for: torch's own decorator leaves out, without a word, what hangs on it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """For the `backward` of a torch.autograd.Function. Called for a gradient of a gradient (create_graph=True) it raises RuntimeError.

    torch.autograd.function.once_differentiable raises only where an incoming gradient has a graph; of a mere sum none has, and
    a penalty on such a gradient would train nothing.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError("a net that trains by kernels has no gradients of gradients (create_graph=True): turn them off by use_fused and use_winograd")
        return backward(ctx, *gradients)

    return checked
