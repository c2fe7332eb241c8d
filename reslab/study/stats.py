"""Means over seeds and their 95 % intervals, by Student's t."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import spearmanr
from scipy.stats import t as student

from reslab.interval import Z
from reslab.study.kinds import UNDECIDED, Verdict


class Estimate(NamedTuple):
    """A mean over n seeds and its 95 % interval; without an interval (infinite) for fewer than two, or two that are equal."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low)

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high < 0

    def verdict(self) -> Verdict:
        """On the claim that the difference is positive."""
        return "agrees" if self.is_above_zero else "disagrees" if self.is_below_zero else UNDECIDED


def estimate(values: Sequence[float]) -> Estimate:
    """The mean; of no value, nothing is known. Three and more equal values have an interval of no width."""
    if not values:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    mean, n = fmean(values), len(values)
    if n < 2 or (n == 2 and math.isclose(*values, rel_tol=1e-9, abs_tol=1e-12)):  # differences of two counts are often equal, and say nothing of the spread
        return Estimate(mean, -math.inf, math.inf, n)
    half = float(student.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired(after: Mapping[int, float], before: Mapping[int, float]) -> Estimate:
    """The mean difference over the seeds that both have: twins share their seed, so its luck cancels."""
    return estimate([after[seed] - before[seed] for seed in sorted(after.keys() & before.keys())])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's, with the interval of Bonett & Wright (2000): Fisher's z, its variance (1 + r^2 / 2) / (n - 3).

    Fisher's z of a perfect order is infinite. Two neighbours that change places take 12 / (n^3 - n) off it, so it counts as half of
    that short of perfect: the usual correction of a value that moves in steps. Its interval still ends at a perfect order.
    """
    n = len(x)
    if n < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return Estimate(math.nan, -1.0, 1.0, n)
    found = float(spearmanr(x, y).statistic)
    most = 1 - 6 / (n**3 - n)
    r = max(-most, min(most, found))
    z, half = math.atanh(r), Z * math.sqrt((1 + r * r / 2) / (n - 3))
    return Estimate(found, min(found, math.tanh(z - half)), max(found, math.tanh(z + half)), n)


def with_interval(e: Estimate, form: str = "+.2f") -> str:
    """A mean in that format, with its interval."""
    if not e.has_interval:
        return f"{e.mean:{form}} (n = {e.n})" if e.n else "not measured"
    return f"{e.mean:{form}} (95 % interval {e.low:{form}} to {e.high:{form}}, n = {e.n})"


def points(e: Estimate) -> str:
    """A difference of shares in percentage points, with its interval."""
    if not e.has_interval:
        return f"{100 * e.mean:+.1f} points (n = {e.n})" if e.n else "not measured"
    return f"{100 * e.mean:+.1f} points (95 % interval {100 * e.low:+.1f} to {100 * e.high:+.1f}, n = {e.n})"


def within(e: Estimate, low: float, high: float) -> Verdict:
    """On the claim that the value lies between two published bounds: the whole interval must, or must not."""
    if low <= e.low and e.high <= high:
        return "agrees"
    return "disagrees" if e.low > high or e.high < low else UNDECIDED


def factor(e: Estimate) -> str:
    """A mean of logarithms as the factor that it is, with its interval."""
    if not e.n:
        return "not measured"
    mean, low, high = (math.exp(min(value, 700.0)) for value in e[:3])
    return f"{mean:.4g} (95 % interval {low:.4g} to {high:.4g}, n = {e.n})" if e.has_interval else f"{mean:.4g} (n = {e.n})"
