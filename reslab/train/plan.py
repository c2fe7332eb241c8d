"""Before epoch 1: the precision is chosen, a few steps are timed on a copy of the net, and a budget is turned into steps."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from reslab.errors import CallError, WorkError, shown
from reslab.nets.fused import Norm, norm_together, reason_against, use_fused
from reslab.nets.tiles import has_amx
from reslab.nets.torch import ResNet
from reslab.nets.winograd import has_winograd, use_winograd
from reslab.train.checkpoint import Checkpointed, Segments, choose_segments
from reslab.train.hardware import Machine, synchronise
from reslab.train.optim import keep_gradients, optimizer
from reslab.train.passes import Pass, ReplayedPass, ReplayedUpdate, Work
from reslab.train.recipe import Recipe

BF16_GAIN = 1.3  # bf16 must multiply matrices this much faster to be worth its rounding
BF16_MACS = 10e6  # and the net must have work enough for that to show
MATRIX = 1024
WORTH = 1.05  # a recorded or compiled step must be this much faster
COMPILE_SECONDS = {"cpu": 1.7, "cuda": 1.1}  # that torch.compile takes a convolution at one image size, as measured (docs/log.md)
COMPILE_GAIN = {"cpu": 1.08, "cuda": 1.41}  # of a step: ResNet-20 on a CPU, ResNet-50 on an H100
TIMED = 3
TIMED_SECONDS = 2.0


@dataclass(frozen=True)
class Plan:
    """What a training will do. Times are in seconds, measured on this machine just before."""

    steps: int  # in all
    steps_per_epoch: int
    precision: str
    reason: str  # why this precision
    step_seconds: float = 0.0  # at full size
    low_step_seconds: float = 0.0  # at the reduced size that the training begins with
    val_seconds: float = 0.0  # one pass over val
    memory: int | None = None  # bytes that a process may hold
    segments: Segments = ()  # the first blocks, grouped, that are computed again in the backward pass
    winograd: bool = False  # convolutions by Winograd's algorithm, where it may pay
    fused: bool = False  # norm, addition and ReLU in one pass and convolutions by products, unless the net is compiled
    fusing: str = ""  # why the norms are not, if the kernels cannot be made
    compiled: bool = False  # the net by torch.compile
    compiling: str = ""  # why, or why not
    twice_from: float = 1.0  # share of the training after which a step takes two passes
    replayed: bool = False  # a step on a GPU is recorded once, as CUDA graphs

    @property
    def epochs(self) -> int:
        """How many epochs the steps begin."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def seconds(self, steps: int, low: float, done: int = 0, pace: float = 1.0) -> float:
        """The time of the steps from `done` to `steps`, the first `low` of all at the reduced size, val included."""

        def train(first: int) -> float:
            small = max(0, round(low * steps) - first)
            return small * self.low_step_seconds + (steps - first - small) * self.step_seconds

        again = train(max(done, round(self.twice_from * steps)))
        return pace * (train(done) + again) + (steps - done) / self.steps_per_epoch * self.val_seconds

    def steps_within(self, seconds: float, low: float, done: int = 0, pace: float = 1.0) -> int:
        """The most steps in all, at least one more than `done`, that end in time."""
        fits, too_many = done + 1, done + 2
        while self.seconds(too_many, low, done, pace) <= seconds:
            fits, too_many = too_many, 2 * too_many
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self.seconds(middle, low, done, pace) <= seconds else (fits, middle)
        return fits


