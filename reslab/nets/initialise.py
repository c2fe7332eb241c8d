"""The first values of a torch net's parameters."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from reslab.layout import start_scales

if TYPE_CHECKING:
    from reslab.nets.torch import ResNet

PIXELS = 1 << 20  # whose patches are laid out at a time
NOISE = 5e-4  # added to the variance of a patch's principal components, where pixels have variance one


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


@torch.no_grad()
def begin_as_identity(net: "ResNet") -> None:
    """Each 3x3 convolution in a block hands its input on, where it has as many outputs or more (Jordan 2024, 2404.00498, section 3.3).

    Outputs beyond the inputs keep what they had.
    """
    for block in net.blocks.values():
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == 1 and module.in_channels <= module.out_channels:
                nn.init.dirac_(module.weight[: module.in_channels])


@torch.no_grad()
def whiten(conv: nn.Conv2d, images: Tensor) -> None:
    """Makes a convolution give the principal components of the patches of images (N, C, H, W), each with unit variance.

    Each component comes twice, as it is and negated, so that ReLU loses nothing; the strongest come first. Patches are the
    smallest, from 2x2 up, that give all filters a component: of larger ones more would be left out, and fine detail is in the
    weakest. Filters that are left over stay as they are (Jordan 2024, 2404.00498, section 3.2).
    """
    kernel, channels = conv.kernel_size[0], images.shape[1]
    side = next((k for k in range(2, kernel) if 2 * k * k * channels >= conv.out_channels), kernel)
    images, products, count = images.to(conv.weight.device), torch.zeros((), device=conv.weight.device), 0
    for some in torch.split(images, max(1, PIXELS // images[0, 0].numel())):
        patches = unfold(some, side).transpose(1, 2).flatten(0, 1)
        products, count = products + patches.mT @ patches, count + len(patches)
    variances, components = torch.linalg.eigh((products / count).double())
    filters = (components / (variances + NOISE).sqrt()).mT.flip(0)[: conv.out_channels // 2].view(-1, channels, side, side)
    if side < kernel:
        filters = pad(filters, (kernel // 2 - side // 2, (kernel + 1) // 2 - (side + 1) // 2) * 2)
    conv.weight[: 2 * len(filters)] = torch.cat([filters, -filters]).to(conv.weight)
