"""Initial rates and mixtures against the first steps of simulated training."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastpref.theory.distinguish import behavior_statistics, class_differences, directions
from fastpref.theory.dual import dpo_weight
from fastpref.theory.mixture import (
    interaction,
    mixture_direction,
    mixture_shares,
    order_agreement,
    priority_levels,
    priority_matrix,
    shares_at,
)
from fastpref.theory.pairs import FrozenPairs, behavior_means, frozen_pairs, kernel
from fastpref.theory.rates import batch_head_rate, initial_accuracy, initial_rates, pair_rates
from tests.theory.simulate import (
    YES,
    gaussian_pairs,
    gradient,
    loss_of,
    mixed_pairs,
    random_head,
    train,
    true_margins,
)

BETA = 0.6
SETS = {
    "balanced": gaussian_pairs(0, (60,)),
    "unbalanced": gaussian_pairs(1, (50, 30), plus=0.7, mean=4.0),
    "mixture": gaussian_pairs(2, (40, 20, 10)),
    "any tokens": mixed_pairs(3),
}


def slopes(pairs: FrozenPairs, width: float = 1e-4) -> tuple[float, np.ndarray, np.ndarray]:
    """Head rate (one-sided), margin rates (P,) and losses' rates (P,) at t = 0, second order."""
    head = random_head(1, pairs.features.shape[1])
    one, two = (train(pairs, [None], w, BETA, head) for w in (width, 2 * width))

    def rate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.asarray((4 * first - second) / (2 * width))

    loss = [loss_of(run.margin[1], BETA) - math.log(2) for run in (one, two)]
    return (
        float(rate(one.head_norm[1:], two.head_norm[1:])[0]),
        rate(one.margin[1], two.margin[1]),
        rate(loss[0], loss[1]),
    )


@pytest.mark.parametrize("pairs", SETS.values(), ids=SETS.keys())
def test_rates_are_the_slopes_of_training(pairs: FrozenPairs) -> None:
    head, margin, loss = slopes(pairs)
    rates = initial_rates(directions(pairs), pairs.fraction, BETA)
    assert rates.head == pytest.approx(head, rel=1e-6)
    np.testing.assert_allclose(rates.margin, behavior_means(pairs, margin), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        rates.behavior_loss, behavior_means(pairs, loss), rtol=1e-6, atol=1e-8
    )
    assert rates.loss == pytest.approx(loss.mean(), rel=1e-6)
    np.testing.assert_allclose(pair_rates(pairs, BETA), margin, rtol=1e-6, atol=1e-7)
    # A behavior's share of the update: what the loss's slope owes to its pairs.
    assert rates.share.sum() == pytest.approx(1)
    np.testing.assert_allclose(
        rates.share, pairs.fraction * behavior_means(pairs, loss) / loss.mean(), rtol=1e-5
    )


def test_one_balanced_behavior_has_the_papers_rates() -> None:
    pairs = SETS["balanced"]
    (s,) = behavior_statistics(pairs)
    head, margin, loss = slopes(pairs)
    assert head == pytest.approx(BETA * s.delta / (2 * math.sqrt(2)), rel=1e-6)
    assert margin.mean() == pytest.approx(BETA * s.delta**2 / 4, rel=1e-6)
    assert loss.mean() == pytest.approx(-((BETA * s.delta) ** 2) / 8, rel=1e-6)


def test_imbalance_is_in_the_exact_rate_and_not_in_the_papers() -> None:
    pairs = SETS["unbalanced"]
    head, _, _ = slopes(pairs)
    paper = initial_rates(class_differences(pairs), pairs.fraction, BETA)
    assert abs(paper.head / head - 1) > 0.1
    assert initial_rates(directions(pairs), pairs.fraction, BETA).head == pytest.approx(
        head, rel=1e-6
    )


def test_probes_rates_and_first_accuracy() -> None:
    pairs = gaussian_pairs(4, (400,), delta=2.0, spread=1.0, width=12)
    probes = gaussian_pairs(4, (300,), delta=2.0, spread=1.0, width=12)
    head = random_head(2, 12)
    run = train(pairs, [None], 1e-3, BETA, head)
    got = true_margins(probes, run.heads[1], head) / 1e-3
    np.testing.assert_allclose(pair_rates(pairs, BETA, probes), got, rtol=1e-6, atol=1e-8)
    assert np.mean(pair_rates(pairs, BETA) > 0) == np.mean(run.margin[1] > 0)


