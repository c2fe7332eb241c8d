"""Spec -> nn.Module. Read block -> stage -> net. Tensors are NCHW; parameter names are torchvision's.

The skip addition is a module (`add`), every ReLU is its own and none works in place, so that any intermediate can be
read, replaced or hooked without a surprise.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reslab.spec import Spec, block_convs, shortcut_kind
from reslab.spec import spec as find_spec


def build(net: str | Spec, **changes: Any) -> "ResNet":
    """An initialised network from a name in `FAMILY` or a Spec; `changes` are Spec fields.

    Random numbers come from torch's global generator. Raises CallError (a ValueError) for an unknown name or field.
    """
    return ResNet(find_spec(net, **changes))


class ResNet(nn.Module):
    """(N, in_channels, H, W) float -> logits (N, num_classes). `spec` is what it was built from."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.widths[0]
        self.conv1 = _conv(spec, spec.in_channels, width, *((3, 1) if spec.stem == "conv3" else (7, 2)))
        if spec.norm == "batch":
            self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        if spec.stem == "conv7-pool":
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for index, (depth, channels) in enumerate(zip(spec.depths, spec.widths, strict=True)):
            blocks = _stage(spec, width, channels, depth, stride=1 if index == 0 else 2)
            width = blocks[-1].out_channels
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, spec.num_classes)
        initialise(self)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages in order, each a Sequential of blocks."""
        return [self.get_submodule(f"layer{i + 1}") for i in range(len(self.spec.depths))]  # type: ignore[misc]

    def forward(self, x: Tensor, outputs: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (N, num_classes). A dict given as `outputs` receives the stem's and every block's output by name."""
        x = self.conv1(x)
        if self.spec.norm == "batch":
            x = self.bn1(x)
        x = self.relu(x)
        if self.spec.stem == "conv7-pool":
            x = self.maxpool(x)
        if outputs is not None:
            outputs["stem"] = x
        for number, stage in enumerate(self.stages, start=1):
            for index, block in enumerate(stage):
                x = block(x)
                if outputs is not None:
                    outputs[f"layer{number}.{index}"] = x
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(spec: Spec, inputs: int, width: int, depth: int, stride: int) -> "list[BasicBlock | Bottleneck]":
    kind = BasicBlock if spec.block == "basic" else Bottleneck
    blocks: list[BasicBlock | Bottleneck] = []
    for index in range(depth):
        blocks.append(kind(spec, inputs, width, stride if index == 0 else 1))
        inputs = blocks[-1].out_channels
    return blocks


class BasicBlock(nn.Module):
    """3x3 - 3x3, then the shortcut is added."""

    def __init__(self, spec: Spec, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        (c1, *first), (c2, *second) = block_convs(spec, width, stride)
        self.out_channels = c2
        self.conv1 = _conv(spec, inputs, c1, *first)
        self.bn1 = _norm(spec, c1)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(spec, c1, c2, *second)
        self.bn2 = _norm(spec, c2)
        self.downsample = _shortcut(spec, inputs, c2, stride)
        self.add = Add() if spec.shortcut != "none" else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(_normed(self.bn1, self.conv1(x)))
        y = _normed(self.bn2, self.conv2(y))
        if self.add is not None:
            y = self.add(y, x if self.downsample is None else self.downsample(x))
        out: Tensor = self.relu2(y)
        return out


class Bottleneck(nn.Module):
    """1x1 - 3x3 - 1x1 to four times the width, then the shortcut is added."""

    def __init__(self, spec: Spec, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        (c1, *first), (c2, *second), (c3, *third) = block_convs(spec, width, stride)
        self.out_channels = c3
        self.conv1 = _conv(spec, inputs, c1, *first)
        self.bn1 = _norm(spec, c1)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(spec, c1, c2, *second)
        self.bn2 = _norm(spec, c2)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(spec, c2, c3, *third)
        self.bn3 = _norm(spec, c3)
        self.downsample = _shortcut(spec, inputs, c3, stride)
        self.add = Add() if spec.shortcut != "none" else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(_normed(self.bn1, self.conv1(x)))
        y = self.relu2(_normed(self.bn2, self.conv2(y)))
        y = _normed(self.bn3, self.conv3(y))
        if self.add is not None:
            y = self.add(y, x if self.downsample is None else self.downsample(x))
        out: Tensor = self.relu3(y)
        return out


class Add(nn.Module):
    """The skip addition, named so that studies can find it."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut


class PadShortcut(nn.Module):
    """Shortcut A: every `stride`-th pixel, and zero channels added on both sides. It has no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.stride = stride
        self.pad = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


def _conv(spec: Spec, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=spec.norm == "none")


def _norm(spec: Spec, channels: int) -> nn.BatchNorm2d | None:
    return nn.BatchNorm2d(channels) if spec.norm == "batch" else None


def _normed(norm: nn.BatchNorm2d | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _shortcut(spec: Spec, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if spec.shortcut == "none":
        return None
    kind = shortcut_kind(spec, inputs, outputs, stride)
    if kind == "pad":
        return PadShortcut(inputs, outputs, stride)
    if kind == "projection":
        conv, norm = _conv(spec, inputs, outputs, 1, stride), _norm(spec, outputs)
        return nn.Sequential(conv) if norm is None else nn.Sequential(conv, norm)
    return None


@torch.no_grad()
def initialise(net: ResNet) -> None:
    """He et al. 2015 (1502.01852), equation 14 (fan out) for convolutions; scales one, biases zero; the head uniform.

    With `zero_init` the last scale of each residual branch starts at zero; without a norm that is the last convolution.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if net.spec.zero_init:
        for module in net.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_((module.bn2 or module.conv2).weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_((module.bn3 or module.conv3).weight)
