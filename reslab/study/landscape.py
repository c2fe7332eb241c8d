"""What does the loss look like around a trained net, with and without skips?

Method: the loss of training images, never augmented, on a plane through the trained weights and along more random lines,
in [-1, 1] times directions whose filters are as long as the trained ones; biases and batch norm stay. Eval mode with the
trained running statistics, as in the authors' code (tomgoldstein/loss-landscape, evaluation.py). Beside it both ends of the
spectrum of the Hessian by steps in those lengths (Li et al. 2018). A cell is one row of the plane, so that what is there is kept.

A result shows how the loss rises around one minimiser, in a few random directions out of hundreds of thousands: a dent
in them is a dent, a bowl in them does not prove that there is none elsewhere. Twins share their random numbers. How far the
weights can be moved is told by how much the loss rises, not by where it gets to, so that a net that trained worse does not
look sharper for it.

    reslab study landscape runs/a runs/b       trained runs, such as a net and its plain twin
    reslab study landscape --budget 2m         twins on digits, trained in a third of the time

Expected (CIFAR-10; the paper, section 6): at 20 layers both surfaces are benign; at 56 and 110 layers the nets without
skips lie in a chaotic surface, the ones with skips do not. Their test errors, with / without: 20 7.37 / 8.18, 56
5.89 / 13.31, 110 5.79 / 16.44 %.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reslab.interval import wilson
from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.seeds import seeded
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.hessian import hessian_product, lanczos
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Setting, Study, Verdict
from reslab.study.stats import Estimate, estimate, paired, points
from reslab.study.surface import Batches, along, direction, filters, for_surface, lengths, mean_loss
from reslab.study.training import SCORED, errors
from reslab.study.twins import batch_size, layers, plain, trained

SAMPLE, DIRECTION, START = 31, 32, 33  # streams of random numbers
TRAINING, MEASURING = 0.3, 0.4  # shares of the budget; where nets are given, both are for measuring
LINES = 4  # beside the plane's own directions
HESSIANS, PRODUCTS, PRODUCT_COST = 3, 15, 20  # disjoint samples; Lanczos steps; forward passes that a product takes
FORWARD = 0.3  # of an image's training step
EXTREMES = 5  # eigenvalues of either end that are kept
BATCH = 125
SHALLOW = 20  # layers, up to which the paper finds both surfaces benign
BENIGN = 0.1  # of the steps away from the minimiser; a surface where the loss falls more often is none
FALL = 0.01  # of a loss, at least, is a fall: less is no chaos


class Plan(NamedTuple):
    """Points along a side of the plane, and images that the loss is taken over; the Hessian's over a tenth of them."""

    side: int
    images: int

    @property
    def looks(self) -> float:
        """Forward passes of single images, for one net."""
        return self.images * (self.side**2 + LINES * self.side) + HESSIANS * self.few * PRODUCTS * PRODUCT_COST

    @property
    def few(self) -> int:
        return max(8, self.images // 10)


PLANS = (Plan(25, 1000), Plan(17, 1000), Plan(17, 500), Plan(13, 500), Plan(9, 500), Plan(9, 250), Plan(9, 100), Plan(7, 30))


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """For every net its errors, lines and Hessians; then the rows of all planes, coarse ones first, so that a picture comes early."""
    nets = trained({"residual": setting.net, "plain": plain(setting.net)}, setting, data, pace, TRAINING)
    plan = Plan(51, len(data.train)) if setting.is_paper else _plan([net.spec for net in nets.values()], setting, data, pace)
    facts = {"side": plan.side, "images": min(plan.images, len(data.train))}
    parts = [("errors", 0), *(("line", k) for k in range(LINES)), *(("hessian", k) for k in range(HESSIANS))]
    rows = sorted((("row", k) for k in range(plan.side)), key=lambda row: -next(step for step in (8, 4, 2, 1) if row[1] % step == 0))
    return [
        Cell(
            f"{name}, {part} {number}",
            net,
            facts={**facts, "net": name, "skips": net.spec.shortcut != "none", "layers": layers(net.spec), "part": part, "number": number},
        )
        for wanted in (parts, rows)
        for part, number in wanted
        for name, net in nets.items()
    ]


def _plan(specs: list[Spec], setting: Setting, data: Data, pace: Pace) -> Plan:
    """The finest plan that fits."""
    scored, batch = len(data.test) + min(SCORED, len(data.train)), batch_size(data)
    each = FORWARD * sum(pace(spec, batch) for spec in specs) / batch
    share = MEASURING + TRAINING * bool(setting.given)
    return next((plan for plan in PLANS if each * (plan.looks + scored) <= share * setting.seconds * min(setting.jobs, len(specs) * plan.side)), PLANS[-1])


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """What the cell's part says: the net's errors, its loss along a line or a row of the plane, or its Hessian's spectrum."""
    part, number = cell.facts["part"], cell.facts["number"]
    if part == "errors":
        yield {"kind": "errors", "steps": len(ready.losses), **errors(for_surface(ready.net, data.facts.size), data)}
    elif part == "hessian":
        yield {"kind": "hessian", **_spectrum(ready.net, data, cell.facts["images"], number)}
    else:
        at = np.linspace(-1, 1, cell.facts["side"]).tolist()
        moves = (0, 1) if part == "row" else (2 + number,)
        moved = [(a, at[number]) if part == "row" else (a,) for a in at]
        yield {"kind": part, "at": at, "classes": data.facts.classes, "loss": _losses(ready.net, data, cell.facts["images"], moves, moved)}


def _losses(net: ResNet, data: Data, images: int, moves: tuple[int, ...], moved: Sequence[tuple[float, ...]]) -> list[float]:
    net = for_surface(net, data.facts.size)
    weights = filters(net)
    directions = [direction(weights, seeded(DIRECTION, move)) for move in moves]
    batches = _batches(data, np.sort(_sample(data)[:images]))
    return along(weights, directions, moved, lambda: mean_loss(net, batches))


def _spectrum(net: ResNet, data: Data, images: int, number: int) -> Record:
    """Both ends of the Hessian's spectrum on a few images of the sample, others for each number."""
    few = Plan(0, images).few
    batches = _batches(data, _sample(data)[number * few : (number + 1) * few])
    net = copy.deepcopy(net).eval()
    weights = filters(net)
    product, scale = hessian_product(net, weights, batches), lengths(weights)
    found = lanczos(lambda vector: scale * product(scale * vector), len(scale), PRODUCTS, seeded(START, number))
    ends = {"largest": slice(None, -EXTREMES - 1, -1), "smallest": slice(None, EXTREMES)}
    return {"of": few, **{f"{name}{what}": found[i][cut].tolist() for name, cut in ends.items() for i, what in enumerate(("", "_within"))}}


def _sample(data: Data) -> NDArray[np.int64]:
    return np.random.default_rng([SAMPLE]).permutation(len(data.train))


def _batches(data: Data, items: NDArray[np.int64]) -> Batches:
    return [data.train_batch(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]


def reach(line: Record) -> float:
    """How far from the minimiser the loss has risen by that of guessing, on the mean of both sides; at most 1.

    The loss of guessing is the logarithm of the number of classes; between points the loss grows exponentially.
    """
    middle = len(line["at"]) // 2
    loss = [math.inf if v is None else v for v in line["loss"]]
    level = loss[middle] + math.log(line["classes"])
    return fmean(_crossing(line["at"][middle:], side, level) for side in (loss[middle:], loss[middle::-1]))


def _crossing(at: list[float], loss: list[float], level: float) -> float:
    for i in range(1, len(loss)):
        if loss[i] >= level:
            share = math.log(level / loss[i - 1]) / math.log(loss[i] / loss[i - 1]) if math.isfinite(loss[i]) and loss[i - 1] > 0 else 0.0
            return float(at[i - 1] + share * (at[i] - at[i - 1]))
    return float(at[-1])


def falls(line: Record) -> float:
    """The share of the steps away from the minimiser in which the loss falls, by FALL at least: none on a bowl, half in chaos."""
    middle, loss = len(line["loss"]) // 2, [math.inf if v is None else v for v in line["loss"]]
    steps = [b < (1 - FALL) * a for side in (loss[middle:], loss[middle::-1]) for a, b in pairwise(side)]
    return steps.count(True) / len(steps)


def claims(records: list[Record]) -> list[Claim]:
    """What the paper says of flatness and of chaos. Lines are paired by direction, Hessians by their images."""
    skips, none = twins(records)
    deep = max((r["layers"] for r in records if r["net"] == skips), default=0) > SHALLOW
    where = "" if deep or not skips else f"; the paper says it of nets deeper than {SHALLOW} layers"
    further = paired(of_lines(records, skips, reach), of_lines(records, none, reach))
    sharper = paired(_log_sharpness(records, none), _log_sharpness(records, skips))
    pair = f"{skips} beyond {none}" if skips else "no nets of one depth with and without skips"
    return [
        Claim(
            "In deep nets skips promote flat minimisers: with them the weights can be moved further",
            f"distance, in lengths of the filters, until the loss has risen by that of guessing, {pair}: {_interval(further)}{where}",
            further.verdict() if deep else UNDECIDED,
            further.n,
        ),
        Claim(
            "In deep nets skips promote flat minimisers: without them the Hessian's largest eigenvalue is larger (this project's reading)",
            f"by steps in lengths of the filters, {f'{none} over {skips}' if skips else pair}: {_factor(sharper)}{where}",
            sharper.verdict() if deep else UNDECIDED,
            sharper.n,
        ),
        _benign(records) if _depth(records) <= SHALLOW else _chaos(records),
    ]


def _benign(records: list[Record]) -> Claim:
    found = {net: _falling(records, net) for net in names(records)}
    measured = "; ".join(f"{net} {100 * e.mean:.1f} % (95 % interval {100 * e.low:.1f} to {100 * e.high:.1f})" for net, e in found.items() if e.has_interval)
    n = min((e.n for e in found.values()), default=0)
    verdict: Verdict = UNDECIDED
    if n > 1 and any(e.low > BENIGN for e in found.values()):
        verdict = "disagrees"
    elif n > 1 and all(e.high < BENIGN for e in found.values()):
        verdict = "agrees"
    said = f"steps away from the minimiser in which the loss falls (benign: below {100 * BENIGN:.0f} %): {measured or 'no lines'}"
    both = ", with and without skips" if len({r["skips"] for r in records}) > 1 else ""
    return Claim(f"Up to {SHALLOW} layers the surface is benign{both}", said, verdict, n)


def _falling(records: list[Record], net: str) -> Estimate:
    """The share of steps in which the loss falls, by Student's t over the lines, but no surer than so many steps can be (Wilson)."""
    e = estimate(list(of_lines(records, net, falls).values()))
    steps = sum(of_lines(records, net, lambda line: len(line["loss"]) - 1).values())
    low, high = wilson(e.mean * steps, steps)
    return e._replace(low=min(e.low, low), high=max(e.high, high))


def _chaos(records: list[Record]) -> Claim:
    skips, none = twins(records)
    more = paired(of_lines(records, none, falls), of_lines(records, skips, falls))
    return Claim(
        "Skips prevent the transition to chaos that depth brings: without them the loss rises and falls",
        f"steps away from the minimiser in which the loss falls, without skips beyond with: {points(more)}",
        more.verdict(),
        more.n,
    )


def answer(records: list[Record]) -> str:
    """How far each net can be moved, and its sharpest direction."""
    found = {net: (of_lines(records, net, reach), _log_sharpness(records, net)) for net in names(records)}
    known = {net: (fmean(far.values()), math.exp(fmean(sharp.values()))) for net, (far, sharp) in found.items() if far and sharp}
    if not known:
        return "Too few cells were measured to say."
    far = ", ".join(f"{net} {distance:.2f}" for net, (distance, _) in known.items())
    sharp = ", ".join(f"{net} {curvature:.3g}" for net, (_, curvature) in known.items())
    return (
        f"How far the weights can be moved at random until the loss has risen by that of guessing, in lengths of a net's filters: {far}. "
        f"Largest curvature, in these lengths: {sharp}."
    )


def names(records: list[Record]) -> list[str]:
    """The nets, in the order in which they were planned."""
    return list(dict.fromkeys(r["net"] for r in records))


def twins(records: list[Record]) -> tuple[str, str]:
    """The deepest nets of equal depth with and without skips; empty where there are none."""
    nets = {(r["layers"], r["skips"]): r["net"] for r in records}
    depths = [depth for depth, skips in nets if skips and (depth, False) in nets]
    return (nets[max(depths), True], nets[max(depths), False]) if depths else ("", "")


def of_lines(records: list[Record], net: str, value: Callable[[Record], float]) -> dict[int, float]:
    """A value of every line of a net, by its direction."""
    return {r["number"]: value(r) for r in records if (r["kind"], r["net"]) == ("line", net)}


def _log_sharpness(records: list[Record], net: str) -> dict[int, float]:
    found = {r["number"]: r["largest"][0] for r in records if (r["kind"], r["net"]) == ("hessian", net)}
    return {number: math.log(value) for number, value in found.items() if value and value > 0}


def _depth(records: list[Record]) -> int:
    return max((int(r["layers"]) for r in records), default=0)


def _interval(e: Estimate) -> str:
    return f"{e.mean:+.3f} (95 % interval {e.low:+.3f} to {e.high:+.3f}, n = {e.n} directions)" if e.has_interval else f"n = {e.n}"


def _factor(e: Estimate) -> str:
    if not e.has_interval:
        return f"n = {e.n}"
    return f"{math.exp(e.mean):.3g} times (95 % interval {math.exp(e.low):.3g} to {math.exp(e.high):.3g}, n = {e.n} samples of images)"


STUDY = Study(
    question="What does the loss look like around a trained net, with and without skips?",
    method="The loss of training images, in eval mode with the trained running statistics, on a plane and on lines of random directions whose filters are "
    "as long as the trained ones, in [-1, 1]; both ends of the spectrum of its Hessian by steps in these lengths, by Lanczos iteration, on three smaller "
    "samples.",
    source="Li et al. 2018 (1712.09913), sections 4 to 6",
    shows="how the loss rises around a minimiser in random directions, and how sharp its sharpest direction is",
    limits="more than one minimiser of each net, and a few directions of very many; and twins that trained shortly are compared where they got to",
    expected="CIFAR-10 test error with / without skips: 20 layers 7.37 / 8.18, 56 layers 5.89 / 13.31, 110 layers 5.79 / 16.44 %; at 20 layers both surfaces "
    "are benign, at 56 and 110 the one without skips is chaotic",
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
    shipped=("resnet20-cifar10", "plain20-cifar10"),
    live=True,
)
