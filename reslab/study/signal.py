"""How strong are branch and shortcut at the start, and the layers' responses after training?

Method: at the start, the mean square of the residual branch and of the shortcut where each block adds them, in train mode
on real images, with norm and without: in the pre-activation net of a single stage that the theory is about, and in the
net itself. (Over random weights these activations have mean zero: their mean square is their variance.) After training,
the standard deviation of the response of every convolution, behind its norm and before ReLU and addition, by depth; batch
norm has the statistics of the images measured.

A result shows how much a block changes what passes it: at the start by its initialisation, later by what it learned. It
does not show that small branches are what makes deep nets trainable; study `init` removes the norm and keeps them small.

    reslab study signal --budget 2m            digits
    reslab study signal RUN RUN                responses in nets that are trained already

Expected: with batch norm the branch is about 1 / sqrt(depth) of the shortcut at depth-th block, since each adds one unit
of variance; without norm both are alike, and the variance doubles in each block (De & Smith 2020, 2002.10444).
After training, the responses of residual nets are smaller than those of plain ones, and those of deeper residual nets
smaller than those of shallower ones (He et al. 2015, 1512.03385, figure 7). Behind batch norm all are 1 at the start, and
weight decay alone takes some thousandths off in a short training: smaller means by a twentieth here, in nets that have trained.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.seeds import seed_of
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.kinds import ROOM, UNDECIDED, Cell, Claim, Pace, Ready, Setting, Study, Subject, Verdict
from reslab.study.probe import additions, outputs, responses, settle
from reslab.study.stats import Estimate, estimate, factor, paired, with_interval, within
from reslab.study.twins import deeper, layers, numbered, plain, schedule
from reslab.study.untouched import untouched

DEPTHS, PAPER_DEPTHS = (1, 3), (1, 3, 6)  # times the net's: figure 7 has 20, 56 and 110 layers
DEEP, SHARE = 3, 0.45
WIDTH = 64  # of the single stage, at most: the narrower, the more it is chance
PIXELS, MOST, LEAST = 128 * 16**2, 256, 16  # of all images together; images
SLOPE, TOLERANCE = -0.5, 0.15  # of the branch's share against depth, both logarithms
FIRST = 2  # block from which the share is fitted
DRAW = 41  # stream of random numbers: dropped paths at the start
APART = 0.05  # of a response is what two must differ by


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """For each seed four nets at the start, and twins of every depth after the same training; given nets instead of these."""
    base = next((net.spec for net in setting.given if net.spec.shortcut != "none"), setting.net)
    made, trained = [], _trained(setting, data, pace)
    for seed in range(setting.seeds):
        made += [cell for cell in trained if cell.subject.seed == seed]
        for order, net in (("single stage", single_stage(base)), ("the net", deeper(base, 1 if setting.given else DEEP))):
            for norm in (net.norm if net.norm != "none" else "batch", "none"):
                facts = {"look": "start", "order": order, "norm": norm != "none"}
                start = replace(net, norm=norm, init="he", zero_init=False)
                made.append(Cell(f"{order}, norm {norm}, seed {seed}", Subject(start, seed), facts=facts))
    return made


def single_stage(net: Spec) -> Spec:
    """The deep pre-activation net of equal blocks, without any halving, that the theory is about."""
    depths, widths = (DEEP * sum(net.depths),), (min(WIDTH, net.widths[-1]),)
    net = replace(net, antialias=False, init="he", zero_init=False, stem_width=0)
    return replace(net, order="preact", stem="conv3", depths=depths, widths=widths, shortcut="A", stride="none", carry="identity")


def _trained(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    if setting.given:
        return [
            Cell(f"{net.name}, trained", Subject(net.spec, weights=net.weights), facts=_facts(twin, net.spec, pair))
            for twin, pair, net in numbered(setting.given)
        ]
    nets = [deeper(setting.net, factor) for factor in (PAPER_DEPTHS if setting.is_paper else DEPTHS)]
    twins = [(twin, spec) for net in nets for twin, spec in (("plain", plain(net)), ("residual", net))]
    plan = schedule([spec for _, spec in twins], setting, data, pace, SHARE)
    return [
        Cell(f"{twin} {layers(spec)} layers, trained, seed {seed}", Subject(spec, seed, plan), facts=_facts(twin, spec, seed))
        for seed in range(setting.seeds)
        for twin, spec in twins
    ]


def _facts(twin: str, spec: Spec, pair: int) -> Record:
    return {"look": "trained", "twin": twin, "layers": layers(spec), "pair": pair}


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """Mean squares at the additions of a net at its start, or the standard deviations of a trained net's responses."""
    if cell.facts["look"] == "start":
        yield {"kind": "addition", **at_additions(ready.net, _images(data, data.train), cell.subject.seed)}
    else:
        found, answers = responding(ready.net, _images(data, data.test))
        error = float(np.mean(answers != _few(data, data.test_labels)))
        yield {"kind": "response", "deviations": found, "steps": len(ready.losses), "error": error, "chance": 1 - 1 / data.facts.classes}


