"""What a residual network is, as data. Standard library only; both frameworks' nets and all counts derive from it.

A residual network is a stem, a few stages of equal blocks, and a head. A block computes relu(F(x) + shortcut(x)):

    basic       F = 3x3 - 3x3                  He et al. 2015 (1512.03385), figure 5 left
    bottleneck  F = 1x1 - 3x3 - 1x1 (4 times wider)                         figure 5 right

Its plain twin leaves the shortcut out and keeps the rest. What was published since changes one part of this each, and
each is a field of `Spec`. `layout.py` spells a Spec out, layer by layer; `family.py` has the published networks.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

from reslab.errors import CallError, shown, unknown

if TYPE_CHECKING:
    from reslab.layout import Layer, Part

Block = Literal["basic", "bottleneck", "skip"]
Shortcut = Literal["A", "B", "C", "D", "late", "none"]
Stride = Literal["v1", "v1.5", "last", "pool", "none"]
Order = Literal["original", "bn-after-add", "relu-before-add", "relu-preact", "preact"]
Carry = Literal["identity", "scaling", "exclusive-gate", "shortcut-gate", "dropout"]
Norm = Literal["batch", "group", "none"]
Bias = Literal["auto", "unnormed", "all"]
Init = Literal["he", "fixup", "skipinit", "rezero"]
Size = int | tuple[int, int]

FLAT_SIZE = 1000  # of the hidden layer behind a flattened map
BOTTLENECK_EXPANSION = 4  # channels that a bottleneck gives, as a multiple of its 3x3's

TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {  # of fields that are not one of some words
    str: ("a name", lambda value: isinstance(value, str)),
    int: ("a whole number", lambda value: type(value) is int),
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    bool: ("True or False", lambda value: type(value) is bool),
    tuple[int, ...]: ("whole numbers, one a stage", lambda value: isinstance(value, tuple) and all(type(n) is int for n in value)),
}


class Conv(NamedTuple):
    """A convolution, padded so that stride 1 keeps the size."""

    outputs: int
    kernel: int
    stride: int
    groups: int = 1


class Pool(NamedTuple):
    """A max-pool. `fill` is what its padding holds: zeros matter when no ReLU came before. `ceil`: an odd edge counts."""

    kernel: int
    stride: int
    padding: int
    fill: Literal["lowest", "zero"] = "lowest"
    ceil: bool = False


class Stem(NamedTuple):
    """What comes before the first stage. Channels are parts of the stem's width."""

    convs: tuple[tuple[float, int, int], ...]  # (part of the width, kernel, stride)
    pool: Pool | None = None
    conv_pool: bool = False  # a 3x3 convolution of stride 2 pools (ResNet-RS)
    activated: bool = True  # norm and ReLU follow; a pre-activation net may leave both to its first block

    @property
    def stride(self) -> int:
        return math.prod(stride for _, _, stride in self.convs) * (self.pool.stride if self.pool else 2 if self.conv_pool else 1)


_DEEP = ((0.5, 3, 2), (0.5, 3, 1), (1.0, 3, 1))
STEMS: dict[str, Stem] = {
    "conv3": Stem(((1.0, 3, 1),)),  # He 2015, section 4.2
    "conv3-pool": Stem(((1.0, 3, 1),), Pool(2, 2, 0)),  # the SkipBlock network
    "conv7": Stem(((1.0, 7, 2),)),
    "conv7-pool": Stem(((1.0, 7, 2),), Pool(3, 2, 1)),  # He 2015, table 1
    "conv7-pool-valid": Stem(((1.0, 7, 2),), Pool(3, 2, 0)),  # the teaching ResNet-50 in Keras
    "raw7-pool": Stem(((1.0, 7, 2),), Pool(3, 2, 1), activated=False),  # pre-activation nets in timm
    "raw7-zeropool": Stem(((1.0, 7, 2),), Pool(3, 2, 1, "zero"), activated=False),  # Keras Applications, V2
    "deep-pool": Stem(_DEEP, Pool(3, 2, 1)),  # ResNet-C and -D: He et al. 2018 (1812.01187), figure 2b
    "deep-conv": Stem(_DEEP, conv_pool=True),  # ResNet-RS: Bello et al. 2021 (2103.07579)
}


