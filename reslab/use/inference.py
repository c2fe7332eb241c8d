"""A net as it predicts: batch norms folded into the convolutions before them, additions and ReLUs computed inside these.

The trained net stays as it is, for explaining, exporting and scoring; what predicts is a second graph that shares nothing
with it. In which precision is measured, not assumed: in bf16 or int8 only where that is faster, and only when it gave at least
99.5 % of the run's val images the class that fp32 gives them. Some hundred images say little about one in two hundred, so each
image's logits are also given the rounding of other images: of these, too, 99.5 % must keep their class.
"""

import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from reslab.host import cpu_name
from reslab.interval import share
from reslab.nets.fused import Norm
from reslab.nets.parts import Add
from reslab.nets.pool import MaxPool
from reslab.nets.recording import Recording, shared_pool, warm_up
from reslab.nets.torch import ResNet
from reslab.use.int8 import Int8Conv, Ranges, connect, has_int8, observe
from reslab.use.race import race

AGREEMENT = 0.995  # of a precision's classes with those of fp32, at least; and of the exchanged ones
SURE = {"bf16": 0.95, "int8": 0.98}  # the lower end of its interval: some 70 images without a difference, or 200, as int8 rounds more
GAIN = 1.1  # it must be this much faster to be worth its rounding
WEIGHED = 256, 1024  # val images that the agreement is measured on: at least, and where they take less than
WEIGHED_SECONDS = 5.0
WEIGHED_BATCH = 16
EXCHANGED = 128  # other images whose rounding an image is given
CALIBRATED = 256  # training images that give int8 its ranges
ROUNDS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECORDINGS = 16  # sizes of batches that a GPU's passes are recorded for
RECORDED_BATCH = 64  # images in the largest of them: beyond, launches no longer count

Forward = Callable[[Tensor], Tensor]
Record = dict[str, Any]


class Quick:
    """The logits of a net as fast as this machine gives them, made when first asked for, and anew when weights change.

    `record` is what `weigh` found after the training; without one the precision is fp32.
    """

    def __init__(self, net: ResNet, record: Record | None = None) -> None:
        self.net, self.record = net, record or {}
        self.recorded = self._versions()
        self.precision = "fp32"
        self.made: tuple[Any, Forward] | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Normalised float32 (N, C, H, W) -> float32 logits (N, classes)."""
        state = self._state()
        if self.made is None or self.made[0] != state:
            self.made = state, self._choose(x)
        return self.made[1](x)

    def _state(self) -> Any:
        return next(self.net.parameters()).device, self._versions()

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """Where each tensor lies, and its version, which grows with every change in place but for those of its `.data`, as in `p.data.zero_()`."""
        held = (tensors for module in self.net.modules() for tensors in (module._parameters, module._buffers))
        return tuple((tensor.data_ptr(), tensor._version) for tensors in held for tensor in tensors.values() if tensor is not None)

    def _choose(self, x: Tensor) -> Forward:
        """The record's own choice on the processor it was made on; elsewhere the fastest of those that keep the classes."""
        allowed = ["fp32", *(name for name in ("bf16", "int8") if self._keeps(name, x.device))]
        if self.record.get("processor") == processor(x.device) and self.record.get("precision") in allowed:
            allowed = [self.record["precision"]]
        made = {name: forward for name in allowed if (forward := self._lowered(name, x))} or {"fp32": lowered(self.net, torch.float32)}
        self.precision = _fastest(_gains(made, x)) if len(made) > 1 else next(iter(made))
        return made[self.precision]

    def _keeps(self, name: str, device: torch.device) -> bool:
        """Whether this machine has that precision and the record says that it gives fp32's classes."""
        facts = self.record.get(name, self.record if name == "bf16" else {})  # older records are flat, and of bf16
        if min(facts.get("agreement", 0), facts.get("exchanged", 1)) < AGREEMENT:  # records from before exchanging have only the one
            return False
        if device.type == "cpu" and self._versions() != self.recorded:  # on a GPU all lie elsewhere than when they were loaded
            return False  # it is of other weights than these
        if facts.get("agreement_low", float(name == "bf16")) < SURE[name]:  # older records have none of bf16
            return False
        return has_int8(device) if name == "int8" else has_bf16(device)

    def _lowered(self, name: str, x: Tensor) -> Forward | None:
        return in_int8(self.net, self.record["int8"].get("ranges"), x) if name == "int8" else lowered(self.net, DTYPES[name])