def low_size(size: int, share: float) -> int:
    """That share of an image size, in whole multiples of 4 where it is large enough."""
    low = int(size * share)
    return max(1, low // 4 * 4 if size >= 16 else low)


def make_plan(
    net: ResNet, x: Tensor, recipe: Recipe, train: int, val: int, macs: int, machine: Machine, memory: int | None = None, seconds: float = math.inf
) -> Plan:  # fmt: skip
    """Chooses how to compute and times steps on `x`, a normalised batch (N, C, H, W) of this process's share.

    `memory` is what the process may hold, in bytes; CallError says how much it needs at least. `seconds` is what the training
    may take, if that is limited.
    """
    assert recipe.epochs is not None and recipe.batch_size is not None and recipe.micro_batch is not None
    precision, reason = (recipe.precision, "as asked") if recipe.precision != "auto" else _choose_precision(macs, machine)
    per_epoch = train // recipe.batch_size
    segments = choose_segments(net.spec, recipe, precision, memory, machine)
    dtype, on_cpu = torch.bfloat16 if precision == "bf16" else torch.float32, machine.device.type == "cpu"
    other_way = recipe.convolution == "auto" and recipe.compile != "always" and on_cpu and not (precision == "bf16" and has_amx()) and has_winograd(net, dtype)
    fuses = recipe.fuse == "auto" and on_cpu
    plan = Plan(
        recipe.steps or recipe.epochs * per_epoch,
        per_epoch,
        precision,
        reason,
        memory=memory,
        segments=segments,
        fused=fuses,
        fusing=reason_against() if fuses else "",
        twice_from=recipe.sam_from if recipe.sam else 1.0,
    )
    pieces, x = recipe.batch_size // machine.world // recipe.micro_batch, x[: recipe.micro_batch]  # x may lack an image that could not be read
    low = recipe.low_resolution or 0.0
    sizes = [x]
    if low:
        sizes.append(interpolate(x, size=low_size(x.shape[2], recipe.low_size), mode="bilinear").contiguous(memory_format=torch.channels_last))
    plan = _timed(plan, net, sizes, recipe, machine, pieces)
    if other_way:  # how fast direct convolutions are, next to matrix products, differs between machines; with AMX, in bf16, they win everywhere
        plan = _better(plan, _timed(replace(plan, winograd=True), net, sizes, recipe, machine, pieces))
    if machine.replays and memory is None:
        plan = _better(plan, _timed(replace(plan, replayed=True), net, sizes, recipe, machine, pieces))
    plan = _compiled(plan, net, sizes, recipe, machine, pieces, seconds)
    use_winograd(net.eval(), plan.winograd, memory is None)
    with torch.no_grad(), machine.autocast(precision):
        forward = _time(lambda: net(x), x)
    machine.release()
    return replace(plan, val_seconds=forward / len(x) * val / machine.world)


def ready(net: ResNet, plan: Plan, recipe: Recipe) -> nn.Module:
    """The net as a step of this plan calls it."""
    norm_together(net, recipe.norm_batch or 0)
    use_winograd(net, plan.winograd, plan.memory is None)
    use_fused(net, plan.fused and not plan.compiled)
    if plan.compiled:
        return torch.compile(net, dynamic=False)  # type: ignore[return-value]
    return Checkpointed(net, plan.segments, plan.memory)


def fit_budget(plan: Plan, recipe: Recipe, seconds: float) -> Plan:
    """The plan with as many steps as fit. Raises CallError when not even one epoch does."""
    steps = plan.steps_within(seconds, recipe.low_resolution or 0.0)
    if steps < plan.steps_per_epoch:
        epoch = plan.seconds(plan.steps_per_epoch, recipe.low_resolution or 0.0)
        raise CallError(
            f"the budget must allow one epoch: that takes about {epoch:.0f} s here and {max(0, seconds):.0f} s are left "
            "after reading the data, the test and the report; raise --budget or choose a smaller net"
        )
    return replace(plan, steps=steps)


def _choose_precision(macs: int, machine: Machine) -> tuple[str, str]:
    """By the speed of a large matrix product, which differs by a factor between machines: noise does not change the choice."""
    if not machine.has_bf16():
        return "fp32", "no bf16 in this hardware"
    if macs < BF16_MACS:
        return "fp32", "the net is small"
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(MATRIX, MATRIX, dtype=dtype, device=machine.device)
        times.append(_time(lambda a=a: a @ a, a))  # type: ignore[misc]
    gain = times[0] / times[1]
    return ("bf16" if gain > BF16_GAIN else "fp32"), f"bf16 multiplies matrices at {gain:.2g} times the speed of fp32 here"


def _timed(plan: Plan, net: ResNet, sizes: list[Tensor], recipe: Recipe, machine: Machine, pieces: int) -> Plan:
    """The plan with what its steps take, at full size and at the reduced one."""
    times = [pieces * _time_step(net, x, recipe, plan, machine) for x in sizes]
    return replace(plan, step_seconds=times[0], low_step_seconds=times[-1])


def _better(plan: Plan, other: Plan) -> Plan:
    return other if other.step_seconds * WORTH < plan.step_seconds else plan


def _compiled(plan: Plan, net: ResNet, sizes: list[Tensor], recipe: Recipe, machine: Machine, pieces: int, seconds: float) -> Plan:
    """The plan with a compiled net where that pays: tried where the gain measured elsewhere repays the trial twice, kept where this net's does.

    What the compiler made is kept on disk for the next training.
    """
    low = recipe.low_resolution or 0.0
    planned = min(seconds, plan.seconds(plan.steps, low))
    kind = machine.device.type
    trial = len(sizes) * COMPILE_SECONDS[kind] * sum(isinstance(module, nn.Conv2d) for module in net.modules())
    if recipe.compile == "never" or plan.winograd or plan.memory is not None:
        return replace(plan, compiling="not with these options")
    if recipe.compile == "auto" and plan.fused and not plan.fusing and any(isinstance(module, Norm) for module in net.modules()):
        return replace(plan, compiling="the kernels in C, which it would replace, were faster wherever both were timed")
    if recipe.compile == "auto" and 2 * trial > planned * (1 - 1 / COMPILE_GAIN[kind]):
        return replace(plan, compiling=f"a trial takes about {trial:.0f} s, the training {planned:.0f}")
    start = time.perf_counter()
    try:
        found = _timed(replace(plan, compiled=True), net, sizes, recipe, machine, pieces)
    except Exception as error:  # of the compiler, of its own kinds: a machine without a C compiler is one
        if recipe.compile == "always":
            raise WorkError(f"the net could not be compiled: {shown(str(error).strip().splitlines()[0])[:200]}; leave out --compile always") from error
        return replace(plan, compiling=f"the compiler failed: {shown(str(error).strip().splitlines()[0])[:120]}")
    took, gain = time.perf_counter() - start, plan.step_seconds / found.step_seconds
    told = f"{gain:.2f} times as fast, tried in {took:.0f} s"
    return replace(found if recipe.compile == "always" or gain > WORTH else plan, compiling=told)


def _time_step(net: ResNet, x: Tensor, recipe: Recipe, plan: Plan, machine: Machine) -> float:
    """Of the net itself, so that what is compiled for it need not be compiled again; afterwards it is as it was."""
    before = copy.deepcopy(net.state_dict())
    optim = optimizer(net.train(), recipe, plan.precision)
    keep_gradients(net)
    targets = one_hot(torch.arange(len(x), device=x.device) % net.spec.num_classes, net.spec.num_classes).float()
    work = Pass(ready(net, plan, recipe), recipe, plan.precision, machine)
    run: Work = ReplayedPass(work) if plan.replayed else work
    update: Callable[[], object] = ReplayedUpdate(optim.step) if plan.replayed else optim.step

    def step() -> None:
        optim.zero_grad(set_to_none=False)
        run(x, targets)
        update()

    try:
        return _time(step, x)
    finally:
        net.zero_grad()
        net.load_state_dict(before)


def _time(work: Callable[[], Any], x: Tensor) -> float:
    """The median of some runs, as many as there is time for, after the first, which pay for new memory, a compiler, a recording."""
    times: list[float] = []
    first, timed = (3, 10) if x.is_cuda else (1, TIMED)
    while len(times) <= first or (len(times) < first + timed and sum(times[first:]) < TIMED_SECONDS):
        start = time.perf_counter()
        work()
        synchronise(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[first:])
