"""The gradient that flows along single paths of a residual net: Veit et al. 2016 (1605.06431).

Every block offers the way through its branch and the way around it, so n blocks make 2^n paths, and the gradient at the
input is the sum of the gradients that flow along each. A path's length is the number of branches that it takes.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.nets.torch import ResNet
from reslab.study.surgery import as_found, units

CARRIED = 0.95  # of the gradient: the lengths that carry so much are told


class Fall(NamedTuple):
    """A straight line through the logarithm of the norms: each further branch multiplies the norm by `factor`."""

    factor: float
    r2: float


def along_paths(net: ResNet, x: Tensor, y: Tensor, taken: Tensor) -> Tensor:
    """float64 (N): the norm of each image's loss gradient at the input, along that image's path alone.

    `taken` (N, blocks) is true where an image's path goes through the branch. The values that the net computes stay what
    they are; only the backward pass is cut. Gates, where the net has some, count as constants.
    """
    norms: Tensor = torch.linalg.vector_norm(gradient_along(net, x, y, taken).double().flatten(1), dim=1)
    return norms


def gradient_along(net: ResNet, x: Tensor, y: Tensor, taken: Tensor) -> Tensor:
    """(N, C, H, W): the gradient behind `along_paths`."""
    with as_found(net), torch.enable_grad(), ExitStack() as hooks:
        for unit, through in zip(units(net), taken.unbind(1), strict=True):
            hooks.enter_context(net.get_submodule(f"{unit.name}.add").register_forward_pre_hook(_fork(through[:, None, None, None])))
        x = x.detach().requires_grad_()
        gradient: Tensor = torch.autograd.grad(cross_entropy(net(x), y, reduction="sum"), x)[0]
    return gradient


def _fork(through: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """Lets the gradient of an image through the branch, or else through the shortcut."""

    def cut(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        branch, shortcut, *gates = inputs
        return (
            torch.where(through, branch, branch.detach()),
            torch.where(through, shortcut.detach(), shortcut),
            *(gate.detach() for gate in gates),
        )

    return cut


def random_paths(length: int, count: int, blocks: int, generator: torch.Generator) -> Tensor:
    """bool (count, blocks): paths of that length, each as likely as any other."""
    return torch.rand(count, blocks, generator=generator).argsort(1) < length


def fall(norms: Sequence[float]) -> Fall:
    """The exponential fall of the norms by path length, from length 0 on; lengths without a gradient are passed over."""
    lengths = [length for length, norm in enumerate(norms) if norm > 0]
    if len(lengths) < 2:
        return Fall(math.nan, math.nan)
    logs = np.log([norms[length] for length in lengths])
    slope, start = np.polyfit(lengths, logs, 1)
    total = float(((logs - logs.mean()) ** 2).sum())
    left = float(((logs - start - slope * np.array(lengths)) ** 2).sum())
    return Fall(math.exp(slope), 1 - left / total if total else 1.0)


def paths_of(blocks: int) -> list[float]:
    """The share of all paths that have each length: the binomial distribution with one half."""
    return _normalised([_log_choose(blocks, length) for length in range(blocks + 1)])


def shares(norms: Sequence[float]) -> list[float]:
    """The share of the gradient that comes along paths of each length: the number of such paths times their mean norm."""
    blocks = len(norms) - 1
    return _normalised([_log_choose(blocks, length) + (math.log(norm) if norm > 0 else -math.inf) for length, norm in enumerate(norms)])


def carrying(share: Sequence[float]) -> tuple[int, int]:
    """The fewest lengths in a row that carry 95 % of the gradient: the first and the last of them."""
    sums = np.concatenate(([0.0], np.cumsum(share)))
    n = len(share)
    spans = ((first, last) for width in range(n) for first in range(n - width) for last in [first + width])
    return next(((first, last) for first, last in spans if sums[last + 1] - sums[first] >= CARRIED - 1e-12), (0, n - 1))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _normalised(logs: Sequence[float]) -> list[float]:
    highest = max(logs)
    if highest == -math.inf:
        return [math.nan] * len(logs)
    weights = [math.exp(value - highest) for value in logs]
    return [weight / sum(weights) for weight in weights]