@torch.no_grad()
def weigh(net: ResNet, batches: Iterable[Tensor], training: Iterable[Tensor], answer: Forward) -> Record:
    """Whether bf16 and int8 keep the classes that fp32 gives for these normalised batches, and are faster; {} without the hardware.

    `answer` makes an image's logits of those of its views. The ranges of int8 are those of `training`, other batches. The
    record says on which processor, on how many images, of each the agreement with its 95 % interval, that with exchanged
    rounding, and the gain in speed, and the precision that follows.
    """
    device = next(net.parameters()).device
    net.eval()
    batches = iter(batches)
    first = next(batches)
    made: dict[str, Forward] = {"fp32": lowered(net, torch.float32)}
    ranges: Ranges = {}
    if has_bf16(device):
        made["bf16"] = lowered(net, torch.bfloat16)
    if has_int8(device):
        ranges = observe(_fused(net, FusedConv), FusedConv, training)
        if eight := in_int8(net, ranges, first):
            made["int8"] = eight
    if len(made) == 1:
        return {}
    gains, end = _gains(made, first), time.perf_counter() + WEIGHED_SECONDS
    n, wanted = 0, list[Tensor]()
    found: dict[str, list[Tensor]] = {name: [] for name in gains}
    for x in chain([first], batches):
        wanted.append(answer(net(x)))
        for name, logits in found.items():
            logits.append(answer(made[name](x)))
        n += len(wanted[-1])
        if n >= WEIGHED[1] or (n >= WEIGHED[0] and time.perf_counter() > end):
            break
    want = torch.cat(wanted)
    facts: dict[str, Record] = {name: {**agreement(want, torch.cat(found[name])), "gain": round(gain, 3)} for name, gain in gains.items()}
    if "int8" in facts:
        facts["int8"]["ranges"] = ranges
    record = {"n": n, **facts, "processor": processor(device)}
    quick = Quick(net, record)
    return {"precision": _fastest({name: gain for name, gain in gains.items() if quick._keeps(name, device)}), **record}


def agreement(want: Tensor, found: Tensor) -> Record:
    """How many of these logits (N, classes) keep the class of `want`, with the interval; and how many would with other images' rounding.

    The second does not hang on the side to which a near tie happened to be rounded: each image gets the rounding of each of the
    next EXCHANGED, which makes N x EXCHANGED answers.
    """
    classes, rounding = want.argmax(1), found - want
    kept = [float(((want + rounding.roll(shift, 0)).argmax(1) == classes).float().mean()) for shift in range(1, min(len(want), EXCHANGED + 1))]
    return {**share("agreement", int((found.argmax(1) == classes).sum()), len(want)), "exchanged": statistics.fmean(kept or [1.0])}


def weighing_seconds(val: int, an_image: float, device: torch.device) -> float:
    """About what `weigh` takes at most with so many val images, where the net takes `an_image` seconds for one."""
    if not (has_bf16(device) or has_int8(device)):
        return 0.0
    ready = (CALIBRATED + 6 * ROUNDS * WEIGHED_BATCH) * an_image
    least, most = (4 * min(n, val) * an_image for n in WEIGHED)
    return ready + max(least, min(most, WEIGHED_SECONDS))


def told(record: Record) -> str:
    """What `weigh` chose and why, in a line; nothing for fp32."""
    name = record.get("precision", "fp32")
    if name == "fp32":
        return ""
    facts = record[name]
    return f"predicts in {name}: {facts['agreement']:.2%} of {record['n']:,} val images keep their class of fp32, {facts['gain']:.1f} times as fast"


def has_bf16(device: torch.device) -> bool:
    """Whether it is worth to measure bf16; a CPU without it emulates it, and slowly."""
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def processor(device: torch.device) -> str:
    """What a measured speed holds for."""
    return cpu_name() if device.type == "cpu" else device.type


def lowered(net: ResNet, dtype: torch.dtype) -> Forward:
    """The folded net in that precision, channels last: normalised float32 (N, C, H, W) -> float32 logits."""
    device = next(net.parameters()).device
    kind: Kind | None = None
    if device.type == "cpu" and torch._C._has_mkldnn and dtype in (torch.float32, torch.bfloat16):
        kind = FusedConv
    elif device.type == "cuda" and torch.version.cuda is not None:  # and no other maker's card under that name
        kind = CudnnConv
    graph = _fused(net, kind, dtype)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = graph(x.to(dtype, memory_format=torch.channels_last))
        return out.float()

    return Recorded(forward) if device.type == "cuda" else forward


def in_int8(net: ResNet, ranges: Ranges, x: Tensor) -> Forward | None:
    """The folded net in 8 bits, tried on `x`: normalised float32 (N, C, H, W) -> float32 logits. None where oneDNN lacks a kernel for it.

    Raises WorkError when a range is missing or none.
    """
    graph = _fused(net, Int8Conv)
    connect(graph, ranges)
    try:
        graph(x[:1])
        graph(x)
    except RuntimeError:  # of torch, which says no more than that
        return None
    return graph


class Recorded:
    """A Forward on a GPU. Each of the first small batch sizes is recorded and then replayed; others run as they are."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.lock = threading.Lock()  # a recording has one place for what goes in
        self.pool = shared_pool()
        self.recorded: dict[torch.Size, tuple[Tensor, Recording[Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Normalised float32 (N, C, H, W) -> float32 logits (N, classes)."""
        with self.lock:
            if x.shape not in self.recorded:
                if len(x) > RECORDED_BATCH or len(self.recorded) >= RECORDINGS:
                    return self.forward(x)
                held = x.clone()
                warm_up(lambda: self.forward(held))
                self.recorded[x.shape] = held, Recording(lambda: self.forward(held), self.pool)
            held, recording = self.recorded[x.shape]
            held.copy_(x)
            return recording().clone()


