"""Rank correlations whose value is known, and how often their interval holds the truth."""

import numpy as np
import pytest

from reslab.study.stats import rank_correlation


def test_order_alone_counts() -> None:
    assert rank_correlation([1, 2, 3, 4, 5], [1, 10, 11, 1e6, 1e7])[:3] == pytest.approx((1, 1, 1))
    assert rank_correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, -9]).is_below_zero


def test_too_little_or_constant_values_decide_nothing() -> None:
    for x, y in (([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 3, 4]), ([], []), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [5, 5, 5, 5])):
        found = rank_correlation(x, y)
        assert (found.n, found.verdict()) == (len(x), "not decided at this budget")


def test_interval_excludes_zero_for_independent_values_about_one_time_in_twenty() -> None:
    rng = np.random.default_rng(0)
    found = [rank_correlation(rng.normal(size=24).tolist(), rng.normal(size=24).tolist()) for _ in range(600)]
    wrong = sum(e.is_above_zero or e.is_below_zero for e in found) / len(found)
    assert wrong == pytest.approx(0.05, abs=0.025)
