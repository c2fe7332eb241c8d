"""Does a plain net train worse the deeper it is, and a residual one not?

Method: plain and residual twins with exactly the same parameters where the shortcuts are of kind A, which has none, the
same order of images, augmentation, steps and seeds, at several depths; training error beside test error (He et al. 2015,
figure 6).

A result shows whether depth alone hurts the optimisation, since a deeper plain net could represent the shallower one. It
does not show why; with batch norm the paper finds vanishing gradients unlikely (section 4.1; study `gradients`).

    reslab study degradation --budget 2m       digits
    reslab study degradation                   CIFAR-10 at half resolution, ten minutes

Expected at the full protocol (CIFAR-10 test error, %): residual 20 / 56 / 110: 8.75 / 6.97 / 6.43 (the paper, table 6);
plain 20 / 56: 9.78 / 12.95 (a five-run reproduction of the protocol), plain 110 over 60.
"""

import math
from collections.abc import Iterator

from reslab.interval import wilson
from reslab.run import Record
from reslab.study.data import Data
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Setting, Study, Subject, Verdict
from reslab.study.stats import Estimate, estimate, paired, points
from reslab.study.training import outcome
from reslab.study.twins import deeper, layers, plain, schedule

SHARE, START = 0.85, 20.0  # of the budget for training steps, and the seconds without which it is: processes begin, errors are counted
DEPTHS, PAPER_DEPTHS = (1, 3), (1, 5 / 3, 7 / 3, 3, 6)  # times the net's: 20 and 56 layers; 20, 32, 44, 56, 110
A_THIRD = 1 / 3  # of the plain net's rise: what the residual net's must stay below; the bound is this project's own


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """Twins of every depth for every seed, seeds outermost: what a short budget cuts off is a whole seed."""
    nets = [deeper(setting.net, factor) for factor in (PAPER_DEPTHS if setting.is_paper else DEPTHS)]
    twins = [(kind, layers(spec), spec) for net in nets for kind, spec in (("plain", plain(net)), ("residual", net))]
    plan = schedule([spec for *_, spec in twins], setting, data, pace, SHARE * setting.seconds / (setting.seconds + START))
    return [
        Cell(f"{kind} {depth} layers, seed {seed}", Subject(spec, seed, plan), facts={"twin": kind, "layers": depth})
        for seed in range(setting.seeds)
        for kind, depth, spec in twins
    ]


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """The running loss of the training, then the net's errors."""
    yield from outcome(ready, data)


def rise(records: list[Record], twin: str, error: str = "train_error") -> Estimate:
    """By how much the error of the deepest net exceeds that of the shallowest, seed by seed."""
    return estimate(list(_rises(records, twin, error).values()))


def _rises(records: list[Record], twin: str, error: str = "train_error") -> dict[int, float]:
    shallow, deep = _ends(records)
    found = {n: {r["seed"]: float(r[error]) for r in _results(records) if (r["twin"], r["layers"]) == (twin, n)} for n in (shallow, deep)}
    return {seed: found[deep][seed] - found[shallow][seed] for seed in sorted(found[deep].keys() & found[shallow].keys())} if deep > shallow else {}


def claims(records: list[Record]) -> list[Claim]:
    """What figure 6 says, decided by paired differences between the deepest and the shallowest twin."""
    shallow, deep = _ends(records)
    plain_rise, residual_rise = rise(records, "plain"), rise(records, "residual")
    short = paired({seed: A_THIRD * value for seed, value in _rises(records, "plain").items()}, _rises(records, "residual"))
    said = f"from {shallow} to {deep} layers" if deep > shallow else f"beyond {shallow} layers"
    return [
        Claim(
            "The deeper plain net has the higher training error",
            f"training error of the plain net {said}: {points(plain_rise)}",
            plain_rise.verdict(),
            plain_rise.n,
        ),
        Claim(
            "The deeper residual net does not: its rise is less than a third of the plain net's",
            f"training error of the residual net {said}: {points(residual_rise)}; below a third of the plain net's rise by {points(short)}",
            short.verdict(),
            short.n,
        ),
        _deep_comparison(_results(records), deep),
        *_of_one_seed(_results(records), shallow, deep),
    ]