def _images(data: Data, pixels: NDArray[np.uint8]) -> Tensor:
    return data.normalised(_few(data, pixels))


def _few(data: Data, rows: NDArray[Any]) -> NDArray[Any]:
    """Evenly spaced ones."""
    count = min(MOST, max(LEAST, PIXELS // data.facts.size**2))
    return rows[:: max(1, -(-len(rows) // count))]


@torch.no_grad()
def at_additions(net: ResNet, x: Tensor, seed: int = 0) -> dict[str, list[float]]:
    """Mean squares of branch and shortcut at each addition, in train mode."""
    with untouched(net), additions(net) as held:
        torch.manual_seed(seed_of(seed, DRAW))
        net.train()(x)
    return {path: [_mean_square(pair[i]) for pair in held.values()] for i, path in enumerate(("branch", "shortcut"))}


@torch.no_grad()
def responding(net: ResNet, x: Tensor) -> tuple[list[float], NDArray[np.int64]]:
    """Standard deviation of the response of each convolution on the longest path, in eval mode; and what the net answers.

    Batch norm has the statistics of these images: after a short training its running ones lag behind the weights, and in a
    deep plain net that multiplies from layer to layer.
    """
    modules = responses(net)
    with untouched(net):
        settle(net, x)
        with outputs(modules) as held:
            answers = net(x).argmax(1).numpy()
    return [float(held[name].std()) for name in modules], answers


def _mean_square(x: Tensor) -> float:
    return float(x.double().square().mean())


def share_slope(record: Record) -> float:
    """Slope of log(branch / shortcut) against log(block), blocks counted from 1, of their root mean squares."""
    share = [0.5 * math.log(b / s) for b, s in zip(record["branch"], record["shortcut"], strict=True)][FIRST - 1 :]
    return float(np.polyfit(np.log(np.arange(FIRST, FIRST + len(share))), share, 1)[0])


def last_share(record: Record) -> float:
    """Branch over shortcut at the last block, as root mean squares."""
    return math.sqrt(record["branch"][-1] / record["shortcut"][-1])


def growth(record: Record) -> float:
    """Logarithm of the factor by which the shortcut's variance grows from one block to the next, on average."""
    return math.log(record["shortcut"][-1] / record["shortcut"][0]) / max(1, len(record["shortcut"]) - 1)


def claims(records: list[Record]) -> list[Claim]:
    """What De & Smith derive for the start, and what He's figure 7 shows after training."""
    normed, bare = _start(records, True), _start(records, False)
    slope = estimate([share_slope(r) for r in normed])
    blocks = next((len(r["branch"]) for r in [*normed, *bare]), 0)
    shares = [estimate([math.log(last_share(r)) for r in rows]) for rows in (normed, bare)]
    doubling = estimate([growth(r) for r in bare])
    apart = paired({r["seed"]: math.log(last_share(r)) for r in bare}, {r["seed"]: math.log(last_share(r)) for r in normed})
    return [
        Claim(
            "De & Smith 2020: with batch norm the branch is scaled down, relative to the shortcut, by about the square root of the depth",
            f"the branch's share falls as depth to the power {with_interval(slope)}; agreement means within {TOLERANCE:g} of {SLOPE:g}"
            + (f". At block {blocks}: branch over shortcut {factor(shares[0])}, 1 / sqrt({blocks}) is {blocks**-0.5:.3g}" if blocks else ""),
            within(slope, SLOPE - TOLERANCE, SLOPE + TOLERANCE),
            slope.n,
        ),
        Claim(
            "Without norm it is not, and the variance grows exponentially",
            f"branch over shortcut at block {blocks}: {factor(shares[1])}, times {factor(apart)} that with norm. The variance grows by {factor(doubling)} a "
            "block; doubling is expected, less what the zeros around the maps take away",
            apart.verdict() if doubling.is_above_zero or not apart.is_above_zero else UNDECIDED,
            apart.n,
        ),
        *_figure_7(records),
    ]


def _figure_7(records: list[Record]) -> list[Claim]:
    depths = sorted({r["layers"] for r in records if r["kind"] == "response"})
    deep, shallow = (depths[-1], depths[0]) if depths else (0, 0)
    made = [
        _smaller(
            "He 2015: after training, residual nets have smaller responses than plain ones",
            "residual over plain",
            records,
            ("residual", deep),
            ("plain", deep),
        )
    ]
    said = "He 2015: the deeper the residual net, the smaller its responses"
    if deep == shallow:
        return [*made, Claim(said, "not measured: one depth", UNDECIDED, 0)]
    return [*made, _smaller(said, f"{deep} over {shallow} layers", records, ("residual", deep), ("residual", shallow))]


def _smaller(said: str, what: str, records: list[Record], one: tuple[str, int], other: tuple[str, int]) -> Claim:
    """Decided by a difference of more than APART, between nets that have trained."""
    ratio, unit = _between(records, one, other)
    nets = [r for r in records if r["kind"] == "response" and (r["twin"], r["layers"]) in (one, other)]
    trained = sum(r["error"] + ROOM <= r["chance"] for r in nets)
    bound = math.log1p(-APART)
    verdict: Verdict = "agrees" if ratio.high < bound else "disagrees" if ratio.low > -bound else UNDECIDED
    measured = f"standard deviation, {what}: {factor(ratio)}, over {unit}; smaller means by {APART:.0%}; {trained} of {len(nets)} nets have trained"
    return Claim(said, measured, verdict if trained == len(nets) else UNDECIDED, ratio.n)


def answer(records: list[Record]) -> str:
    """The shares at the last block with and without norm, and the responses after training."""
    normed, bare = (_start(records, norm) for norm in (True, False))
    shares = [f"{geometric_mean(map(last_share, rows)):.2g}" if rows else "unknown" for rows in (normed, bare)]
    said = f"At the start the branch of the last block is {shares[0]} of the shortcut with norm, {shares[1]} without."
    deep = max((r["layers"] for r in records if r["kind"] == "response"), default=0)
    apart, _ = _between(records, ("residual", deep), ("plain", deep))
    return said + (f" After training the responses of the deep residual net are {math.exp(apart.mean):.2g} times its plain twin's." if apart.n else "")


def _start(records: list[Record], norm: bool) -> list[Record]:
    found = (r for r in records if r["kind"] == "addition" and (r["order"], r["norm"]) == ("single stage", norm))
    return [r for r in found if None not in (*r["branch"], *r["shortcut"])]  # where a variance overflowed


def _between(records: list[Record], one: tuple[str, int], other: tuple[str, int]) -> tuple[Estimate, str]:
    """Logarithm of the ratio of two nets' responses: over pairs; over layers for a single pair of given nets whose layers match."""
    found = [[r for r in records if r["kind"] == "response" and (r["twin"], r["layers"]) == net] for net in (one, other)]
    if len(found[0]) == len(found[1]) == 1:
        (a,), (b,) = found
        if not a["steps"] and len(a["deviations"]) == len(b["deviations"]):
            return estimate([math.log(x / y) for x, y in zip(a["deviations"], b["deviations"], strict=True) if x and y]), "the layers of one pair"
    means = [{r["pair"]: fmean(map(math.log, r["deviations"])) for r in nets if all(r["deviations"])} for nets in found]
    return paired(means[0], means[1]), "pairs of nets"


STUDY = Study(
    question="How strong are branch and shortcut at the start, and the layers' responses after training?",
    method="Mean squares of branch and shortcut where they are added, with norm and without; after training, standard deviations of the layers' responses.",
    source="De & Smith 2020 (2002.10444); He et al. 2015 (1512.03385), figure 7",
    shows="how much a block changes what passes it: at the start by its initialisation, later by what it learned",
    limits="that small branches are what makes deep nets trainable; and short trainings hardly move the scales of batch norm, which set the responses: "
    "a difference below a twentieth decides nothing, nor do nets whose error is not 30 points below chance (bounds of this project)",
    expected="with batch norm, branch over shortcut about 1 / sqrt(depth); without norm about 1, the variance doubling in each block",
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
    shipped=("resnet56-cifar10", "plain56-cifar10"),
)
