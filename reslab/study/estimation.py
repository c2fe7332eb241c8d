"""Do the blocks of a residual stage refine one estimate?

Method: of trained nets, (1) for each block that keeps the shape, the cosine between what its branch adds and the negative
gradient of the loss at its input, and the norm of the branch relative to its input (Jastrzebski et al. 2018, 1710.04773);
(2) the error when the net's own head reads each block of the last stage, and the error of a linear read-out fitted to each
block's averaged map by ridge regression on training images; (3) how far the output of each block is from that of the last
block of its stage, feature by feature (Greff et al. 2017, 1612.07771). A plain block has no branch: what it
adds is its output minus its input, and the same is measured of the residual blocks beside.

A result shows whether blocks behave as steps towards one estimate. It does not show that the net computes by descent: a
net that was never trained is measured beside, its batch norms with the statistics of training images, and one training of
each net says little of others.

    reslab study estimation RUN RUN --budget 10m    trained nets, a residual one and its plain twin
    reslab study estimation --budget 2m             digits: trains twins first

Expected: branches point along the negative gradient, the more so in the later blocks, and later blocks of a stage change
their input less (1710.04773); within a stage the estimates differ by nothing in the mean, and by less and less
from block to block (1612.07771). Neither paper gives numbers to compare with.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.study.data import Data, spread
from reslab.study.kinds import ROOM, UNDECIDED, Cell, Claim, Pace, Ready, Setting, Study, Subject, Verdict
from reslab.study.probe import settle
from reslab.study.refinement import Distance, block_outputs, ridge, stage_ends, stage_of, steps_of
from reslab.study.stats import Estimate, estimate, points, rank_correlation
from reslab.study.surgery import as_found, batches, units
from reslab.study.twins import affordable, deeper, is_residual, trained, with_and_without_shortcuts
from reslab.study.untouched import untouched

DEEPER = 3  # times the blocks: 56 layers of 20
TRAINING, MEASURING = 0.5, 0.1  # shares of the budget; given nets leave both to the measuring
COST = {"steps": 1.2, "read-outs": 5 / 3, "differences": 1 / 3}  # of a test image, in training steps
LEAST, FITTED = 100, 4  # test images; training images that a read-out is fitted to, for each of them
MOST = 2000  # test images
SETTLING = 128  # training images for the statistics of batch norm, in the net that was never trained
NOTHING = 0.25  # standard deviations


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """A cell for each measurement and net, and the steps of the first net as it was initialised."""
    pace = cache(pace)
    subjects = trained(with_and_without_shortcuts(deeper(setting.net, DEEPER)), setting, data, pace, TRAINING)
    jobs = [(kind, name, "residual" if is_residual(s.spec) else "plain", s) for kind in COST for name, s in subjects.items()]
    first, subject = next(iter(subjects.items()))
    jobs.append(("steps", f"{first}, untrained", "untrained", Subject(subject.spec)))
    share = (MEASURING + (TRAINING if setting.given else 0.0)) / len(jobs)
    made = []
    for kind, name, twin, subject in jobs:
        images = int(min(MOST, len(data.test), max(LEAST, affordable(COST[kind], subject.spec, setting, data, pace, share, len(jobs)))))
        made.append(Cell(f"{name}, {kind}", subject, facts={"net": name, "twin": twin, "what": kind, "images": images}))
    return made


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """The records of one measurement. The net is left as it was found, also after an exception."""
    with untouched(ready.net):
        if cell.facts["twin"] == "untrained":  # fresh from its seed, its batch norms would hand on what they get
            settle(ready.net, data.train_batch(spread(len(data.train), SETTLING))[0])
        yield from {"steps": steps, "read-outs": read_outs, "differences": differences}[cell.facts["what"]](ready.net, data, cell.facts["images"])


def steps(net: ResNet, data: Data, images: int) -> Iterator[Record]:
    """For each block that keeps its shape: where it moves its input, and how far, an image at a time."""
    found: dict[int, list[Tensor]] = {}
    with as_found(net):
        for batch in batches(net, data, spread(len(data.test), images)):
            for number, rows in steps_of(net, *data.test_batch(batch)).items():
                found.setdefault(number, []).append(rows)
    for number, parts in found.items():
        table = torch.cat(parts)
        cosine, ratio, change_cosine, change_ratio = (estimate(column[column.isfinite()].tolist()) for column in table.unbind(1))
        yield {
            "kind": "step",
            **_place(net, number),
            "cosine": cosine.mean,
            "cosine_low": cosine.low,
            "cosine_high": cosine.high,
            "ratio": ratio.mean,
            "change_cosine": change_cosine.mean,
            "change_ratio": change_ratio.mean,
            "n": cosine.n,
        }


def read_outs(net: ResNet, data: Data, images: int) -> Iterator[Record]:
    """The error of a fitted linear read-out of every block, and of the net's own head on the blocks of the last stage."""
    test, y, heads = _read(net, data, spread(len(data.test), images), "test")
    train, labels, _ = _read(net, data, spread(len(data.train), min(FITTED * images, len(data.train))), "train")
    for number, features in enumerate(test):
        weight, bias = ridge(train[number], labels, data.facts.classes)
        wrong = (features.double() @ weight + bias).argmax(1) != y
        head = {"head_error": float((heads[number] != y).double().mean())} if number in heads else {}
        yield {"kind": "read-out", **_place(net, number), "error": float(wrong.double().mean()), **head}
    last = max(heads)
    earlier = torch.stack([(heads[number] != y).double() for number in heads if number != last]) if len(heads) > 1 else torch.empty(0, len(y))
    early, wrong = earlier.mean(0) if len(earlier) else torch.empty(0), (heads[last] != y).double()
    more = estimate((early - wrong).tolist() if len(early) else [])
    facts = {"error": float(early.mean()), "more": more.mean, "low": more.low, "high": more.high, "n": more.n}
    yield {"kind": "head", **facts, "whole": float(wrong.mean()), "chance": 1 - 1 / data.facts.classes}


