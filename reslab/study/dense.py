"""Fully connected nets at their initialisation, as the theory of gradients has them. Weights are drawn as they are used."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

EPS = 1e-5

Centring = Literal["mean", "batch"]  # subtracted; also divided by the deviation


class Dense(NamedTuple):
    """A net of one input and one output with rectifiers, `layers` of them `width` wide.

    Plain: x <- norm(W relu(x)). With `beta`, residual: x <- x + beta W relu(norm(x)) (Balduzzi et al. 2017, equation 2).
    """

    layers: int
    norm: Centring
    beta: float = 0.0
    width: int = 200


def he(outputs: int, inputs: int, generator: Generator) -> Tensor:
    """Weights (outputs, inputs) of variance 2 / inputs: He et al. 2015 (1502.01852)."""
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * math.sqrt(2 / inputs)


def input_gradient(net: Dense, x: Tensor, generator: Generator) -> Tensor:
    """df/dx at each input (N) of a net drawn by the generator; exact, by forward differentiation.

    Means and deviations are those of the inputs given, and constants: the gradients are those of one function. Biases of
    the first layer are standard normal, so that its rectifiers switch at different inputs; the norm removes later ones.
    """
    first = torch.randn(net.width, 1, generator=generator, dtype=torch.float64)
    bias = torch.randn(net.width, 1, generator=generator, dtype=torch.float64)
    value, slope = first * x.double() + bias, first.expand(-1, len(x))  # (width, N) both
    for _ in range(net.layers - 1):
        weight = he(net.width, net.width, generator)
        if net.beta:
            normed, steep = _normed(net.norm, value, slope)
            value, slope = value + net.beta * weight @ normed.relu(), slope + net.beta * weight @ (steep * (normed > 0))
        else:
            value, slope = _normed(net.norm, weight @ value.relu(), weight @ (slope * (value > 0)))
    return (he(1, net.width, generator) @ (slope * (value > 0)))[0]


def _normed(norm: Centring, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    centred = value - value.mean(1, keepdim=True)
    if norm == "mean":
        return centred, slope
    deviation = (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    return centred / deviation, slope / deviation


def gradient_norms(layers: int, width: int, batch: int, generator: Generator, norm: bool = True) -> list[float]:
    """Norms of the gradient at the outputs of the layers relu(norm(W x)), for random inputs and a random linear loss."""
    x = torch.randn(batch, width, generator=generator, dtype=torch.float64, requires_grad=True)
    held = []
    for _ in range(layers):
        x = x @ he(width, width, generator).T
        x = torch.nn.functional.batch_norm(x, None, None, training=True, eps=EPS).relu() if norm else x.relu()
        held.append(x)
    loss = (x * torch.randn(batch, width, generator=generator, dtype=torch.float64)).sum()
    return [gradient.norm().item() for gradient in torch.autograd.grad(loss, held)]
