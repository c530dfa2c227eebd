"""Bounds, closed form and guarantees against simulated training."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastpref.theory import concentrated
from fastpref.theory.bounds import (
    curvature,
    gap_radius,
    head_bounds,
    loss_bounds,
    max_learning_rate,
    validity_window,
)
from fastpref.theory.distinguish import (
    behavior_statistics,
    class_moments,
    directions,
    second_moment,
)
from fastpref.theory.dual import dpo_loss, dual_recursion, gradient_flow
from fastpref.theory.guarantee import accuracy_guarantee, certified, initial_guarantee
from fastpref.theory.mixture import mixture_direction
from fastpref.theory.pairs import FrozenPairs, behavior_means, frozen_pairs, kernel, output_gap
from fastpref.theory.rates import pair_rates
from tests.theory.simulate import (
    NO,
    YES,
    gaussian_pairs,
    mixed_pairs,
    random_head,
    train,
    true_margins,
)

SETS = {
    "one behavior": gaussian_pairs(0, (60,)),
    "far from the origin": gaussian_pairs(1, (60,), mean=12.0),
    "unbalanced mixture": gaussian_pairs(2, (40, 20), plus=0.6),
    "any tokens": mixed_pairs(3),
    # Pairs that contradict each other along one line: a loss that is all but quadratic.
    "at odds": frozen_pairs(np.ones((40, 1)), [YES] * 21 + [NO] * 19, [NO] * 21 + [YES] * 19),
}


def numbers(pairs: FrozenPairs) -> tuple[float, float]:
    pull = mixture_direction(directions(pairs), pairs.fraction)
    return float(np.linalg.norm(pull)), second_moment(pairs)


def mean_loss(margin: np.ndarray, beta: float) -> np.ndarray:
    return dpo_loss(margin, beta).mean(axis=1)


@pytest.mark.parametrize("pairs", SETS.values(), ids=SETS.keys())
def test_curvature_bounds_the_hessian(pairs: FrozenPairs) -> None:
    beta = 0.7
    exact = beta**2 / 4 * np.linalg.eigvalsh(kernel(pairs) / len(pairs.chosen))[-1]
    c = curvature(second_moment(pairs), beta)
    assert exact <= c * (1 + 1e-12)
    if len(pairs.answers) == 1:
        assert exact == pytest.approx(c, rel=1e-10)


@pytest.mark.parametrize("pairs", SETS.values(), ids=SETS.keys())
def test_bounds_contain_training(pairs: FrozenPairs) -> None:
    beta, steps = 0.5, 120
    delta, moment = numbers(pairs)
    limit = max_learning_rate(moment, beta)
    head = random_head(1, pairs.features.shape[1])
    for part in (0.02, 0.2, 0.95):
        rate = part * limit
        run = train(pairs, [None] * steps, rate, beta, head)
        time = rate * np.arange(steps + 1)
        lower, upper = head_bounds(time, delta, moment, beta)
        assert (lower >= 0).all() and (lower[1:3] > 0).any()
        assert (run.head_norm >= lower - 1e-12).all() and (run.head_norm <= upper + 1e-12).all()
        below, above = loss_bounds(time, delta, moment, beta, rate)
        loss = mean_loss(run.margin, beta)
        assert (loss >= below - 1e-12).all() and (loss <= above + 1e-12).all()
        linear = np.outer(time, pair_rates(pairs, beta))
        radius = gap_radius(pairs, time, delta, moment, beta)
        assert (np.abs(run.margin - linear) <= radius + 1e-12).all()
    flow = gradient_flow(pairs, np.linspace(0, 3 * limit, 40), beta)
    lower, upper = head_bounds(flow.time, delta, moment, beta)
    assert (flow.head_norm >= lower - 1e-9).all() and (flow.head_norm <= upper + 1e-9).all()
    below, above = loss_bounds(flow.time, delta, moment, beta)
    loss = mean_loss(flow.margin, beta)
    assert (loss >= below - 1e-9).all() and (loss <= above + 1e-9).all()


def test_bounds_are_tight_where_they_say_so() -> None:
    pairs, beta, tolerance = SETS["one behavior"], 0.5, 0.05
    delta, moment = numbers(pairs)
    rate = 0.01 * max_learning_rate(moment, beta)
    window = validity_window(moment, beta, tolerance, rate)
    assert window * rate == pytest.approx(validity_window(moment, beta, tolerance))
    steps = int(window)
    assert steps >= 5
    run = train(pairs, [None] * steps, rate, beta, random_head(1, 8))
    time = rate * np.arange(steps + 1)
    lower, upper = head_bounds(time, delta, moment, beta)
    assert lower[-1] >= (1 - tolerance) * upper[-1] * (1 - 1e-12)
    assert run.head_norm[-1] >= (1 - tolerance) * upper[-1]
    # Nothing tighter holds: the lower bound is touched where all features are one eigenvector.
    line = frozen_pairs(np.array([[1.0], [-1.0]]), [YES, NO], [NO, YES])
    delta, moment = numbers(line)
    flow = gradient_flow(line, [0.0, 0.005], 1.0)
    lower, upper = head_bounds(flow.time, delta, moment, 1.0)
    assert flow.head_norm[1] - lower[1] < 1e-3 * (upper[1] - lower[1])
    below, above = loss_bounds(flow.time, delta, moment, 1.0)
    assert mean_loss(flow.margin, 1.0)[1] > above[1] - 1e-2 * (above[1] - below[1])


def test_bounds_of_features_that_are_zero_and_bad_numbers() -> None:
    time = np.array([0.0, 1.0])
    assert max_learning_rate(0.0, 1.0) == validity_window(0.0, 1.0) == math.inf
    lower, upper = head_bounds(time, 0.0, 0.0, 1.0)
    assert (lower == 0).all() and (upper == 0).all()
    for loss in loss_bounds(time, 0.0, 0.0, 1.0):
        assert loss == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="not stable"):
        loss_bounds(time, 1.0, 4.0, 1.0, learning_rate=1.1)
    with pytest.raises(ValueError, match="time: expected finite"):
        head_bounds(np.array([-1.0]), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="delta is nan"):
        head_bounds(time, math.nan, 1.0, 1.0)
    with pytest.raises(ValueError, match="second_moment is -1"):
        head_bounds(time, 1.0, -1.0, 1.0)
    with pytest.raises(ValueError, match="tolerance=0"):
        validity_window(1.0, 1.0, 0)


def points(delta: float, width: int = 4, mean: float = 2.0) -> FrozenPairs:
    """Two concentrated balanced classes with mu.d = 0."""
    d, middle = np.zeros(width), np.zeros(width)
    d[0], middle[1] = delta, mean
    features = np.stack([middle + d / 2, middle - d / 2])
    chosen = np.array([YES, NO])
    return frozen_pairs(features, chosen, YES + NO - chosen)


def test_closed_form_is_the_simulation_of_concentrated_classes() -> None:
    delta, beta, steps = 3.0, 0.3, 2000
    end = 8 * concentrated.time_constant(delta, beta)
    pairs = points(delta)
    coarse, fine = (
        train(pairs, [None] * n, end / n, beta, random_head(2, 4)) for n in (steps, 2 * steps)
    )
    time = end * np.arange(0, steps + 1, 200) / steps
    margin = concentrated.margin_at(time, delta, beta)
    extrapolated = 2 * fine.margin[::400] - coarse.margin[::200]
    np.testing.assert_allclose(extrapolated, np.outer(margin, np.ones(2)), rtol=1e-5)
    head = 2 * fine.head_norm[::400] - coarse.head_norm[::200]
    np.testing.assert_allclose(concentrated.head_norm_at(time, delta, beta), head, rtol=1e-5)
    flow = gradient_flow(pairs, time, beta, tolerance=1e-11)
    np.testing.assert_allclose(flow.margin[:, 0], margin, rtol=1e-9)
    np.testing.assert_allclose(
        concentrated.loss_at(time, delta, beta), mean_loss(flow.margin, beta), rtol=1e-9
    )


def test_closed_form_solves_its_equation_from_the_smallest_to_the_largest_times() -> None:
    delta, beta = 2.5, 0.4
    time = np.array([0.0, 1e-14, 1e-8, 1e-3, 1.0, 1e3, 1e9])
    x = beta * concentrated.margin_at(time, delta, beta)
    np.testing.assert_allclose(x + np.expm1(x), time * (beta * delta) ** 2 / 2, rtol=1e-13)
    for t, margin in zip(time, x / beta, strict=True):
        assert concentrated.time_to_margin(margin, delta, beta) == pytest.approx(t, rel=1e-12)
    # At first m = beta delta^2 t / 4, the rate of (E10).
    assert x[2] / beta == pytest.approx(beta * delta**2 / 4 * 1e-8, rel=1e-6)
    assert concentrated.time_constant(delta, beta) == pytest.approx(2 / (0.4 * 2.5) ** 2)


def test_closed_form_without_distance() -> None:
    time = np.array([0.0, 5.0])
    assert (concentrated.margin_at(time, 0.0, 1.0) == 0).all()
    assert (concentrated.head_norm_at(time, 0.0, 1.0) == 0).all()
    assert concentrated.time_constant(0.0, 1.0) == math.inf
    assert concentrated.time_to_margin(1.0, 0.0, 1.0) == math.inf
    assert concentrated.time_to_margin(0.0, 0.0, 1.0) == 0.0
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="margin is"):
            concentrated.time_to_margin(wrong, 1.0, 1.0)
        with pytest.raises(ValueError, match="delta is"):
            concentrated.margin_at(time, wrong, 1.0)
    with pytest.raises(ValueError, match="time"):
        concentrated.margin_at(np.array([-1.0]), 1.0, 1.0)


@pytest.mark.parametrize("mean", [0.0, 3.0, 15.0])
@pytest.mark.parametrize("spread", [0.15, 0.5, 1.2])
def test_guarantee_holds_over_many_seeds(mean: float, spread: float) -> None:
    beta, steps = 0.2, 60
    for seed in range(6):
        pairs = gaussian_pairs(seed, (50, 30), 3.0, 10, spread, mean, plus=(0.5, 0.7)[seed % 2])
        moments = class_moments(pairs)
        rate = (0.05, 0.3, 1.0)[seed % 3] * max_learning_rate(moments.second_moment, beta)
        for head in (None, 0.5 * random_head(seed, 10)):
            start = np.zeros(80) if head is None else output_gap(pairs, head)
            right = start + dual_recursion(pairs, [None] * steps, rate, beta).margin > 0
            promised = accuracy_guarantee(moments, steps, rate, beta, head)
            sure = certified(pairs, moments, steps, rate, beta, head)
            by_behavior = behavior_means(pairs, right.astype(float))
            for claim in (promised, sure):
                assert (claim.accuracy <= right.mean(axis=1) + 1e-12).all()
                assert (claim.behavior_accuracy <= by_behavior + 1e-12).all()
                assert (claim.accuracy >= 0).all() and claim.accuracy.shape == (steps + 1,)


def test_real_heads_stay_within_the_radius_and_answers_of_any_tokens_too() -> None:
    for pairs in (gaussian_pairs(7, (40, 40), spread=0.8, mean=4.0), mixed_pairs(8, behaviors=1)):
        moments, beta = class_moments(pairs), 0.4
        rate = 0.2 * max_learning_rate(moments.second_moment, beta)
        head = random_head(9, pairs.features.shape[1])
        run = train(pairs, [None] * 15, rate, beta, head)
        means = train(moments.means, [None] * 15, rate, beta, head)
        apart = [np.linalg.norm(a - b) for a, b in zip(run.heads, means.heads, strict=True)]
        claim = accuracy_guarantee(moments, 15, rate, beta)
        assert (np.array(apart) <= claim.radius + 1e-12).all()
        assert apart[-1] > 0.01 * claim.radius[-1], "far too wide to mean anything"
        assert (claim.accuracy <= (run.margin > 0).mean(axis=1) + 1e-12).all()


def test_guarantee_says_something_in_the_papers_regime() -> None:
    """beta 0.01, lr 0.1, 100 steps as in its code; lambda = delta^2/40, the mean 4 delta away."""
    pairs = gaussian_pairs(11, (200,), delta=10.0, width=32, spread=1.0, mean=40.0)
    (s,) = behavior_statistics(pairs)
    assert 0.01 < s.concentration / s.delta**2 < 0.03
    moments = class_moments(pairs)
    claim = accuracy_guarantee(moments, 100, 0.1, 0.01)
    right = (dual_recursion(pairs, [None] * 100, 0.1, 0.01).margin > 0).mean(axis=1)
    assert 0.8 < claim.accuracy[-1] <= right[-1]
    assert 0.95 < certified(pairs, moments, 100, 0.1, 0.01).accuracy[-1] <= right[-1]
    # Concentrated to points, everything is sure, at every step but before the first.
    still = class_moments(points(2.0))
    sure = accuracy_guarantee(still, 20, 0.1, 0.5)
    assert sure.accuracy.tolist() == [0.0] + [1.0] * 20 and sure.radius.max() < 1e-10


def test_guarantee_falls_as_classes_spread_and_grows_with_their_distance() -> None:
    spreads = [
        accuracy_guarantee(
            class_moments(gaussian_pairs(12, (80,), spread=s)), 30, 0.1, 0.2
        ).accuracy[-1]
        for s in (0.1, 0.3, 0.6, 1.2)
    ]
    assert spreads == sorted(spreads, reverse=True)
    distances = [
        accuracy_guarantee(
            class_moments(gaussian_pairs(12, (80,), delta=d)), 30, 0.1, 0.2
        ).accuracy[-1]
        for d in (0.5, 1.5, 4.0)
    ]
    assert distances == sorted(distances)


@pytest.mark.parametrize("tilt", [0.0, 0.6, 2.0])
def test_initial_guarantee(tilt: float) -> None:
    rng = np.random.default_rng(13)
    for _ in range(20):
        middle = np.array([tilt, *rng.normal(size=3)])
        d = np.array([2.0, 0, 0, 0])
        sign = np.repeat([1, -1], 40)
        # Heavy tails: the bound assumes no distribution.
        features = middle + sign[:, None] * d / 2 + 0.5 * rng.standard_t(3, size=(80, 4))
        chosen = np.where(sign > 0, YES, NO)
        pairs = frozen_pairs(features, chosen, YES + NO - chosen)
        (s,) = behavior_statistics(pairs, YES)
        promised = initial_guarantee(
            s.delta, s.mu_dot_d, (s.concentration_plus, s.concentration_minus)
        )
        assert promised <= np.mean(pair_rates(pairs, 0.1) > 0)
        after_one = accuracy_guarantee(class_moments(pairs), 1, 1e-6, 0.1).accuracy[1]
        assert promised == pytest.approx(after_one, rel=1e-6)
        if s.mu_dot_d < 1e-3:
            assert promised >= 1 - 4 * s.concentration / s.delta**2
    assert initial_guarantee(2.0, 0.0, (0.25, 0.25)) == pytest.approx(1 / (1 + 4 * 0.25 / 4))


def test_guarantees_that_cannot_be_given() -> None:
    assert math.isnan(initial_guarantee(0.0, 0.0, (1.0, 1.0)))
    assert math.isnan(initial_guarantee(math.nan, math.nan, (math.nan, 1.0)))
    assert initial_guarantee(1.0, 0.5, (0.0, 0.0)) == 0.5  # D-'s mean margin is 0: nothing is sure
    with pytest.raises(ValueError, match="expected 0 or more"):
        initial_guarantee(1.0, 0.0, (-1.0, 0.0))
    moments = class_moments(gaussian_pairs(0))
    limit = max_learning_rate(moments.second_moment, 0.1)
    with pytest.raises(ValueError, match=r"not within 0 to 2/c"):
        accuracy_guarantee(moments, 5, 1.01 * limit, 0.1)
    with pytest.raises(ValueError, match="steps is -1"):
        accuracy_guarantee(moments, -1, 0.1, 0.1)
    # Classes that coincide but for rounding: nothing is taught, and nothing is promised.
    half = 10 + 0.01 * np.random.default_rng(18).normal(size=(50, 4))
    chosen = np.repeat([YES, NO], 50)
    features = np.concatenate([half, half[::-1]])
    pairs = frozen_pairs(features, chosen, YES + NO - chosen)
    assert np.abs(dual_recursion(pairs, [None], 0.1, 0.1).margin[1]).max() > 0
    for claim in (
        accuracy_guarantee(class_moments(pairs), 3, 0.1, 0.1),
        certified(pairs, class_moments(pairs), 3, 0.1, 0.1),
    ):
        assert (claim.accuracy == 0).all()
    assert (pair_rates(pairs, 0.1) == 0).all()


@pytest.mark.parametrize("with_head", [False, True])
def test_guarantee_is_its_formula_at_the_heads_of_the_run_on_means(with_head: bool) -> None:
    """(E28) and (E29), once more, from simulated heads; how loose they are no run can tell."""
    pairs, beta, steps = gaussian_pairs(16, (40, 30), 3.0, 6, 0.4, 4.0, plus=0.6), 0.5, 12
    moments = class_moments(pairs)
    rate = 0.3 * max_learning_rate(moments.second_moment, beta)
    means, start = moments.means, random_head(17, 6)
    claim = accuracy_guarantee(moments, steps, rate, beta, start if with_head else None)
    radius, share = 0.0, means.count / means.count.sum()
    length, width = np.linalg.norm(means.features, axis=1), np.sqrt(moments.concentration)
    for step, head in enumerate(train(means, [None] * steps, rate, beta, start).heads):
        moved = head - start
        pull = moved[means.chosen] - moved[means.rejected]
        spread = beta * width * np.linalg.norm(pull, axis=1)
        if with_head:
            pull = head[means.chosen] - head[means.rejected]
        mean = (pull * means.features).sum(axis=1) - math.sqrt(2) * radius * length
        deviation = width * (np.linalg.norm(pull, axis=1) + math.sqrt(2) * radius)
        sure = np.where(mean > 0, mean**2 / np.maximum(mean**2 + deviation**2, 1e-300), 0)
        assert claim.radius[step] == pytest.approx(radius, rel=1e-9, abs=1e-11)
        assert claim.accuracy[step] == pytest.approx(sure @ share, abs=1e-9)
        bend = np.minimum(spread**2 / (12 * math.sqrt(3)), spread / 4)
        force = math.sqrt(2) * beta * (bend * length + spread * width / 4) @ share
        radius += rate * force
    assert radius > 0.01
    x = np.linspace(-4, 4, 80001)
    bends = np.diff(1 / (1 + np.exp(x)), 2) / (x[1] - x[0]) ** 2
    assert np.abs(bends).max() == pytest.approx(1 / (6 * math.sqrt(3)), rel=1e-4)


def test_guarantee_of_outputs_counts_gaps_of_the_real_model() -> None:
    pairs = gaussian_pairs(14, (60,), spread=0.3, mean=2.0)
    head = 0.3 * random_head(15, 8)
    moments = class_moments(pairs)
    claim = accuracy_guarantee(moments, 40, 0.2, 0.2, head)
    run = train(pairs, [None] * 40, 0.2, 0.2, head)
    right = [(true_margins(pairs, h, np.zeros_like(h)) > 0).mean() for h in run.heads]
    assert (claim.accuracy <= np.array(right) + 1e-12).all()
    assert claim.accuracy[-1] > 0.8
