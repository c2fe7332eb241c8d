"""Where do gradients explode, vanish or stay healthy, at the start and in training?

Method: the norm of activations and gradients at every block's output, and of the residual branch and the shortcut apart,
at steps spread evenly on a logarithmic scale: plain and residual nets, with norm and without. Beside them, at the start
only: fully connected nets with batch norm, for which the growth is known exactly, and a plain net without norm whose
weights are too small by the square root of two.

A result shows whether the size of the gradients differs between the nets, and when. It does not show that this decides
which net trains well: He et al. found the norms healthy in plain nets that train badly, and sizes say nothing of
directions (study `shattering`).

    reslab study gradients --budget 2m         digits
    reslab study gradients                     CIFAR-10 at half resolution, ten minutes

It costs training steps only: benchmarks/study_gradients_cost.py measures what a measured step costs more.

Expected: growth of sqrt(pi / (pi - 1)) = 1.2112 a layer in fully connected nets with batch norm and ReLU, and a far smaller
range of gradients after a single step (Yang et al. 2019, 1902.08129; the first steps of a training here are small ones, its
warm-up); with He's weights none without norm, but for what the zeros around small maps take away (He et al. 2015,
1502.01852), and 1 / sqrt(2) of that a layer with weights too small by that much, by arithmetic; healthy gradients in plain
nets with batch norm in training (He et al. 2015, 1512.03385, section 4.1).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import compress
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from reslab.layout import stages
from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.seeds import seeded
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.dense import gradient_norms
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Schedule, Setting, Study, Subject, Verdict
from reslab.study.probe import flowing
from reslab.study.stats import Estimate, estimate, factor, paired, within
from reslab.study.training import outcome, train
from reslab.study.twins import batch_size, deeper, layers, plain, schedule
from reslab.study.untouched import untouched

DENSE = (30, 512, 512)  # layers, width, batch
ENDS = slice(5, -3)  # of the fully connected layers: the growth settles after a few, and the loss has its own gradient
GROWTH = math.sqrt(math.pi / (math.pi - 1))  # 1.2112 a layer
TOLERANCE = 0.02
WEAK = math.sqrt(1 / 2)  # Glorot's weights where fan in and fan out are equal, as a part of He's
DEEP, SHARE, TIMES = 3, 0.4, 40
FAR = 0.5  # of the range at the start is far smaller
HEALTHY = 0.1  # of the last block's gradient is what the first must have, at least
START, AFTER_ONE_STEP, LATE = "at the start", "after one step", "in the second half of the training"


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """First, since they take a second, the dense and the weak nets of all seeds; then for each seed four twins that are watched in training."""
    net = deeper(setting.net, DEEP)
    normed, bare = (replace(net, norm=net.norm if net.norm != "none" else "batch"), replace(net, norm="none"))
    twins = {("plain", True): plain(normed), ("residual", True): normed, ("plain", False): plain(bare), ("residual", False): bare}
    plan = schedule(list(twins.values()), setting, data, pace, SHARE)
    made = [Cell(f"fully connected, seed {seed}", Subject(net, seed), facts={"look": "dense"}) for seed in range(setting.seeds)]
    made += [Cell(f"weak weights, seed {seed}", Subject(plain(bare), seed), facts={"look": "weak"}) for seed in range(setting.seeds)]
    for seed in range(setting.seeds):
        for (twin, norm), spec in twins.items():
            name = f"{twin} {'with' if norm else 'without'} norm, {layers(spec)} layers, seed {seed}"
            made.append(Cell(name, Subject(spec, seed), plan, {"look": "training", "twin": twin, "norm": norm, "layers": layers(spec)}))
    return made


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """Growth of the gradient a layer at the start, or the sizes of all that passes the blocks through a training."""
    match cell.facts["look"]:
        case "dense":
            norms = gradient_norms(*DENSE, generator=seeded(cell.subject.seed))
            yield {"kind": "growth", "rate": math.exp(-_slope(range(len(norms)), norms, ENDS)), "norms": norms}
        case "weak":
            yield from _weak(ready.net, data)
        case _:
            assert cell.training
            with untouched(ready.net):
                rows, losses = watched(ready.net, data, cell.training, cell.subject.seed)
                yield from _rows(rows, ready.net.spec)
                yield from outcome(Ready(ready.net, losses), data)


def watched(net: ResNet, data: Data, plan: Schedule, seed: int) -> tuple[dict[int, dict[Any, float]], list[float]]:
    """Trains in place; gives what `Flow` read at TIMES of the steps, and the losses."""
    wanted = {0, 1} | {round(step) - 1 for step in np.geomspace(1, plan.steps, TIMES)}
    rows: dict[int, dict[Any, float]] = {}

    def look(step: int, loss: float) -> None:
        if step in wanted:
            rows[step] = flow.read()
        flow.on = step + 1 in wanted

    with flowing(net) as flow:
        return rows, train(net, data, plan, seed, watch=look)


def _rows(rows: dict[int, dict[Any, float]], spec: Spec) -> Iterator[Record]:
    """A record a quantity: values by step and block. And the growth a layer at the first step."""
    names = ["stem", *_names(spec)]
    steps = sorted(rows)
    for where in ("out", "branch", "shortcut"):
        for what in ("activation", "gradient"):
            values = [[_short(rows[step].get((name, where, what))) for name in names] for step in steps]
            if any(value is not None for value in values[0]):
                yield {"kind": "flow", "where": where, "what": what, "at": steps, "blocks": names, "values": values}
    yield {"kind": "growth", "rate": rate(rows[0], spec)}


def _weak(net: ResNet, data: Data) -> Iterator[Record]:
    """The growth with He's weights, and with all of them times WEAK: a net without norm and biases only scales."""
    x, y = data.train_batch(np.linspace(0, len(data.train) - 1, batch_size(data)).astype(np.int64))
    with untouched(net), flowing(net) as flow:
        for scale in (1.0, WEAK):
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(scale if p.ndim == 4 else 1)
            net.train()
            cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
            taken = flow.read()
            norms = [taken[name, "out", "gradient"] for name in _names(net.spec)]
            yield {"kind": "growth", "scale": scale, "rate": rate(taken, net.spec), "norms": norms}


