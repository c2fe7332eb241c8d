"""A net that a study looks at is given back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Puts back weights, statistics, modes, requires_grad, gradients and torch's random numbers when the block ends, however it ends."""
    held = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    modes = [(module, module.training) for module in net.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        net.load_state_dict(held)
        for module, mode in modes:
            module.training = mode
        for p, wanted, gradient in parameters:
            p.requires_grad_(wanted)
            p.grad = gradient
