"""Rank correlations whose value is known, and how often their interval holds the truth."""

import numpy as np
import pytest

from reslab.study.stats import rank_correlation


def test_order_alone_counts() -> None:
    assert rank_correlation([1, 2, 3, 4, 5], [1, 10, 11, 1e6, 1e7]) == rank_correlation([1, 2, 3, 4, 5], [2, 3, 4, 5, 6])
    assert rank_correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, -9]).is_below_zero


def test_a_perfect_order_of_few_values_is_not_beyond_doubt() -> None:
    """Of five, one order in 120 is perfect by chance, of four one in 24, and the interval is the surer the more there are."""
    found = {n: rank_correlation(range(n), range(n)) for n in (4, 5, 7, 30)}
    assert all((e.mean, e.high) == pytest.approx((1, 1)) for e in found.values())
    assert found[4].low < 0 < found[5].low < 0.5 < found[7].low < found[30].low < 1
    upside_down = rank_correlation(range(7), range(7, 0, -1))
    assert upside_down[:3] == pytest.approx((-1, -1, -found[7].low))
    assert rank_correlation(range(5), [0, 1, 2, 4, 3]).low < found[5].low, "perfect is surer than all but perfect"


def test_too_little_or_constant_values_decide_nothing() -> None:
    for x, y in (([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 3, 4]), ([], []), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [5, 5, 5, 5])):
        found = rank_correlation(x, y)
        assert (found.n, found.verdict()) == (len(x), "not decided at this budget")


def test_interval_excludes_zero_for_independent_values_about_one_time_in_twenty() -> None:
    rng = np.random.default_rng(0)
    found = [rank_correlation(rng.normal(size=24).tolist(), rng.normal(size=24).tolist()) for _ in range(600)]
    wrong = sum(e.is_above_zero or e.is_below_zero for e in found) / len(found)
    assert wrong == pytest.approx(0.05, abs=0.025)
