"""A table of a paper, repeated: variants of one deep net, all trained alike, the published errors beside ours.

Where a short training would otherwise be a comparison of which variant likes the learning rate, each variant is trained at
every one of the same rates, and stands with the one at which its training error is the lowest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from reslab.run import Record
from reslab.spec import Spec
from reslab.study.data import Data
from reslab.study.grid import Arm, Ladder, beyond, by_seed, claim, depths, grid, results
from reslab.study.kinds import Cell, Claim, Pace, Setting
from reslab.study.stats import Estimate, estimate, points, rank_correlation

LADDERS = (Ladder((1,), 1), Ladder((3,), 60), Ladder((6,), 400))  # 20, 56 or 110 layers, where --net is resnet20
PAPER = (6,)


class Row(NamedTuple):
    """A published test error, a share, and what makes the variant. `least`: the paper only says that it is higher."""

    published: float
    fields: Mapping[str, Any]
    least: bool = False

    @property
    def percent(self) -> str:
        return f"{'over ' if self.least else ''}{100 * self.published:.{0 if self.least else 2}f} %"


Table = dict[str, Row]


def cells(table: Table, setting: Setting, data: Data, pace: Pace, rates: Sequence[float] = ()) -> list[Cell]:
    """Every row for every seed, at the greatest depth that the budget allows enough steps; in a short budget at each of the rates, if any are given."""

    def arms(net: Spec) -> list[Arm]:
        made = [Arm(replace(net, **row.fields), {"variant": name, "published": row.published, "published_is_least": row.least}) for name, row in table.items()]
        if setting.is_paper or not rates:
            return made
        return [arm._replace(facts={**arm.facts, "rate": rate}, own={"lr": rate}) for arm in made for rate in rates]

    return grid(arms, LADDERS, PAPER, setting, data, pace)


def best(records: list[Record]) -> list[Record]:
    """Of each variant, the records at the rate with the lowest mean training error; all where there was one rate."""
    if not any("rate" in r for r in records):
        return records
    means: dict[str, dict[float, float]] = {}
    for r in results(records):
        rows = results(records, variant=r["variant"], rate=r["rate"])
        means.setdefault(r["variant"], {})[r["rate"]] = estimate([row["train_error"] for row in rows]).mean
    chosen = {variant: min(rates, key=lambda rate: rates[rate]) for variant, rates in means.items()}
    return [r for r in records if r["rate"] == chosen[r["variant"]]]


def higher(table: Table, records: list[Record], worse: str, better: str, said: str) -> Claim:
    """The claim that one row's test error is above another's."""
    records = best(records)
    gap, training = (beyond(records, {"variant": worse}, {"variant": better}, error) for error in ("test_error", "train_error"))
    return claim(
        f"{said}: {table[worse].percent} beside {table[better].percent}",
        f"test error, {worse} beyond {better}",
        gap,
        f"; training error {points(training)}" if training.n else "",
    )


def order(table: Table, records: list[Record]) -> Claim:
    """The claim that the mean errors rank with the table's, by Spearman's rank correlation over its rows: single rows may have changed places."""
    e = correlation(table, records)
    found = f"{e.mean:+.2f} (95 % interval {e.low:+.2f} to {e.high:+.2f}, n = {e.n} rows)" if e.n else "not measured"
    if e.n and math.isnan(e.mean):
        found = "none, all are equal"
    said = "The test errors rank with the table's: their rank correlation is above zero"
    return Claim(said, f"rank correlation of the mean test errors with the table's: {found}", e.verdict(), e.n)


def correlation(table: Table, records: list[Record]) -> Estimate:
    """Over the rows of the table, of their mean errors over the seeds of which every row was measured.

    More seeds make the means surer, but not the rows more: the interval is that of so many rows.
    """
    records = best(records)
    errors = [by_seed(records, "test_error", variant=name) for name in table]
    seeds = sorted(set.intersection(*map(set, errors)))
    means = [round(estimate([row[seed] for seed in seeds]).mean, 9) for row in errors]  # equal counts are ties, whatever their sum's last digit
    return rank_correlation([row.published for row in table.values()], means) if seeds else estimate([])


def answer(table: Table, records: list[Record]) -> str:
    """All rows by their mean test error."""
    records = best(records)
    means = {name: estimate([r["test_error"] for r in results(records, variant=name)]).mean for name in table if results(records, variant=name)}
    ranked = sorted(means, key=lambda name: means[name])
    listed = ", ".join(f"{name} {100 * means[name]:.1f} %" for name in ranked)
    return f"Mean test errors at {depths(records)[-1]} layers, best first: {listed}."