@pytest.mark.parametrize("pairs", [mixed_pairs(5), gaussian_pairs(5, (20, 30, 50), plus=0.6)])
def test_interaction_is_who_teaches_whom_at_any_moment(pairs: FrozenPairs) -> None:
    head, reference = (
        random_head(3, pairs.features.shape[1]),
        random_head(4, pairs.features.shape[1]),
    )
    margin = true_margins(pairs, head, reference)
    got = interaction(pairs, margin, BETA, 0.1)
    width, everything = 1e-6, np.arange(len(margin))
    for taught_by in range(len(got)):
        own = pairs.behavior == taught_by
        step = gradient(pairs, everything[own], head, reference, BETA, 0.1) * own.mean()
        ahead, back = (true_margins(pairs, head - w * step, reference) for w in (width, -width))
        np.testing.assert_allclose(
            got[:, taught_by],
            behavior_means(pairs, (ahead - back) / (2 * width)),
            rtol=1e-6,
            atol=1e-7,
        )
    grad = gradient(pairs, everything, head, reference, BETA, 0.1)
    share = shares_at(pairs, margin, BETA, 0.1)
    assert share.sum() == pytest.approx(1)
    for k in range(len(got)):
        own = pairs.behavior == k
        part = gradient(pairs, everything[own], head, reference, BETA, 0.1) * own.mean()
        assert share[k] == pytest.approx((part * grad).sum() / (grad**2).sum(), rel=1e-9)


def test_shares_and_interaction_at_the_start_are_the_initial_ones() -> None:
    pairs = SETS["mixture"]
    start = np.zeros(len(pairs.chosen))
    rates = initial_rates(directions(pairs), pairs.fraction, BETA)
    np.testing.assert_allclose(shares_at(pairs, start, BETA), rates.share, atol=1e-12)
    np.testing.assert_allclose(
        interaction(pairs, start, BETA).sum(axis=1), rates.margin, atol=1e-12
    )
    np.testing.assert_allclose(
        mixture_shares(directions(pairs), [40, 20, 10]), rates.share, atol=1e-12
    )


def test_priority_is_the_update_rate_and_its_gap_an_identity() -> None:
    pairs = gaussian_pairs(6, (30, 30, 30))
    pull = directions(pairs)
    rates = initial_rates(pull, pairs.fraction, BETA)
    length = np.linalg.norm(mixture_direction(pull, pairs.fraction))
    np.testing.assert_allclose(
        priority_levels(pull, pairs.fraction) * BETA / 4 * length, rates.margin, atol=1e-12
    )
    matrix = priority_matrix(pull)
    assert (matrix == -matrix.T).all() and (np.diag(matrix) == 0).all()
    delta = np.linalg.norm(pull, axis=1)
    for k in range(3):
        for other in range(3):
            if k != other:
                dbar = (pull[k] + pull[other]) / 2  # the official notebook's own formula
                level = [dbar @ v / np.linalg.norm(dbar) for v in (pull[k], pull[other])]
                assert matrix[k, other] == pytest.approx(
                    (level[0] - level[1]) / max(delta[[k, other]])
                )
                gap = (delta[k] ** 2 - delta[other] ** 2) / (2 * np.linalg.norm(dbar))
                assert level[0] - level[1] == pytest.approx(gap)


