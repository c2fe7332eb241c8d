"""How much of what a unit could see does it use, before and after training?

Method: the gradient of the unit in the middle of the last feature map with respect to the input, with a random normal
weight for each of its channels: its root mean square over images and colours is a map around the middle (Luo et al. 2016,
1701.04128). Its size is the side of a square with as many pixels as exceed 4.55 % of the largest value (the paper takes that
part of the middle's, which scatters more over few images); the theoretical field follows from kernels and strides. First
stacks of 3x3 convolutions of several depths at their start, then plain and residual twins before and after training.

Images are continued beyond their borders by mirroring, so that no border cuts the field; batch norm has the statistics of
training images, before training as after it. Both are ours.

A result shows from where a unit is moved at all. It does not show that a net needs more: what is useful may lie near, and
where images are smaller than the field at the start, training may have nothing to enlarge it for, and decides nothing.

    reslab study receptive --budget 2m         digits
    reslab study receptive RUN RUN             nets that are trained already

Expected: at the start the effective field grows as the square root of the depth, the theoretical one linearly, so the
share that is used shrinks (the paper fits powers of 0.56 and -0.43); training enlarges the effective field; skip
connections make it smaller.
"""

import math
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reslab.errors import CallError
from reslab.nets.torch import ResNet
from reslab.receptive import receptive_field
from reslab.run import Record
from reslab.seeds import seeded
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Setting, Study, Subject, Verdict
from reslab.study.probe import settle
from reslab.study.stats import Estimate, estimate, factor, paired, with_interval, within
from reslab.study.twins import layers, numbered, plain, schedule
from reslab.study.untouched import untouched

STACKS = (2, 4, 8, 16)  # blocks of two 3x3 convolutions
WIDTH = 16  # channels of the stacks
SLOPE, TOLERANCE = 0.5, 0.1  # of the size against depth, both logarithms
EDGE = 0.0455  # of the largest value
IMAGES, LEAST, PIXELS = 16, 4, 16 * 128**2  # images measured, at most and at least, and pixels of all together
SETTLING, CHUNK = 128, 4  # images for the statistics of batch norm, and through a net together
MOST = 513  # pixels a side that a net is shown at most
SHOWN = 41  # pixels a side of a map that a record keeps
SHARE = 0.45
DRAW = 43  # stream of random numbers


class Field(NamedTuple):
    """The effective field of one unit: pixels a side, spread in pixels along one axis, and the map (odd side)."""

    size: float
    spread: float
    map: Tensor


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """For each seed stacks of several depths, and twins before and after training; given nets instead of the twins."""
    made, pairs = [], _given(setting) if setting.given else _twins(setting, data, pace)
    for seed in range(setting.seeds):
        for blocks in STACKS:
            spec = stack(setting.net, blocks)
            facts = {"look": "stack", "layers": layers(spec) - 1, "theoretical": theoretical(spec), "pair": seed}
            made.append(Cell(f"stack of {layers(spec) - 1} convolutions, seed {seed}", Subject(spec, seed), facts=facts))
        made += [cell for cell in pairs if cell.subject.seed == seed]
    return made


def stack(net: Spec, blocks: int) -> Spec:
    """3x3 convolutions and ReLU alone: what the theory is about."""
    return Spec("basic", (blocks,), (WIDTH,), "conv3", shortcut="none", norm="none", in_channels=net.in_channels, num_classes=net.num_classes)


