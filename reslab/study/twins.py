"""Nets that differ in one thing, and the number of steps that a budget gives them all alike."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from reslab.errors import CallError
from reslab.layout import stages
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.kinds import Given, Pace, Schedule, Setting, Subject

PAPER_STEPS = 64_000  # He et al. 2015, section 4.2


def plain(spec: Spec) -> Spec:
    """The twin without shortcuts. It has the same parameters where the shortcuts have none. Raises CallError for a plain net."""
    if spec.shortcut == "none":
        raise CallError("a study of twins takes away the shortcuts of a residual net; received a plain one: name its residual twin")
    return replace(spec, shortcut="none")


def with_and_without_shortcuts(spec: Spec) -> dict[str, Spec]:
    """A residual net and its plain twin, by a name that tells them apart. Raises CallError for a net without shortcuts."""
    if not is_residual(spec):
        raise CallError("this study compares a residual net with its plain twin; received one that has no shortcuts: name the residual net")
    return {f"residual {layers(spec)} layers": spec, f"plain {layers(spec)} layers": plain(spec)}


def is_residual(spec: Spec) -> bool:
    """Whether its blocks have shortcuts."""
    return spec.shortcut != "none"


def deeper(spec: Spec, factor: float) -> Spec:
    """The same net with that many times the blocks in every stage, at least one."""
    return replace(spec, depths=tuple(max(1, round(factor * depth)) for depth in spec.depths))


def layers(spec: Spec) -> int:
    """Weighted layers on the longest path, as the papers count them: the stem, the branches' convolutions, the head."""
    return 2 + sum(len(unit.convs) for units in stages(spec) for unit in units)


def batch_size(data: Data) -> int:
    """128, or less where the images are few."""
    return min(128, max(1, len(data.train) // 4))


def schedule(specs: list[Spec], setting: Setting, data: Data, pace: Pace, share: float, batch: int = 0, **changes: Any) -> Schedule:
    """The same training for all the specs, each once a seed: as many steps of `batch` images as a share of the budget allows.

    A batch of 0 is that of `batch_size`. However many processes there are, one training takes one of them.
    """
    batch = batch or batch_size(data)
    if setting.is_paper:
        return Schedule(PAPER_STEPS, batch, **{"lr": 0.1, "warmup": 0.01, **changes})
    paces = [pace(spec, batch) for spec in specs]
    cost = max(max(paces), sum(paces) * (setting.sharing or setting.seeds) / setting.jobs)
    return Schedule(min(PAPER_STEPS, int(share * setting.seconds / cost)), batch, **changes)


def trained(twins: dict[str, Spec], setting: Setting, data: Data, pace: Pace, share: float) -> dict[str, Subject]:
    """The nets that were given, or else the twins, each trained once with the first seed in a share of the budget."""
    if setting.given:
        return {net.name: Subject(net.spec, weights=net.weights) for net in setting.given}
    plan = schedule(list(twins.values()), setting._replace(seeds=1, sharing=1), data, pace, share)
    return {name: Subject(spec, 0, plan) for name, spec in twins.items()}


def affordable(steps: float, spec: Spec, setting: Setting, data: Data, pace: Pace, share: float, cells: int) -> float:
    """How many images a share of the budget pays for when each costs so many images' training steps; no limit for `paper`.

    It is the share of one of so many cells, of which each takes one process.
    """
    batch = batch_size(data)
    return share * setting.seconds * min(setting.jobs, cells) / (steps * pace(spec, batch) / batch) if setting.seconds else math.inf


def numbered(given: tuple[Given, ...]) -> list[tuple[str, int, Given]]:
    """The given nets, each as plain or residual and with its number among those of that kind and depth: equal numbers are compared."""
    seen: Counter[tuple[str, int]] = Counter()
    found = []
    for net in given:
        kind = "plain" if net.spec.shortcut == "none" else "residual", layers(net.spec)
        found.append((kind[0], seen[kind], net))
        seen[kind] += 1
    return found