def differences(net: ResNet, data: Data, images: int) -> Iterator[Record]:
    """How far each block's output is from that of the last block of its stage, in standard deviations of the latter.

    `mean` and `spread` are over the features of each feature's mean difference, `rms` is over everything.
    """
    sums: dict[int, Distance] = {}
    with as_found(net), torch.no_grad():
        for batch in batches(net, data, spread(len(data.test), images)):
            outputs = block_outputs(net, data.test_batch(batch)[0])
            for number, last in stage_ends(net, outputs).items():
                sums.setdefault(number, Distance()).add(outputs[number].double(), outputs[last].double())
    for number, held in sums.items():
        yield {"kind": "difference", **_place(net, number), **held.facts()}


def _read(net: ResNet, data: Data, items: NDArray[np.int64], part: str) -> tuple[list[Tensor], Tensor, dict[int, Tensor]]:
    """Of every block the averaged map (N, C); the labels; and what the head answers to the blocks whose output it can read."""
    features: list[list[Tensor]] = [[] for _ in units(net)]
    answers: dict[int, list[Tensor]] = {}
    labels = []
    with as_found(net), torch.no_grad():
        for batch in batches(net, data, items):
            x, y = data.test_batch(batch) if part == "test" else data.train_batch(batch)
            outputs = block_outputs(net, x)
            labels.append(y)
            for number, output in enumerate(outputs):
                features[number].append(output.mean((2, 3)))
                if part == "test" and output.shape == outputs[-1].shape:
                    answers.setdefault(number, []).append(net.head(output).argmax(1))
    return [torch.cat(each) for each in features], torch.cat(labels), {number: torch.cat(each) for number, each in answers.items()}


def _place(net: ResNet, number: int) -> Record:
    unit = units(net)[number]
    return {"block": unit.name, "number": number, "stage": stage_of(unit), "position": int(unit.name.split(".")[1])}


def claims(records: list[Record]) -> list[Claim]:
    """What the papers say, for each residual net that was looked at, and how its head compares with that of each plain one."""
    names = {twin: list(dict.fromkeys(r["net"] for r in records if r["twin"] == twin)) for twin in ("residual", "plain")}
    made = []
    for name in names["residual"]:
        rows = [r for r in records if r["net"] == name]
        found = [judge(rows) for judge in (_descends, _more_so_later, _refines, _reads_better, _nears, _agrees_in_the_mean)]
        found += [_head(rows, [r for r in records if r["net"] == other], other) for other in names["plain"]]
        heads = [r for r in rows if r["kind"] == "head"]
        room = bool(heads) and all(r["whole"] + ROOM <= r["chance"] for r in heads)
        made += [c._replace(measured=f"{name}: {c.measured}", verdict=c.verdict if room else UNDECIDED) for c in found]
    return made


def answer(records: list[Record]) -> str:
    """Cosines and the head's errors, net by net."""
    steps = [r for r in records if r["kind"] == "step" and r["cosine"] is not None]
    cosines = [f"{estimate([r['cosine'] for r in steps if r['net'] == net]).mean:+.3f} ({net})" for net in dict.fromkeys(r["net"] for r in steps)]
    heads = [f"{100 * r['error']:.0f} % ({r['net']})" for r in records if r["kind"] == "head" and r["n"]]
    parts = [
        f"What a block adds has, in the mean, this cosine with the negative gradient: {', '.join(cosines)}." if cosines else "",
        f"Reading the earlier blocks of the last stage, a net's own head errs on {', '.join(heads)} of the test images." if heads else "",
    ]
    return " ".join(part for part in parts if part) or "Nothing that answers the question was measured at this budget."


def _steps(rows: list[Record]) -> list[Record]:
    return [r for r in rows if r["kind"] == "step" and r["cosine"] is not None]


def _descends(rows: list[Record]) -> Claim:
    mean = estimate([r["cosine"] for r in _steps(rows)])
    positive = sum(r["cosine_low"] > 0 for r in _steps(rows) if r["cosine_low"] is not None)
    measured = f"mean cosine {_told(mean, 3)}; above zero beyond the interval over the images in {positive} of {mean.n} blocks"
    return _claim("The branches point along the negative gradient of the loss", measured, mean)