def _twins(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    nets = {"plain": plain(setting.net), "residual": setting.net}
    plan = schedule(list(nets.values()), setting, data, pace, SHARE)
    return [
        Cell(f"{twin}, {'trained' if after else 'start'}, seed {seed}", Subject(spec, seed, plan if after else None), facts=_facts(twin, spec, after, seed))
        for seed in range(setting.seeds)
        for twin, spec in nets.items()
        for after in (False, True)
    ]


def _given(setting: Setting) -> list[Cell]:
    made = []
    for twin, pair, net in numbered(setting.given):
        made.append(Cell(f"{net.name}, before training", Subject(net.spec), facts=_facts(twin, net.spec, False, pair)))
        made.append(Cell(f"{net.name}, trained", Subject(net.spec, weights=net.weights), facts=_facts(twin, net.spec, True, pair)))
    return made


def _facts(twin: str, spec: Spec, after: bool, pair: int) -> Record:
    return {"look": "twin", "twin": twin, "trained": after, "pair": pair, "theoretical": theoretical(spec)}


def theoretical(spec: Spec) -> int:
    """Pixels a side that a unit of the last block's output can depend on, by arithmetic. Raises CallError for a flattened map."""
    if spec.flatten:
        raise CallError(f"study receptive shows a net larger images than it was made for; this one flattens a map of fixed size, {spec.flatten}: name another")
    fields = receptive_field(list(spec.layers(MOST)))
    return [pixels for name, pixels in fields.items() if name.startswith("layer")][-1]


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """One record: sizes, and the middle of the map in units of its largest value."""
    count = min(IMAGES, max(LEAST, PIXELS // cell.facts["theoretical"] ** 2), len(data.test))
    x, _ = data.test_batch(np.linspace(0, len(data.test) - 1, count).astype(np.int64))
    settling, _ = data.train_batch(np.arange(0, len(data.train), max(1, len(data.train) // SETTLING)))
    found = effective(ready.net, x, settling, cell.subject.seed)
    half = len(found.map) // 2
    near = slice(max(0, half - SHOWN // 2), half + SHOWN // 2 + 1)
    shown = [[round(value, 4) for value in row] for row in found.map[near, near].tolist()]
    yield {
        "kind": "field",
        "size": found.size,
        "spread": found.spread,
        "canvas": len(found.map),
        "map": shown,
        "steps": len(ready.losses),
        "image_size": data.facts.size,
    }


def effective(net: ResNet, x: Tensor, settling: Tensor, seed: int = 0) -> Field:
    """The field of the middle unit of the last block's output, for images (N, C, H, W) continued by mirroring.

    `settling` are images that batch norm takes its statistics from first.
    """
    step = net.spec.reduction
    half = -(-min(theoretical(net.spec), MOST) // (2 * step)) * step
    generator, energy = seeded(seed, DRAW), torch.zeros(2 * half + 1, 2 * half + 1)
    with untouched(net):
        settle(net, settling)
        for images in torch.split(mirrored(x, 2 * half + 1), CHUNK):
            part, outputs = images.requires_grad_(), dict[str, Tensor]()
            net(part, outputs)
            unit = list(outputs.values())[-1][:, :, half // step, half // step]
            (found,) = torch.autograd.grad((unit * torch.randn(unit.shape, generator=generator)).sum(), part)
            energy += found.square().sum((0, 1))
    return describe(energy)


def describe(energy: Tensor) -> Field:
    """Size, spread and map (its largest value one) of squared gradients around the middle of an odd square."""
    amplitude = (energy / energy.max()).sqrt()
    away = torch.arange(len(energy)) - len(energy) // 2
    spread = math.sqrt(float((energy * (away.view(-1, 1) ** 2 + away**2)).sum() / energy.sum() / 2))
    return Field(math.sqrt(int((amplitude > EDGE).sum())), spread, amplitude)


def mirrored(x: Tensor, side: int) -> Tensor:
    """Images continued by mirroring on all sides, or their middle."""
    size = x.shape[-1]
    at = (torch.arange(side) - (side - size) // 2) % (2 * size)
    at = torch.where(at < size, at, 2 * size - 1 - at)
    return x[:, :, at][:, :, :, at].contiguous(memory_format=torch.channels_last)


def claims(records: list[Record]) -> list[Claim]:
    """What Luo et al. derive for the start, and see after training."""
    growth, used = estimate(_slopes(records, "size")), estimate(_slopes(records, "share"))
    trained = {twin: _ratio(records, (twin, True), (twin, False)) for twin in ("residual", "plain")}
    skips = [_ratio(records, ("residual", after), ("plain", after)) for after in (False, True)]
    cramped = _cramped(records)
    return [
        Claim(
            "Luo 2016: at the start the effective field grows as the square root of the depth",
            f"size as depth to the power {with_interval(growth)}; agreement means within {TOLERANCE:g} of {SLOPE:g}",
            within(growth, SLOPE - TOLERANCE, SLOPE + TOLERANCE),
            growth.n,
        ),
        Claim(
            "It fills an ever smaller share of the theoretical field",
            f"share as depth to the power {with_interval(used)}{_shares(records)}",
            _smaller(used),
            used.n,
        ),
        Claim(
            "Training enlarges the effective field of a residual net",
            f"size after over before training: {factor(trained['residual'])}; of the plain net: {factor(trained['plain'])}.{cramped}",
            UNDECIDED if cramped else trained["residual"].verdict(),
            trained["residual"].n,
        ),
        Claim(
            "Skip connections make the effective field smaller",
            f"size, residual over plain: {factor(skips[0])} at the start, {factor(skips[1])} after training",
            _both(skips),
            min(e.n for e in skips),
        ),
    ]


def answer(records: list[Record]) -> str:
    """Sizes before and after training, as far as they were measured, beside the theoretical one."""
    said = []
    for twin in ("residual", "plain"):
        field = next((r["theoretical"] for r in records if r["look"] == "twin" and r["twin"] == twin), 0)
        sizes = [(when, fmean(found.values())) for when, after in (("before", False), ("after", True)) if (found := _sizes(records, twin, after))]
        if sizes:
            (when, size), *later = sizes
            more = f" and {later[0][1]:.0f} after" if later else ""
            said.append(f"the {twin} net uses {size:.0f} of {field} pixels a side {when} training{more}")
    return f"In the middle of its last map {'; '.join(said)}." if said else "Only stacks of convolutions were measured."


def _slopes(records: list[Record], what: str) -> list[float]:
    """Of size, or of its share of the theoretical field, against depth, both logarithms, seed by seed."""
    stacks = [r for r in records if r["look"] == "stack"]
    found = []
    for seed in sorted({r["seed"] for r in stacks}):
        rows = [r for r in stacks if r["seed"] == seed]
        if len(rows) > 2:
            values = [r["size"] / (r["theoretical"] if what == "share" else 1) for r in rows]
            found.append(float(np.polyfit(np.log([r["layers"] for r in rows]), np.log(values), 1)[0]))
    return found


def _shares(records: list[Record]) -> str:
    """How much of the theoretical field the shallowest and the deepest stack use."""
    depths = sorted({r["layers"] for r in records if r["look"] == "stack"})
    means = [(depth, fmean(r["size"] / r["theoretical"] for r in records if r["look"] == "stack" and r["layers"] == depth)) for depth in depths]
    return "; " * bool(means) + " and ".join(f"{share:.0%} with {depth} convolutions" for depth, share in dict(means[:1] + means[-1:]).items())


def _cramped(records: list[Record]) -> str:
    """Says so where the images are smaller than the field at the start."""
    start, pixels = _sizes(records, "residual", False), next((r["image_size"] for r in records), 0)
    if not start or pixels > fmean(start.values()):
        return ""
    return f" The images, {pixels} pixels a side, are smaller than the field at the start, {fmean(start.values()):.0f}: there may be nothing to enlarge it for"


def _sizes(records: list[Record], twin: str, after: bool) -> dict[int, float]:
    """By pair; a net through which nothing comes back has none."""
    return {r["pair"]: r["size"] for r in records if r["look"] == "twin" and (r["twin"], r["trained"]) == (twin, after) and r["size"]}


def _ratio(records: list[Record], one: tuple[str, bool], other: tuple[str, bool]) -> Estimate:
    """Logarithm of the ratio of sizes, pair by pair."""
    return paired(*({pair: math.log(size) for pair, size in _sizes(records, *net).items()} for net in (one, other)))


def _smaller(e: Estimate) -> Verdict:
    return "agrees" if e.is_below_zero else "disagrees" if e.is_above_zero else UNDECIDED


def _both(estimates: list[Estimate]) -> Verdict:
    verdicts = {_smaller(e) for e in estimates}
    return "disagrees" if "disagrees" in verdicts else "agrees" if verdicts == {"agrees"} else UNDECIDED


STUDY = Study(
    question="How much of what a unit could see does it use, before and after training?",
    method="The gradient of the middle unit of the last map with respect to the input, root mean square over images: its size beside the theoretical field.",
    source="Luo et al. 2016 (1701.04128)",
    shows="from where in the image a unit is moved at all",
    limits="that a net needs a larger field: what is useful may lie near, or within images that are smaller than the field",
    expected="at the start the size grows as the square root of the depth (the paper fits a power of 0.56), and the share that is used shrinks (-0.43); "
    "training enlarges it; skips make it smaller",
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
    shipped=("resnet20-cifar10", "plain20-cifar10"),
)