def rate(taken: dict[Any, float], spec: Spec) -> float:
    """Growth of the gradient a layer towards the input: fitted to its logarithm within stages, which may differ in level."""
    ups, downs, depth = 0.0, 0.0, 0
    for units in stages(spec):
        at, norms = [], []
        for unit in units:
            depth += len(unit.convs)
            at.append(depth)
            norms.append(taken[unit.name, "out", "gradient"])
        if len(at) > 1 and min(norms) > 0:
            x = np.array(at) - fmean(at)
            ups += float(x @ np.log(norms))
            downs += float(x @ x)
    return math.exp(-ups / downs) if downs else math.nan


def _slope(at: Any, norms: list[float], part: slice) -> float:
    return float(np.polyfit(np.array(at)[part], np.log(norms)[part], 1)[0])


def _names(spec: Spec) -> list[str]:
    return [unit.name for units in stages(spec) for unit in units]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def claims(records: list[Record]) -> list[Claim]:
    """What Yang 2019 and He 2015 say of the sizes of gradients."""
    dense = _logs(records, look="dense")
    conv = _logs(records, look="training", twin="plain", norm=True)
    ratio = paired(_by_seed(records, look="weak", scale=WEAK), _by_seed(records, look="weak", scale=1.0))
    weak = _logs(records, look="weak", scale=WEAK)
    start = spans(records, START)
    once, shrunk = (paired(spans(records, when), start) for when in (AFTER_ONE_STEP, LATE))
    health = estimate(list(heads(records).values()))
    vanish = within(ratio, math.log(WEAK * (1 - TOLERANCE)), math.log(WEAK * (1 + TOLERANCE)))
    return [
        Claim(
            f"Yang 2019: batch norm makes gradients grow by {GROWTH:.4f} a layer towards the input of fully connected nets at the start",
            f"growth a layer: {factor(dense)}; agreement means within {TOLERANCE:.0%}",
            within(dense, math.log(GROWTH * (1 - TOLERANCE)), math.log(GROWTH * (1 + TOLERANCE))),
            dense.n,
        ),
        Claim(
            "Convolutional plain nets with norm explode at the start as well",
            f"growth a layer: {factor(conv)}",
            conv.verdict(),
            conv.n,
        ),
        Claim(
            "Yang 2019: after a single step the range of gradients over stem and blocks is far smaller",
            f"largest over smallest gradient in the plain net with norm, against the start: after one step, the first of a warm-up, times {factor(once)}; "
            f"in the second half of the training times {factor(shrunk)}; far smaller is below {FAR:g}",
            _below(once, FAR),
            once.n,
        ),
        Claim(
            "He 2015: with norm the gradients of the deep plain net do not vanish in training",
            f"gradient at the first block as a part of that at the last, second half of the training: {factor(health)}; vanished is below {HEALTHY:g}",
            _above(health, HEALTHY),
            health.n,
        ),
        Claim(
            "Without norm, weights too small by sqrt(2) make gradients vanish, by 0.71 a layer beyond what He's weights do (by arithmetic: such a net scales)",
            f"growth a layer with weak weights {factor(weak)}; as a part of that with He's weights {factor(ratio)}",
            vanish if weak.is_below_zero or vanish != "agrees" else UNDECIDED,
            ratio.n,
        ),
    ]


