"""Blocks as steps towards one estimate: which way a block moves its input, what can be read from it, how far it still is."""

import math
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from reslab.layout import Unit
from reslab.nets.torch import ResNet
from reslab.study.surgery import keeps_shape, units

RIDGE = 1e-3  # of the features' mean variance


def steps_of(net: ResNet, x: Tensor, y: Tensor) -> dict[int, Tensor]:
    """float64 (N, 4) by block: cosine with the negative gradient and relative norm, of the branch and of output minus input.

    NaN where an image has no gradient. A plain block's branch is its output minus its input.
    """
    branches: dict[int, Tensor] = {}
    with torch.enable_grad(), ExitStack() as hooks:
        inputs = [net.stem(x).detach().requires_grad_()]
        for number, unit in enumerate(units(net)):
            block = net.get_submodule(unit.name)
            if unit.carrier != "none":
                hooks.enter_context(block.get_submodule("add").register_forward_pre_hook(partial(_keep, branches, number)))
            inputs.append(block(inputs[-1]))
        gradients = torch.autograd.grad(cross_entropy(net.head(inputs[-1]), y, reduction="sum"), inputs[:-1])
    made = {}
    for number, unit in enumerate(units(net)):
        if keeps_shape(unit):
            h, change = inputs[number].detach(), (inputs[number + 1] - inputs[number]).detach()
            columns = [c for step in (branches.get(number, change), change) for c in (_cosine(step, -gradients[number]), _norm(step) / _norm(h))]
            made[number] = torch.stack(columns, dim=1)
    return made


def ridge(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weights (features, classes) and bias of the linear read-out with the least squared error, in float64 and closed form.

    Squared weights cost RIDGE times the mean variance of a feature.
    """
    x, target = x.double(), one_hot(y, classes).double()
    mean, share = x.mean(0), target.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    penalty = RIDGE * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance + penalty, centred.T @ (target - share) / len(x))
    return weight, share - mean @ weight


class Distance:
    """How far maps (N, C, H, W) are from the final ones, summed over batches."""

    def __init__(self) -> None:
        self.n = 0
        self.difference, self.square = torch.zeros(1), 0.0
        self.final, self.final_square = 0.0, 0.0

    def add(self, a: Tensor, final: Tensor) -> None:
        """A batch of maps, and the final ones for the same images."""
        difference = a - final
        self.n += len(a) * a[0, 0].numel()
        self.difference = self.difference + difference.sum((0, 2, 3))
        self.square += float(difference.square().sum())
        self.final += float(final.sum())
        self.final_square += float(final.square().sum())

    def facts(self) -> dict[str, float]:
        """In standard deviations of the final maps: `mean` and `spread` over the channels of each one's mean difference, `rms` over everything."""
        every = self.n * len(self.difference)
        std = math.sqrt(max(self.final_square / every - (self.final / every) ** 2, 1e-24))
        by_feature = self.difference / self.n / std
        return {"mean": float(by_feature.mean()), "spread": float(by_feature.std(correction=0)), "rms": math.sqrt(self.square / every) / std}


@torch.no_grad()
def block_outputs(net: ResNet, x: Tensor) -> list[Tensor]:
    """What each block puts out."""
    held: dict[str, Tensor] = {}
    net(x, held)
    return [held[unit.name] for unit in units(net)]


def stage_ends(net: ResNet, outputs: list[Tensor]) -> dict[int, int]:
    """For each block, the last one of its stage whose output has the same shape."""
    made = {}
    for number, unit in enumerate(units(net)):
        stage = [i for i, other in enumerate(units(net)) if stage_of(other) == stage_of(unit) and outputs[i].shape == outputs[number].shape]
        made[number] = max(stage)
    return made


def stage_of(unit: Unit) -> int:
    """The number of a block's stage, from 1."""
    return int(unit.name.split(".")[0].removeprefix("layer"))


def _keep(held: dict[int, Tensor], number: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    held[number] = inputs[0].detach()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1)  # type: ignore[no-any-return]


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """NaN where either is zero."""
    return (x.double() * y.double()).flatten(1).sum(1) / (_norm(x) * _norm(y))
