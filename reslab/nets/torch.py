"""Spec -> nn.Module. Read block -> stage -> net. Tensors are NCHW; parameter names are torchvision's, and timm's beyond.

The skip addition is a module (`add`), every ReLU is its own and none works in place, so that any intermediate can be
read, replaced or hooked without a surprise. What a spec does not ask for is None and has no name in the state.
"""

from typing import Any

from torch import Tensor, nn

from reslab.family import spec as find_spec
from reslab.layout import SHORTCUT_DROPOUT, Unit, has_bias, is_normed, squeezed, stages
from reslab.nets.fused import Norm, hooked, norm_add_relu, norm_relu, twin
from reslab.nets.gram import conv_norm, conv_norm_add_relu, entry
from reslab.nets.initialise import initialise
from reslab.nets.parts import (
    Add,
    AddExclusive,
    AddGated,
    AddScaled,
    BlurPool,
    DropPath,
    Duplicate,
    PadShortcut,
    Scale,
    Shift,
    SqueezeExcite,
    ZeroPaddedMaxPool,
    conv,
    norm,
    through,
)
from reslab.nets.pool import MaxPool
from reslab.spec import FLAT_SIZE, STEMS, Conv, Spec

ADDITIONS = {"scaling": AddScaled, "exclusive-gate": AddExclusive, "shortcut-gate": AddGated}


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
        stem, width = STEMS[spec.stem], spec.stem_width or spec.widths[0]
        normed = stem.activated and spec.block != "skip"
        self.conv1 = _stem(spec, width, normed)
        self.bn1 = norm(spec, width) if normed else None
        self.relu = nn.ReLU() if stem.activated else None
        self.maxpool = _pool(spec, width)
        for number, units in enumerate(stages(spec), start=1):
            self.add_module(f"layer{number}", nn.Sequential(*(KINDS[spec.block if spec.block == "skip" else spec.order](spec, unit) for unit in units)))
            width = units[-1].outputs
        self.bn_last = norm(spec, width) if spec.order == "preact" else None
        self.relu_last = nn.ReLU() if spec.order in ("preact", "relu-preact") else None
        if spec.flatten:
            self.flatten = nn.Flatten()
            (features,) = next(layer.shape for layer in spec.layers(spec.flatten) if layer.kind == "flatten")
            self.fc1, self.relu_fc1, width = nn.Linear(features, FLAT_SIZE), nn.ReLU(), FLAT_SIZE
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.pre_fc = Shift() if spec.init == "fixup" else None
        self.fc = nn.Linear(width, spec.num_classes)
        initialise(self)

    @property
    def first_conv(self) -> nn.Conv2d:
        """The convolution that sees the images."""
        return self.conv1[0] if isinstance(self.conv1, nn.Sequential) else self.conv1  # type: ignore[return-value]

    @property
    def first_norm(self) -> nn.Module | None:
        """What stands right behind the first convolution as its norm, if anything does."""
        return self.conv1[1] if isinstance(self.conv1, nn.Sequential) else self.bn1

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages in order, each a Sequential of blocks."""
        return [self.get_submodule(f"layer{i + 1}") for i in range(len(self.spec.depths))]  # type: ignore[misc]

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """Every block by name, in order."""
        return {f"layer{number}.{index}": block for number, stage in enumerate(self.stages, start=1) for index, block in enumerate(stage)}

    def forward(self, x: Tensor, outputs: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (N, num_classes). A dict given as `outputs` receives the stem's and every block's output by name."""
        x = self.stem(x)
        if outputs is not None:
            outputs["stem"] = x
        for name, block in self.blocks.items():
            x = block(x)
            if outputs is not None:
                outputs[name] = x
        return self.head(x)

    def stem(self, x: Tensor) -> Tensor:
        """What the first block sees of the images."""
        return through(self.maxpool, norm_relu(self.bn1, self.relu, self.conv1(x)))

    def head(self, x: Tensor) -> Tensor:
        """The last block's output, or another of its shape -> logits."""
        x = through(self.relu_last, through(self.bn_last, x))
        x = self.relu_fc1(self.fc1(self.flatten(x))) if self.spec.flatten else self.avgpool(x).flatten(1)
        logits: Tensor = self.fc(through(self.pre_fc, x))
        return logits


def _stem(spec: Spec, width: int, normed: bool) -> nn.Module:
    """One convolution, or several with norm and ReLU between them."""
    layers: list[nn.Module | None] = []
    inputs, convs = spec.in_channels, STEMS[spec.stem].convs
    for index, (part, kernel, stride) in enumerate(convs, start=1):
        last, outputs = index == len(convs), int(width * part)
        layers.append(conv(inputs, Conv(outputs, kernel, stride), has_bias(spec, normed or not last)))
        if not last:
            layers += [norm(spec, outputs) or nn.Identity(), nn.ReLU()]
        inputs = outputs
    made = [layer for layer in layers if layer is not None]
    return made[0] if len(made) == 1 else nn.Sequential(*made)