def answer(records: list[Record]) -> str:
    """The growths at the start, and what remains of them in training."""
    dense, conv = _logs(records, look="dense"), _logs(records, look="training", twin="plain", norm=True)
    residual = _logs(records, look="training", twin="residual", norm=True)
    start, late = (estimate(list(spans(records, when).values())) for when in (START, LATE))
    if not all(e.n for e in (dense, conv, residual, start, late)):
        return "Some of the nets that are compared were not measured yet."
    return (
        f"At the start, gradients grow by {_times(dense)} a layer towards the input in fully connected nets with batch norm, by {_times(conv)} in the "
        f"plain convolutional net and by {_times(residual)} in the residual one. Over the blocks of the plain net that is a range of {_times(start)}; "
        f"in the second half of its training {_times(late)}."
    )


def spans(records: list[Record], when: str, twin: str = "plain") -> dict[int, float]:
    """Logarithm of the largest over the smallest gradient of stem's and blocks' outputs, with norm."""
    return _over_time(records, twin, when, lambda values: math.log(max(values) / min(values)))


def heads(records: list[Record]) -> dict[int, float]:
    """Logarithm of the first block's gradient over the last's in the plain net with norm, median over the second half."""
    return _over_time(records, "plain", LATE, lambda values: math.log(values[1] / values[-1]))


def _over_time(records: list[Record], twin: str, when: str, of: Any) -> dict[int, float]:
    """Of each seed the value at the start or after one step, or the median over the second half of the training."""
    found = {}
    for r in records:
        if r["kind"] == "flow" and (r["where"], r["what"], r["twin"], r["norm"]) == ("out", "gradient", twin, True):
            wanted = [{START: at == 0, AFTER_ONE_STEP: at == 1, LATE: at >= r["at"][-1] / 2}[when] for at in r["at"]]
            known = [of(values) for values in compress(r["values"], wanted) if all(values)]
            if known and len(r["at"]) > 1:
                found[r["seed"]] = median(known)
    return found


def _by_seed(records: list[Record], **facts: Any) -> dict[int, float]:
    found = [r for r in records if r["kind"] == "growth" and all(r.get(key) == value for key, value in facts.items())]
    return {r["seed"]: math.log(r["rate"]) for r in found if r["rate"]}


def _logs(records: list[Record], **facts: Any) -> Estimate:
    return estimate(list(_by_seed(records, **facts).values()))


def _above(e: Estimate, bound: float) -> Verdict:
    return "agrees" if e.low > math.log(bound) else "disagrees" if e.high < math.log(bound) else UNDECIDED


def _below(e: Estimate, bound: float) -> Verdict:
    return "agrees" if e.high < math.log(bound) else "disagrees" if e.low > math.log(bound) else UNDECIDED


def _times(e: Estimate) -> str:
    value = math.exp(e.mean)
    return f"{value:,.0f} times" if value >= 100 else f"{value:.3g} times"


STUDY = Study(
    question="Where do gradients explode, vanish or stay healthy, at the start and in training?",
    method="Norms of activations and gradients at every block, branch and shortcut apart, in the training of plain and residual nets with and without norm.",
    source="Yang et al. 2019 (1902.08129); He et al. 2015 (1512.03385), section 4.1; He et al. 2015 (1502.01852)",
    shows="whether, where and when the size of gradients differs between the nets",
    limits="that size decides which net trains well: directions matter too, and plain nets with norm train badly with gradients of a healthy size",
    expected="growth of 1.2112 a layer with batch norm, fully connected, at the start; 0.71 a layer with weights too small by sqrt(2), by arithmetic",
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
)
