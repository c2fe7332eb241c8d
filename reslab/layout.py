"""A Spec spelled out: first its blocks, with every channel and stride decided, then every layer in the order it runs.

The torch net is written by hand from the blocks; the Keras net is made from the layers. Counts and pictures come from
the layers too, and tests hold all of them against each other. Shapes are (C, H, W). Standard library only.
"""

import math
from itertools import groupby
from typing import Literal, NamedTuple

from reslab.spec import BOTTLENECK_EXPANSION, FLAT_SIZE, STEMS, Conv, Pool, Size, Spec

GROUPS = 32  # of group norm (Wu & He 2018)
LEAST_SQUEEZED = 8  # channels
SCALING = 0.5  # of branch and shortcut (He et al. 2016, table 1)
SHORTCUT_DROPOUT = 0.5  # the same table

Carrier = Literal["none", "identity", "late", "pad", "projection", "pool-projection", "duplicate"]
Shape = tuple[int, ...]


class Unit(NamedTuple):
    """One residual block."""

    name: str
    inputs: int  # channels
    convs: tuple[Conv, ...]  # of the residual branch
    stride: int  # of the block as a whole
    carrier: Carrier  # what brings the input around the branch
    blur: int = 0  # the convolution, counted from 1, that is blurred and then subsampled
    pool: int = 0  # the convolution, counted from 1, behind which a max-pool halves
    activated: bool = False  # a pre-activation block whose input is activated already
    drop_path: float = 0.0

    @property
    def outputs(self) -> int:
        return self.convs[-1].outputs


class Layer(NamedTuple):
    """One leaf module: its name in the net, what it is, what it reads, and what it costs for one image."""

    name: str
    kind: str
    inputs: tuple[str, ...]  # names of layers; "input" is the image
    shape: Shape  # of its output: (C, H, W), or (features,)
    params: int = 0
    macs: int = 0
    conv: Conv | None = None
    pool: Pool | None = None
    bias: bool = False
    value: float = 0.0  # a chance to drop, or a gate's first bias


class Part(NamedTuple):
    """A stretch of a net: the stem, equal blocks in a row, or the head."""

    blocks: tuple[str, ...]  # their names; none of the stem and the head
    layers: list[Layer]  # of the first block

    @property
    def times(self) -> int:
        return max(1, len(self.blocks))


def stages(spec: Spec) -> list[list[Unit]]:
    """The blocks of each stage."""
    made: list[list[Unit]] = []
    channels, number, total = spec.stem_width or spec.widths[0], 0, sum(spec.depths)
    for stage, (depth, width) in enumerate(zip(spec.depths, spec.widths, strict=True), start=1):
        blocks = []
        for index in range(depth):
            number += 1
            stride = 2 if _halves(spec, stage, index) else 1
            unit = _skip_unit(channels, width, stride) if spec.block == "skip" else _unit(spec, channels, width, stride)
            activated = number == 1 and spec.order in ("preact", "relu-preact") and STEMS[spec.stem].activated
            unit = unit._replace(name=f"layer{stage}.{index}", activated=activated, drop_path=spec.drop_path * number / total)
            blocks.append(unit._replace(carrier="none") if spec.shortcut == "none" else unit)
            channels = unit.outputs
        made.append(blocks)
    return made


def _halves(spec: Spec, stage: int, index: int) -> bool:
    if spec.stride == "none":
        return False
    if spec.stride == "last":
        return stage < len(spec.depths) and index == spec.depths[stage - 1] - 1
    return index == 0 and (stage > 1 or spec.stride == "pool")


def _unit(spec: Spec, inputs: int, width: int, stride: int) -> Unit:
    if spec.block == "basic":
        convs, halving = [Conv(width, 3, 1), Conv(width, 3, 1)], 0
    else:
        inner = width * spec.inner
        convs = [Conv(inner, 1, 1), Conv(inner, 3, 1, spec.groups), Conv(width * BOTTLENECK_EXPANSION, 1, 1)]
        halving = 0 if spec.stride == "v1" else 1
    blur = halving + 1 if spec.antialias and stride > 1 else 0
    pool = halving + 1 if spec.stride == "pool" and stride > 1 else 0
    if not (blur or pool):
        convs[halving] = convs[halving]._replace(stride=stride)
    return Unit("", inputs, tuple(convs), stride, _carrier(spec, inputs, convs[-1].outputs, stride), blur, pool)


def _carrier(spec: Spec, inputs: int, outputs: int, stride: int) -> Carrier:
    if spec.shortcut == "C":
        return "projection"
    if inputs == outputs and stride == 1:
        return "identity"
    if spec.shortcut == "late":
        return "late"
    if spec.shortcut == "A" or (inputs == outputs and spec.stride == "last"):  # Keras V2 only subsamples there
        return "pad"
    return "pool-projection" if spec.shortcut == "D" else "projection"


