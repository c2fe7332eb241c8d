"""What studies of grids of trained nets share: the depths and steps that a budget allows, cells, effects over seeds.

A short training is made of many small batches: what deep nets lack in it is steps, not images. The learning rate belongs
to the batch. On digits (120 steps of 32 images, one seed; docs/log.md) 0.02 is the one of 0.002 to 0.05 at which a net of
56 layers with skips and batch norm trains best, and no net of 20 or 56 layers that fails at it trains at another of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from reslab.errors import CallError
from reslab.run import Record
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.kinds import UNDECIDED, Cell, Claim, Pace, Ready, Schedule, Setting, Subject
from reslab.study.stats import Estimate, estimate, points
from reslab.study.training import outcome
from reslab.study.twins import batch_size, deeper, layers, schedule

SMALL_BATCH = 32
GENTLE: dict[str, Any] = {"lr": 0.02}  # what a small batch takes
SHARE = 0.55  # of the budget: a step of a small batch spends a fifth more on the optimiser and the images than its timing tells
BETTER_THAN_GUESSING = 0.1  # by that share of the images: the net has trained at all


class Arm(NamedTuple):
    """One net of a grid, the facts that tell it from the others, and what is its own of the common schedule."""

    spec: Spec
    facts: dict[str, Any]
    own: Mapping[str, Any] = {}


class Ladder(NamedTuple):
    """Depths, as multiples of the net's, and the least steps at which training nets so deep says anything."""

    depths: tuple[float, ...]
    steps: int


def grid(
    arms: Callable[[Spec], list[Arm]], ladders: Sequence[Ladder], paper: tuple[float, ...], setting: Setting, data: Data, pace: Pace, **changes: Any
) -> list[Cell]:
    """Every arm at every depth for every seed, all trained alike; seeds outermost, so that what is cut off is a whole seed.

    Of the ladders, which ascend, it takes the last that leaves each net its least steps, and the first in any case;
    `paper` are the depths of the published protocol. `changes` are fields of the schedule.
    """
    if setting.net.shortcut == "none":
        raise CallError("this study varies nets with skip connections; received a plain one: give --net resnet20 or the like")
    pace = cache(pace)
    made: list[Arm] = []
    plan = Schedule(0)
    for rung, least in [Ladder(paper, 1)] if setting.is_paper else ladders:
        wanted = [arm._replace(facts={**arm.facts, "layers": layers(arm.spec)}) for factor in rung for arm in arms(deeper(setting.net, factor))]
        if made and plan.steps * _total(made) < least * _total(wanted):
            break  # before nets are timed that are far too deep
        longer = planned([arm.spec for arm in wanted], setting, data, pace, **changes)
        if made and longer.steps < least:
            break
        made, plan = wanted, longer
    return [Cell(_words(arm.facts, seed), Subject(arm.spec, seed, replace(plan, **arm.own)), facts=arm.facts) for seed in range(setting.seeds) for arm in made]


def planned(specs: list[Spec], setting: Setting, data: Data, pace: Pace, **changes: Any) -> Schedule:
    """The published protocol, or as many steps of small batches as the budget allows."""
    if setting.is_paper:
        return schedule(specs, setting, data, pace, SHARE, **changes)
    return schedule(specs, setting, data, pace, SHARE, min(SMALL_BATCH, batch_size(data)), **{**GENTLE, **changes})


def _total(arms: list[Arm]) -> int:
    return sum(arm.facts["layers"] for arm in arms)


def _words(facts: dict[str, Any], seed: int) -> str:
    return ", ".join(
        [
            *(str(value) for value in facts.values() if isinstance(value, str)),
            *([f"rate {facts['rate']}"] if "rate" in facts else []),
            f"{facts['layers']} layers",
            f"seed {seed}",
        ]
    )


def measure(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
    """The running loss of the training, then the net's errors beside the error of always naming the commonest class."""
    for record in outcome(ready, data):
        yield {**record, "guess_error": guess_error(data)} if record["kind"] == "result" else record


def guess_error(data: Data) -> float:
    """The training error of always naming the commonest class."""
    return 1 - float(np.bincount(data.train_labels).max()) / len(data.train_labels)


def results(records: list[Record], **facts: Any) -> list[Record]:
    """What became of the nets of which these facts hold."""
    return [r for r in records if r["kind"] == "result" and all(r[key] == value for key, value in facts.items())]


def depths(records: list[Record]) -> list[int]:
    """The layers of the nets, ascending."""
    return sorted({int(r["layers"]) for r in results(records)})


def by_seed(records: list[Record], error: str, **facts: Any) -> dict[int, float]:
    """That error of the one arm that these facts name, for each seed."""
    return {int(r["seed"]): float(r[error]) for r in results(records, **facts)}


def differences(records: list[Record], worse: Mapping[str, Any], better: Mapping[str, Any], error: str = "train_error") -> dict[int, float]:
    """By how much the error of one arm exceeds that of another, for each seed that has both."""
    high, low = by_seed(records, error, **worse), by_seed(records, error, **better)
    return {seed: high[seed] - low[seed] for seed in sorted(high.keys() & low.keys())}


def beyond(records: list[Record], worse: Mapping[str, Any], better: Mapping[str, Any], error: str = "train_error") -> Estimate:
    """The mean of those differences, and its interval."""
    return estimate(list(differences(records, worse, better, error).values()))


def has_trained(result: Record) -> bool:
    """Whether a net has trained at all: its loss was not lost, and it is clearly better than guessing."""
    return not result["lost"] and float(result["train_error"]) < float(result["guess_error"]) - BETTER_THAN_GUESSING


def trained(rows: list[Record]) -> str:
    """How many nets have trained at all, in words."""
    return f"{sum(map(has_trained, rows))} of {len(rows)} trained at all"


def claim(
    paper: str, what: str, gap: Estimate, more: str = "", alive: Sequence[Record] = (), dead: Sequence[Record] = (), asked: Sequence[Record] = ()
) -> Claim:
    """A claim that a difference is positive, decided by its interval.

    Where it says that nets train or do not, it is agreed with only if most of those `alive` have, and most of those `dead` have not.
    Where it asks what becomes of nets that train, it is decided only if most of those `asked` have.
    """
    verdict = gap.verdict()
    as_said = [*map(has_trained, alive)], [not has_trained(row) for row in dead]
    if (verdict == "agrees" and not all(map(_mostly, as_said))) or not _mostly([*map(has_trained, asked)]):
        verdict = UNDECIDED
    return Claim(paper, f"{what}: {points(gap)}{more}", verdict, gap.n)


def _mostly(rows: Sequence[bool]) -> bool:
    return not rows or 2 * sum(rows) > len(rows)