def _pool(spec: Spec, width: int) -> nn.Module | None:
    stem = STEMS[spec.stem]
    if stem.conv_pool:
        return nn.Sequential(conv(width, Conv(width, 3, 2), has_bias(spec, normed=True)), norm(spec, width) or nn.Identity(), nn.ReLU())
    if stem.pool is None:
        return None
    kernel, stride, padding, fill, _ = stem.pool
    if spec.antialias:
        return nn.Sequential(nn.MaxPool2d(kernel, 1, padding), BlurPool(stride))
    return ZeroPaddedMaxPool(kernel, stride, padding) if fill == "zero" else MaxPool(kernel, stride, padding)


class Block(nn.Module):
    """A residual branch of convolutions and the shortcut around it. Abstract: an order of its parts is a subclass.

    The parts are conv1, bn1, relu1, conv2 and so on; `dropout` before the last convolution, and `blur` or `pool` behind
    the convolution that else had halved, are there when the spec says so.
    """

    def __init__(self, spec: Spec, unit: Unit) -> None:
        super().__init__()
        self.count, self.blurred, self.pooled = len(unit.convs), unit.blur, unit.pool
        self.late = unit.carrier == "late"
        inputs = unit.inputs
        for number, each in enumerate(unit.convs, start=1):
            if spec.init == "fixup":
                self.add_module(f"pre{number}", Shift())
            self.add_module(f"conv{number}", conv(inputs, each, has_bias(spec, is_normed(spec, number, self.count))))
            free = unit.activated and number == 1  # its input is activated already
            normed = inputs if spec.order == "preact" else each.outputs
            self.add_module(f"bn{number}", None if free and spec.order == "preact" else norm(spec, normed, last_of_branch=number == self.count))
            self.add_module(f"relu{number}", None if free else nn.ReLU())
            inputs = each.outputs
        self.blur = BlurPool(2) if unit.blur else None
        self.pool = MaxPool(2, ceil_mode=True) if unit.pool else None
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None
        self.se = SqueezeExcite(inputs, squeezed(spec, inputs)) if spec.squeeze else None
        self.scale = Scale() if spec.init in ("skipinit", "rezero") else None
        self.drop_path = DropPath(unit.drop_path) if unit.drop_path else None
        self.downsample = _shortcut(spec, unit)
        self.carry = nn.Dropout(SHORTCUT_DROPOUT) if spec.carry == "dropout" else None
        gated = spec.carry in ("exclusive-gate", "shortcut-gate")
        self.gate = nn.Sequential(conv(inputs, Conv(inputs, 1, 1), bias=True), nn.Sigmoid()) if gated else None
        self.add = ADDITIONS.get(spec.carry, Add)() if unit.carrier != "none" else None

    def part(self, name: str, number: int, x: Tensor) -> Tensor:
        return through(self._modules[f"{name}{number}"], x)

    def activated(self, number: int, x: Tensor) -> Tensor:
        """x through the norm and the ReLU of that number."""
        return norm_relu(self._modules[f"bn{number}"], self._modules[f"relu{number}"], x)

    def convolve(self, number: int, x: Tensor) -> Tensor:
        """The convolution of that number, and what directly surrounds it."""
        if number == self.count:
            x = through(self.dropout, x)
        x = self.part("conv", number, through(self._modules.get(f"pre{number}"), x))
        return through(self.pool, x) if number == self.pooled else x

    def join(self, branch: Tensor, x: Tensor) -> Tensor:
        """The branch and what the shortcut carries of x, added."""
        branch = through(self.drop_path, through(self.scale, through(self.se, branch)))
        if self.add is None:
            return branch
        carried = through(self.carry, through(self.downsample, x))
        out: Tensor = self.add(branch, carried) if self.gate is None else self.add(branch, carried, self.gate(carried))
        return out