def _more_so_later(rows: list[Record]) -> Claim:
    rank = rank_correlation([r["number"] for r in _steps(rows)], [r["cosine"] for r in _steps(rows)])
    return _claim("The later the block, the more so", f"rank correlation of the cosine with the block's number {_told(rank)}", rank)


def _refines(rows: list[Record]) -> Claim:
    rank = _within_stages([r for r in _steps(rows) if r["ratio"]], "ratio")
    measured = f"rank correlation of the branch's relative norm with the block's place in its stage {_told(rank)}"
    return _claim("Within a stage, later blocks change their input less", measured, _negative(rank))


def _reads_better(rows: list[Record]) -> Claim:
    found = [r for r in rows if r["kind"] == "read-out"]
    rank = rank_correlation([r["number"] for r in found], [r["error"] for r in found])
    return _claim("A read-out errs less from block to block", f"rank correlation of its error with the block's number {_told(rank)}", _negative(rank))


def _nears(rows: list[Record]) -> Claim:
    rank = _within_stages(_differences(rows), "rms")
    measured = f"rank correlation of the distance with the block's place in its stage {_told(rank)}, the last blocks left out"
    return _claim("Within a stage, the output comes nearer to the stage's last from block to block", measured, _negative(rank))


def _agrees_in_the_mean(rows: list[Record]) -> Claim:
    size = estimate([math.hypot(r["mean"], r["spread"]) for r in _differences(rows)])
    measured = f"root mean square over the features of each one's mean difference, {_told(size)} standard deviations; bound {NOTHING}"
    below = Estimate(NOTHING - size.mean, NOTHING - size.high, NOTHING - size.low, size.n)
    return _claim("Within a stage, the estimates differ by nothing in the mean", measured, below)


def _head(rows: list[Record], others: list[Record], other: str) -> Claim:
    """How much more a head errs on earlier blocks than on its own, so that a net does not lose by an error of the whole.

    Two means over the images; that their intervals lie apart is more than a test of the difference would ask for.
    """
    said = "The head loses less than a plain net's head does when it reads earlier blocks of the last stage"
    pair = [next((r for r in each if r["kind"] == "head" and r["n"] > 1), None) for each in (rows, others)]
    if not (pair[0] and pair[1]):
        return Claim(said, "not measured", UNDECIDED, 0)
    mine, theirs = (Estimate(r["more"], r["low"], r["high"], r["n"]) for r in pair if r)
    verdict: Verdict = "agrees" if mine.high < theirs.low else "disagrees" if mine.low > theirs.high else UNDECIDED
    if pair[1]["whole"] + ROOM > pair[1]["chance"]:
        verdict = UNDECIDED
    whole = f"the whole nets err on {100 * pair[0]['whole']:.1f} and {100 * pair[1]['whole']:.1f} %"
    measured = f"errs more by {points(mine)}, {other} by {points(theirs)}; {whole}; n counts images"
    return Claim(said, measured, verdict, mine.n)


def _differences(rows: list[Record]) -> list[Record]:
    """Without the last blocks, which differ from themselves by nothing."""
    return [r for r in rows if r["kind"] == "difference" and r["rms"]]


def _within_stages(rows: list[Record], key: str) -> Estimate:
    """Rank correlation with the place in the stage. Stages have levels of their own, so a value counts relative to its stage's mean."""
    levels = {stage: estimate([r[key] for r in rows if r["stage"] == stage]).mean for stage in {r["stage"] for r in rows}}
    return rank_correlation([r["position"] for r in rows], [r[key] / levels[r["stage"]] for r in rows])


def _negative(e: Estimate) -> Estimate:
    return Estimate(-e.mean, -e.high, -e.low, e.n)


def _claim(said: str, measured: str, e: Estimate) -> Claim:
    """Decided by whether the interval lies above zero."""
    return Claim(said, measured if e.n else "not measured", e.verdict(), e.n)


def _told(e: Estimate, digits: int = 2) -> str:
    return f"{e.mean:+.{digits}f} (95 % interval {e.low:+.{digits}f} to {e.high:+.{digits}f}, n = {e.n})"


STUDY = Study(
    question="Do the blocks of a residual stage refine one estimate?",
    method=(
        "Of trained nets: the cosine between what a block adds and the negative gradient at its input, and its relative norm; the error of the net's own head "
        "on each block of the last stage, and of a ridge read-out of every block; the difference of each block's output from that of its stage's last."
    ),
    source="Jastrzebski et al. 2018 (1710.04773); Greff et al. 2017 (1612.07771)",
    shows="whether blocks behave as steps towards one estimate, and whether training made them so: an untrained net is beside",
    limits="that the net computes by descent; intervals are over the blocks or images of one training of each net, and say little of other trainings",
    expected=(
        "Branches point along the negative gradient, more so in later blocks, which change their input less; estimates of a stage differ by nothing in the "
        "mean, and less and less. Neither paper gives numbers; the bound of a quarter of a standard deviation is this project's own."
    ),
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
    shipped=("resnet56-cifar10", "plain56-cifar10"),
)
