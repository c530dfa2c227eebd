"""Class statistics against numpy's own, and the cases in which they do not exist."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from fastpref.theory.distinguish import (
    BehaviorStatistics,
    behavior_statistics,
    class_differences,
    class_moments,
    directions,
    largest_eigenvalue,
    second_moment,
)
from fastpref.theory.pairs import FrozenPairs, flipped, frozen_pairs, head_change, kernel
from tests.theory.simulate import NO, YES, gaussian_pairs, mixed_pairs


def classes(pairs: FrozenPairs, behavior: int) -> tuple[np.ndarray, np.ndarray]:
    own = pairs.behavior == behavior
    plus = pairs.chosen == YES
    return pairs.features[own & plus], pairs.features[own & ~plus]


def numbers(s: BehaviorStatistics) -> dict[str, float]:
    return {name: value for name, value in asdict(s).items() if name != "behavior"}


@pytest.mark.parametrize("width", [4, 40], ids=["narrow", "wider than the classes"])
def test_statistics_are_numpys(width: int) -> None:
    pairs = gaussian_pairs(0, (30, 50), plus=0.6, width=width)
    for k, s in enumerate(behavior_statistics(pairs, YES)):
        plus, minus = classes(pairs, k)
        d, middle = plus.mean(0) - minus.mean(0), (plus.mean(0) + minus.mean(0)) / 2
        covariance = [np.cov(x.T, bias=True) for x in (plus, minus)]
        both = np.concatenate([plus, minus])
        assert (s.behavior, s.n, s.n_plus, s.n_minus) == (f"b{k}", len(both), len(plus), len(minus))
        assert s.delta == pytest.approx(np.linalg.norm(d), rel=1e-12)
        assert s.mu_dot_d == pytest.approx(middle @ d, rel=1e-10)
        assert s.mu_norm == pytest.approx(np.linalg.norm(middle), rel=1e-12)
        largest = [np.linalg.eigvalsh(c)[-1] for c in covariance]
        assert [s.concentration_plus, s.concentration_minus] == pytest.approx(largest, rel=1e-10)
        assert s.concentration == pytest.approx(max(largest), rel=1e-10)
        assert s.trace == pytest.approx(max(np.trace(c) for c in covariance), rel=1e-12)
        spread = [np.sqrt(d @ c @ d) / np.linalg.norm(d) for c in covariance]
        assert [s.spread_plus, s.spread_minus] == pytest.approx(spread, rel=1e-10)
        assert s.second_moment == pytest.approx(
            np.linalg.norm(both.T @ both / len(both), 2), rel=1e-10
        )
        share = len(plus) / len(both)
        pull = share * plus.mean(0) - (1 - share) * minus.mean(0)
        assert s.effective_delta == pytest.approx(2 * np.linalg.norm(pull), rel=1e-12)
        # (E9): the imbalance adds the mean to the pull.
        np.testing.assert_allclose(pull, d / 2 + 2 * (share - 0.5) * middle, atol=1e-12)


def test_coherence_is_of_margin_gradients() -> None:
    pairs = gaussian_pairs(1, (40,))
    matrix = kernel(pairs)
    (s,) = behavior_statistics(pairs)
    assert s.coherence == pytest.approx(matrix.mean() / np.trace(matrix) * 40, rel=1e-12)
    assert s.effective_delta == pytest.approx(s.delta, rel=1e-12)
    assert s.coherence == pytest.approx(
        s.delta**2 / (4 * (pairs.features**2).sum(axis=1).mean()), rel=1e-12
    )


def test_directions_are_mean_margin_gradients() -> None:
    for pairs in (gaussian_pairs(2, (20, 30), plus=0.3), mixed_pairs(3)):
        pull = directions(pairs)
        mean = np.stack(
            [
                kernel(pairs)[np.ix_(pairs.behavior == k, pairs.behavior == other)].mean()
                for k in range(len(pull))
                for other in range(len(pull))
            ]
        )
        np.testing.assert_allclose((pull @ pull.T).ravel(), 2 * mean, atol=1e-12)
    balanced = gaussian_pairs(2, (20, 30))
    # The smaller token id, NO, is "+" unless told otherwise.
    np.testing.assert_allclose(directions(balanced), class_differences(balanced, NO), atol=1e-12)
    np.testing.assert_allclose(directions(balanced), -class_differences(balanced, YES), atol=1e-12)
    unbalanced = gaussian_pairs(2, (20, 30), plus=0.3)
    for k, d in enumerate(class_differences(unbalanced, YES)):
        plus, minus = classes(unbalanced, k)
        np.testing.assert_allclose(d, plus.mean(0) - minus.mean(0), atol=1e-12)


def test_positive_token_and_flipping_decide_signs_only() -> None:
    pairs = gaussian_pairs(3, (30,), plus=0.4)
    yes, no, default = (behavior_statistics(pairs, t)[0] for t in (YES, NO, None))
    assert default == no
    assert (yes.delta, yes.coherence, yes.trace) == pytest.approx(
        (no.delta, no.coherence, no.trace)
    )
    assert yes.mu_dot_d == pytest.approx(-no.mu_dot_d)
    assert (yes.n_plus, yes.concentration_plus) == (no.n_minus, no.concentration_minus)
    other = behavior_statistics(flipped(pairs), YES)[0]
    assert numbers(other) == pytest.approx(numbers(no) | {"positive_token": YES})


def test_class_moments_have_a_row_per_behavior_and_answers() -> None:
    pairs = gaussian_pairs(4, (30, 20), plus=0.6)
    moments = class_moments(pairs)
    assert sorted(moments.means.count) == [8, 12, 12, 18]
    assert moments.second_moment == second_moment(pairs)
    for c in range(4):
        plus, minus = classes(pairs, int(moments.means.behavior[c]))
        own = plus if moments.means.chosen[c] == YES else minus
        np.testing.assert_allclose(moments.means.features[c], own.mean(0), atol=1e-12)
        assert moments.concentration[c] == pytest.approx(
            np.linalg.norm(np.cov(own.T, bias=True), 2), rel=1e-9
        )
        assert moments.trace[c] == pytest.approx(own.var(axis=0).sum(), rel=1e-12)
    np.testing.assert_allclose(
        head_change(moments.means, moments.means.weight).rows,
        head_change(pairs, pairs.weight).rows,
        atol=1e-12,
    )
    many = class_moments(mixed_pairs(0))
    assert many.means.count.sum() == 40 and len(many.means.count) > 20


def test_moments_of_weighted_rows_are_those_of_the_pairs() -> None:
    pairs = gaussian_pairs(5, (12,))
    count = np.arange(1, 13)
    weighted = frozen_pairs(pairs.features, pairs.chosen, pairs.rejected, count=count)
    long = frozen_pairs(
        *(np.repeat(a, count, axis=0) for a in (pairs.features, pairs.chosen, pairs.rejected))
    )
    one, other = (numbers(behavior_statistics(p, YES)[0]) for p in (weighted, long))
    assert one == pytest.approx(other, rel=1e-10)


def test_an_empty_class_is_refused_by_name() -> None:
    chosen = np.array([YES, YES, YES, NO])
    rejected = np.array([NO, NO, NO, YES])
    pairs = frozen_pairs(
        np.random.default_rng(0).normal(size=(4, 3)), chosen, rejected, [0, 0, 1, 1], ["yea", "ok"]
    )
    match = rf"'yea': all 2 pairs choose token {YES}; the class that chooses {NO} is empty"
    with pytest.raises(ValueError, match=match):
        behavior_statistics(pairs)
    with pytest.raises(ValueError, match=match):
        class_differences(pairs, NO)
    with pytest.raises(ValueError, match="positive_token 7 is neither"):
        behavior_statistics(pairs, 7)
    assert np.isfinite(directions(pairs)).all(), "what needs no classes goes on"


def test_more_than_two_answers_leave_the_classes_undefined() -> None:
    pairs = mixed_pairs(1)
    for s in behavior_statistics(pairs):
        assert math.isnan(s.delta) and math.isnan(s.concentration) and math.isnan(s.spread_plus)
        assert (s.n_plus, s.n_minus, s.positive_token) == (-1, -1, -1)
        assert s.effective_delta > 0 and 0 < s.coherence <= 1 and s.second_moment > 0
    with pytest.raises(ValueError, match="different pairs of answers"):
        class_differences(pairs)


def test_classes_that_coincide_have_no_distance_and_no_direction() -> None:
    rng = np.random.default_rng(1)
    half = 1e3 * rng.normal(size=(50, 6))
    order = rng.permutation(50)
    chosen = np.repeat([YES, NO], 50)
    pairs = frozen_pairs(np.concatenate([half, half[order]]), chosen, YES + NO - chosen)
    means = [half.mean(0), half[order].mean(0)]
    assert np.linalg.norm(means[0] - means[1]) > 0, "else rounding has nothing to get wrong"
    (s,) = behavior_statistics(pairs)
    assert s.delta == s.effective_delta == s.coherence == s.mu_dot_d == 0
    assert math.isnan(s.spread_plus) and s.concentration > 0
    assert (directions(pairs) == 0).all()


def test_features_that_are_all_zero() -> None:
    pairs = frozen_pairs(np.zeros((2, 3)), [YES, NO], [NO, YES])
    (s,) = behavior_statistics(pairs)
    assert (s.delta, s.trace, s.second_moment) == (0, 0, 0)
    assert math.isnan(s.coherence)


def test_largest_eigenvalue_takes_the_smaller_matrix() -> None:
    rows = np.random.default_rng(2).normal(size=(5, 9))
    truth = np.linalg.svd(rows, compute_uv=False)[0] ** 2
    assert largest_eigenvalue(rows) == pytest.approx(truth, rel=1e-12)
    assert largest_eigenvalue(rows.T) == pytest.approx(truth, rel=1e-12)
