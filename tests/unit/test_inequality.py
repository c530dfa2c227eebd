"""Indices of inequality: published values, definitions as double sums, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.dynamics.inequality import atkinson, gini, restricted_times

# The example of R's package ineq (Zeileis; incomes of deciles) and what it prints.
INEQ = (541, 1463, 2445, 3438, 4437, 5401, 6392, 8304, 11904, 22261)

positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)
signed = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)
aversion = st.floats(0, 6)


def double_sum(x: np.ndarray) -> float:
    """The definition, term by term."""
    total = sum(abs(a - b) for a in x for b in x)
    return total / (2 * len(x) * sum(abs(a) for a in x))


def test_published_values() -> None:
    assert gini(INEQ) == pytest.approx(0.4620911, abs=5e-8)
    assert atkinson(INEQ, 0.5) == pytest.approx(0.1796591, abs=5e-8)
    assert gini([1, 2, 3, 4, 5]) == pytest.approx(4 / 15, rel=1e-15)
    assert atkinson([1, 3], 0.5) == pytest.approx(1 - ((1 + math.sqrt(3)) / 2) ** 2 / 2, rel=1e-14)
    assert atkinson([1, 4], 1) == pytest.approx(1 - 2 / 2.5, rel=1e-14)  # means 2 and 2.5
    assert atkinson([1, 4], 2) == pytest.approx(1 - 1.6 / 2.5, rel=1e-14)  # harmonic mean 1.6


@given(signed)
def test_gini_is_its_double_sum(values: list[float]) -> None:
    x = np.array(values)
    if np.abs(x).max() > 1e-280:
        assert gini(x) == pytest.approx(double_sum(x), rel=1e-12, abs=1e-15)
    assert 0 <= gini(x) <= (len(x) - 1) / len(x) + 1e-15


@given(positive, st.floats(1e-3, 1e3), aversion)
def test_scale_order_and_copies_do_not_matter(
    values: list[float], factor: float, epsilon: float
) -> None:
    x = np.array(values)
    mixed = np.random.default_rng(0).permutation(x)
    for index in (gini, lambda v: atkinson(v, epsilon)):
        assert index(x) == pytest.approx(index(factor * x), rel=1e-9, abs=1e-12)
        assert index(x) == pytest.approx(index(mixed), rel=1e-9, abs=1e-12)
        assert index(x) == pytest.approx(index(np.concatenate([x, x])), rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12), st.floats(0.01, 0.5), aversion)
def test_a_gift_from_the_richest_to_the_poorest_lowers_both(
    values: list[float], part: float, epsilon: float
) -> None:
    x = np.sort(values)
    after = x.copy()
    gift = part * (x[-1] - x[0])  # at most half the way: they do not change places
    after[[0, -1]] += gift, -gift
    assert gini(after) <= gini(x) + 1e-12
    assert atkinson(after, epsilon) <= atkinson(x, epsilon) + 1e-12
    if x[-1] > 1.1 * x[0]:
        assert gini(after) < gini(x)
        if epsilon > 0.1:
            assert atkinson(after, epsilon) < atkinson(x, epsilon)


@given(positive, st.floats(0, 3), st.floats(0, 3))
def test_atkinson_grows_with_the_aversion(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert atkinson(values, low) <= atkinson(values, high) + 1e-12
    assert 0 <= atkinson(values, high) <= 1
    assert atkinson(values, 0) == pytest.approx(0, abs=1e-13)


def test_atkinson_is_smooth_where_its_formula_changes() -> None:
    exact = 1 - 2 / 2.5
    for step in (1e-6, 1e-9, 1e-12, 1e-15):
        for epsilon in (1 - step, 1 + step):
            # d A / d epsilon at 1 is var(log x) / 2 x geometric mean / mean: below 1 here.
            assert atkinson([1, 4], epsilon) == pytest.approx(exact, abs=step + 1e-15)
    assert atkinson([1e-300, 1.0], 50) == pytest.approx(1, abs=1e-12)  # x^-49 would overflow
    assert atkinson([3e300, 9e300], 0.5) == pytest.approx(atkinson([1, 3], 0.5), rel=1e-13)
    assert gini([3e307, 9e307, 1.5e308]) == pytest.approx(gini([3, 9, 15]), rel=1e-14)


def test_edges() -> None:
    assert gini([5.0]) == atkinson([5.0]) == 0
    assert gini([0.0, 0.0]) == atkinson([0.0, 0.0], 1) == 0
    assert gini([0, 0, 0, 2]) == 0.75  # one has everything
    assert atkinson([0, 1], 1) == atkinson([0, 1], 3) == 1
    assert atkinson([0, 1], 0.5) == pytest.approx(0.5, rel=1e-15)
    assert gini([-1, 1]) == 0.5 and gini([-2, -1]) == gini([1, 2])  # bounds hold for both signs
    assert math.isnan(atkinson([-1, 1]))
    for empty_or_unknown in ([], [1, math.nan], [1, math.inf]):
        assert math.isnan(gini(empty_or_unknown)) and math.isnan(atkinson(empty_or_unknown))


def test_bad_arguments_are_named() -> None:
    for epsilon in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon: expected a finite number of 0 or more"):
            atkinson([1, 2], epsilon)
    for index in (gini, atkinson):
        with pytest.raises(ValueError, match=r"\(K,\), got shape \(1, 2\)"):
            index(np.ones((1, 2)))


def test_restricted_times() -> None:
    times = restricted_times([3, math.nan, 250, math.inf, 0], 100)
    assert times.tolist() == [3, 100, 100, 100, 0]
    for horizon in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="horizon: expected a positive"):
            restricted_times([1], horizon)
    with pytest.raises(ValueError, match="times: expected 0 or more, nan for never, got -2"):
        restricted_times([1, -2], 10)
