"""The ends of a Hessian's spectrum, from its products with vectors: Lanczos with full reorthogonalisation.

The matrix itself is never made: for n weights it would have n^2 entries (Pearlmutter 1994; Golub & Van Loan, chapter 10).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.study.surface import Batches

Product = Callable[[Tensor], Tensor]  # of a symmetric matrix with a flat float64 vector
NOTHING_LEFT = 1e-8  # of the matrix's size: what is left of a vector then is rounding


class Ritz(NamedTuple):
    """Approximate eigenvalues in rising order. `errors` bounds each one's distance from a true eigenvalue."""

    values: NDArray[np.float64]
    errors: NDArray[np.float64]


def hessian_product(net: nn.Module, weights: Sequence[Tensor], batches: Batches) -> Product:
    """Multiplies the Hessian of the mean cross-entropy, by `weights` of the net, with a vector; by double backward."""
    n = sum(len(y) for _, y in batches)

    def product(vector: Tensor) -> Tensor:
        parts = [part.view_as(w).to(w.dtype) for part, w in zip(torch.split(vector, [w.numel() for w in weights]), weights, strict=True)]
        total = torch.zeros_like(vector)
        for x, y in batches:
            gradient = torch.autograd.grad(cross_entropy(net(x), y, reduction="sum") / n, weights, create_graph=True)
            found = torch.autograd.grad(gradient, weights, parts)
            total += torch.cat([part.reshape(-1) for part in found]).double()
        return total

    return product


def lanczos(product: Product, size: int, steps: int, generator: Generator) -> Ritz:
    """Ritz values of a symmetric matrix after so many products, fewer where the vectors span all that it reaches.

    Each vector is made orthogonal to all before it, twice: with the short recurrence alone, found eigenvalues would come
    again as copies. The ends of the spectrum converge first. An eigenvalue that occurs several times is found once.
    """
    first = torch.randn(size, dtype=torch.float64, generator=generator)
    basis = [first / torch.linalg.vector_norm(first)]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, size)):
        w = product(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        for _ in range(2):
            for v in basis:
                w = w - (w @ v) * v
        beside.append(float(torch.linalg.vector_norm(w)))
        if beside[-1] <= NOTHING_LEFT * max(map(abs, [*diagonal, *beside])):
            break
        basis.append(w / beside[-1])
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside[:-1]))
    return Ritz(values.astype(np.float64), beside[-1] * np.abs(vectors[-1]))
