"""Does a trained residual net miss a block that is removed, and a plain one?

Method (Veit et al. 2016, 1605.06431): of a trained net, each block in turn yields nothing, so that only what its shortcut
carries remains; then several blocks at random; then blocks of a stage change places. A plain block is left out whole, with
shortcut A in its place where it changes the shape. For the gradient, paths are sampled: the backward pass goes through the
branch of k random blocks and around all others, in evaluation mode; the norm is taken at the input, an image at a time.

A result shows how far the blocks of a trained net depend on each other, and how long the paths are that its gradient
takes. It does not show that the paths were trained as an ensemble, nor why residual nets train at all.

    reslab study lesion RUN RUN --budget 10m    trained nets, a residual one and its plain twin
    reslab study lesion --budget 2m             digits: trains twins first

Expected: one block of a trained ResNet-110 removed is barely noticed, one layer of VGG is fatal; the error grows smoothly
with the number of blocks removed and with the disorder of a permutation; the gradient's norm falls exponentially with the
path's length; of 54 blocks the paths through 5 to 17 carry almost all of it, 0.45 % of all paths (the paper).
The bounds of 2 and 30 points are this project's own, for 56 layers on CIFAR-10, and so is that of a smooth rise: half of it.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

from reslab.interval import wilson
from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.seeds import seeded
from reslab.study.data import Data, spread
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Setting, Study, Verdict
from reslab.study.paths import along_paths, carrying, fall, paths_of, random_paths, shares
from reslab.study.stats import Estimate, estimate, points, rank_correlation
from reslab.study.surgery import Lesion, batches, interchangeable, keeps_shape, mistakes, units
from reslab.study.twins import affordable, deeper, is_residual, trained, with_and_without_shortcuts

DEEPER = 3  # times the blocks: 56 layers of 20
TRAINING, MEASURING = 0.5, 0.12  # shares of the budget; given nets leave both to the measuring
# Of the time to measure. The median of blocks that each do little takes many images, the norms along single paths vary much.
WEIGHTS = {"each block": 4, "paths": 3, "several blocks": 1, "permuted": 1}
DRAWS, PERMUTATIONS, BOOTSTRAPS = 10, 48, 1000
LEAST, MOST_PATH_IMAGES = 64, 1000  # images; the paper samples 1000 paths of each length
LITTLE, RUINOUS = 0.02, 0.30  # rise of the error by one block: of a residual net at most, of a plain one at least
DEEP = 20  # blocks: the fewer there are, the more each does; the paper's nets have 54 and more
SUDDEN = 0.5  # of the whole rise: what the largest step must stay below for the rise to be smooth
STRAIGHT = 0.9  # R2 of a straight line through the logarithms
REMOVED, PERMUTED, PATHS, RESAMPLED = 1, 2, 3, 4  # streams of random numbers


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """A cell for each kind of lesion and net, the kinds outermost: what a short budget cuts off is a whole kind."""
    pace = cache(pace)
    subjects = trained(with_and_without_shortcuts(deeper(setting.net, DEEPER)), setting, data, pace, TRAINING)
    jobs = [(kind, name) for kind in MEASURES for name, subject in subjects.items() if kind != "paths" or is_residual(subject.spec)]
    share = (MEASURING + (TRAINING if setting.given else 0.0)) / sum(WEIGHTS[kind] for kind, _ in jobs)
    made = []
    for kind, name in jobs:
        spec = subjects[name].spec
        images = _images(kind, affordable(_cost(kind, sum(spec.depths)), spec, setting, data, pace, share * WEIGHTS[kind], len(jobs)), data)
        facts = {"net": name, "twin": "residual" if is_residual(spec) else "plain", "lesion": kind, "images": images}
        made.append(Cell(f"{name}, {kind}", subjects[name], facts=facts))
    return made


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """The records of one kind of lesion. The net is left as it was found, also after an exception."""
    yield from MEASURES[cell.facts["lesion"]](ready.net, data, cell.facts["images"], cell.subject.seed)


def each_block(net: ResNet, data: Data, images: int, seed: int) -> Iterator[Record]:
    """The error without each block, and the median rise with an interval over the images (bootstrap)."""
    blocks = units(net)
    wrong = mistakes(net, data, spread(len(data.test), images), [Lesion(), *(Lesion((number,)) for number in range(len(blocks)))])
    yield _whole(wrong[0], data)
    for number, (unit, lesioned) in enumerate(zip(blocks, wrong[1:], strict=True)):
        rise = _over_images(estimate((lesioned.astype(float) - wrong[0]).tolist()))
        yield {
            "kind": "removed",
            "block": unit.name,
            "number": number,
            "keeps_shape": keeps_shape(unit),
            "error": float(lesioned.mean()),
            "rise": rise.mean,
            "rise_low": rise.low,
            "rise_high": rise.high,
        }
    low, middle, high = _median_rise(wrong, seed)
    yield {"kind": "median", "rise": middle, "rise_low": low, "rise_high": high, "blocks": len(blocks)}


def several(net: ResNet, data: Data, images: int, seed: int) -> Iterator[Record]:
    """Each draw removes one random block, then another one as well, and so on."""
    count = len(units(net))
    orders = [np.random.default_rng([seed, REMOVED, draw]).permutation(count).tolist() for draw in range(DRAWS)]
    lesions = [Lesion(tuple(order[:n])) for order in orders for n in range(1, _most_removed(count) + 1)]
    wrong = mistakes(net, data, spread(len(data.test), images), [Lesion(), *lesions])
    yield _whole(wrong[0], data)
    for index, lesion in enumerate(lesions):
        yield {"kind": "several", "draw": index // _most_removed(count), "removed": len(lesion.removed), "error": float(wrong[index + 1].mean())}


def permuted(net: ResNet, data: Data, images: int, seed: int) -> Iterator[Record]:
    """Pairs of blocks of a stage change places: from one pair to as many as there are blocks."""
    orders = [_disorder(net, draw, seed) for draw in range(PERMUTATIONS)]
    wrong = mistakes(net, data, spread(len(data.test), images), [Lesion(), *(Lesion(order=order) for order in orders)])
    yield _whole(wrong[0], data)
    for draw, order in enumerate(orders):
        tau = float(kendalltau(range(len(order)), order).statistic) if len(order) > 1 else 1.0
        yield {"kind": "permuted", "draw": draw, "tau": tau, "error": float(wrong[draw + 1].mean())}


def paths(net: ResNet, data: Data, images: int, seed: int) -> Iterator[Record]:
    """The mean gradient norm along paths of each length, a draw of training images and paths at a time."""
    blocks, count = len(units(net)), max(1, images // DRAWS)
    norms = np.zeros((DRAWS, blocks + 1))
    yield _whole(mistakes(net, data, spread(len(data.test), min(images, len(data.test))), [Lesion()])[0], data)
    for draw in range(DRAWS):
        generator = seeded(seed, PATHS, draw)
        items = torch.randperm(len(data.train), generator=generator)[:count].sort().values.numpy()
        found: list[list[Tensor]] = [[] for _ in range(blocks + 1)]
        for batch in batches(net, data, items):
            x, y = data.train_batch(batch)
            for length, parts in enumerate(found):  # the same images for every length, so that their luck cancels
                parts.append(along_paths(net, x, y, random_paths(length, len(x), blocks, generator)))
        norms[draw] = [float(torch.cat(parts).mean()) for parts in found]
        share = shares(norms[draw].tolist())
        yield {"kind": "fall", "draw": draw, "factor": fall(norms[draw].tolist()).factor, "mean_length": sum(length * s for length, s in enumerate(share))}
    mean = norms.mean(0).tolist()
    share, there_are = shares(mean), paths_of(blocks)
    for length, norm in enumerate(mean):
        by_draw = norms[:, length].tolist()
        yield {"kind": "path", "length": length, "norm": norm, "draws": by_draw, "share": share[length], "paths": there_are[length]}
    first, last = carrying(share)
    yield {"kind": "paths", "blocks": blocks, **fall(mean)._asdict(), "first": first, "last": last, "effective": sum(there_are[first : last + 1])}


MEASURES = {"each block": each_block, "paths": paths, "several blocks": several, "permuted": permuted}


def claims(records: list[Record]) -> list[Claim]:
    """What the paper says, for each net that was looked at. A net whose error leaves no room to rise decides nothing."""
    made = []
    for name, twin in dict.fromkeys((r["net"], r["twin"]) for r in records):
        rows = [r for r in records if r["net"] == name]
        judges = [_one_removed, *([_smooth, _in_disorder, _fall, _short_paths] if twin == "residual" else [])]
        room = all(r["error"] + RUINOUS <= r["chance"] for r in rows if r["kind"] == "whole")
        made += [claim if room else claim._replace(verdict=UNDECIDED) for claim in (judge(rows, name) for judge in judges)]
    return made


def answer(records: list[Record]) -> str:
    """The median rises, net by net, beside the errors of the whole nets."""
    whole = {r["cell"]: r["error"] for r in records if r["kind"] == "whole"}
    found = [f"{_percent(r['rise'])} ({r['net']}, whole {_percent(whole[r['cell']])} %)" for r in records if r["kind"] == "median"]
    if not found:
        return "No net's single blocks were measured at this budget."
    return f"Removing one block raises the test error, in the median over the blocks, by so many points: {', '.join(found)}."


def _cost(kind: str, blocks: int) -> float:
    """Of one image, in training steps: a forward pass is a third of one, and what comes before a lesion is not done again."""
    forward = 1 / 3
    return {
        "each block": forward * (1 + blocks / 2),
        "paths": 1.3 * (blocks + 1),
        "several blocks": forward * DRAWS * _most_removed(blocks),
        "permuted": forward * PERMUTATIONS,
    }[kind]


def _images(kind: str, afford: float, data: Data) -> int:
    most = min(MOST_PATH_IMAGES, len(data.train)) if kind == "paths" else len(data.test)
    return int(min(most, max(LEAST, afford)))


def _most_removed(blocks: int) -> int:
    return min(10, blocks)


def _whole(wrong: NDArray[np.bool_], data: Data) -> Record:
    return {"kind": "whole", "error": float(wrong.mean()), "chance": 1 - 1 / data.facts.classes}


def _median_rise(wrong: NDArray[np.bool_], seed: int) -> tuple[float, float, float]:
    """The median over the blocks of the rise, and its 95 % interval when the images are drawn again and again."""
    rises = wrong[1:].astype(np.float32) - wrong[0]
    n = rises.shape[1]
    counts = np.random.default_rng([seed, RESAMPLED]).multinomial(n, np.full(n, 1 / n), BOOTSTRAPS).astype(np.float32)
    medians = np.median(counts @ rises.T / n, axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(np.median(rises.mean(1))), float(high)


def _over_images(e: Estimate) -> Estimate:
    """A difference of two shares of the same n images: however few of them changed, no surer than of n without a change (Wilson)."""
    least = wilson(0, e.n)[1]
    return e._replace(low=max(-1.0, min(e.low, e.mean - least)), high=min(1.0, max(e.high, e.mean + least)))


def _disorder(net: ResNet, draw: int, seed: int) -> tuple[int, ...]:
    """All blocks in order, but for as many swaps within stages as the draw has."""
    rng = np.random.default_rng([seed, PERMUTED, draw])
    order = np.arange(len(units(net)))
    groups = [group for group in interchangeable(net) if len(group) > 1]
    if groups:
        sizes = np.array([len(group) for group in groups])
        for _ in range(1 + draw * len(order) // PERMUTATIONS):
            pair = rng.choice(groups[rng.choice(len(groups), p=sizes / sizes.sum())], 2, replace=False)
            order[pair] = order[pair[::-1]]
    return tuple(order.tolist())


def _one_removed(rows: list[Record], name: str) -> Claim:
    residual = rows[0]["twin"] == "residual"
    said = (
        f"Removing one block of a trained residual net is barely noticed: at most {_percent(LITTLE)} points in the median"
        if residual
        else f"Removing one block of a trained plain net ruins it: at least {_percent(RUINOUS)} points in the median"
    )
    medians = [r for r in rows if r["kind"] == "median"]
    if not medians:
        return _not_measured(said, name)
    found, largest = medians[0], max((r for r in rows if r["kind"] == "removed"), key=lambda r: r["rise"])
    rise = _over_images(Estimate(found["rise"], found["rise_low"], found["rise_high"], found["images"]))
    shallow = residual and found["blocks"] < DEEP
    as_said, otherwise = (rise.high <= LITTLE, rise.low > LITTLE) if residual else (rise.low >= RUINOUS, rise.high < RUINOUS)
    if shallow:
        as_said, otherwise = False, False
    hint = f"; the claim is about nets of {DEEP} and more blocks" if shallow else ""
    measured = f"median of {found['blocks']} blocks {points(rise)}, the largest {_percent(largest['rise'])} ({largest['block']}); {_of_whole(rows)}{hint}"
    return Claim(said, f"{name}: {measured}", "agrees" if as_said else "disagrees" if otherwise else UNDECIDED, rise.n)


def _smooth(rows: list[Record], name: str) -> Claim:
    said = f"The error of a residual net grows smoothly with the number of removed blocks: its largest step is less than {100 * SUDDEN:.0f} % of the whole rise"
    found = [r for r in rows if r["kind"] == "several"]
    if not found:
        return _not_measured(said, name)
    whole, most = next(r for r in rows if r["kind"] == "whole" and r["cell"] == found[0]["cell"])["error"], max(r["removed"] for r in found)
    draws = [{r["removed"]: r["error"] - whole for r in found if r["draw"] == draw} for draw in sorted({r["draw"] for r in found})]
    steps = [[draw[n] - draw.get(n - 1, 0.0) for n in range(1, most + 1)] for draw in draws]
    last, largest = estimate([sum(rise) for rise in steps]), estimate([max(rise) / sum(rise) for rise in steps if sum(rise) > 0])
    verdict: Verdict = UNDECIDED
    if last.is_above_zero and most > 1:
        verdict = "agrees" if largest.high < SUDDEN else "disagrees" if largest.low > SUDDEN else UNDECIDED
    measured = f"{most} removed {points(last)}"
    if largest.has_interval:
        interval = f"95 % interval {_percent(largest.low)} to {_percent(largest.high)}, n = {largest.n} draws"
        measured += f"; the largest step is {_percent(largest.mean)} % of a draw's rise ({interval})"
    return Claim(said, f"{name}: {measured}", verdict, largest.n)


def _in_disorder(rows: list[Record], name: str) -> Claim:
    said = "The error of a residual net grows with the disorder of its blocks"
    found = [r for r in rows if r["kind"] == "permuted" and r["tau"] < 1]
    if not found:
        return _not_measured(said, name)
    rank = rank_correlation([1 - r["tau"] for r in found], [r["error"] for r in found])
    measured = f"rank correlation of error and disorder {rank.mean:+.2f} (95 % interval {rank.low:+.2f} to {rank.high:+.2f}, n = {rank.n} permutations)"
    return Claim(said, f"{name}: {measured}", rank.verdict(), rank.n)


def _fall(rows: list[Record], name: str) -> Claim:
    said = "The gradient's norm falls exponentially with the length of the path"
    totals, factors = [r for r in rows if r["kind"] == "paths"], [r["factor"] for r in rows if r["kind"] == "fall" and r["factor"] is not None]
    if not totals or totals[0]["r2"] is None:
        return _not_measured(said, name)
    factor, r2 = estimate(factors), totals[0]["r2"]
    measured = (
        f"times {factor.mean:.3f} a branch (95 % interval {factor.low:.3f} to {factor.high:.3f}, n = {factor.n} draws of images and paths); "
        f"R2 of a line through the logarithms {r2:.3f}"
    )
    as_said, otherwise = factor.high < 1 and r2 >= STRAIGHT, factor.low >= 1
    return Claim(said, f"{name}: {measured}", "agrees" if as_said else "disagrees" if otherwise else UNDECIDED, factor.n)


def _short_paths(rows: list[Record], name: str) -> Claim:
    said = "The gradient comes from paths that are shorter than most"
    totals, lengths = [r for r in rows if r["kind"] == "paths"], [r["mean_length"] for r in rows if r["kind"] == "fall" and r["mean_length"] is not None]
    if not totals or not lengths:
        return _not_measured(said, name)
    total, half = totals[0], totals[0]["blocks"] / 2
    below = estimate([half - length for length in lengths])
    measured = (
        f"mean length of a path {half:g} blocks, and {half - below.mean:.1f} when paths count by their gradient "
        f"(95 % interval {half - below.high:.1f} to {half - below.low:.1f}, n = {below.n} draws); "
        f"lengths {total['first']} to {total['last']} of {total['blocks']} carry 95 % of it, and are {100 * total['effective']:.2g} % of all paths"
    )
    return Claim(said, f"{name}: {measured}", below.verdict(), below.n)


def _not_measured(said: str, name: str) -> Claim:
    return Claim(said, f"{name}: not measured", UNDECIDED, 0)


def _of_whole(rows: list[Record]) -> str:
    whole = next(r for r in rows if r["kind"] == "whole")
    hint = "" if whole["error"] + RUINOUS <= whole["chance"] else ", too near to chance to judge"
    return f"error of the whole net {_percent(whole['error'])} %{hint}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


STUDY = Study(
    question="Does a trained residual net miss a block that is removed, and a plain one?",
    method=(
        "On test images, each block of a trained net yields nothing, so that only what its shortcut carries remains; then several blocks; then blocks change "
        "places. A plain block is left out whole, with shortcut A where it changes the shape. Gradients flow along sampled paths, through or around each block."
    ),
    source="Veit, Wilber & Belongie 2016 (1605.06431)",
    shows="how far the blocks of a trained net depend on one another, and how long the paths are that its gradient takes",
    limits="that such paths are trained as an ensemble, nor why residual nets train; and one training of each net says little of others",
    expected=(
        "One block of ResNet-110 removed is barely noticed, one layer of VGG is fatal; of 54 blocks, paths through 5 to 17, 0.45 % of all paths, carry almost "
        "all of the gradient. The bounds of 2 and 30 points and of half the rise were set for 56 layers on CIFAR-10 by this project."
    ),
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
    shipped=("resnet56-cifar10", "plain56-cifar10"),
)
