"""Optimiser, learning rate and the average of weights: the arithmetic of a recipe."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from reslab.nets.tiles import has_amx
from reslab.nets.torch import ResNet
from reslab.train.recipe import Recipe

STEPS, FIFTH = 5, (3.4445, -4.7750, 2.0315)  # Newton-Schulz, by a polynomial of fifth degree: Jordan et al. 2024
LEAST = 1e-7  # added to a norm
WIDE = 4  # times as wide as it is tall a matrix must be, for the detour by its Gram matrix to be shorter


def optimizer(net: ResNet, recipe: Recipe, precision: str = "fp32") -> torch.optim.Optimizer:
    """The recipe's optimiser. Norms and biases, and beside Muon the head, do not decay unless `decay_all`; the trunk learns at `trunk_lr` of the rate.

    Beside Muon, norms and head learn at `sgd_lr` times its rate; the trunk's biases at `bias_lr` times what they would. What
    the recipe freezes gets no gradient from now on. On a GPU rates are tensors there, so that a recorded step can follow them.
    Muon makes its matrices orthogonal in bf16 where the net's `precision` is that, and on a GPU; weights and momentum stay fp32.
    """
    muon = recipe.optimizer == "muon"
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    whitened = [net.first_conv, net.first_norm] if recipe.whiten else []
    fixed = {id(parameter) for module in whitened if module for parameter in module.parameters()}
    for name, parameter in net.named_parameters():
        head = name.startswith("fc.")
        parameter.requires_grad_(head or not (id(parameter) in fixed or recipe.freeze == "trunk"))
        if parameter.requires_grad:
            by_muon = muon and parameter.ndim == 4
            share = (1.0 if head else recipe.trunk_lr) * (recipe.sgd_lr if muon and not by_muon else 1.0)
            if name.endswith(".bias") and not head:
                share *= recipe.bias_lr
            groups.setdefault((by_muon, recipe.decay_all or parameter.ndim > 1, share), []).append(parameter)
    rows = [
        {
            "params": parameters,
            "muon": by_muon,
            "weight_decay": recipe.weight_decay if recipe.decay_all or (decays and by_muon == muon) else 0.0,
            "scale": share,
        }
        for (by_muon, decays, share), parameters in groups.items()
    ]
    on_gpu = net.fc.weight.is_cuda
    for row in rows:
        row["lr"] = torch.tensor(recipe.lr, device=net.fc.weight.device) if on_gpu else recipe.lr
    if muon:
        return Muon(rows, recipe.lr, recipe.momentum, torch.bfloat16 if on_gpu or precision == "bf16" else torch.float32)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(rows, recipe.lr, recipe.momentum, nesterov=recipe.nesterov and recipe.momentum > 0, fused=True)
    return torch.optim.AdamW(rows, recipe.lr, fused=True, capturable=on_gpu)


def keep_gradients(net: nn.Module) -> None:
    """Allocates the gradients once, side by side. Allocated at every step, they end up between activations and keep these apart."""
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


@contextmanager
def uphill(net: nn.Module, radius: float) -> Iterator[None]:
    """Inside, the parameters are `radius` further up their gradient; afterwards they are what they were (SAM: Foret et al. 2021, 2010.01412)."""
    parameters: list[Tensor] = [p for p in net.parameters() if p.grad is not None]
    with torch.no_grad():
        gradients, kept = [p.grad for p in parameters if p.grad is not None], [p.clone() for p in parameters]
        norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
        torch._foreach_add_(parameters, gradients, alpha=radius / (norm + 1e-12))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is applied (Jordan et al. 2024), to convolutions as (out, in x k x k).

    Groups with `muon` False get SGD with Nesterov momentum. Weight decay is decoupled. `dtype` is what matrices are multiplied in.
    """

    def __init__(self, rows: list[dict[str, Any]], lr: float, momentum: float, dtype: torch.dtype) -> None:
        super().__init__(rows, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            held = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
            torch._foreach_mul_(held, group["momentum"])
            torch._foreach_add_(held, gradients)
            updates = list(torch._foreach_add(gradients, held, alpha=group["momentum"]))
            if group["muon"]:
                updates = orthogonal(updates, self.dtype)
            torch._foreach_mul_(updates, group["lr"])
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, updates)


def orthogonal(updates: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each update's nearest matrix with equal singular values, by five Newton-Schulz steps; equal shapes go together."""
    found = list(updates)
    shapes: dict[torch.Size, list[int]] = {}
    for i, update in enumerate(updates):
        shapes.setdefault(update.shape, []).append(i)
    for shape, members in shapes.items():
        x = torch.stack([updates[i].movedim(1, -1).flatten(1) for i in members])  # in the order in which a channels-last filter lies in memory
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = _by_gram(x, dtype) if x.shape[2] > WIDE * x.shape[1] and not _quick(x, dtype) else _by_steps(x, dtype)
        for i, matrix in zip(members, (x.mT if tall else x).to(updates[0].dtype), strict=True):
            found[i] = matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return found


def _by_steps(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + LEAST)).to(dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=FIFTH[1], alpha=FIFTH[2]), x, beta=FIFTH[0])
    return x


def _by_gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, but for rounding: a step multiplies x by a polynomial of x x', so x itself is only needed at both ends.

    In between everything is as small as x x', and in fp32, without which its least eigenvalues would be lost.
    """
    gram = x @ x.mT
    norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].sqrt() + LEAST
    gram, factors = gram / norm.square(), [norm.reciprocal()]
    for step in range(STEPS):
        gram = factors[-1] @ gram @ factors[-1] if step else gram
        factors.append(torch.baddbmm(gram, gram, gram, beta=FIFTH[1], alpha=FIFTH[2]))
        factors[-1].diagonal(dim1=1, dim2=2).add_(FIFTH[0])
    return (factors[0] * reduce(torch.matmul, factors[1:])).to(dtype) @ x.to(dtype)


def _quick(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are so much faster than in fp32 that more of them take less time."""
    return dtype == torch.bfloat16 and (x.is_cuda or has_amx())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group its share of `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["scale"])
        else:
            group["lr"] = lr * group["scale"]


def lr_at(recipe: Recipe, progress: float, drops: int = 0) -> float:
    """The learning rate after `progress` (0 to 1) of the training; `drops` counts the plateaus so far."""
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    rest = (progress - recipe.warmup) / max(1e-12, 1 - recipe.warmup)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * rest))
    if recipe.schedule == "one-cycle":
        return recipe.lr * (1 - rest)
    if recipe.schedule == "step":
        drops = sum(progress >= m for m in recipe.milestones)
    return recipe.lr * 0.1**drops


class Average:
    """Exponential moving average of a net's weights and statistics; short at first, so that it forgets the start."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Takes in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        tensors = net.state_dict()
        names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in names], [tensors[name] for name in names], 1 - decay)
        for name in tensors.keys() - set(names):
            self.tensors[name].copy_(tensors[name])