def _skip_unit(inputs: int, outputs: int, stride: int) -> Unit:
    """Both convolutions at the old size, then 1x1 convolutions of stride 2 on either path."""
    carrier: Carrier = "duplicate" if stride > 1 else "identity" if inputs == outputs else "projection"
    return Unit("", inputs, (Conv(inputs, 3, 1), Conv(outputs, 3, 1)), stride, carrier)


def has_bias(spec: Spec, normed: bool) -> bool:
    """Whether a convolution has a bias; `normed` says that a norm follows it directly."""
    if spec.bias == "auto":
        return spec.norm == "none" and spec.init not in ("fixup", "rezero")
    return spec.bias == "all" or not normed or spec.norm == "none"


def is_normed(spec: Spec, number: int, convs: int) -> bool:
    """Whether a norm directly follows the block's convolution of that number, counted from 1."""
    return number < convs or spec.order not in ("preact", "bn-after-add")


def norm_kind(spec: Spec, last_of_branch: bool = False) -> str | None:
    """What stands where a norm stands: Fixup has learned scalars there."""
    if spec.init == "fixup":
        return "scaleshift" if last_of_branch else "shift"
    return {"batch": "batchnorm", "group": "groupnorm", "none": None}[spec.norm]


def norm_groups(channels: int) -> int:
    """Of group norm: 32, or fewer that leave at least two channels each."""
    return math.gcd(channels, min(GROUPS, max(1, channels // 2)))


def squeezed(spec: Spec, channels: int) -> int:
    """Channels inside squeeze-and-excitation; never under 8, as in timm."""
    return max(LEAST_SQUEEZED, channels // spec.squeeze)


def start_scales(spec: Spec) -> dict[str, float]:
    """What the first parameters of some layers are multiplied by, by the layer's name; nets of both frameworks start so.

    `zero_init` starts the last scale of each residual branch at zero; where no norm ends the branch, the last convolution.
    Fixup (1901.09321, section 3): L^(-1 / (2m - 2)) on a branch of m layers, whose last starts at zero, as the head does.
    """
    scales: dict[str, float] = {"fc": 0.0} if spec.init == "fixup" else {}
    for unit in (unit for stage in stages(spec) for unit in stage):
        count = len(unit.convs)
        if spec.zero_init:
            last = "bn" if spec.norm != "none" and is_normed(spec, count, count) else "conv"
            scales[f"{unit.name}.{last}{count}"] = 0.0
        if spec.init == "fixup":
            factor = sum(spec.depths) ** (-1 / (2 * count - 2))
            scales |= {f"{unit.name}.conv{number}": factor if number < count else 0.0 for number in range(1, count + 1)}
    return scales


def parts(spec: Spec, image_size: Size, fold: bool = True) -> list[Part]:
    """The layers by stretches. With `fold`, equal blocks in a row are told once, which is all that counting needs.

    They are equal but for their names and chances to drop; the layer behind them then reads, by name, from the first.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    walk = _Walk(spec, (spec.in_channels, height, width))
    walk.stem()
    made = [Part((), walk.take())]
    for stage in stages(spec):
        for _, alike in groupby(stage, lambda unit: unit[1:-1] if fold else unit.name):
            units = list(alike)
            walk.unit(units[0])
            made.append(Part(tuple(unit.name for unit in units), walk.take()))
    walk.head()
    return [*made, Part((), walk.take())]


class _Walk:
    """Goes through a net as its forward pass does; `here` is the layer that was written last."""

    def __init__(self, spec: Spec, image: Shape) -> None:
        self.spec = spec
        self.made: list[Layer] = []
        self.shapes: dict[str, Shape] = {"input": image}
        self.here = "input"

    @property
    def shape(self) -> Shape:
        return self.shapes[self.here]

    def put(self, layer: Layer) -> None:
        self.made.append(layer)
        self.shapes[layer.name] = layer.shape
        self.here = layer.name

    def same(self, name: str, kind: str, *others: str, params: int = 0, value: float = 0.0) -> None:
        """A layer whose output has the shape of its first input."""
        self.put(Layer(name, kind, (self.here, *others), self.shape, params, value=value))

    def conv(self, name: str, conv: Conv, bias: bool) -> None:
        inputs, height, width = self.shape
        shape = (conv.outputs, (height - 1) // conv.stride + 1, (width - 1) // conv.stride + 1)
        weights = conv.kernel**2 * inputs * conv.outputs // conv.groups
        self.put(Layer(name, "conv", (self.here,), shape, weights + bias * conv.outputs, weights * shape[1] * shape[2], conv, bias=bias))

    def pool(self, name: str, kind: str, pool: Pool) -> None:
        channels, *sides = self.shape
        ceil = pool.stride - 1 if pool.ceil else 0
        least = 2 if kind == "blurpool" else 1  # at an edge the pixel beside it is reflected
        pooled = ((n + 2 * pool.padding - pool.kernel + ceil) // pool.stride + 1 if n >= least else 0 for n in sides)
        self.put(Layer(name, kind, (self.here,), (channels, *pooled), pool=pool))

    def global_pool(self, name: str) -> None:
        self.put(Layer(name, "globalpool", (self.here,), (self.shape[0], 1, 1)))

    def linear(self, name: str, outputs: int) -> None:
        inputs = math.prod(self.shape)
        self.put(Layer(name, "linear", (self.here,), (outputs,), (inputs + 1) * outputs, inputs * outputs, bias=True))

    def norm(self, name: str, last_of_branch: bool = False) -> None:
        kind = norm_kind(self.spec, last_of_branch)
        if kind:
            self.same(name, kind, params={"shift": 1, "scaleshift": 2}.get(kind, 2 * self.shape[0]))

    def take(self) -> list[Layer]:
        """What was written since the last time."""
        made, self.made = self.made, []
        return made

    def unit(self, unit: Unit) -> None:
        if self.spec.block == "skip":
            self.skip_block(unit)
        else:
            self.block(unit)

    def head(self) -> None:
        spec = self.spec
        if spec.order == "preact":
            self.norm("bn_last")
        if spec.order in ("preact", "relu-preact"):
            self.same("relu_last", "relu")
        if spec.flatten:
            self.put(Layer("flatten", "flatten", (self.here,), (math.prod(self.shape),)))
            self.linear("fc1", FLAT_SIZE)
            self.same("relu_fc1", "relu")
        else:
            self.global_pool("avgpool")
        if spec.init == "fixup":
            self.put(Layer("pre_fc", "shift", (self.here,), (math.prod(self.shape),), 1))
        self.linear("fc", spec.num_classes)

    def stem(self) -> None:
        spec, stem = self.spec, STEMS[self.spec.stem]
        width = spec.stem_width or spec.widths[0]
        normed = stem.activated and spec.block != "skip"
        for index, (part, kernel, stride) in enumerate(stem.convs):
            last = index == len(stem.convs) - 1
            name = "conv1" if len(stem.convs) == 1 else f"conv1.{3 * index}"
            self.conv(name, Conv(int(width * part), kernel, stride), has_bias(spec, normed or not last))
            if not last:
                self.norm(f"conv1.{3 * index + 1}")
                self.same(f"conv1.{3 * index + 2}", "relu")
        if normed:
            self.norm("bn1")
        if stem.activated:
            self.same("relu", "relu")
        if stem.conv_pool:
            self.conv("maxpool.0", Conv(width, 3, 2), has_bias(spec, normed=True))
            self.norm("maxpool.1")
            self.same("maxpool.2", "relu")
        elif stem.pool and spec.antialias:
            self.pool("maxpool.0", "maxpool", stem.pool._replace(stride=1))
            self.pool("maxpool.1", "blurpool", Pool(3, 2, 1))
        elif stem.pool:
            self.pool("maxpool", "maxpool", stem.pool)

    def block(self, unit: Unit) -> None:
        """The residual branch in the order that the spec names, then the shortcut."""
        spec, start, order = self.spec, self.here, self.spec.order
        count = len(unit.convs)
        for number, conv in enumerate(unit.convs, start=1):
            last = number == count
            if order == "preact" and not (unit.activated and number == 1):
                self.norm(f"{unit.name}.bn{number}")
            if order in ("preact", "relu-preact") and not (unit.activated and number == 1):
                self.same(f"{unit.name}.relu{number}", "relu")
            if number == 1 and order in ("preact", "relu-preact") and unit.carrier not in ("identity", "pad"):
                start = self.here  # a projection sees what the branch sees
            if last and spec.dropout:
                self.same(f"{unit.name}.dropout", "dropout", value=spec.dropout)
            if spec.init == "fixup":
                self.same(f"{unit.name}.pre{number}", "shift", params=1)
            self.conv(f"{unit.name}.conv{number}", conv, has_bias(spec, is_normed(spec, number, count)))
            if number == unit.pool:
                self.pool(f"{unit.name}.pool", "maxpool", Pool(2, unit.stride, 0, ceil=True))
            if order in ("original", "relu-before-add", "relu-preact") or (order == "bn-after-add" and not last):
                self.norm(f"{unit.name}.bn{number}", last)
            if order == "relu-before-add" or (order in ("original", "bn-after-add") and not last):
                self.same(f"{unit.name}.relu{number}", "relu")
            if number == unit.blur:
                self.pool(f"{unit.name}.blur", "blurpool", Pool(3, 2, 1))
            if number == 1 and unit.carrier == "late":
                start = self.here
        self.join(unit, start)
        if order == "bn-after-add":
            self.norm(f"{unit.name}.bn{count}")
        if order in ("original", "bn-after-add"):
            self.same(f"{unit.name}.relu{count}", "relu")

    def join(self, unit: Unit, start: str) -> None:
        """What is done to the branch and to the shortcut, and their addition."""
        spec, name = self.spec, unit.name
        if spec.squeeze:
            self.squeeze_excite(f"{name}.se")
        if spec.init in ("skipinit", "rezero"):
            self.same(f"{name}.scale", "scale", params=1)
        if unit.drop_path:
            self.same(f"{name}.drop_path", "droppath", value=unit.drop_path)
        if unit.carrier == "none":
            return
        branch, outputs = self.here, unit.outputs
        self.here = start
        self.carry(unit)
        if spec.carry == "dropout":
            self.same(f"{name}.carry", "dropout", value=SHORTCUT_DROPOUT)
        carried = self.here
        others: tuple[str, ...] = (carried,)
        if spec.carry in ("exclusive-gate", "shortcut-gate"):
            self.conv(f"{name}.gate.0", Conv(outputs, 1, 1), bias=True)
            self.made[-1] = self.made[-1]._replace(value=spec.gate_bias)
            self.same(f"{name}.gate.1", "sigmoid")
            others = (carried, self.here)
        self.here = branch
        kind = {"scaling": "add-scaled", "exclusive-gate": "add-exclusive", "shortcut-gate": "add-gated"}.get(spec.carry, "add")
        self.same(f"{name}.add", kind, *others)

    def carry(self, unit: Unit) -> None:
        spec, name, conv = self.spec, f"{unit.name}.downsample", Conv(unit.outputs, 1, unit.stride)
        if unit.carrier == "pad":
            self.put(Layer(name, "pad", (self.here,), (unit.outputs, *((n - 1) // unit.stride + 1 for n in self.shape[1:])), conv=conv))
        elif unit.carrier in ("projection", "pool-projection"):
            first = 0
            if unit.carrier == "pool-projection":
                first, conv = 1, conv._replace(stride=1)
                if unit.stride > 1:
                    self.pool(f"{name}.0", "avgpool", Pool(2, unit.stride, 0, ceil=True))
            normed = spec.order != "preact"
            self.conv(f"{name}.{first}", conv, has_bias(spec, normed))
            if normed and spec.norm != "none":
                self.norm(f"{name}.{first + 1}")

    def squeeze_excite(self, name: str) -> None:
        scaled, channels = self.here, self.shape[0]
        self.global_pool(f"{name}.pool")
        self.conv(f"{name}.fc1", Conv(squeezed(self.spec, channels), 1, 1), bias=True)
        self.same(f"{name}.relu", "relu")
        self.conv(f"{name}.fc2", Conv(channels, 1, 1), bias=True)
        self.same(f"{name}.sigmoid", "sigmoid")
        gate, self.here = self.here, scaled
        self.same(f"{name}.multiply", "multiply", gate)

    def skip_block(self, unit: Unit) -> None:
        """conv - BN - ReLU twice, the input added after the last ReLU."""
        spec, name, start = self.spec, unit.name, self.here
        bias = has_bias(spec, normed=True)
        for number, conv in enumerate(unit.convs, start=1):
            self.conv(f"{name}.conv{number}", conv, bias)
            self.norm(f"{name}.bn{number}")
            self.same(f"{name}.relu{number}", "relu")
        if unit.stride > 1:
            self.conv(f"{name}.halve", Conv(unit.outputs, 1, unit.stride), bias)
        if unit.carrier == "none":
            return
        branch, self.here = self.here, start
        if unit.carrier == "duplicate":
            self.conv(f"{name}.downsample", Conv(unit.inputs, 1, unit.stride), bias)
            if unit.outputs > unit.inputs:
                self.put(Layer(f"{name}.duplicate", "duplicate", (self.here,), (unit.outputs, *self.shape[1:])))
        elif unit.carrier == "projection":
            self.conv(f"{name}.downsample", Conv(unit.outputs, 1, 1), bias)
        carried, self.here = self.here, branch
        self.same(f"{name}.add", "add", carried)
