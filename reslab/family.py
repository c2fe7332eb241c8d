"""The published networks, a row each: what it is, the image size it was published for, where, and how well it did.

Adding a network is adding a row. Accuracies are the authors' own, by their own training, and so compare only within one
source; they say nothing about what a training here will reach.
"""

import dataclasses
from typing import Any, NamedTuple

from reslab.errors import unknown
from reslab.spec import Block, Spec


class Row(NamedTuple):
    """One published network. `top1` is a fraction; `top1_source` says on which images and by whom."""

    spec: Spec
    image_size: int
    source: str
    top1: float | None = None
    top1_source: str = ""


HE_2015 = "He 2015, section 4.2"
TABLE_6 = "CIFAR-10, He 2015 table 6"
HE_2016 = "He 2016 (1603.05027)"
TORCHVISION = "ImageNet, torchvision V1"
WRN = "Zagoruyko & Komodakis 2016 (1605.07146)"
RESNEXT = "Xie 2016 (1611.05431)"
RESNET_D = "He 2018 (1812.01187), figure 2"
SQUEEZE = "Hu 2017 (1709.01507)"
SQUEEZE_BLOCKS = f"blocks of {SQUEEZE}"  # in nets that the paper does not have
RESNET_RS = "Bello 2021 (2103.07579)"
BLUR = "Zhang 2019 (1904.11486); shortcut and stem's pool as timm"
KERAS = "Keras Applications"
AIRBENCH = "reslab's own, widths and pools of airbench94, 95 and 96, Jordan 2024 (2404.00498)"
SKIPBLOCK = "the SkipBlock teaching network"


def _cifar(n: int, top1: float | None = None, top1_source: str = "", source: str = HE_2015, **fields: Any) -> Row:
    """Depth 6n + 2 with basic blocks, 9n + 2 with bottlenecks."""
    given = {"block": "basic", "shortcut": "A", **fields}
    return Row(Spec(depths=(n, n, n), widths=(16, 32, 64), stem="conv3", num_classes=10, **given), 32, source, top1, top1_source)


def _imagenet(block: Block, depths: tuple[int, ...], top1: float | None = None, source: str = "He 2015, table 1", **fields: Any) -> Row:
    spec = Spec(block, depths, **{"widths": (64, 128, 256, 512), "stem": "conv7-pool", **fields})
    peer = {"He 2015, table 1": "torchvision", SQUEEZE: "timm"}.get(source)
    stride = f"; stride v1.5 as {peer}" if peer and block == "bottleneck" else ""
    return Row(spec, 224, source + stride, top1, TORCHVISION if top1 else "")


def _wide(n: int, k: int, top1: float | None = None, **fields: Any) -> Row:
    spec = Spec("basic", (n, n, n), (16 * k, 32 * k, 64 * k), "conv3", order="preact", stem_width=16, num_classes=10, **fields)
    return Row(spec, 32, WRN, top1, "CIFAR-10, the same" if top1 else "")


def _resnext29(groups: int, top1: float | None = None) -> Row:
    spec = Spec("bottleneck", (3, 3, 3), (64, 128, 256), "conv3", groups=groups, inner=groups, num_classes=10)
    return Row(spec, 32, f"{RESNEXT}, table 7", top1, "CIFAR-10, the same" if top1 else "")


def _d(block: Block, depths: tuple[int, ...], source: str = f"{RESNET_D}c", **fields: Any) -> Row:
    """The deep stem, and a projection behind an average pool."""
    return _imagenet(block, depths, None, source, stem="deep-pool", shortcut="D", **fields)


def _rs(depths: tuple[int, ...], image_size: int) -> Row:
    """At the largest size that the authors trained it with, which grows with the depth."""
    return _imagenet("bottleneck", depths, None, RESNET_RS, stem="deep-conv", shortcut="D", squeeze=4)._replace(image_size=image_size)


def _preact_imagenet(depths: tuple[int, ...]) -> Row:
    return _imagenet("bottleneck", depths, None, f"{HE_2016}; stride and stem as timm", stem="raw7-pool", order="preact")