def test_mixture_shares_rank_what_training_shows() -> None:
    rng = np.random.default_rng(7)
    sets = [gaussian_pairs(s, (20,), delta=rng.uniform(0.3, 4), mean=3.0) for s in range(12)]
    common = np.array([1.0, -1.0, 0.5, 0, 0, 0, 0, 0])
    features = [
        np.where(p.chosen[:, None] == YES, 1, -1) * common * rng.uniform(0, 1) + p.features
        for p in sets
    ]
    pairs = frozen_pairs(
        np.concatenate(features),
        np.concatenate([p.chosen for p in sets]),
        np.concatenate([p.rejected for p in sets]),
        np.repeat(np.arange(12), 20),
    )
    share = mixture_shares(directions(pairs), pairs.fraction)
    run = train(pairs, [None] * 3, 1e-3, BETA, random_head(5, 8))
    observed = behavior_means(pairs, run.margin[-1] - run.margin[0])
    assert order_agreement(share, observed) == 1.0
    assert order_agreement(share[::-1], observed) < 0.9
    assert (share < 0).any() == (observed < 0).any()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
        elements=st.floats(-5, 5).map(lambda x: round(x, 3)),
    ),
    st.integers(0, 99),
)
def test_shares_sum_to_one_or_are_undefined(pull: np.ndarray, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(1, 50, size=len(pull))
    share, level = mixture_shares(pull, counts), priority_levels(pull, counts)
    mean = mixture_direction(pull, counts)
    assert share.shape == level.shape == (len(pull),)
    if np.linalg.norm(mean) == 0:
        assert np.isnan(share).all() and np.isnan(level).all()
    else:
        # Where pulls nearly cancel, shares are large numbers of both signs.
        assert share.sum() == pytest.approx(1, abs=1e-9 * np.abs(share).max() + 1e-9)
    matrix = priority_matrix(pull)
    assert matrix.shape == (len(pull), len(pull))
    same = (matrix == -matrix.T) | np.isnan(matrix)
    assert same.all() and (np.isnan(matrix) == np.isnan(matrix.T)).all()
    assert np.nanmax(np.abs(matrix)) <= 2


def test_pulls_that_cancel_leave_shares_undefined() -> None:
    pull = np.array([[0.1, 0.7], [-0.1, -0.7]])
    assert np.isnan(mixture_shares(pull, [1, 1])).all()
    assert np.isnan(priority_levels(pull, [3, 3])).all()
    assert np.isnan(priority_matrix(pull)[0, 1])
    third = np.array([[0.1, 0.2], [0.2, 0.4], [-0.3, -0.6]])
    assert np.linalg.norm(third.mean(axis=0)) > 0, "rounding, which must not become a share"
    assert np.isnan(mixture_shares(third, [1, 1, 1])).all()
    rates = initial_rates(pull, [1, 1], BETA)
    assert rates.head == rates.loss == 0 and np.isnan(rates.share).all()
    nothing = priority_matrix(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    assert np.isnan(nothing[0, 1]) and nothing[2, 0] == 1.0
    assert mixture_shares(pull, [3, 1]).tolist() == pytest.approx([1.5, -0.5])


def test_bad_mixtures_are_refused() -> None:
    pull = np.ones((2, 3))
    with pytest.raises(ValueError, match="expected 2 or more"):
        priority_matrix(np.ones((1, 3)))
    with pytest.raises(ValueError, match="directions: expected finite"):
        priority_matrix(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="directions: expected finite"):
        mixture_shares(np.full((2, 2), np.nan), [1, 1])
    with pytest.raises(ValueError, match=r"counts \(3,\) need \(K,\)"):
        mixture_shares(pull, [1, 1, 1])
    with pytest.raises(ValueError, match="positive numbers of pairs"):
        mixture_shares(pull, [1, 0])
    with pytest.raises(ValueError, match="beta is 0"):
        initial_rates(pull, [1, 1], 0)
    with pytest.raises(ValueError, match="expected two"):
        order_agreement(np.ones(2), np.ones(3))


def test_order_agreement() -> None:
    assert order_agreement(np.array([1, 2, 3]), np.array([10, 20, 15])) == pytest.approx(2 / 3)
    assert order_agreement(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0.5
    assert order_agreement(np.array([1.0, np.nan, 0.0]), np.array([1.0, 9.0, 0.0])) == 1.0
    assert math.isnan(order_agreement(np.array([np.nan, 1.0]), np.array([1.0, 2.0])))


@pytest.mark.parametrize("size", [1, 7, 50])
def test_first_batch_moves_the_head_by_the_rate_of_batches(size: int) -> None:
    pairs = gaussian_pairs(8, (50,), delta=1.0, mean=6.0)
    rng = np.random.default_rng(9)
    matrix, square = kernel(pairs), []
    for _ in range(4000):
        batch = rng.choice(50, size=size, replace=False)
        square.append(matrix[np.ix_(batch, batch)].mean() * (BETA / 2) ** 2)
    error = np.std(square) / math.sqrt(len(square))
    expected = batch_head_rate(pairs, size, BETA) ** 2
    assert np.mean(square) == pytest.approx(expected, abs=4 * error + 1e-12)
    if size < 50:
        assert expected > 1.5 * initial_rates(directions(pairs), [50], BETA).head ** 2
    with pytest.raises(ValueError, match="batch_size is 51"):
        batch_head_rate(pairs, 51, BETA)


@pytest.mark.parametrize("tilt", [0.0, 0.8, 2.0])
def test_initial_accuracy_of_gaussian_classes(tilt: float) -> None:
    rng = np.random.default_rng(10)
    size, width, delta = 40000, 5, 2.0
    d = np.zeros(width)
    d[0] = delta
    sign = np.where(np.arange(size) < size // 2, 1, -1)
    middle = np.array([tilt * delta / 2, 3.0, 0, 0, 0])
    widths = np.where(sign[:, None] > 0, [1.0, 0.5, 1, 1, 1], [2.0, 1, 1, 1, 1])
    features = middle + sign[:, None] * d / 2 + widths * rng.normal(size=(size, width))
    chosen = np.where(sign > 0, YES, YES + 1)
    pairs = frozen_pairs(features, chosen, 2 * YES + 1 - chosen)
    (s,) = behavior_statistics(pairs, YES)
    predicted = initial_accuracy(s.delta, s.mu_dot_d, (s.spread_plus, s.spread_minus))
    assert predicted == pytest.approx(np.mean(pair_rates(pairs, BETA) > 0), abs=0.01)


def test_initial_accuracy_where_it_is_degenerate() -> None:
    assert math.isnan(initial_accuracy(0.0, 0.0, (1.0, 1.0)))
    assert math.isnan(initial_accuracy(math.nan, 0.0, (math.nan, 1.0)))
    assert initial_accuracy(2.0, 0.0, (0.0, 0.0)) == 1.0
    assert initial_accuracy(2.0, 3.0, (0.0, 0.0), 0.7) == pytest.approx(0.7)
    assert math.isnan(initial_accuracy(2.0, 2.0, (0.0, 0.0)))
    with pytest.raises(ValueError, match="expected lengths"):
        initial_accuracy(1.0, 0.0, (-1.0, 1.0))


def test_label_smoothing_scales_first_rates() -> None:
    weight = dpo_weight(np.zeros(1), BETA, 0.2)[0]
    assert weight == pytest.approx(BETA / 2 * (1 - 2 * 0.2))