class Original(Block):
    """conv-BN-ReLU ... conv-BN, addition, ReLU: He et al. 2015."""

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.enter(x)
        for number in range(1, self.count):
            y = self.activated(number, self.convolve(number, y) if number > 1 else y)
            if number == self.blurred:
                y = through(self.blur, y)
        return self.finish(y, y if self.late else x)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first convolution of x, and x for the shortcut."""
        out = None if "pre1" in self._modules or self.pooled == 1 else entry(self._modules["conv1"], x)
        return (self.convolve(1, x), x) if out is None else out

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The last convolution and norm, the addition and ReLU, at once as far as nothing else stands between them."""
        last, bn, relu = (self._modules[f"{name}{self.count}"] for name in ("conv", "bn", "relu"))
        plain = isinstance(self.add, Add) and relu is not None and not any((self.se, self.scale, self.drop_path, self.carry))
        out = None
        if plain and not self.dropout and self.pooled != self.count:
            out = conv_norm_add_relu(last, bn, self.add, relu, y, lambda: self.shortcut(twin(x)))
        if out is None:
            y = self.convolve(self.count, y)
            out = norm_add_relu(bn, self.add, relu, y, lambda: self.shortcut(twin(x))) if plain else None
        return through(relu, self.join(through(bn, y), x)) if out is None else out

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added of x."""
        parts = list(self.downsample) if isinstance(self.downsample, nn.Sequential) and not hooked(self.downsample) else []
        if not (len(parts) > 1 and isinstance(parts[-1], Norm)):
            return through(self.downsample, x)
        *pools, last, bn = parts
        for pool in pools:
            x = pool(x)
        out = conv_norm(last, bn, x)
        return bn(last(x)) if out is None else out


class BNAfterAdd(Block):
    """conv-BN-ReLU ... conv, addition, BN, ReLU: He et al. 2016, figure 4b."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.count):
            y = self.activated(number, self.convolve(number, y))
        y = self.join(self.convolve(self.count, y), x)
        return self.activated(self.count, y)


class ReLUBeforeAdd(Block):
    """conv-BN-ReLU ... conv-BN-ReLU, addition: figure 4c."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.count + 1):
            y = self.activated(number, self.convolve(number, y))
        return self.join(y, x)


class ReLUPreact(Block):
    """ReLU-conv-BN ... ReLU-conv-BN, addition: figure 4d. A projection sees the activated input."""

    def forward(self, x: Tensor) -> Tensor:
        y = activated = self.part("relu", 1, x)
        for number in range(1, self.count + 1):
            y = self.part("relu", number, y) if number > 1 else y
            y = self.part("bn", number, self.convolve(number, y))
        return self.join(y, activated if isinstance(self.downsample, nn.Sequential) else x)


class Preact(Block):
    """BN-ReLU-conv ... BN-ReLU-conv, addition: figure 4e. A projection sees the activated input."""

    def forward(self, x: Tensor) -> Tensor:
        y = activated = self.activated(1, x)
        for number in range(1, self.count + 1):
            y = self.activated(number, y) if number > 1 else y
            y = self.convolve(number, y)
        return self.join(y, activated if isinstance(self.downsample, nn.Sequential) else x)


class SkipBlock(nn.Module):
    """conv-BN-ReLU twice at the old size, the input added after the last ReLU; 1x1 convolutions halve either path.

    Where channels double with it, the shortcut is put behind itself once more.
    """

    def __init__(self, spec: Spec, unit: Unit) -> None:
        super().__init__()
        first, second = unit.convs
        bias = has_bias(spec, normed=True)
        self.conv1, self.bn1, self.relu1 = conv(unit.inputs, first, bias), norm(spec, first.outputs), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv(first.outputs, second, bias), norm(spec, second.outputs), nn.ReLU()
        self.halve = conv(second.outputs, Conv(second.outputs, 1, unit.stride), bias) if unit.stride > 1 else None
        carried = {"duplicate": unit.inputs, "projection": unit.outputs}.get(unit.carrier)
        self.downsample = conv(unit.inputs, Conv(carried, 1, unit.stride), bias) if carried else None
        self.duplicate = Duplicate() if unit.carrier == "duplicate" and unit.outputs > unit.inputs else None
        self.add = Add() if unit.carrier != "none" else None

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.relu1, self.conv1(x))
        y = through(self.halve, norm_relu(self.bn2, self.relu2, self.conv2(y)))
        if self.add is None:
            return y
        out: Tensor = self.add(y, through(self.duplicate, through(self.downsample, x)))
        return out


KINDS: dict[str, type[nn.Module]] = {
    "original": Original,
    "bn-after-add": BNAfterAdd,
    "relu-before-add": ReLUBeforeAdd,
    "relu-preact": ReLUPreact,
    "preact": Preact,
    "skip": SkipBlock,
}


def _shortcut(spec: Spec, unit: Unit) -> nn.Module | None:
    if unit.carrier in ("none", "identity", "late"):
        return None
    if unit.carrier == "pad":
        return PadShortcut(unit.inputs, unit.outputs, unit.stride)
    layers: list[nn.Module] = []
    stride = unit.stride
    if unit.carrier == "pool-projection":
        layers.append(nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity())
        stride = 1
    normed = spec.order != "preact"
    layers.append(conv(unit.inputs, Conv(unit.outputs, 1, stride), has_bias(spec, normed)))
    if normed and spec.norm != "none":
        layers.append(norm(spec, unit.outputs) or nn.Identity())
    return nn.Sequential(*layers)
