"""A folded net in 8 bits, on a CPU that multiplies them (VNNI): a convolution, the addition and the ReLU behind it in one call of oneDNN.

Activations are unsigned, with a scale and a zero point a tensor from the values it had on training images; weights are signed,
with a scale a filter (Jacob et al. 2017, 1712.05877). A max-pool keeps the 8 bits, all else computes in float32.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from reslab.errors import WorkError, shown

LEVELS = 255
WIDEST, NARROWEST = 1e30, 1e-30  # spans of values that float32 can scale
LAID_FOR = 16  # images: weights laid out for these are as fast for one
PLACES = ("x", "added", "out")  # of a convolution: what goes in, what is added, what comes out

Ranges = dict[str, list[float]]  # the lowest and the highest value, by "NAME OF CONVOLUTION.PLACE"


class Levels(NamedTuple):
    """A value is `scale` times its level less `zero`."""

    scale: float
    zero: int


def has_int8(device: torch.device) -> bool:
    """Whether it is worth to measure 8 bits: on a CPU with AVX-512 VNNI, and a torch with the calls of oneDNN that are used here."""
    return device.type == "cpu" and torch._C._has_mkldnn and torch.cpu._is_vnni_supported() and hasattr(torch.ops.onednn, "qconv2d_pointwise")


def levels(ranges: Ranges, place: str) -> Levels:
    """256 levels over the range there and zero, which is one of them. Raises WorkError when there is none, for ranges come from a file."""
    try:
        low, high = (float(end) for end in ranges[place])
        if not low <= high or max(-low, high) > WIDEST:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise WorkError(f"the model is damaged: inference.json holds no range of {shown(place)}; delete that file to predict without it") from None
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS if high - low > NARROWEST else 1.0
    return Levels(scale, round(-low / scale))


@torch.no_grad()
def observe(graph: fx.GraphModule, kind: type[nn.Module], batches: Iterable[Tensor]) -> Ranges:
    """The range at every place of each `kind` of convolution in a graph: the mean over batches of their lowest and highest values."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    class Observer(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            values = self.fetch_args_kwargs_from_env(node)[0]
            out = super().run_node(node)
            if node.op == "call_module" and isinstance(self.fetch_attr(str(node.target)), kind):
                named = zip(PLACES, values, strict=False)
                for place, value in [*named, ("out", out)]:
                    seen[f"{node.target}.{place}"].append(torch.stack(value.aminmax()))
            return out

    observer = Observer(graph)
    for x in batches:
        observer.run(x)
    return {place: torch.stack(found).mean(0).tolist() for place, found in seen.items()}


class Int8Conv(nn.Module):
    """A convolution, then an addition and a ReLU where it has them, from 8 bits to 8 bits."""

    x: Levels
    added: Levels
    out: Levels
    copies: bool  # what is added is needed again, and the call overwrites it

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.settings = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.after = "relu" if relu else "none"
        weight = conv.weight.detach()
        self.scales = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = (weight / self.scales[:, None, None, None]).round().to(torch.int8)
        self.laid: Tensor | None = None

    def forward(self, q: Tensor, added: Tensor | None = None) -> Tensor:
        if self.laid is None:
            shape = [LAID_FOR, *q.shape[1:]]
            self.laid = torch.ops.onednn.qconv_prepack(self.weight, self.scales, *self.x, *self.settings, shape)
        call: Any = torch.ops.onednn.qconv2d_pointwise
        given = q, *self.x, self.laid, self.scales, self.zeros
        made = self.bias, *self.settings, *self.out, torch.uint8
        if added is None:
            out: Tensor = call(*given, *made, self.after, [], "")
        else:
            added = added.clone() if self.copies else added
            out = call.binary(*given, added, *made, *self.added, "sum", 1.0, self.after, [], "")
        return out


class Int8Pool(nn.Module):
    """A max-pool of levels; bfloat16 holds each of them exactly, and torch pools it on vectors."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, q: Tensor) -> Tensor:
        out: Tensor = self.pool(q.to(torch.bfloat16)).to(torch.uint8)
        return out


def enter(x: Tensor, held: Levels) -> Tensor:
    """float32 -> uint8, the nearest levels."""
    return x.mul(1 / held.scale).add_(held.zero).round_().clamp_(0, LEVELS).to(torch.uint8)


def leave(q: Tensor, held: Levels) -> Tensor:
    """uint8 -> float32."""
    return q.float().sub_(held.zero).mul_(held.scale)


def connect(graph: fx.GraphModule, ranges: Ranges) -> None:
    """Between Int8Convs that follow each other tensors stay in 8 bits; elsewhere they enter and leave them. Raises WorkError like `levels`."""
    modules, held, entered, left = dict(graph.named_modules()), dict[fx.Node, Levels](), dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()

    def within(before: fx.Node, value: fx.Node, name: str) -> fx.Node:
        """That value in 8 bits."""
        if value in held:
            return value
        if value not in entered:
            made = levels(ranges, name)
            with graph.graph.inserting_before(before):
                entered[value] = graph.graph.call_function(enter, (value, made))
            held[entered[value]] = made
        return entered[value]

    def outside(before: fx.Node, value: fx.Node) -> fx.Node:
        """That value in float32."""
        if value not in left:
            with graph.graph.inserting_before(before):
                left[value] = graph.graph.call_function(leave, (value, held[value]))
        return left[value]

    for node in list(graph.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Int8Conv):
            node.args = tuple(within(node, value, f"{node.target}.{place}") for place, value in zip(PLACES, node.args, strict=False))
            for place, value in zip(PLACES, node.args, strict=False):
                setattr(module, place, held[value])
            module.out = held[node] = levels(ranges, f"{node.target}.out")
        elif isinstance(module, nn.MaxPool2d) and node.args[0] in held:
            graph.set_submodule(str(node.target), Int8Pool(module))
            held[node] = held[node.args[0]]
        else:
            for value in node.all_input_nodes:
                if value in held:
                    node.replace_input_with(value, outside(node, value))
    _keep_what_is_needed_again(graph)
    graph.recompile()


def _keep_what_is_needed_again(graph: fx.GraphModule) -> None:
    """Where what is added has another use, behind this one or in it, the call is given a copy to overwrite."""
    modules, position = dict(graph.named_modules()), {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Int8Conv) and len(node.args) == 2:
            x, added = node.args
            module.copies = x is added or any(position[user] > position[node] for user in added.users)
