"""Do the gradients of deep plain nets look like white noise, and those of residual nets not?

Method: the gradient with respect to the input along a line of inputs, and its autocorrelation, at the start, without
training. As published: fully connected nets from one number to one number, 200 rectifiers a layer, at 256 points from -2
to 2, averaged over 20 nets; plain with centred or batch-normalised layers, residual with batch norm and branches times
beta = 1 or 0.1 (Balduzzi et al. 2017, 1702.08591). And for convolutional nets: from one training image to another, the
gradient of a logit, batch norm with the statistics of real images. White and brown noise are the references.

A result shows whether a small step changes the gradient altogether, which makes a gradient a poor guide. It says nothing
of its size (study `gradients`), and nothing of nets that have begun to train.

    reslab study shattering --budget 2m        seconds; trains nothing

Expected: the gradients of a shallow net resemble brown noise, those of a plain net of 24 or 50 layers white noise, those
of a residual net of 50 layers lie between: the correlation falls exponentially with depth in plain nets, sublinearly in
residual ones (the paper's abstract). The convolutional case is ours.
"""

import math
from collections.abc import Iterator
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.seeds import seeded
from reslab.study.autocorrelation import autocorrelation, brown_noise, white_noise
from reslab.study.data import Data
from reslab.study.dense import Dense, input_gradient
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Setting, Study, Subject, Verdict
from reslab.study.probe import settle
from reslab.study.stats import Estimate, estimate, paired, with_interval
from reslab.study.twins import batch_size, deeper, layers, plain
from reslab.study.untouched import untouched

POINTS, ENDS, NETS, LAGS = 256, (-2.0, 2.0), 20, 15
DEPTHS = (2, 24, 50)
VARIANTS = {"plain, centred": ("mean", 0.0), "plain, batch norm": ("batch", 0.0), "residual, beta 1": ("batch", 1.0), "residual, beta 0.1": ("batch", 0.1)}
LINES, CHUNK = 2, 64  # pairs of images a net; points that go through a net together
DRAW = 42  # stream of random numbers
Nets = dict[tuple[str, int], list[float]]  # scores by net and layers


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """For each seed all the fully connected nets, and convolutional twins of two depths."""
    made = []
    for seed in range(setting.seeds):
        made.append(Cell(f"fully connected, seed {seed}", Subject(setting.net, seed), facts={"look": "dense"}))
        for factor in (1, 3):
            net = deeper(setting.net, factor)
            for twin, spec in (("plain", plain(net)), ("residual", net)):
                facts = {"look": "images", "net": twin, "layers": layers(spec)}
                made.append(Cell(f"{twin} {layers(spec)} layers between images, seed {seed}", Subject(spec, seed), facts=facts))
    return made


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """Autocorrelations up to LAGS, a record a kind of net: their mean, and every net's score."""
    if cell.facts["look"] == "images":
        lines = [autocorrelation(gradient, LAGS) for gradient in between_images(ready.net, data, cell.subject.seed)]
        yield _record([values for values in lines if math.isfinite(values[0])])  # between equal images no gradient changes
        return
    x = torch.linspace(*ENDS, POINTS)
    for number, (name, (norm, beta)) in enumerate(VARIANTS.items()):
        for depth in DEPTHS:
            drawn = [seeded(cell.subject.seed, DRAW, number, depth, i) for i in range(NETS)]
            found = [input_gradient(Dense(depth, norm, beta), x, generator) for generator in drawn]  # type: ignore[arg-type]
            yield {"net": name, "layers": depth, "gradient": _shape(found[0]), **_record([autocorrelation(g, LAGS) for g in found])}
    for name, noise in (("white noise", white_noise), ("brown noise", brown_noise)):
        sequences = [noise(POINTS, seeded(cell.subject.seed, DRAW, len(name), i)) for i in range(NETS)]
        yield {"net": name, "layers": 0, "gradient": _shape(sequences[0]), **_record([autocorrelation(s, LAGS) for s in sequences])}


def _record(found: list[list[float]]) -> Record:
    """`score` is the mean correlation at lags 1 to LAGS."""
    means = [fmean(values) for values in zip(*found, strict=True)]
    return {"kind": "correlation", "values": means, "scores": [fmean(values[1:]) for values in found]}


def _shape(gradient: Tensor) -> list[float]:
    """Every value in units of the largest, for a figure."""
    return [round(value, 3) for value in (gradient / gradient.abs().max()).tolist()]


def between_images(net: ResNet, data: Data, seed: int) -> Iterator[Tensor]:
    """(POINTS, values of an image): the gradient of the first logit along lines from one training image to another."""
    rng = np.random.default_rng([seed, DRAW])
    chosen = np.sort(rng.choice(len(data.train), min(len(data.train), batch_size(data)), replace=False))
    x, _ = data.train_batch(chosen)
    with untouched(net):
        settle(net, x)
        for _ in range(LINES):
            one, other = x[rng.choice(len(x), 2, replace=len(x) < 2)]
            points = one + torch.linspace(0, 1, POINTS).view(-1, 1, 1, 1) * (other - one)
            yield torch.cat([_gradient(net, chunk) for chunk in points.split(CHUNK)])


