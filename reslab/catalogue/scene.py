"""What a drawing shows of a block: its layers as boxes on the branch and on the shortcut, and where the two part and meet."""

from collections.abc import Iterable
from typing import NamedTuple

from reslab.catalogue.svg import wide
from reslab.layout import Layer, Part, Shape

TALL, LOW = 40, 24  # heights of a box with two lines and with one
ON_SHORTCUT = ("downsample", "duplicate", "carry", "gate")
WORDS = {
    "batchnorm": "BN", "groupnorm": "GN", "relu": "ReLU", "sigmoid": "σ", "globalpool": "mean", "flatten": "flatten", "duplicate": "concat × 2",
    "shift": "+ b", "scaleshift": "a x + b", "scale": "a x", "droppath": "drop path",
}  # fmt: skip
POOLS = {"maxpool": "max", "avgpool": "avg", "blurpool": "blur"}
FORMULAS = {"add-scaled": "½ F + ½ x", "add-exclusive": "g F + (1 − g) x", "add-gated": "F + (1 − g) x"}


class Box(NamedTuple):
    """One layer, or squeeze-and-excitation as one, with its share of all multiply-adds, repeats included."""

    lines: tuple[str, ...]
    share: float
    tip: str

    @property
    def width(self) -> float:
        return max(wide(line, 12 if len(self.lines) > 1 else 11) for line in self.lines) + 14

    @property
    def height(self) -> int:
        return TALL if len(self.lines) > 1 else LOW


class Scene(NamedTuple):
    """The boxes of a part. `fork` and `join` count the boxes of `main` before the shortcut leaves and before it arrives."""

    main: list[Box]
    side: list[Box]
    gate: list[Box]
    fork: int
    join: int | None
    formula: str


def scene(part: Part, macs: int, shapes: dict[str, Shape]) -> Scene:
    """What to draw of a part; `macs` are those of the whole net, `shapes` those of all its layers."""
    branch: list[Layer] = []
    side: list[Layer] = []
    gate: list[Layer] = []
    addition: Layer | None = None
    join = None
    for layer in part.layers:
        own = _within(layer)
        if part.blocks and own.startswith("gate"):
            gate.append(layer)
        elif part.blocks and own.split(".")[0] in ON_SHORTCUT:
            side.append(layer)
        elif layer.kind.startswith("add"):
            addition, join = layer, len(_boxes(branch, part.times, macs, shapes))
        else:
            branch.append(layer)
    source = (side[0].inputs[0] if side else addition.inputs[1]) if addition else ""
    names = [layer.name for layer in branch]
    fork = names.index(source) + 1 if source in names else 0
    formula = FORMULAS.get(addition.kind, "") if addition else ""
    made = [_boxes(layers, part.times, macs, shapes) for layers in (branch, side, gate)]
    return Scene(made[0], made[1], made[2], fork, join, formula)


def _within(layer: Layer) -> str:
    """The layer's name inside its block."""
    return ".".join(layer.name.split(".")[2:])


def _boxes(layers: Iterable[Layer], times: int, macs: int, shapes: dict[str, Shape]) -> list[Box]:
    boxes: list[Box] = []
    squeeze: list[Layer] = []
    for layer in layers:
        if ".se." in layer.name:
            squeeze.append(layer)
            if layer.kind != "multiply":
                continue
            outer, inner = layer.shape[0], next(each.shape[0] for each in squeeze if each.conv)
            lines: tuple[str, ...] = ("squeeze-excite", f"{outer} → {inner} → {outer}")
            told, squeeze = squeeze, []
        else:
            lines, told = _lines(layer, shapes[layer.inputs[0]]), [layer]
        own = sum(each.macs for each in told)
        boxes.append(Box(lines, times * own / macs, _tip(told, own, times)))
    return boxes


def _lines(layer: Layer, given: Shape) -> tuple[str, ...]:
    if layer.kind == "conv":
        assert layer.conv
        groups = f", {layer.conv.groups} groups" if layer.conv.groups > 1 else ""
        return f"{layer.conv.kernel}×{layer.conv.kernel} conv{_stride(layer.conv.stride)}", f"{layer.conv.outputs}{groups}"
    if layer.kind == "linear":
        return "linear", str(layer.shape[0])
    if layer.kind == "dropout":
        return (f"drop {layer.value:g}",)
    if layer.kind == "pad":
        assert layer.conv
        what = "subsample" if given[0] == layer.shape[0] else f"zero-pad to {layer.shape[0]}"
        return (f"{what}{_stride(layer.conv.stride)}",)
    if layer.pool:
        size = "" if layer.kind == "blurpool" else f" {layer.pool.kernel}×{layer.pool.kernel}"
        return (f"{POOLS[layer.kind]}{size}{_stride(layer.pool.stride)}",)
    return (WORDS[layer.kind],)


def _stride(stride: int) -> str:
    return f", /{stride}" if stride > 1 else ""


def _tip(layers: list[Layer], macs: int, times: int) -> str:
    """What the pointer reads: name, output, cost."""
    last, params = layers[-1], sum(layer.params for layer in layers)
    name = last.name if len(layers) == 1 else last.name.rpartition(".")[0]
    each = " each" if times > 1 else ""
    costs = f"{params:,} parameters" * bool(params), f"{macs:,} multiply-adds{each}" * bool(macs)
    return ", ".join([f"{name}: {' × '.join(map(str, last.shape))}", *filter(None, costs)])
