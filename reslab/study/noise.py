"""Noise behind every batch norm, with a distribution that is another one at each step: Santurkar et al. 2018, section 2.1.

It undoes what batch norm was first praised for, that a layer's inputs keep their distribution, and keeps the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SHIFT, STRETCH = 0.5, 1.25  # of an activation: its noise has a mean in [-0.5, 0.5] and a scale in [1, 1.25], drawn at each step
SPREAD = 0.1  # around those two, from image to image


@contextmanager
def noisy(net: nn.Module) -> Iterator[None]:
    """While it is entered, what the batch norms of the net give is scaled and shifted at random, in training and eval mode.

    Numbers come from torch's global generator: seeded alike, a forward pass sees the same noise.
    """
    hooks = [module.register_forward_hook(_perturbed) for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _perturbed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """s x + m, where m and s scatter around a mean and a scale that each activation (c, h, w) has for this pass."""
    mean = torch.empty_like(output[:1]).uniform_(-SHIFT, SHIFT)
    scale = torch.empty_like(output[:1]).uniform_(1, STRETCH)
    m = mean + SPREAD * (2 * _laid_out(torch.rand(output.numel()), output) - 1)
    s = scale + SPREAD * _laid_out(torch.randn(output.numel()), output)
    return s * output + m


def _laid_out(numbers: Tensor, like: Tensor) -> Tensor:
    """Flat numbers as a tensor of the same shape and memory format: drawing them in that format is several times slower."""
    return numbers.to(like.device).as_strided(like.shape, like.stride())