def _gradient(net: ResNet, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    return found.flatten(1)


def whiteness(records: list[Record], net: str, depth: int) -> Estimate:
    """Where the mean score lies between those of white noise (0) and brown noise (1), which are means of simulated noise themselves.

    In a ratio (score - white) / (brown - white) of independent means, errors add up in squares (the delta method).
    """
    white, brown, score = (estimate(_scores(records, *key)) for key in (("white noise", 0), ("brown noise", 0), (net, depth)))
    gap = brown.mean - white.mean
    if not score.n or not gap > 0:
        return estimate([])
    at = (score.mean - white.mean) / gap
    half = math.hypot(score.high - score.mean, (1 - at) * (white.high - white.mean), at * (brown.high - brown.mean)) / gap
    return Estimate(at, at - half, at + half, score.n)


def claims(records: list[Record]) -> list[Claim]:
    """What Balduzzi et al. see, each decided by scores over nets."""
    shallow, middle, deep = DEPTHS
    shallow_plain = whiteness(records, "plain, centred", shallow)
    deep_plain = [whiteness(records, name, deep) for name in ("plain, centred", "plain, batch norm")]
    residual = whiteness(records, "residual, beta 0.1", deep)
    fall = _difference(records, ("plain, batch norm", shallow), ("plain, batch norm", middle))
    gaps = [_difference(records, (name, deep), ("plain, batch norm", deep)) for name in ("residual, beta 1", "residual, beta 0.1")]
    return [
        Claim(
            f"The gradients of a net of {shallow} layers resemble brown noise",
            f"{_share(shallow_plain)}; agreement means the nearer to brown noise (above one half)",
            _above(shallow_plain, 0.5),
            shallow_plain.n,
        ),
        Claim(
            f"Those of a plain net of {deep} layers resemble white noise",
            f"centred: {_share(deep_plain[0])}; batch norm: {_share(deep_plain[1])}; agreement means both the nearer to white noise",
            _all([_above(e, 0.5, below=True) for e in deep_plain]),
            min(e.n for e in deep_plain),
        ),
        Claim(
            "Plain gradients decorrelate with depth",
            f"mean correlation, {shallow} over {middle} layers: {_plain(fall)}",
            fall.verdict(),
            fall.n,
        ),
        Claim(
            f"Those of a residual net of {deep} layers resist: they stay more correlated than those of the plain one",
            f"mean correlation beyond the plain net's: beta 1 {_plain(gaps[0])}, beta 0.1 {_plain(gaps[1])} ({_share(residual)})",
            _all([gap.verdict() for gap in gaps]),
            min(gap.n for gap in gaps),
        ),
        _images(records),
    ]


def _images(records: list[Record]) -> Claim:
    depths = sorted({r["layers"] for r in records if r["look"] == "images"})
    found = {(r["net"], r["layers"], r["seed"]): fmean(r["scores"]) for r in records if r["look"] == "images" and r["scores"]}
    by_seed = {twin: {seed: score for (t, n, seed), score in found.items() if (t, n) == (twin, depths[-1])} for twin in ("plain", "residual")}
    gap = paired(by_seed["residual"], by_seed["plain"])
    return Claim(
        "So do those of convolutional residual nets between two images",
        f"mean correlation at {depths[-1] if depths else 0} layers, residual beyond plain: {_plain(gap)}",
        gap.verdict(),
        gap.n,
    )


def answer(records: list[Record]) -> str:
    """How near to brown noise each kind of deep net is."""
    deep = DEPTHS[-1]
    found = {name: whiteness(records, name, deep) for name in ("plain, batch norm", "residual, beta 1", "residual, beta 0.1")}
    if not all(e.n for e in found.values()):
        return "The fully connected nets are not measured yet."
    return (
        f"On a scale from white noise (0) to brown noise (1), the gradients of a fully connected plain net of {deep} layers lie at "
        f"{found['plain, batch norm'].mean:.2f}, those of residual nets at {found['residual, beta 1'].mean:.2f} (beta 1) and "
        f"{found['residual, beta 0.1'].mean:.2f} (beta 0.1)."
    )


def _scores(records: list[Record], net: str, depth: int) -> list[float]:
    found = [r for r in records if r["look"] == "dense" and (r["net"], r["layers"]) == (net, depth)]
    return [score for r in found for score in r["scores"] if score is not None]


def _difference(records: list[Record], one: tuple[str, int], other: tuple[str, int]) -> Estimate:
    """Of mean scores, over seeds and nets in the order they were drawn."""
    return paired(*(dict(enumerate(_scores(records, *net))) for net in (one, other)))


def _above(e: Estimate, bound: float, below: bool = False) -> Verdict:
    if e.low <= bound <= e.high:
        return UNDECIDED
    return "agrees" if (e.low > bound) != below else "disagrees"


def _all(verdicts: list[Verdict]) -> Verdict:
    return "disagrees" if "disagrees" in verdicts else "agrees" if set(verdicts) == {"agrees"} else UNDECIDED


def _share(e: Estimate) -> str:
    return f"{_plain(e)} of the way from white to brown noise" if e.n else _plain(e)


def _plain(e: Estimate) -> str:
    return with_interval(e, ".3f")


STUDY = Study(
    question="Do the gradients of deep plain nets look like white noise, and those of residual nets not?",
    method="The autocorrelation of the gradient along a line of inputs, at the start: fully connected as published, and convolutional between images.",
    source="Balduzzi et al. 2017 (1702.08591)",
    shows="whether a small step changes the gradient altogether",
    limits="the size of gradients, or anything of nets that have begun to train; the convolutional case is ours, not the paper's",
    expected="2 layers like brown noise, plain 24 and 50 layers like white noise, residual 50 layers between (curves only, no table)",
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
)
