"""Before epoch 1: a few steps are timed on a copy of the net, and the epochs that a budget allows are counted."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.errors import CallError
from reslab.train.hardware import Machine, synchronise
from reslab.train.optim import optimizer
from reslab.train.recipe import Recipe

BF16_GAIN = 1.1  # bf16 must be this much faster to be worth its rounding
TIMED = 3


@dataclass(frozen=True)
class Plan:
    """What a training will do. Times are in seconds, measured on this machine just before."""

    epochs: int
    steps_per_epoch: int
    precision: str
    step_seconds: float  # at full size
    low_step_seconds: float  # at the reduced size of the first epochs
    val_seconds: float  # one pass over val
    reason: str  # why this precision

    def epoch_seconds(self, recipe: Recipe) -> float:
        """The mean over all epochs."""
        low = recipe.low_resolution or 0.0
        step = low * self.low_step_seconds + (1 - low) * self.step_seconds
        return step * self.steps_per_epoch + self.val_seconds


def low_size(size: int) -> int:
    """Three quarters of an image size, in whole multiples of 4 where it is large enough."""
    return max(1, size * 3 // 4 // 4 * 4 if size >= 16 else size * 3 // 4)


def make_plan(net: nn.Module, x: Tensor, recipe: Recipe, train: int, val: int, machine: Machine) -> Plan:
    """Times the training step on `x`, a normalised batch (N, C, H, W), in each precision that the machine has."""
    times = {}
    for precision in machine.precisions() if recipe.precision == "auto" else [recipe.precision]:
        times[precision] = _time_step(net, x, recipe, precision, machine)
    fastest = min(times, key=lambda p: times[p])
    gain = times["fp32"] / times["bf16"] if len(times) == 2 else 0.0
    precision = fastest if len(times) == 1 else ("bf16" if gain > BF16_GAIN else "fp32")
    reason = f"bf16 runs at {gain:.2f} times the speed of fp32 here" if gain else "as asked" if recipe.precision != "auto" else "no fast bf16 here"
    low = times[precision]
    if recipe.low_resolution:
        small = nn.functional.interpolate(x, size=low_size(x.shape[2]), mode="bilinear").contiguous(memory_format=torch.channels_last)
        low = _time_step(net, small, recipe, precision, machine)
    with torch.no_grad(), machine.autocast(precision):
        forward = _time(lambda: net(x), x)
    assert recipe.epochs is not None and recipe.batch_size is not None
    per_image = forward / len(x)
    return Plan(recipe.epochs, train // recipe.batch_size, precision, times[precision], low, per_image * val / machine.world, reason)


def epochs_within(plan: Plan, recipe: Recipe, seconds: float, done: int = 0) -> int:
    """Epochs in all, when `done` are done and `seconds` remain. Raises CallError when not even one fits."""
    each = plan.epoch_seconds(recipe)
    epochs = done + int(seconds / each)
    if epochs < 1:
        raise CallError(
            f"the budget must allow one epoch: that takes about {each:.0f} s here and {max(0, seconds):.0f} s are left "
            "after reading the data, the test and the report; raise --budget or choose a smaller net"
        )
    return epochs


def _time_step(net: nn.Module, x: Tensor, recipe: Recipe, precision: str, machine: Machine) -> float:
    twin = copy.deepcopy(net)
    twin.train()
    optim = optimizer(twin, recipe)
    classes = twin(x[:2]).shape[1]
    y = torch.arange(len(x), device=x.device) % classes

    def step() -> None:
        with machine.autocast(precision):
            logits = twin(x)
        optim.zero_grad()
        cross_entropy(logits.float(), y).backward()  # type: ignore[no-untyped-call]
        optim.step()

    return _time(step, x)


def _time(work: Callable[[], Any], x: Tensor) -> float:
    """The median of a few runs after a first; of that first alone when it takes long."""
    times = []
    for _ in range(1 + TIMED):
        start = time.perf_counter()
        work()
        synchronise(x)
        times.append(time.perf_counter() - start)
        if times[0] > 5:
            return times[0]
    return sorted(times[1:])[TIMED // 2]
