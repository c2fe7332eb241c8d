"""Verdicts on records whose answer is known."""

import pytest
from scipy import stats as scipy_stats

from reslab.interval import wilson
from reslab.study.degradation import _newcombe, claims
from reslab.study.stats import Estimate, estimate, paired, points, within


def records(plain: list[float], residual: list[float]) -> list[dict]:
    """Deep nets with the given training errors, shallow ones with 0.1, a seed each."""
    rows = []
    for kind, deep in (("plain", plain), ("residual", residual)):
        for seed, error in enumerate(deep):
            rows += [
                {"kind": "result", "twin": kind, "layers": depth, "seed": seed, "train_error": e, "test_error": e, "test_n": 1000}
                for depth, e in ((20, 0.1 + 0.001 * seed), (56, error))
            ]
    return rows


@pytest.mark.parametrize(
    ("plain", "residual", "verdicts"),
    [
        ([0.6, 0.62, 0.61], [0.1, 0.11, 0.1], ["agrees", "agrees", "agrees"]),
        ([0.6, 0.62, 0.61], [0.5, 0.52, 0.51], ["agrees", "disagrees", "agrees"]),
        ([0.3, 0.4, 0.5], [0.12, 0.122, 0.127], ["agrees", "agrees", "agrees"]),
        ([0.3, 0.4, 0.5], [0.1, 0.111, 0.106], ["agrees", "agrees", "agrees"]),
        ([0.3, 0.3, 0.3], [0.08, 0.13, 0.19], ["agrees", "not decided at this budget", "agrees"]),
        ([0.3, 0.3, 0.3], [0.1, 0.12, 0.15], ["agrees", "not decided at this budget", "agrees"]),
        ([0.05, 0.06, 0.05], [0.05, 0.06, 0.05], ["disagrees", "agrees", "not decided at this budget"]),
        ([0.1, 0.9, 0.2], [0.1, 0.9, 0.3], ["not decided at this budget"] * 3),
        ([0.6], [0.07], [*["not decided at this budget"] * 3, "agrees"]),
        ([0.6], [0.099], [*["not decided at this budget"] * 3, "not decided at this budget"]),
        ([0.6], [0.1], [*["not decided at this budget"] * 3, "not decided at this budget"]),
        ([0.6], [0.11], [*["not decided at this budget"] * 3, "not decided at this budget"]),
        ([0.6], [0.2], [*["not decided at this budget"] * 3, "disagrees"]),
        ([0.05], [0.1], [*["not decided at this budget"] * 3, "disagrees"]),
        ([0.12], [0.1], [*["not decided at this budget"] * 3, "not decided at this budget"]),
    ],
)
def test_verdicts(plain: list[float], residual: list[float], verdicts: list[str]) -> None:
    assert [claim.verdict for claim in claims(records(plain, residual))] == verdicts


def test_of_one_seed_the_difference_of_errors_has_newcombes_interval() -> None:
    assert "residual 20 beyond 56: +0.1 points (95 % interval -2.5 to +2.7, n = 1000)" in claims(records([0.6], [0.099]))[3].measured
    low, high = _newcombe((56 / 70, *wilson(56, 70)), (48 / 80, *wilson(48, 80)), 70)[1:3]
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339), "Newcombe 1998, table II, example a"


def test_two_equal_differences_have_no_interval() -> None:
    both = paired({0: 0.3, 1: 0.7}, {0: 0.2, 1: 0.6})
    assert both.mean == pytest.approx(0.1)
    assert both.verdict() == "not decided at this budget"
    assert points(both) == "+10.0 points (n = 2)"
    assert paired({0: 0.3, 1: 0.71}, {0: 0.2, 1: 0.6}).has_interval
    assert {claim.verdict for claim in claims(records([0.6, 0.601], [0.1, 0.101]))} == {"not decided at this budget"}


def test_intervals_are_students() -> None:
    values = [0.3, 0.5, 0.1, 0.45]
    want = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate(values)[1:3] == pytest.approx((want.low, want.high))


@pytest.mark.parametrize(
    ("interval", "want"),
    [((0.2, 0.3), "agrees"), ((0.1, 0.4), "agrees"), ((0.41, 0.5), "disagrees"), ((0.0, 0.09), "disagrees"), ((0.3, 0.41), "not decided at this budget"),
     ((0.0, 1.0), "not decided at this budget"), ((-float("inf"), float("inf")), "not decided at this budget")],
)  # fmt: skip
def test_all_of_an_interval_lies_between_the_published_bounds_or_none_of_it(interval: tuple[float, float], want: str) -> None:
    assert within(Estimate(0.25, *interval, n=3), 0.1, 0.4) == want


def test_pairing_cancels_the_luck_of_a_seed() -> None:
    difference = paired({0: 0.9, 1: 0.5, 2: 0.1}, {0: 0.8, 1: 0.4, 2: 0.0, 3: 1.0})
    assert difference.mean == pytest.approx(0.1)
    assert difference.n == 3
    assert difference.is_above_zero
