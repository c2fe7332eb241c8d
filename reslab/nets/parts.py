"""The leaves of a torch net that torch does not have, and how its convolutions and norms are made from a Spec. NCHW."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reslab.layout import SCALING, norm_groups, norm_kind
from reslab.nets import tiles
from reslab.nets.compiler import takes
from reslab.nets.conv3x3 import Conv3x3
from reslab.nets.fused import Norm
from reslab.nets.winograd import WinogradConv, suits
from reslab.spec import Conv, Spec

NARROW = 16  # channels


def conv(inputs: int, c: Conv, bias: bool) -> nn.Conv2d:
    """Padded so that stride 1 keeps the size."""
    if c.kernel == 1 and c.groups == 1:
        return Pointwise(inputs, c.outputs, 1, c.stride, bias=bias)
    if suits(inputs, c.outputs, c.kernel, c.stride, c.groups):
        return WinogradConv(inputs, c.outputs, c.kernel, padding=1, bias=bias)
    if (c.kernel, c.groups) == (3, 1) and c.stride <= 2:
        return Conv3x3(inputs, c.outputs, c.kernel, c.stride, padding=1, bias=bias)
    return nn.Conv2d(inputs, c.outputs, c.kernel, c.stride, padding=c.kernel // 2, groups=c.groups, bias=bias)


def norm(spec: Spec, channels: int, last_of_branch: bool = False) -> nn.Module | None:
    """What the spec has where a norm stands, or None."""
    match norm_kind(spec, last_of_branch):
        case "batchnorm":
            return Norm(channels, spec.eps)
        case "groupnorm":
            return nn.GroupNorm(norm_groups(channels), channels, spec.eps)
        case "shift":
            return Shift()
        case "scaleshift":
            return ScaleShift()
    return None


def through(module: nn.Module | None, x: Tensor) -> Tensor:
    """The module's output, or x where there is none."""
    return x if module is None else module(x)


def every(stride: int, x: Tensor) -> Tensor:
    """Every `stride`-th pixel, as a pool of one: what a slice gives back as gradient is not channels-last, and all behind it is slow."""
    return x if stride == 1 else F.avg_pool2d(x, 1, stride)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution. Where it is `fused` and in bf16, it is a matrix product over all pixels, which is mostly faster (benchmarks/fused.py).

    With few channels, a strided one is one of every `stride`-th pixel: in torch 2.13 its own backward pass writes past its memory,
    and the process dies, with fewer than 16 input channels, channels last, several threads and a batch that these do not divide
    evenly (tests/nets/test_blocks.py).
    """

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        product = self.fused and self.training and torch.is_autocast_enabled("cpu") and takes(x)
        if not (product or (self.stride[0] > 1 and self.in_channels < NARROW)):
            return super().forward(x)
        x = every(self.stride[0], x)
        if not product:
            return F.conv2d(x, self.weight, self.bias)
        if self.bias is None and tiles.suits(x):
            return tiles.convolution(x, self.weight)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Add(nn.Module):
    """The skip addition, named so that studies can find it."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut


class AddScaled(nn.Module):
    """Both halved: constant scaling, He et al. 2016, section 3.1."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return SCALING * branch + SCALING * shortcut


class AddExclusive(nn.Module):
    """g F + (1 - g) x: exclusive gating, as in highway networks."""

    def forward(self, branch: Tensor, shortcut: Tensor, gate: Tensor) -> Tensor:
        return gate * branch + (1 - gate) * shortcut


class AddGated(nn.Module):
    """F + (1 - g) x: shortcut-only gating."""

    def forward(self, branch: Tensor, shortcut: Tensor, gate: Tensor) -> Tensor:
        return branch + (1 - gate) * shortcut


class PadShortcut(nn.Module):
    """Shortcut A: every `stride`-th pixel, and zero channels added on both sides. It has no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.stride = stride
        self.pad = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(every(self.stride, x), self.pad)


class Duplicate(nn.Module):
    """The channels, and once more the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), dim=1)


class ZeroPaddedMaxPool(nn.MaxPool2d):
    """A max-pool whose padding is zero, not minus infinity: as in Keras, where zeros are padded first.

    The zeros are put around by concatenation: onnxruntime 1.31 folds a Pad into the pool behind it, and then pads nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        for dim in (2, 3):
            edge = torch.zeros_like(x.narrow(dim, 0, int(self.padding)))  # type: ignore[arg-type]
            x = torch.cat((edge, x, edge), dim)
        return F.max_pool2d(x, self.kernel_size, self.stride)


class BlurPool(nn.Module):
    """Every `stride`-th pixel of x smoothed by (1 2 1)^T (1 2 1) / 16, edges reflected: Zhang 2019 (1904.11486)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        kernel = [[0.0625, 0.125, 0.0625], [0.125, 0.25, 0.125], [0.0625, 0.125, 0.0625]]  # a product would load torch's Python code on meta
        self.register_buffer("kernel", torch.tensor(kernel), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.get_buffer("kernel").to(x.dtype)
        channels = x.shape[1]
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel.expand(channels, 1, 3, 3), stride=self.stride, groups=channels)


class SqueezeExcite(nn.Module):
    """Every channel times a number in (0, 1) that all channels' means decide: Hu et al. 2017 (1709.01507)."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = conv(channels, Conv(inside, 1, 1), bias=True)
        self.relu = nn.ReLU()
        self.fc2 = conv(inside, Conv(channels, 1, 1), bias=True)
        self.sigmoid = nn.Sigmoid()
        self.multiply = Multiply()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.multiply(x, self.sigmoid(self.fc2(self.relu(self.fc1(self.pool(x))))))
        return out


class Multiply(nn.Module):
    """The product of two tensors."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


class DropPath(nn.Module):
    """In training each image's branch is zero with that chance, and scaled up otherwise (Huang et al. 2016, 1603.09382)."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty(len(x), 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.chance)
        return x * kept / (1 - self.chance)

    def extra_repr(self) -> str:
        return f"chance={self.chance:.3g}"


class Shift(nn.Module):
    """x + b with one learned scalar that starts at zero: Fixup (Zhang et al. 2019, 1901.09321)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class ScaleShift(nn.Module):
    """a x + b with two learned scalars, one and zero at the start: the end of a Fixup branch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class Scale(nn.Module):
    """a x with one learned scalar that starts at zero: SkipInit (De & Smith 2020) and ReZero (Bachlechner et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x
