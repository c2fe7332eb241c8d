"""The first values of a torch net's parameters."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from reslab.layout import start_scales

if TYPE_CHECKING:
    from reslab.nets.torch import ResNet


@torch.no_grad()
def initialise(net: "ResNet") -> None:
    """He et al. 2015 (1502.01852), equation 14 (fan out) for convolutions; scales one, biases zero; the head uniform.

    Then `layout.start_scales`: zero_init and Fixup. Gates start at `gate_bias`. A net on the meta device has shapes and
    no values: nothing is done, which saves torch a millisecond a convolution.
    """
    if net.fc.weight.is_meta:
        return
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.constant_(module.bias, net.spec.gate_bias if name.endswith("gate.0") else 0.0)
    for name, scale in start_scales(net.spec).items():
        for parameter in net.get_submodule(name).parameters():
            parameter.mul_(scale)
