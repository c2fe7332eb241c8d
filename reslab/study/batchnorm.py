"""Does batch norm help because it keeps the layers' inputs stable, or because it smooths the loss?

Method: a shallow plain net and its residual twin, each with batch norm, without, and with batch norm followed by noise
whose distribution changes at every step. Now and then in training the weights are moved along the gradient of the step by
half to four times the learning rate: how far the loss ranges, how much the gradient changes, and how much at most for the
way gone (effective beta-smoothness). Then they are put back: the training goes on as if nobody had looked (Santurkar et
al. 2018, sections 2.1 and 3.2). How stable a layer's inputs are is how much the mean of each activation over the batch
moves from one step to the next, in deviations.

Without norm a net first sits on a plateau, where nothing changes and it learns nothing; probes count from where its loss is
a tenth below guessing.

A result shows which of the two goes with fast training. It does not show that smoothness causes it. The nets without norm
have biases and no scales, and the same learning rate: one at which all of them train.

    reslab study batchnorm --budget 2m         digits

Expected: the paper has curves and no numbers (figures 2 and 4): without batch norm the loss ranges wider, gradients change
more, and the smoothness is worse all through training; noisy batch norm trains almost as fast as batch norm.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import fmean, median
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.seeds import seed_of
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Schedule, Setting, Study, Subject, Verdict
from reslab.study.line import along_gradient
from reslab.study.noise import noisy
from reslab.study.stats import Estimate, paired
from reslab.study.training import BLOW_UP, LAYERS, Watch, augmented, image_order, lr_at, outcome, train
from reslab.study.twins import deeper, layers, plain, schedule

SCORES = 41  # stream of random numbers: the noise while errors are measured
SHALLOW = 1 / 3  # of the blocks: 8 layers of 20, as deep as the paper's VGG
STEPS = (0.5, 1.0, 2.0, 3.0, 4.0)  # times the learning rate
PROBES = 20  # in a training
RATE = 0.02  # at which all six train
SHARE = 0.32  # of the budget for training steps; probes and noise take the rest
NORMS = ("batch", "none", "noisy")
LEARNING = 0.9  # of the loss of guessing: below it a net has left the plateau that it starts on
A_THIRD = 1 / 3
PAPER_STEPS = 15_000  # of the training that the paper shows


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """Both shapes with every norm, for every seed, seeds outermost."""
    net = replace(deeper(setting.net, SHALLOW), norm="batch")
    shapes = {"plain": plain(net), "residual": net}
    made = [(shape, norm, _with(spec, norm)) for shape, spec in shapes.items() for norm in NORMS]
    plan = schedule([spec for *_, spec in made], setting, data, pace, SHARE, lr=RATE, warmup=0.0, milestones=(1.0, 1.0))  # a constant rate
    if setting.is_paper:
        plan = replace(plan, steps=PAPER_STEPS)
    return [
        Cell(f"{shape}, {norm}, seed {seed}", Subject(spec, seed), plan, {"shape": shape, "norm": norm, "layers": layers(spec)})
        for seed in range(setting.seeds)
        for shape, norm, spec in made
    ]


def _with(spec: Spec, norm: str) -> Spec:
    return replace(spec, norm="none" if norm == "none" else "batch")


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """Trains the net and looks along its gradient on the way; then its errors, and how fast it got there."""
    plan, seed = cell.training, cell.subject.seed
    assert plan
    probes: list[Record] = []
    with noisy(ready.net) if cell.facts["norm"] == "noisy" else nullcontext(), torch.random.fork_rng():
        with Drift(ready.net) as drift:
            losses = train(ready.net, data, plan, seed, _watch(ready.net, data, plan, seed, drift, probes))
        torch.manual_seed(seed_of(seed, SCORES))
        scored = outcome(Ready(ready.net, losses), data)
    yield from [*scored, *probes]
    guess = math.log(data.facts.classes)
    counted = [loss if loss < BLOW_UP else guess for loss in losses] + [guess] * (plan.steps - len(losses))  # a lost training guesses from there on
    yield {"kind": "speed", "mean_loss": fmean(counted[: plan.steps]), "drift": fmean(drift.found) if drift.found else math.nan}


def _watch(net: ResNet, data: Data, plan: Schedule, seed: int, drift: "Drift", probes: list[Record]) -> Watch:
    """Probes every so many steps, with the step's own images and noise."""
    order, every = image_order(len(data.train), plan, seed), max(1, plan.steps // PROBES)

    def watch(step: int, found: float) -> None:
        if step % every or not found < BLOW_UP:
            return
        x, y = augmented(data, order[step], plan, seed, step, next(net.parameters()).device)
        sizes = [factor * lr_at(plan, step) for factor in STEPS]

        def loss() -> Tensor:
            torch.manual_seed(seed_of(seed, LAYERS, step))
            return cross_entropy(net(x), y)

        with drift.paused():
            probe = along_gradient(net, loss, sizes)
        told = {"range": probe.range, "change": max(probe.changes), "smoothness": probe.smoothness(sizes)}
        probes.append({"kind": "probe", "step": step, "learning": found < LEARNING * math.log(data.facts.classes), "sizes": sizes, **told, **probe._asdict()})

    return watch


class Drift:
    """How much the inputs of the ReLUs of a net move from one training step to the next, while it is entered.

    `found` has a number for each ReLU and step: the root mean square change, over all activations, of an activation's mean
    over the batch, by the root of the mean variance. Other images alone make about sqrt(2 / batch size) of it.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.found, self.resting = net, list[float](), False
        self.before: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> Self:
        self.hooks = [module.register_forward_pre_hook(self._see) for module in self.net.modules() if isinstance(module, nn.ReLU)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is no step."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

    def _see(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if self.resting or not module.training:
            return
        x = inputs[0].detach()
        mean, n = x.mean(0), len(x)
        if module in self.before:
            variance = (x.square().mean() - mean.square().mean()) * n / max(1, n - 1)  # the mean of x.var(0), which is slow in this layout
            moved = (mean - self.before[module]).square().mean() / variance.clamp_min(1e-12)
            self.found.append(moved.sqrt().item())
        self.before[module] = mean


MEASURES = {
    "the loss ranges wider along the gradient": "range",
    "the gradient changes more along itself": "change",
    "the effective smoothness is worse": "smoothness",
}


def claims(records: list[Record]) -> list[Claim]:
    """For each shape what smooths the loss, what keeps inputs stable, and which of the two goes with speed."""
    return [claim for shape in dict.fromkeys(r["shape"] for r in records) for claim in _of_shape([r for r in records if r["shape"] == shape], shape)]


def _of_shape(records: list[Record], shape: str) -> list[Claim]:
    made = []
    for said, key in MEASURES.items():
        more = paired(typical(records, "none", key), typical(records, "batch", key))
        made.append(Claim(f"Without batch norm {said} ({shape})", f"without over with, median while a net learns: {_factor(more)}", more.verdict(), more.n))
    moved = paired(of_seeds(records, "noisy", "drift"), of_seeds(records, "none", "drift"))
    stirred = f"change of inputs from step to step, in their deviations, noisy batch norm beyond no norm: {_interval(moved)}"
    made.append(Claim(f"Noise behind batch norm makes inputs less stable than no norm at all ({shape})", stirred, moved.verdict(), moved.n))
    slower, gap = _speeds(records)
    paced = f"mean training loss, beyond batch norm's: noisy {_interval(slower)}; without {_interval(gap)}"
    made.append(Claim(f"It trains almost as fast as batch norm all the same ({shape})", paced, _as_fast(slower, gap), min(slower.n, gap.n)))
    return made


def _speeds(records: list[Record]) -> tuple[Estimate, Estimate]:
    """The mean training loss with noise, and without norm, beyond that with batch norm."""
    batch = of_seeds(records, "batch", "mean_loss")
    return paired(of_seeds(records, "noisy", "mean_loss"), batch), paired(of_seeds(records, "none", "mean_loss"), batch)


def _as_fast(slower: Estimate, gap: Estimate) -> Verdict:
    """That no difference was found is no agreement: the noise must cost at most a third of what leaving batch norm out costs."""
    if slower.is_below_zero or (gap.is_above_zero and slower.mean <= A_THIRD * gap.mean and slower.high < gap.low):
        return "agrees"
    return "disagrees" if slower.is_above_zero and slower.low > A_THIRD * gap.high else UNDECIDED


def answer(records: list[Record]) -> str:
    """Smoothness and speed, shape by shape."""
    said = []
    for shape in dict.fromkeys(r["shape"] for r in records):
        mine = [r for r in records if r["shape"] == shape]
        rough = paired(typical(mine, "none", "smoothness"), typical(mine, "batch", "smoothness"))
        slower, gap = _speeds(mine)
        if rough.n and slower.n and gap.n:
            said.append(
                f"without batch norm the {shape} net's gradient changes {math.exp(rough.mean):.2g} times as fast on its way, and its mean training loss is "
                f"{gap.mean:+.2f} against batch norm's; with noise behind batch norm it is {slower.mean:+.2f}"
            )
    return ". ".join(text[0].upper() + text[1:] for text in said) + "." if said else "Too few cells were measured to say."


def typical(records: list[Record], norm: str, key: str) -> dict[int, float]:
    """By seed, the logarithm of the median over the probes of a training while it learns; seeds without a finite one are left out."""
    by_seed: dict[int, list[float]] = {}
    for r in records:
        if (r["kind"], r["norm"]) == ("probe", norm) and r["learning"]:
            by_seed.setdefault(r["seed"], []).append(math.inf if r[key] is None else r[key])
    medians = {seed: median(values) for seed, values in by_seed.items()}
    return {seed: math.log(m) for seed, m in medians.items() if 0 < m < math.inf}


def of_seeds(records: list[Record], norm: str, key: str) -> dict[int, float]:
    """By seed, what the `speed` records of a norm say."""
    return {r["seed"]: r[key] for r in records if (r["kind"], r["norm"]) == ("speed", norm) and r[key] is not None}


def _factor(e: Estimate) -> str:
    if not e.has_interval:
        return f"{math.exp(e.mean):.3g} times (n = {e.n})" if e.n else "no seed"
    return f"{math.exp(e.mean):.3g} times (95 % interval {math.exp(e.low):.3g} to {math.exp(e.high):.3g}, n = {e.n})"


def _interval(e: Estimate) -> str:
    if not e.has_interval:
        return f"{e.mean:+.3f} (n = {e.n})" if e.n else "no seed"
    return f"{e.mean:+.3f} (95 % interval {e.low:+.3f} to {e.high:+.3f}, n = {e.n})"


STUDY = Study(
    question="Does batch norm help because it keeps the layers' inputs stable, or because it smooths the loss?",
    method="Shallow plain and residual nets with batch norm, without norm, and with batch norm followed by noise whose distribution changes at every step; the "
    "same images, steps, seeds and learning rate. Every so many steps the weights are moved along the gradient by half to four times the learning rate, "
    "and put back; what is seen counts from where the loss is a tenth below guessing, since without norm a net first sits on a plateau.",
    source="Santurkar et al. 2018 (1805.11604), sections 2.1 and 3.2, figures 2 and 4",
    shows="whether a smooth loss or stable inputs go with fast training",
    limits="that smoothness is the cause, nor what happens at learning rates at which a net without norm does not train",
    expected="the paper has curves, no numbers: without batch norm the loss ranges wider, the gradient changes more and the smoothness is worse all through "
    "training; with noise behind batch norm the net trains almost as fast as with batch norm",
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
)
