"""The first values of a torch net's parameters."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from reslab.nets.torch import Block, ResNet


@torch.no_grad()
def initialise(net: "ResNet") -> None:
    """He et al. 2015 (1502.01852), equation 14 (fan out) for convolutions; scales one, biases zero; the head uniform.

    With `zero_init` the last scale of each residual branch starts at zero; where no norm ends the branch, that is the
    last convolution. Fixup scales the branches by depth and starts the head at zero. Gates start at `gate_bias`.
    A net on the meta device has shapes and no values: nothing is done, which saves torch a millisecond a convolution.
    """
    if net.fc.weight.is_meta:
        return
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    blocks: list[Block] = [block for stage in net.stages for block in stage if hasattr(block, "gate")]  # type: ignore[misc]
    for block in blocks:
        if block.gate is not None:
            nn.init.constant_(block.gate[0].bias, net.spec.gate_bias)  # type: ignore[arg-type]
        if net.spec.zero_init:
            _zero_branch(block, ends_in_norm=net.spec.order not in ("preact", "bn-after-add"))
        if net.spec.init == "fixup":
            _fixup(block, len(blocks))
    if net.spec.init == "fixup":
        nn.init.zeros_(net.fc.weight)
        nn.init.zeros_(net.fc.bias)


def _zero_branch(block: "Block", ends_in_norm: bool) -> None:
    norm = getattr(block, f"bn{block.count}") if ends_in_norm else None
    nn.init.zeros_((norm or getattr(block, f"conv{block.count}")).weight)


def _fixup(block: "Block", blocks: int) -> None:
    """Zhang et al. 2019 (1901.09321), section 3: L^(-1 / (2m - 2)) on a branch of m layers, whose last starts at zero."""
    for number in range(1, block.count):
        getattr(block, f"conv{number}").weight.mul_(math.pow(blocks, -1 / (2 * block.count - 2)))
    nn.init.zeros_(getattr(block, f"conv{block.count}").weight)
