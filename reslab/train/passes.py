"""A micro-batch forward and back, as training and its plan take it: as it is, or recorded on a GPU and replayed."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.nets.recording import Recording, shared_pool, warm_up
from reslab.train.hardware import Machine
from reslab.train.recipe import Recipe


class Work(Protocol):
    """Images (N, C, H, W) and targets (N, classes), as probabilities -> the mean loss, and how many answers are right."""

    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


class Pass:
    """Adds a micro-batch's share of the gradient to the parameters'; `pieces` are as many as a process takes for one step."""

    def __init__(self, net: nn.Module, recipe: Recipe, precision: str, machine: Machine, pieces: int = 1, weights: Tensor | None = None) -> None:
        self.net, self.machine, self.precision = net, machine, precision
        self.pieces, self.weights, self.smoothing = pieces, weights, recipe.label_smoothing

    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A Work."""
        with self.machine.autocast(self.precision):
            logits = self.net(x)
        loss = cross_entropy(logits.float(), targets, weight=self.weights, label_smoothing=self.smoothing)
        (loss / self.pieces).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), (logits.argmax(1) == targets.argmax(1)).sum()


class ReplayedPass:
    """A Pass recorded once for each shape of its images. The gradients and running statistics that it writes to must stay where they are.

    What the net draws at random follows torch's seed, but the numbers are not those that it draws unrecorded.
    """

    def __init__(self, work: Pass) -> None:
        self.work = work
        self.pool = shared_pool()
        self.recorded: dict[torch.Size, tuple[tuple[Tensor, Tensor], Recording[tuple[Tensor, Tensor]]]] = {}

    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A Work. What it returns holds until the next call."""
        if x.shape not in self.recorded:
            self.recorded[x.shape] = self._record(x, targets)
        inputs, recording = self.recorded[x.shape]
        for held, given in zip(inputs, (x, targets), strict=True):
            held.copy_(given)
        return recording()

    def _record(self, x: Tensor, targets: Tensor) -> Any:
        """Runs and records; afterwards gradients and running statistics are what they were."""
        net, inputs = self.work.net, (x.clone(), targets.clone())
        held = [*net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
        before = [tensor.clone() for tensor in held]
        warm_up(lambda: self.work(*inputs))
        recording = Recording(lambda: self.work(*inputs), self.pool)
        for tensor, value in zip(held, before, strict=True):
            tensor.copy_(value)
        return inputs, recording


class ReplayedUpdate:
    """An optimiser's step, recorded when it is called a second time: the first makes the optimiser's memory."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
        self.begun = False
        self.recording: Recording[Any] | None = None

    def __call__(self) -> None:
        if not self.begun:
            self.step()
            self.begun = True
            return
        if self.recording is None:
            self.recording = Recording(self.step)
        self.recording()
