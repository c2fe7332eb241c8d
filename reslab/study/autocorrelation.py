"""How alike the values of a sequence are that lie a few places apart, and two noises to compare with."""

import torch
from torch import Generator, Tensor


def autocorrelation(sequence: Tensor, lags: int) -> list[float]:
    """Correlation of values 0, 1, ... `lags` places apart in a sequence (T) or (T, features), about its mean.

    The usual biased estimate: sums of fewer products are divided by the same variance. A constant sequence has none: NaN.
    """
    centred = sequence.double().reshape(len(sequence), -1)
    centred = centred - centred.mean(0)
    sums = [(centred[lag:] * centred[: len(centred) - lag]).sum() for lag in range(lags + 1)]
    return (torch.stack(sums) / sums[0]).tolist()


def white_noise(points: int, generator: Generator) -> Tensor:
    """Independent normal values."""
    return torch.randn(points, generator=generator, dtype=torch.float64)


def brown_noise(points: int, generator: Generator) -> Tensor:
    """A random walk: sums of independent normal values."""
    return white_noise(points, generator).cumsum(0)