def folded(net: ResNet) -> fx.GraphModule:
    """A copy in eval mode, in which no batch norm directly follows a convolution; parameters keep their dtype.

    gamma (conv(x) - mean) / sqrt(var + eps) + beta is a convolution too, its weights scaled and its bias shifted; the
    arithmetic is in float64. What is the identity in eval mode is gone; batch norms that follow an addition stay.
    """
    net = copy.deepcopy(net).eval()
    graph = fx.GraphModule(net, _Tracer().trace(net, {"outputs": None}))
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        before = modules.get(str(node.args[0].target)) if module is not None and isinstance(node.args[0], fx.Node) else None
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d) and len(node.args[0].users) == 1:
            _fold(before, module)
        elif not isinstance(module, (nn.Dropout, nn.Identity)):
            continue
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


class _Tracer(fx.Tracer):
    """Sees convolutions, norms, pools and skip additions as one node each, ours included."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, Norm, MaxPool, Add)) or super().is_leaf_module(module, name)


@torch.no_grad()
def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None and var is not None
    scale = bn.weight.double() / (var.double() + bn.eps).sqrt()
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias
    conv.bias = nn.Parameter(((bias.double() - mean.double()) * scale + bn.bias.double()).to(conv.weight.dtype))
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])


class FusedConv(nn.Module):
    """A convolution, then an addition and a ReLU where it has them, in one call of oneDNN; float32 or bfloat16.

    Weights are laid out for the size of images they last met, once for one image and once for several: in the other's
    layout a ResNet-50 at 224 px takes up to three times as long. torch's own convolution lays them out anew at every call.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.settings = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.after = "relu" if relu else "none"
        self.laid: list[tuple[Any, Tensor]] = [(None, conv.weight.detach())] * 2  # for one image, for several; a pair is put there at once, for other threads

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        several = len(x) > 1
        shape, weight = self.laid[several]
        if shape != x.shape[1:]:
            dense = weight.to_dense() if weight.is_mkldnn else weight
            weight = torch.ops.mkldnn._reorder_convolution_weight(dense, *self.settings, list(x.shape))
            self.laid[several] = x.shape[1:], weight
            if self.laid[not several][0] is None:
                self.laid[not several] = None, weight  # where the plain weights, which nobody needs any more, may be given up
        call: Any = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            out: Tensor = call(x, weight, self.bias, *self.settings, self.after, [], "")
        else:
            out = call.binary(x, other, weight, self.bias, *self.settings, "add", 1.0, "relu" if self.after == "relu" else None, [], None)
        return out


class CudnnConv(nn.Module):
    """The same by one call of cuDNN, where a ReLU ends it."""

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.settings: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.weight, self.bias, self.relu = conv.weight.detach(), None if conv.bias is None else conv.bias.detach(), relu

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.relu and other is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.settings)
        if self.relu and other is not None:
            return torch.cudnn_convolution_add_relu(x, self.weight, other, 1.0, self.bias, *self.settings)
        out = nn.functional.conv2d(x, self.weight, self.bias, *self.settings)
        return out if other is None else out + other


Kind = type[FusedConv] | type[CudnnConv] | type[Int8Conv]


def _fused(net: ResNet, kind: Kind | None, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The folded net, channels last, with convolutions of that kind."""
    graph: fx.GraphModule = folded(net).to(next(net.parameters()).device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kind is not None:
        _fuse(graph, kind)
    return graph


def _fuse(graph: fx.GraphModule, kind: Kind) -> None:
    """Every convolution becomes one of that kind with the addition and the ReLU that directly follow it and read nothing else."""
    modules = dict(graph.named_modules())

    def only_user(node: fx.Node, kind: type[nn.Module]) -> fx.Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is not None and isinstance(modules.get(str(user.target)), kind) else None

    for node in list(graph.graph.nodes):
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d):
            continue
        chain, inputs = [node], [node.args[0]]
        if (add := only_user(node, Add)) is not None and len(add.all_input_nodes) == 2:
            chain.append(add)
            inputs += [other for other in add.args if other is not node]
        if (relu := only_user(chain[-1], nn.ReLU)) is not None:
            chain.append(relu)
        graph.set_submodule(str(node.target), kind(conv, relu is not None))
        with graph.graph.inserting_after(chain[-1]):
            made = graph.graph.call_module(str(node.target), tuple(inputs))
        chain[-1].replace_all_uses_with(made)
        for old in reversed(chain):
            graph.graph.erase_node(old)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _gains(made: dict[str, Forward], x: Tensor) -> dict[str, float]:
    """How many times faster than fp32 each of the others is."""
    took = race({name: lambda forward=forward: forward(x).cpu() for name, forward in made.items()}, seconds=0.0, rounds=ROUNDS)  # type: ignore[misc]
    return {name: took["fp32"] / seconds for name, seconds in took.items() if name != "fp32"}


def _fastest(gains: dict[str, float]) -> str:
    """Of fp32 and these."""
    best = max(gains, key=lambda name: gains[name], default="fp32")
    return best if gains.get(best, 0) > GAIN else "fp32"
