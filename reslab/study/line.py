"""What the loss of a training step does along its gradient, at several distances; the net comes back bit for bit."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reslab.study.untouched import untouched


class Probe(NamedTuple):
    """At each step size: the loss there, and by how much (2-norm) its gradient differs from the one here."""

    loss: float
    gradient: float  # 2-norm
    losses: list[float]
    changes: list[float]

    @property
    def range(self) -> float:
        """Highest minus lowest loss, where the net is and where it was moved to."""
        values = [self.loss, *self.losses]
        return max(values) - min(values) if all(map(math.isfinite, values)) else math.inf

    def smoothness(self, steps: Sequence[float]) -> float:
        """The largest change of the gradient for the way gone: effective beta-smoothness (Santurkar et al. 2018, figure 4c)."""
        return max(change / (step * self.gradient) for change, step in zip(self.changes, steps, strict=True)) if self.gradient > 0 else 0.0


def along_gradient(net: nn.Module, loss: Callable[[], Tensor], steps: Sequence[float]) -> Probe:
    """Moves the weights against the gradient by each step size and looks again. `loss` must be the same function each time."""
    weights = list(net.parameters())
    with untouched(net):
        here, gradient = _look(loss, weights)
        size = _norm(gradient)
        losses, changes = [], []
        held = [weight.detach().clone() for weight in weights]
        for step in steps:
            with torch.no_grad():
                for weight, old, g in zip(weights, held, gradient, strict=True):
                    weight.copy_(old).sub_(g, alpha=step)
            there, other = _look(loss, weights)
            losses.append(there)
            changes.append(_norm([a - b for a, b in zip(other, gradient, strict=True)]))
    return Probe(here, size, losses, changes)


def _look(loss: Callable[[], Tensor], weights: Sequence[Tensor]) -> tuple[float, Sequence[Tensor]]:
    value = loss()
    return value.item(), torch.autograd.grad(value, weights)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors])))