def _keras(depths: tuple[int, ...]) -> Row:
    return _imagenet("bottleneck", depths, None, f"{KERAS}, V1", stride="v1", bias="all", eps=1.001e-5)


def _keras_v2(depths: tuple[int, ...]) -> Row:
    return _imagenet("bottleneck", depths, None, f"{KERAS}, V2", stem="raw7-zeropool", stride="last", order="preact", bias="unnormed", eps=1.001e-5)


def _skipblock(depth: int, size: int = 32, **fields: Any) -> Row:
    """Stages 2 and 3 have one block more: the one that changes the size."""
    given = {"stem": "conv3-pool", "bias": "all", "flatten": size, "num_classes": 10, **fields}
    return Row(Spec("skip", (depth, depth + 1, depth + 1), (64, 128, 256), **given), size, SKIPBLOCK)


def _he_2016(top1: float, table: int, **fields: Any) -> Row:
    """ResNet-110 with one thing changed. Projections where shapes change give the parameters that the paper's code has."""
    return _cifar(18, top1, f"CIFAR-10, the same, table {table}", f"{HE_2016}, table {table}", **{"shortcut": "B", **fields})


FAMILY: dict[str, Row] = {
    "resnet8": Row(Spec("basic", (1, 1, 1), (64, 256, 256), "conv3", "late", "pool", stem_width=24, num_classes=10), 32, AIRBENCH),
    "wide_resnet8": Row(Spec("basic", (1, 1, 1), (128, 384, 384), "conv3", "late", "pool", stem_width=24, num_classes=10), 32, AIRBENCH),
    "wide_resnet14": Row(Spec("basic", (2, 2, 2), (128, 384, 512), "conv3", "late", "pool", stem_width=24, num_classes=10), 32, AIRBENCH),
    "resnet20": _cifar(3, 0.9125, TABLE_6),
    "resnet32": _cifar(5, 0.9249, TABLE_6),
    "resnet44": _cifar(7, 0.9283, TABLE_6),
    "resnet56": _cifar(9, 0.9303, TABLE_6),
    "resnet110": _cifar(18, 0.9357, TABLE_6),
    "resnet164": _cifar(18, 0.9407, "CIFAR-10, He 2016 table 2", HE_2016, block="bottleneck", shortcut="B", stride="v1"),
    "resnet1202": _cifar(200, 0.9207, TABLE_6),
    "plain20": _cifar(3, shortcut="none"),
    "plain32": _cifar(5, shortcut="none"),
    "plain44": _cifar(7, shortcut="none"),
    "plain56": _cifar(9, shortcut="none"),
    "plain110": _cifar(18, shortcut="none"),
    "preact20": _cifar(3, source=HE_2016, order="preact", shortcut="B"),
    "preact110": _he_2016(0.9363, 2, order="preact"),
    "preact164": _cifar(18, 0.9454, "CIFAR-10, the same, table 2", HE_2016, block="bottleneck", order="preact", shortcut="B", stride="v1"),
    "preact1001": _cifar(111, 0.9508, "CIFAR-10, the same, table 4", HE_2016, block="bottleneck", order="preact", shortcut="B", stride="v1"),
    "resnet110_bn_after_add": _he_2016(0.9183, 2, order="bn-after-add"),
    "resnet110_relu_before_add": _he_2016(0.9216, 2, order="relu-before-add"),
    "resnet110_relu_preact": _he_2016(0.9329, 2, order="relu-preact"),
    "resnet110_scaling": _he_2016(0.8765, 1, carry="scaling"),
    "resnet110_exclusive_gate": _he_2016(0.9130, 1, carry="exclusive-gate"),
    "resnet110_shortcut_gate": _he_2016(0.9309, 1, carry="shortcut-gate"),
    "resnet110_conv_shortcut": _he_2016(0.8778, 1, shortcut="C"),
    "resnet110_dropout_shortcut": _cifar(18, source=f"{HE_2016}, table 1", shortcut="B", carry="dropout"),
    "resnet110_stochastic": _cifar(18, 0.9477, "CIFAR-10, the same", "Huang 2016 (1603.09382)", drop_path=0.5),
    "resnet1202_stochastic": _cifar(200, 0.9509, "CIFAR-10, the same", "Huang 2016 (1603.09382)", drop_path=0.5),
    "resnet110_fixup": _cifar(18, source="Zhang 2019 (1901.09321)", norm="none", init="fixup"),
    "resnet110_skipinit": _cifar(18, source="De & Smith 2020 (2002.10444)", norm="none", init="skipinit", order="preact"),
    "resnet110_rezero": _cifar(18, source="Bachlechner 2020 (2003.04887), without its norms", norm="none", init="rezero", order="relu-before-add"),
    "se_resnet20": _cifar(3, source=SQUEEZE_BLOCKS, squeeze=16),
    "se_resnet56": _cifar(9, source=SQUEEZE_BLOCKS, squeeze=16),
    "se_resnet110": _cifar(18, source=SQUEEZE_BLOCKS, squeeze=16),
    "wrn40-4": _wide(6, 4, 0.9547),
    "wrn16-8": _wide(2, 8, 0.9573),
    "wrn28-10": _wide(4, 10, 0.9600),
    "wrn28-10-dropout": _wide(4, 10, dropout=0.3),
    "resnext29_8x64d": _resnext29(8, 0.9635),
    "resnext29_16x64d": _resnext29(16),
    "skipblock8": _skipblock(8),
    "skipblock8_plain": _skipblock(8, shortcut="none"),
    "resnet18": _imagenet("basic", (2, 2, 2, 2), 0.69758),
    "resnet26": _imagenet("bottleneck", (2, 2, 2, 2), None, "timm"),
    "resnet34": _imagenet("basic", (3, 4, 6, 3), 0.73314),
    "resnet50": _imagenet("bottleneck", (3, 4, 6, 3), 0.76130),
    "resnet101": _imagenet("bottleneck", (3, 4, 23, 3), 0.77374),
    "resnet152": _imagenet("bottleneck", (3, 8, 36, 3), 0.78312),
    "resnet200": _imagenet("bottleneck", (3, 24, 36, 3), None, "timm"),
    "plain18": _imagenet("basic", (2, 2, 2, 2), shortcut="none"),
    "plain34": _imagenet("basic", (3, 4, 6, 3), shortcut="none"),
    "resnet50_v1": _imagenet("bottleneck", (3, 4, 6, 3), None, "He 2015, table 1: stride on the first 1x1", stride="v1"),
    "resnet50_gn": _imagenet("bottleneck", (3, 4, 6, 3), None, "Wu & He 2018 (1803.08494)", norm="group"),
    "resnet50c": _imagenet("bottleneck", (3, 4, 6, 3), None, f"{RESNET_D}b", stem="deep-pool"),
    "resnet18d": _d("basic", (2, 2, 2, 2)),
    "resnet26d": _d("bottleneck", (2, 2, 2, 2)),
    "resnet34d": _d("basic", (3, 4, 6, 3)),
    "resnet50d": _d("bottleneck", (3, 4, 6, 3)),
    "resnet101d": _d("bottleneck", (3, 4, 23, 3)),
    "resnet152d": _d("bottleneck", (3, 8, 36, 3)),
    "resnet200d": _d("bottleneck", (3, 24, 36, 3)),
    "se_resnet18": _imagenet("basic", (2, 2, 2, 2), None, SQUEEZE_BLOCKS, squeeze=16),
    "se_resnet34": _imagenet("basic", (3, 4, 6, 3), None, SQUEEZE_BLOCKS, squeeze=16),
    "se_resnet50": _imagenet("bottleneck", (3, 4, 6, 3), None, SQUEEZE, squeeze=16),
    "se_resnet101": _imagenet("bottleneck", (3, 4, 23, 3), None, SQUEEZE, squeeze=16),
    "se_resnet152": _imagenet("bottleneck", (3, 8, 36, 3), None, SQUEEZE, squeeze=16),
    "se_resnext50_32x4d": _imagenet("bottleneck", (3, 4, 6, 3), None, SQUEEZE, squeeze=16, groups=32, inner=2),
    "se_resnext26d_32x4d": _d("bottleneck", (2, 2, 2, 2), "timm", squeeze=16, groups=32, inner=2),
    "resnet18_blur": _imagenet("basic", (2, 2, 2, 2), None, BLUR, antialias=True),
    "resnet50_blur": _imagenet("bottleneck", (3, 4, 6, 3), None, BLUR, antialias=True),
    "resnet50d_blur": _d("bottleneck", (3, 4, 6, 3), BLUR, antialias=True),
    "wide_resnet50_2": _imagenet("bottleneck", (3, 4, 6, 3), None, f"{WRN}, table 8", inner=2),
    "wide_resnet101_2": _imagenet("bottleneck", (3, 4, 23, 3), None, f"{WRN}; torchvision", inner=2),
    "resnext50_32x4d": _imagenet("bottleneck", (3, 4, 6, 3), None, f"{RESNEXT}, table 1", groups=32, inner=2),
    "resnext50d_32x4d": _d("bottleneck", (3, 4, 6, 3), "timm", groups=32, inner=2),
    "resnext101_32x4d": _imagenet("bottleneck", (3, 4, 23, 3), None, RESNEXT, groups=32, inner=2),
    "resnext101_32x8d": _imagenet("bottleneck", (3, 4, 23, 3), None, f"{RESNEXT}; torchvision", groups=32, inner=4),
    "resnext101_64x4d": _imagenet("bottleneck", (3, 4, 23, 3), None, f"{RESNEXT}, table 4", groups=64, inner=4),
    "preact_resnet50": _preact_imagenet((3, 4, 6, 3)),
    "preact_resnet101": _preact_imagenet((3, 4, 23, 3)),
    "preact_resnet152": _preact_imagenet((3, 8, 36, 3)),
    "resnetrs50": _rs((3, 4, 6, 3), 160),
    "resnetrs101": _rs((3, 4, 23, 3), 192),
    "resnetrs152": _rs((3, 8, 36, 3), 256),
    "resnetrs200": _rs((3, 24, 36, 3), 256),
    "resnetrs270": _rs((4, 29, 53, 4), 256),
    "resnetrs350": _rs((4, 36, 72, 4), 320),
    "resnetrs420": _rs((4, 44, 87, 4), 320),
    "keras_resnet50": _keras((3, 4, 6, 3)),
    "keras_resnet101": _keras((3, 4, 23, 3)),
    "keras_resnet152": _keras((3, 8, 36, 3)),
    "keras_resnet50v2": _keras_v2((3, 4, 6, 3)),
    "keras_resnet101v2": _keras_v2((3, 4, 23, 3)),
    "keras_resnet152v2": _keras_v2((3, 8, 36, 3)),
    "keras_teaching_resnet50": Row(
        Spec("bottleneck", (3, 4, 6, 3), (64, 128, 256, 512), "conv7-pool-valid", stride="v1", bias="all", eps=1e-3, num_classes=6),
        64, "the teaching ResNet-50 in Keras: identity and convolutional blocks",
    ),
}  # fmt: skip


def name_of(net: str | Spec) -> str:
    """The name of a network in `FAMILY`; "custom" for a Spec that is none of them."""
    return net if isinstance(net, str) else next((name for name, row in FAMILY.items() if row.spec == net), "custom")


def spec(net: str | Spec, **changes: Any) -> Spec:
    """The Spec of a network in `FAMILY`, or the given Spec, with `changes` to its fields applied.

    Raises CallError (a ValueError) with the nearest name for an unknown net or field, and for fields that do not go together.
    """
    if not isinstance(net, Spec) and (not isinstance(net, str) or net not in FAMILY):
        raise unknown("net", net, FAMILY, "; `reslab models` lists them")
    chosen = net if isinstance(net, Spec) else FAMILY[net].spec
    made = Spec.from_dict({**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}, **changes})
    made.check_new()
    return made
