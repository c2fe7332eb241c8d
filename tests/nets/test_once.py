"""Kernels have no gradients of gradients, and say so."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from reslab.nets.conv3x3 import Conv3x3
from reslab.nets.fused import Norm, reason_against, use_fused
from reslab.nets.pool import MaxPool, usable
from reslab.nets.winograd import WinogradConv, use_winograd

CASES: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {  # what makes one, pixels a side, whether its kernels are missing
    "_NormReLUBackward": (lambda: Norm(128), 8, bool(reason_against())),
    "_MaxPoolBackward": (lambda: MaxPool(2), 8, not usable()),
    "WinogradBackward": (lambda: WinogradConv(128, 128, 3, padding=1, bias=False), 8, False),
    "_AsMatrixBackward": (lambda: Conv3x3(128, 128, 3, padding=1, bias=False), 2, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_penalty_on_a_gradient_is_refused_and_not_forgotten(case: str) -> None:
    make, side, missing = CASES[case]
    if missing:
        pytest.skip("the kernels cannot be made here")
    x = torch.randn(16, 128, side, side, requires_grad=True)
    module = make().train()
    use_fused(module, True)
    use_winograd(module, True)
    y = module(x)
    assert type(y.grad_fn).__name__ == case
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
