"""What a residual network is, as data. Standard library only; both frameworks' nets and all counts derive from it.

A residual network is a stem, a few stages of equal blocks, and a linear head. A block computes relu(F(x) + shortcut(x)):

    basic       F = 3x3 - 3x3                  He et al. 2015 (1512.03385), figure 5 left
    bottleneck  F = 1x1 - 3x3 - 1x1 (4 times wider)                         figure 5 right

Its plain twin leaves the shortcut out and keeps the rest. The nets of the paper's table 1 (ImageNet) and section 4.2
(CIFAR: depth 6n + 2, three stages of n blocks, 16-32-64 channels) are the rows of `FAMILY`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, get_args

from reslab.errors import CallError, unknown

Block = Literal["basic", "bottleneck"]
Stem = Literal["conv3", "conv7", "conv7-pool"]
Shortcut = Literal["A", "B", "C", "none"]
Stride = Literal["v1", "v1.5"]
Norm = Literal["batch", "none"]
Size = int | tuple[int, int]

BOTTLENECK_EXPANSION = 4
STEM_STRIDE = {"conv3": 1, "conv7": 2, "conv7-pool": 4}


@dataclass(frozen=True)
class Spec:
    """One network. Sizes are in pixels, (height, width); tensors are NCHW.

    Raises CallError (a ValueError) for a field that cannot be.
    """

    block: Block
    depths: tuple[int, ...]  # blocks in each stage; every stage but the first halves the resolution
    widths: tuple[int, ...]  # channels of each stage's 3x3 convolutions; the stem has widths[0]
    stem: Stem  # 3x3 / 7x7 stride 2 / 7x7 stride 2 and 3x3 max-pool stride 2
    shortcut: Shortcut = "B"  # A: zero-padded identity, B: projection where shapes change, C: projection everywhere
    stride: Stride = "v1.5"  # where a bottleneck halves: its first 1x1 (v1, the paper) or its 3x3 (v1.5, torchvision)
    norm: Norm = "batch"  # "none" gives the convolutions biases instead
    groups: int = 1  # of a bottleneck's 3x3 (ResNeXt, Xie et al. 2016, 1611.05431)
    inner: int = 1  # channels of a bottleneck's 3x3, as a multiple of `widths` (wide ResNets, Zagoruyko & Komodakis 2016, 1605.07146)
    in_channels: int = 3
    num_classes: int = 1000
    zero_init: bool = False  # the last scale of each residual branch starts at zero (Goyal et al. 2017, section 5.1)

    def __post_init__(self) -> None:
        for name, choices in (("block", Block), ("stem", Stem), ("shortcut", Shortcut), ("stride", Stride), ("norm", Norm)):
            if getattr(self, name) not in get_args(choices):
                raise unknown(name, getattr(self, name), get_args(choices))
        for name in ("depths", "widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = (*self.depths, *self.widths, self.groups, self.inner, self.in_channels, self.num_classes)
        if not all(type(n) is int and n > 0 for n in counts) or sum(self.depths) > 5000 or max(counts) > 1 << 20:
            raise CallError(
                "depths, widths, groups, inner, in_channels and num_classes must be whole numbers from 1 to 2^20 (5000 blocks in all); "
                f"received {self.depths}, {self.widths}, {self.groups}, {self.inner}, {self.in_channels}, {self.num_classes}"
            )
        if self.block == "basic" and (self.groups, self.inner) != (1, 1):
            raise CallError(f"groups and inner belong to bottleneck blocks; received {self.groups} and {self.inner} for basic ones")
        if any(width * self.inner % self.groups for width in self.widths):
            raise CallError(f"groups must divide the channels of each 3x3, {[w * self.inner for w in self.widths]}; received {self.groups}")
        if not self.depths or len(self.depths) != len(self.widths):
            raise CallError(f"depths and widths must have one entry a stage; received {self.depths} and {self.widths}")
        if self.zero_init and self.shortcut == "none":
            raise CallError("zero_init needs a shortcut: a plain net whose branches start at zero computes nothing")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, for a dict read from a file; CallError names a field that is wrong."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise unknown("Spec field", name, known)
        try:
            return cls(**fields)
        except TypeError as error:
            raise CallError(f"a Spec needs {', '.join(known[:4])}; received {', '.join(fields) or 'nothing'}") from error

    @property
    def reduction(self) -> int:
        """How many input pixels, along one side, make one pixel of the last stage."""
        return STEM_STRIDE[self.stem] << (len(self.depths) - 1)

    def fit(self, image_size: int, in_channels: int, num_classes: int) -> Self:
        """This network for images of that size: same blocks, and the stem that leaves 4 to 16 pixels a side at the end.

        The own stem is kept where it does, which covers each published net at its published size.
        Raises CallError when even the smallest stem reduces an image to less than a pixel.
        """

        def misfit(stem: Stem) -> float:
            side = image_size / replace(self, stem=stem).reduction
            outside = math.log2(side / 16) if side > 16 else math.log2(4 / side) if side < 4 else 0.0
            return outside + 0.01 * abs(math.log2(STEM_STRIDE[stem] / STEM_STRIDE[self.stem]))  # of equals, the most like its own

        fitted = replace(self, stem=min(get_args(Stem), key=misfit), in_channels=in_channels, num_classes=num_classes)
        fitted.check_size(image_size)
        return fitted

    def check_size(self, image_size: int) -> None:
        """Raises CallError when the last stage would see less than one pixel."""
        if image_size < self.reduction:
            raise CallError(
                f"this net halves an image down to 1/{self.reduction}, so it needs at least {self.reduction} px a side; "
                f"received {image_size} px: give a larger --image-size, or take a net with fewer stages"
            )

    def layers(self, image_size: Size) -> Iterator["Layer"]:
        """Every leaf module of the built net in the order it runs, with what it costs for one image."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return _Arithmetic(self, (self.in_channels, height, width)).net()

    def cost(self, image_size: Size | None = None) -> "Cost":
        """Parameters, multiply-accumulates (convolutions and the head) and fp32 bytes of every layer's output.

        All for one image; by arithmetic alone. `image_size` defaults to 32 for a conv3 stem and to 224 otherwise.
        """
        layers = list(self.layers(image_size or (32 if self.stem == "conv3" else 224)))
        return Cost(
            params=sum(layer.params for layer in layers),
            macs=sum(layer.macs for layer in layers),
            activations=sum(4 * math.prod(layer.shape) for layer in layers),
        )


