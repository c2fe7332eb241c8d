"""What passes through a net: its blocks' outputs, branches and shortcuts, and the gradients that come back.

Hooks are there only inside a `with`, also after an exception.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reslab.layout import is_normed, stages
from reslab.nets.parts import Add
from reslab.nets.torch import ResNet

SAMPLED = 32  # images of a batch, at most, that norms are taken from
Where = tuple[str, str, str]  # a block; out, branch or shortcut; activation or gradient


@torch.no_grad()
def settle(net: nn.Module, x: Tensor) -> None:
    """Puts the net into eval mode with the running statistics of one batch: a net fresh from its seed has none yet."""
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [module.momentum for module in norms]
    try:
        for module in norms:
            module.train()
            module.momentum = 1.0
        net(x)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.eval()
            module.momentum = momentum


def blocks(net: ResNet) -> dict[str, nn.Module]:
    """Every block by its name, in order."""
    return {unit.name: net.get_submodule(unit.name) for units in stages(net.spec) for unit in units}


def responses(net: ResNet) -> dict[str, nn.Module]:
    """What gives the response of each convolution on the longest path: the norm behind it, or itself (He 2015, section 4.2)."""
    found = {"stem": net.bn1 or net.conv1}
    for units in stages(net.spec):
        for unit in units:
            block, count = net.get_submodule(unit.name), len(unit.convs)
            for number in range(1, count + 1):
                norm = block._modules.get(f"bn{number}") if is_normed(net.spec, number, count) and net.spec.order != "preact" else None
                found[f"{unit.name}.conv{number}"] = norm or block.get_submodule(f"conv{number}")
    return found


@contextmanager
def outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with what each module gives, while the block lasts."""
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: held.__setitem__(name, out.detach())

    with _removed([module.register_forward_hook(keep(name)) for name, module in modules.items()]):
        yield held


@contextmanager
def additions(net: ResNet) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Fills a dict with the branch and the shortcut that each block adds, while the block lasts."""
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args: held.__setitem__(name, (args[0].detach(), args[1].detach()))

    with _removed([block.add.register_forward_pre_hook(keep(name)) for name, block in blocks(net).items() if isinstance(block.add, nn.Module)]):
        yield held


class Flow:
    """Sizes of what passes each block in a forward and a backward pass, where `on`: root mean square of activations,
    norm of the batch's gradients.

    `out` is what a block gives to the next; `stem` what the first one gets. Where there is a shortcut, activations of
    `branch` and `shortcut` are those that are added, gradients of `branch` and `shortcut` those that each brings back:
    at the first layer of the branch, and at the shortcut's end. Both share their tensor with the rest of the net, so it is
    read through a view of its own where nothing else tells. Taken from up to SAMPLED images, evenly spaced in the batch.
    """

    def __init__(self) -> None:
        self.on = True
        self._taken: dict[Where, tuple[Tensor, float]] = {}  # norms of images, and what makes theirs the size that is asked for
        self._last: tuple[Tensor | None, str] = None, ""  # what passed last, and where

    def read(self) -> dict[Where, float]:
        """What the last pass left."""
        taken, self._taken, self._last = self._taken, {}, (None, "")
        if not taken:
            return {}
        norms = torch.linalg.vector_norm(torch.stack([norms for norms, _ in taken.values()]), dim=1).tolist()
        return {where: norm * scale for norm, (where, (_, scale)) in zip(norms, taken.items(), strict=True)}

    def activation(self, name: str, where: str, x: Tensor) -> None:
        part = _sample(x.detach())
        self._taken[name, where, "activation"] = _norms(part), part.numel() ** -0.5

    def gradient(self, name: str, where: str, x: Tensor) -> None:
        def keep(gradient: Tensor) -> None:
            part = _sample(gradient)
            self._taken[name, where, "gradient"] = _norms(part), math.sqrt(len(gradient) / len(part))

        if x.requires_grad:
            x.register_hook(keep)  # type: ignore[no-untyped-call]

    def passed(self, name: str, x: Tensor) -> None:
        if self.on:
            self._last = x, name
            self.activation(name, "out", x)
            self.gradient(name, "out", x)

    def entering(self, name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.on:
            return None
        view = args[0].view_as(args[0])
        self.gradient(name, "branch", view)
        return (view, *args[1:])

    def adding(self, name: str, add: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.on:
            return None
        branch, shortcut = args[:2]
        self.activation(name, "branch", branch)
        if shortcut is self._last[0]:  # an identity: measured already
            self._taken[name, "shortcut", "activation"] = self._taken[self._last[1], "out", "activation"]
        else:
            self.activation(name, "shortcut", shortcut)
        if isinstance(add, Add):  # a sum gives both the same gradient, and the branch is nobody else's
            self.gradient(name, "shortcut", branch)
            return None
        view = shortcut.view_as(shortcut)
        self.gradient(name, "shortcut", view)
        return (branch, view, *args[2:])


@contextmanager
def flowing(net: ResNet) -> Iterator[Flow]:
    """Measures the passes of the net, while the block lasts. It changes no value that passes."""
    flow = Flow()
    handles: list[RemovableHandle] = []
    for name, block in blocks(net).items():
        if not handles:
            handles.append(block.register_forward_pre_hook(lambda module, args: flow.passed("stem", args[0])))
        handles.append(block.register_forward_hook(lambda module, args, out, name=name: flow.passed(name, out)))
        if isinstance(block.add, nn.Module):
            handles.append(_entry(net, block).register_forward_pre_hook(lambda module, args, name=name: flow.entering(name, args)))
            handles.append(block.add.register_forward_pre_hook(lambda module, args, name=name: flow.adding(name, module, args)))
    with _removed(handles):
        yield flow


def _entry(net: ResNet, block: nn.Module) -> nn.Module:
    """The first module of the branch that the shortcut does not share."""
    early = {"preact": ("bn1", "relu1"), "relu-preact": ("relu1",)}.get(net.spec.order, ())
    names = (*(() if isinstance(block.downsample, nn.Sequential) else early), "pre1", "conv1")
    if block.late:
        names = ("dropout", "pre2", "conv2")
    return next(module for name in names if (module := block._modules.get(name)) is not None)


def _sample(x: Tensor) -> Tensor:
    return x[:: max(1, -(-len(x) // SAMPLED))]


def _norms(x: Tensor) -> Tensor:
    """Of each image: five times as fast as one norm over images that do not lie side by side."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3))
    return norms


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