def answer(records: list[Record]) -> str:
    """The rises of both twins in one sentence."""
    shallow, deep = _ends(records)
    if shallow == deep:
        return f"Only nets of {deep} layers were trained: the budget was too short to compare depths."
    plain_rise, residual_rise = rise(records, "plain"), rise(records, "residual")
    if not plain_rise.n or not residual_rise.n:
        return "The budget was too short to train both twins at both depths: nothing can be compared."
    return (
        f"From {shallow} to {deep} layers the training error of the plain net changes by {100 * plain_rise.mean:+.1f} points, "
        f"that of its residual twin by {100 * residual_rise.mean:+.1f}."
    )


def _results(records: list[Record]) -> list[Record]:
    return [r for r in records if r["kind"] == "result"]


def _ends(records: list[Record]) -> tuple[int, int]:
    depths = {r["layers"] for r in _results(records)}
    return min(depths), max(depths)


def _deep_comparison(results: list[Record], deep: int) -> Claim:
    by_twin = {twin: {r["seed"]: r["test_error"] for r in results if (r["twin"], r["layers"]) == (twin, deep)} for twin in ("plain", "residual")}
    gap = paired(by_twin["plain"], by_twin["residual"])
    return Claim(
        "Of two deep twins the residual one has the lower test error",
        f"test error at {deep} layers, plain beyond residual: {points(gap)}",
        gap.verdict(),
        gap.n,
    )


def _of_one_seed(results: list[Record], shallow: int, deep: int) -> list[Claim]:
    """What a single seed can say: the nets' test errors with intervals over the test images. Other seeds are not covered."""
    found = {(r["twin"], r["layers"]): (r["test_error"], *wilson(r["test_error"] * r["test_n"], r["test_n"])) for r in results}
    ends = [(twin, layers) for twin in ("plain", "residual") for layers in (shallow, deep)]
    if len({r["seed"] for r in results}) != 1 or not found.keys() >= set(ends) or shallow == deep:
        return []
    told = ", ".join(f"{twin} {n} {100 * e:.1f} % ({100 * low:.1f} to {100 * high:.1f})" for (twin, n) in ends for e, low, high in [found[twin, n]])
    (_, worst, best), others = found["plain", deep], [found[end] for end in ends if end != ("plain", deep)]
    is_worst, is_not = worst > max(high for *_, high in others), best < max(low for _, low, _ in others)
    n = min(int(r["test_n"]) for r in results)
    fall = _newcombe(found["residual", shallow], found["residual", deep], n)
    verdict: Verdict = "disagrees" if is_not or fall.is_below_zero else "agrees" if is_worst and fall.is_above_zero else UNDECIDED
    said = "The deeper plain net ends with the highest test error, the deeper residual net with a lower one than the shallower"
    return [Claim(said, f"of one seed, with 95 % intervals over {n:,} test images: {told}; residual {shallow} beyond {deep}: {points(fall)}", verdict, n)]


def _newcombe(one: tuple[float, float, float], other: tuple[float, float, float], n: int) -> Estimate:
    """The difference of two shares, from Wilson's intervals of each (Newcombe 1998, method 10).

    The records do not tell on which images a net errs. Nets tend to err on the same ones, so a paired interval would be narrower.
    """
    (p, low, high), (q, least, most) = one, other
    return Estimate(p - q, p - q - math.hypot(p - low, most - q), p - q + math.hypot(high - p, q - least), n)


STUDY = Study(
    question="Does a plain net train worse the deeper it is, and a residual one not?",
    method="Plain and residual twins with the same order of images, augmentation, steps and seeds, and exactly the same parameters where the shortcuts are of "
    "kind A, which has none; training error beside test error.",
    source="He et al. 2015 (1512.03385), section 4.2 and figure 6",
    shows="whether depth alone hurts the optimisation: a deeper plain net could represent the shallower one",
    limits="not why; and a short budget compares how fast the nets train, not where they would end",
    expected="CIFAR-10 test error at the full protocol: residual 20 / 56 / 110 8.75 / 6.97 / 6.43 %; plain 20 / 56 9.78 / 12.95 % (five-run reproduction). "
    "The bound of a third of the plain net's rise is this project's own.",
    cells=cells,
    measure=measure,
    claims=claims,
    answer=answer,
)
