"""The overview against simulated first steps and the functions it puts together."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastpref.theory.overview import overview
from fastpref.theory.pairs import FrozenPairs, behavior_means, frozen_pairs
from fastpref.theory.rates import pair_rates
from tests.theory.simulate import NO, VOCABULARY, YES, train


def some_pairs(sizes: tuple[int, ...] = (30, 10, 20), seed: int = 0) -> FrozenPairs:
    rng = np.random.default_rng(seed)
    behavior = np.repeat(np.arange(len(sizes)), sizes)
    yes = rng.random(len(behavior)) < 0.55
    pull = rng.normal(size=(len(sizes), 6)) * np.arange(1, len(sizes) + 1)[:, None]
    features = rng.normal(size=(len(behavior), 6)) + np.where(yes, 1, -1)[:, None] * pull[behavior]
    chosen, rejected = np.where(yes, YES, NO), np.where(yes, NO, YES)
    return frozen_pairs(features, chosen, rejected, behavior, [f"b{k}" for k in range(len(sizes))])


def test_rates_are_those_of_a_first_step() -> None:
    pairs, beta, rate = some_pairs(), 0.3, 1e-5
    view = overview(pairs, beta, rate, positive_token=YES)
    head = np.random.default_rng(1).normal(size=(VOCABULARY, 6))
    run = train(pairs, [None], rate, beta, head)
    assert view.mixture.head_rate == pytest.approx(run.head_norm[1], rel=1e-9)
    means = behavior_means(pairs, run.margin[1])
    for own in view.behaviors:
        k = pairs.behaviors.index(own.statistics.behavior)
        assert own.mixture_rate == pytest.approx(means[k], rel=1e-6)
        alone = frozen_pairs(
            *(x[pairs.behavior == k] for x in (pairs.features, pairs.chosen, pairs.rejected))
        )
        single = train(alone, [None], rate, beta, head)
        assert own.head_rate == pytest.approx(single.head_norm[1], rel=1e-9)
        assert own.margin_rate == pytest.approx(single.margin[1].mean(), rel=1e-6)
    assert view.mixture.accuracy == pytest.approx((run.margin[1] > 0).mean())
    found = [own.mixture_rate for own in view.behaviors]
    assert found == sorted(found, reverse=True)
    assert [own.order for own in view.behaviors] == [1, 2, 3]
    assert sum(own.share for own in view.behaviors) == pytest.approx(1)
    assert sum(own.fraction for own in view.behaviors) == pytest.approx(1)


def test_learning_rate_scales_rates_and_nothing_else() -> None:
    pairs = some_pairs()
    time, step = overview(pairs, 0.1), overview(pairs, 0.1, 0.02)
    for a, b in zip(time.behaviors, step.behaviors, strict=True):
        assert b.mixture_rate == pytest.approx(0.02 * a.mixture_rate)
        assert b.head_rate == pytest.approx(0.02 * a.head_rate)
        assert (b.level, b.share, b.statistics) == (a.level, a.share, a.statistics)
    assert step.mixture.window == pytest.approx(50 * time.mixture.window)
    assert step.mixture.max_learning_rate == time.mixture.max_learning_rate
    with pytest.raises(ValueError, match="learning_rate is 0"):
        overview(pairs, 0.1, 0.0)


def test_priority_is_in_the_order_of_the_behaviors() -> None:
    view = overview(some_pairs(), 0.1)
    delta = np.array([own.statistics.effective_delta for own in view.behaviors])
    assert view.priority is not None
    np.testing.assert_array_equal(np.sign(view.priority), np.sign(delta[:, None] - delta[None]))


def test_a_single_behavior_has_no_priority() -> None:
    view = overview(some_pairs((20,)), 0.1, batch_size=20)
    assert view.priority is None and view.mixture.batch_size == 0
    assert math.isnan(view.mixture.batch_rate)
    (own,) = view.behaviors
    assert own.order == 1 and own.share == 1 and own.mixture_rate == own.margin_rate


def test_what_cancels_is_undefined() -> None:
    one = np.random.default_rng(0).normal(size=(8, 4))
    yes = np.arange(8) % 2 == 0
    pairs = frozen_pairs(
        np.concatenate([one, one]),
        np.concatenate([np.where(yes, YES, NO), np.where(yes, NO, YES)]),
        np.concatenate([np.where(yes, NO, YES), np.where(yes, YES, NO)]),
        np.repeat([0, 1], 8),
    )
    view = overview(pairs, 0.1)
    assert view.mixture.pull == 0 and view.mixture.head_rate == 0
    for own in view.behaviors:
        assert own.order == 0 and own.mixture_rate == 0 and own.head_rate > 0
        assert math.isnan(own.share) and math.isnan(own.level)
    assert view.priority is not None and np.isnan(view.priority[0, 1])


def test_a_cap_on_logits_leaves_the_statistics_alone() -> None:
    pairs = some_pairs()
    capped, plain = overview(pairs, 0.1, linear=False), overview(pairs, 0.1)
    deltas = {own.statistics.behavior: own.statistics.delta for own in plain.behaviors}
    for own in capped.behaviors:
        assert own.statistics.delta == deltas[own.statistics.behavior] and own.order == 0
        rates = (own.head_rate, own.margin_rate, own.mixture_rate, own.level, own.share)
        assert all(map(math.isnan, (*rates, own.statistics.coherence)))
    assert capped.priority is not None and np.isfinite(capped.priority).all()
    assert [own.statistics.effective_delta for own in capped.behaviors] == sorted(
        (own.statistics.effective_delta for own in plain.behaviors), reverse=True
    )
    mixture = capped.mixture
    assert math.isnan(mixture.accuracy) and math.isnan(mixture.window)


def test_equal_rates_share_their_order() -> None:
    one = some_pairs((12,))
    twice = frozen_pairs(
        np.concatenate([one.features, one.features]),
        np.concatenate([one.chosen, one.chosen]),
        np.concatenate([one.rejected, one.rejected]),
        np.repeat([0, 1], 12),
        ["later", "earlier"],
    )
    view = overview(twice, 0.1)
    assert [own.order for own in view.behaviors] == [1, 1]
    assert pair_rates(twice, 0.1).mean() == pytest.approx(view.behaviors[0].mixture_rate)