class Cost(NamedTuple):
    """What a network costs for one image, as exact integers."""

    params: int
    macs: int
    activations: int  # bytes


class Layer(NamedTuple):
    """One leaf module: its name in the net, what it is, and what it costs for one image."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of its output: (C, H, W), or (features,)
    params: int
    macs: int


class Row(NamedTuple):
    """One published network: the spec, the image size it was published for, and where."""

    spec: Spec
    image_size: int
    source: str


def _cifar(n: int, shortcut: Shortcut = "A") -> Row:
    spec = Spec("basic", (n, n, n), (16, 32, 64), "conv3", shortcut, num_classes=10)
    return Row(spec, 32, "He 2015, section 4.2")


def _imagenet(block: Block, depths: tuple[int, ...], source: str = "He 2015, table 1", **fields: Any) -> Row:
    spec = Spec(block, depths, (64, 128, 256, 512), "conv7-pool", **fields)
    return Row(spec, 224, source if block == "basic" else f"{source}; stride v1.5 as torchvision")


def _resnext29(groups: int) -> Row:
    spec = Spec("bottleneck", (3, 3, 3), (64, 128, 256), "conv3", groups=groups, inner=groups, num_classes=10)
    return Row(spec, 32, "Xie 2016, table 7")


FAMILY: dict[str, Row] = {
    "resnet20": _cifar(3),
    "resnet32": _cifar(5),
    "resnet44": _cifar(7),
    "resnet56": _cifar(9),
    "resnet110": _cifar(18),
    "resnet1202": _cifar(200),
    "plain20": _cifar(3, "none"),
    "plain32": _cifar(5, "none"),
    "plain44": _cifar(7, "none"),
    "plain56": _cifar(9, "none"),
    "plain110": _cifar(18, "none"),
    "resnet18": _imagenet("basic", (2, 2, 2, 2)),
    "resnet34": _imagenet("basic", (3, 4, 6, 3)),
    "resnet50": _imagenet("bottleneck", (3, 4, 6, 3)),
    "resnet101": _imagenet("bottleneck", (3, 4, 23, 3)),
    "resnet152": _imagenet("bottleneck", (3, 8, 36, 3)),
    "plain18": _imagenet("basic", (2, 2, 2, 2), shortcut="none"),
    "plain34": _imagenet("basic", (3, 4, 6, 3), shortcut="none"),
    "wide_resnet50_2": _imagenet("bottleneck", (3, 4, 6, 3), "Zagoruyko & Komodakis 2016, table 8", inner=2),
    "wide_resnet101_2": _imagenet("bottleneck", (3, 4, 23, 3), "Zagoruyko & Komodakis 2016; torchvision", inner=2),
    "resnext50_32x4d": _imagenet("bottleneck", (3, 4, 6, 3), "Xie 2016, table 1", groups=32, inner=2),
    "resnext101_32x8d": _imagenet("bottleneck", (3, 4, 23, 3), "Xie 2016; torchvision", groups=32, inner=4),
    "resnext29_8x64d": _resnext29(8),
    "resnext29_16x64d": _resnext29(16),
}


def spec(net: str | Spec, **changes: Any) -> Spec:
    """The Spec of a network in `FAMILY`, or the given Spec, with `changes` to its fields applied.

    Raises CallError (a ValueError) with the nearest name for an unknown net or field.
    """
    if isinstance(net, str) and net not in FAMILY:
        raise unknown("net", net, FAMILY, "; `reslab models` lists them")
    chosen = FAMILY[net].spec if isinstance(net, str) else net
    return Spec.from_dict({**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}, **changes})


class _Arithmetic:
    """Walks a net as the builders do, and counts instead of building. `shape` is the running (C, H, W)."""

    def __init__(self, spec: Spec, shape: tuple[int, int, int]) -> None:
        self.spec = spec
        self.shape = shape

    def net(self) -> Iterator[Layer]:
        spec = self.spec
        kernel, stride = (3, 1) if spec.stem == "conv3" else (7, 2)
        yield from self.conv("conv1", "bn1", spec.widths[0], kernel, stride)
        yield self.same("relu", "relu")
        if spec.stem == "conv7-pool":
            yield self.window("maxpool", "maxpool", 3, 2)
        for stage, (depth, width) in enumerate(zip(spec.depths, spec.widths, strict=True), start=1):
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                yield from self.block(f"layer{stage}.{index}.", width, stride)
        channels = self.shape[0]
        yield Layer("avgpool", "avgpool", (channels, 1, 1), 0, 0)
        yield Layer("fc", "linear", (spec.num_classes,), (channels + 1) * spec.num_classes, channels * spec.num_classes)

    def block(self, name: str, width: int, stride: int) -> Iterator[Layer]:
        before = self.shape
        convs = block_convs(self.spec, width, stride)
        for i, (channels, kernel, step, groups) in enumerate(convs, start=1):
            yield from self.conv(f"{name}conv{i}", f"{name}bn{i}", channels, kernel, step, groups)
            if i < len(convs):
                yield self.same(f"{name}relu{i}", "relu")
        after = self.shape
        if self.spec.shortcut != "none":
            kind = shortcut_kind(self.spec, before[0], after[0], stride)
            if kind == "projection":
                self.shape = before
                yield from self.conv(f"{name}downsample.0", f"{name}downsample.1", after[0], 1, stride)
            elif kind == "pad":
                yield self.same(f"{name}downsample", "pad")
            yield self.same(f"{name}add", "add")
        yield self.same(f"{name}relu{len(convs)}", "relu")

    def conv(self, name: str, norm: str, channels: int, kernel: int, stride: int, groups: int = 1) -> Iterator[Layer]:
        inputs = self.shape[0]
        layer = self.window(name, f"conv{kernel}x{kernel}", kernel, stride, channels)
        weights = kernel * kernel * inputs * channels // groups
        biases = channels if self.spec.norm == "none" else 0
        yield layer._replace(params=weights + biases, macs=weights * self.shape[1] * self.shape[2])
        if self.spec.norm == "batch":
            yield self.same(norm, "batchnorm")._replace(params=2 * channels)

    def window(self, name: str, kind: str, kernel: int, stride: int, channels: int | None = None) -> Layer:
        """A sliding window padded to keep the size at stride 1: (n + 2p - k) // s + 1 with p = (k - 1) / 2."""
        c, h, w = self.shape
        self.shape = (channels or c, (h - 1) // stride + 1, (w - 1) // stride + 1)
        return self.same(name, kind)

    def same(self, name: str, kind: str) -> Layer:
        return Layer(name, kind, self.shape, 0, 0)


def block_convs(spec: Spec, width: int, stride: int) -> list[tuple[int, int, int, int]]:
    """The convolutions of a block's residual branch, as (channels, kernel, stride, groups)."""
    if spec.block == "basic":
        return [(width, 3, stride, 1), (width, 3, 1, 1)]
    first, second = (stride, 1) if spec.stride == "v1" else (1, stride)
    inner = width * spec.inner
    return [(inner, 1, first, 1), (inner, 3, second, spec.groups), (width * BOTTLENECK_EXPANSION, 1, 1, 1)]


def shortcut_kind(spec: Spec, inputs: int, outputs: int, stride: int) -> Literal["identity", "pad", "projection"]:
    """What carries a residual block's input around its branch. Plain nets have no shortcut to ask about."""
    if spec.shortcut == "C":
        return "projection"
    if inputs == outputs and stride == 1:
        return "identity"
    return "pad" if spec.shortcut == "A" else "projection"