@dataclass(frozen=True)
class Spec:
    """One network. Sizes are in pixels, (height, width); tensors are NCHW.

    Raises CallError (a ValueError) for a field, or fields together, that cannot be.
    """

    block: Block
    depths: tuple[int, ...]  # blocks in each stage; every stage but the first halves the resolution, unless `stride` says otherwise
    widths: tuple[int, ...]  # channels of each stage's 3x3 convolutions
    stem: str  # a row of STEMS
    shortcut: Shortcut = "B"  # A: zero-padded identity, B: projection where shapes change, C: projection everywhere, D: B behind a 2x2 average pool,
    # late: where shapes change, an identity that sets out behind the first convolution (Jordan 2024, 2404.00498, airbench96)
    stride: Stride = "v1.5"  # what halves: a bottleneck's first 1x1 (v1, the paper), its 3x3 (v1.5), the 3x3 of a stage's last block (last, Keras V2),
    # a max-pool behind the first 3x3 of every stage, the first too (pool), nothing (none)
    order: Order = "original"  # of convolution, norm, ReLU and addition: He et al. 2016 (1603.05027), figure 4
    carry: Carry = "identity"  # what happens to the shortcut's signal: He et al. 2016, table 1
    norm: Norm = "batch"  # group: Wu & He 2018 (1803.08494)
    bias: Bias = "auto"  # convolutions with a bias: those of nets without norm, but for Fixup's and ReZero's (auto), those that no norm follows (unnormed), all
    init: Init = "he"  # for nets without norm: Zhang 2019 (1901.09321), De & Smith 2020 (2002.10444), Bachlechner 2020 (2003.04887)
    groups: int = 1  # of a bottleneck's 3x3 (ResNeXt, Xie et al. 2016, 1611.05431)
    inner: int = 1  # channels of a bottleneck's 3x3, as a multiple of `widths` (wide ResNets, Zagoruyko & Komodakis 2016, 1605.07146)
    stem_width: int = 0  # channels of the stem; 0: widths[0]
    squeeze: int = 0  # squeeze-and-excitation through 1/squeeze of the channels (Hu et al. 2017, 1709.01507); 0: none
    antialias: bool = False  # blur where a branch and the stem's pool subsample, as in timm; Zhang 2019 (1904.11486) blurs the shortcut too
    dropout: float = 0.0  # before a block's last convolution (wide ResNets)
    drop_path: float = 0.0  # chance that the last block's branch is left out in training, linear in depth (Huang et al. 2016, 1603.09382)
    gate_bias: float = -6.0  # of the gates in `carry`, at the start
    eps: float = 1e-5  # added to a variance by the norms
    flatten: int = 0  # image size whose last map is flattened into a hidden layer of 1000; 0: the map is averaged
    in_channels: int = 3
    num_classes: int = 1000
    zero_init: bool = False  # the last scale of each residual branch starts at zero (Goyal et al. 2017, section 5.1)

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):
            with suppress(TypeError):  # what is no sequence is refused as it is
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_types()
        self._check_values()
        if self.block == "skip":
            self._check_skip()
        else:
            self._check_together()
        if self.flatten:
            self.check_size(self.flatten)

    def _check_types(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type not in TYPES:
                if value not in get_args(f.type):
                    raise unknown(f.name, value, get_args(f.type))
            elif not TYPES[f.type][1](value):
                raise CallError(f"{f.name} must be {TYPES[f.type][0]}; received {shown(repr(value))[:80]}")

    def _check_values(self) -> None:
        if self.stem not in STEMS:
            raise unknown("stem", self.stem, STEMS)
        counts = (*self.depths, *self.widths, self.groups, self.inner, self.in_channels, self.num_classes)
        if not all(0 < n <= 1 << 20 for n in counts) or sum(self.depths) > 5000:
            raise CallError(
                "depths, widths, groups, inner, in_channels and num_classes must be whole numbers from 1 to 2^20 (5000 blocks in all); "
                f"received {self.depths}, {self.widths}, {self.groups}, {self.inner}, {self.in_channels}, {self.num_classes}"
            )
        sizes = (self.stem_width, self.squeeze, self.flatten)
        if not all(0 <= n <= 1 << 16 for n in sizes):
            raise CallError(f"stem_width, squeeze and flatten must be whole numbers from 0 to 65536; received {', '.join(map(str, sizes))}")
        if not (0 <= self.dropout < 1 and 0 <= self.drop_path < 1 and 0 < self.eps < 1 and abs(self.gate_bias) < 100):
            raise CallError(
                "dropout and drop_path must be at least 0 and below 1, eps between 0 and 1, gate_bias between -100 and 100; "
                f"received {self.dropout}, {self.drop_path}, {self.eps}, {self.gate_bias}"
            )
        if not self.depths or len(self.depths) != len(self.widths):
            raise CallError(f"depths and widths must have one entry a stage; received {self.depths} and {self.widths}")
        width = self.stem_width or self.widths[0]
        if any(int(part * width) < 1 for part, _, _ in STEMS[self.stem].convs):
            raise CallError(f"stem {self.stem} begins with half of its channels, so it needs at least 2; received {width}: give stem_width")

    def _check_together(self) -> None:
        if self.block == "basic" and (self.groups, self.inner) != (1, 1):
            raise CallError(f"groups and inner belong to bottleneck blocks; received {self.groups} and {self.inner} for basic ones")
        if any(width * self.inner % self.groups for width in self.widths):
            raise CallError(f"groups must divide the channels of each 3x3, {[w * self.inner for w in self.widths]}; received {self.groups}")
        if self.shortcut == "none" and (self.zero_init or self.init != "he" or self.drop_path or self.carry != "identity"):
            raise CallError("zero_init, init, drop_path and carry need a shortcut: a plain net without its branches computes nothing; received shortcut none")
        if self.shortcut == "late" and (self.block, self.order) != ("basic", "original"):
            raise CallError(f"shortcut late is for basic blocks in order original; received {self.block} and {self.order}")
        if self.init != "he" and (self.norm != "none" or self.zero_init):
            raise CallError(f"init {self.init} is for norm none, without zero_init; received norm {self.norm}, zero_init {self.zero_init}")
        if self.init == "fixup" and self.order != "original":
            raise CallError(f"init fixup is defined for order original; received {self.order}")
        if self.antialias and (self.order != "original" or self.stride == "pool"):
            raise CallError(f"antialias is defined for order original, without stride pool; received {self.order}, stride {self.stride}")

    def check_new(self) -> None:
        """Raises CallError for fields that together mean another net than they say.

        For a net that is chosen now. A recorded one may be older than the rule, and is read as it was.
        """
        if self.zero_init and self.order == "relu-before-add":
            raise CallError("zero_init and order relu-before-add do not go together: a branch that begins at zero behind a ReLU never gets a gradient")
        if self.shortcut == "D" and self.stride == "last":
            raise CallError("shortcut D pools before its projection; stride last subsamples the input itself: take shortcut B")
        if self.shortcut == "A" and self._narrows():
            raise CallError(f"shortcut A adds channels of zeros and takes none away; received stem_width {self.stem_width}, widths {self.widths}")
        if not STEMS[self.stem].activated and self.order != "preact":
            raise CallError(f"stem {self.stem} leaves its norm and ReLU to blocks of order preact; received order {self.order}")

    def _narrows(self) -> bool:
        """Whether a block has fewer channels than what comes before it."""
        outputs = [width * (BOTTLENECK_EXPANSION if self.block == "bottleneck" else 1) for width in self.widths]
        return any(after < before for before, after in pairwise([self.stem_width or self.widths[0], *outputs]))

    def _check_skip(self) -> None:
        """The SkipBlock network has its own order and sizes; what it does not know must be left as it is."""
        own = ("block", "depths", "widths", "stem", "shortcut", "stride", "norm", "bias", "eps", "flatten", "in_channels", "num_classes")
        for f in dataclasses.fields(self):
            if f.name not in own and getattr(self, f.name) != f.default:
                raise CallError(f"skip blocks have no {f.name}; received {getattr(self, f.name)}: leave it at {f.default}")
        allowed = {"stem": ("conv3", "conv3-pool"), "shortcut": ("B", "none"), "stride": ("v1.5", "none"), "norm": ("batch", "none")}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise CallError(f"{name} of skip blocks must be {' or '.join(choices)}; received {getattr(self, name)}")
        if any(wide not in (narrow, 2 * narrow) for narrow, wide in zip(self.widths, self.widths[1:], strict=False)):
            raise CallError(f"each stage of skip blocks must have as many channels as the one before, or twice; received {self.widths}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, for a dict read from a file; CallError names a field that is wrong."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise unknown("Spec field", name, known)
        try:
            return cls(**fields)
        except TypeError as error:  # of the types of values it makes a CallError itself
            raise CallError(f"a Spec needs {', '.join(known[:4])}; received {', '.join(fields) or 'nothing'}") from error

    @property
    def reduction(self) -> int:
        """How many input pixels, along one side, make one pixel of the last stage."""
        halvings = {"none": 0, "pool": len(self.depths)}.get(self.stride, len(self.depths) - 1)
        return STEMS[self.stem].stride << halvings

    def fit(self, image_size: int, in_channels: int, num_classes: int) -> Self:
        """This network for images of that size: same blocks, and the stem that leaves 4 to 16 pixels a side at the end.

        The own stem is kept where it does, which covers each published net at its published size.
        Raises CallError when even the smallest stem reduces an image to less than a pixel.
        """

        def misfit(stem: str) -> float:
            side = image_size / self.reduction * STEMS[self.stem].stride / STEMS[stem].stride
            outside = math.log2(side / 16) if side > 16 else math.log2(4 / side) if side < 4 else 0.0
            return outside + 0.01 * abs(math.log2(STEMS[stem].stride / STEMS[self.stem].stride))  # of equals, the most like its own

        stems = ("conv3", "conv3-pool") if self.block == "skip" else ("conv3", "conv7", "conv7-pool")
        flatten = image_size if self.flatten else 0
        fitted = replace(self, stem=min((self.stem, *stems), key=misfit), in_channels=in_channels, num_classes=num_classes, flatten=flatten)
        fitted.check_size(image_size)
        return fitted

    def check_size(self, image_size: int) -> None:
        """Raises CallError when the last stage would see less than one pixel, any layer none, or a flattened map another size."""
        if image_size < self.reduction:
            raise CallError(
                f"this net halves an image down to 1/{self.reduction}, so it needs at least {self.reduction} px a side; "
                f"received {image_size} px: give a larger --image-size, or take a net with fewer stages"
            )
        self._parts(image_size, fold=True)

    def _parts(self, image_size: Size, fold: bool) -> list["Part"]:
        """What `layout.parts` gives, of a size that this net takes."""
        from reslab.layout import parts

        if self.flatten and image_size not in (self.flatten, (self.flatten, self.flatten)):
            raise CallError(f"this net flattens its last map, which fixes the image size at {self.flatten} px; received {image_size}: set flatten to it")
        made = parts(self, image_size, fold)
        for layer in (layer for part in made for layer in part.layers):
            if min(layer.shape) < 1:
                raise CallError(f"every layer of a net must leave a pixel; of images of {image_size} px {layer.name} leaves none: give a larger --image-size")
        return made

    def layers(self, image_size: Size) -> Iterator["Layer"]:
        """Every leaf module of the built net in the order it runs, with its inputs and what it costs for one image.

        Raises CallError for images that are too small for it.
        """
        return iter([layer for part in self._parts(image_size, fold=False) for layer in part.layers])

    def cost(self, image_size: Size | None = None) -> "Cost":
        """Parameters, multiply-accumulates (convolutions and linear layers) and fp32 bytes of every layer's output.

        All for one image; by arithmetic alone. `image_size` defaults to 32 for a conv3 stem and to 224 otherwise.
        Raises CallError for images that are too small for the net.
        """
        size = (self.flatten or (32 if self.stem == "conv3" else 224)) if image_size is None else image_size
        counted = [(part.times, layer) for part in self._parts(size, fold=True) for layer in part.layers]
        return Cost(
            params=sum(times * layer.params for times, layer in counted),
            macs=sum(times * layer.macs for times, layer in counted),
            activations=sum(times * 4 * math.prod(layer.shape) for times, layer in counted),
        )


class Cost(NamedTuple):
    """What a network costs for one image, as exact integers."""

    params: int
    macs: int
    activations: int  # bytes
