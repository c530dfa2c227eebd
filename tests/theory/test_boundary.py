"""Flip times, the boundary's turn, and what frozen features say of misalignment."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastpref.theory.boundary import (
    angle,
    boundary_angle,
    compare_starts,
    flip_times,
    observed_flips,
)
from fastpref.theory.distinguish import class_differences
from fastpref.theory.dual import dpo_loss, dual_recursion, gradient_flow
from fastpref.theory.pairs import flipped, output_gap, with_features
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

BETA = 0.3


def test_early_flips_come_when_first_rates_say() -> None:
    pairs = gaussian_pairs(0, (200,), delta=3.0, spread=0.4, mean=0.5)
    head = -0.1 * random_head(1, 8)
    gap = output_gap(pairs, head)
    predicted = flip_times(gap, pair_rates(pairs, BETA))
    flow = gradient_flow(pairs, np.linspace(0, 0.5, 501), BETA, tolerance=1e-6)
    observed = observed_flips(flow.time, gap + flow.margin)
    early = predicted < 0.4
    assert early.sum() > 30
    np.testing.assert_allclose(observed[early], predicted[early], rtol=0.03, atol=1e-3)
    assert np.isinf(observed[np.isinf(predicted)]).all()
    assert np.isinf(predicted).sum() > 10


def test_gaps_move_by_the_margin() -> None:
    """(E32), with gaps of the full softmax."""
    pairs, head = mixed_pairs(2), random_head(3, 6)
    run = train(pairs, [None] * 20, 0.5, BETA, head)
    gap = [true_margins(pairs, h, np.zeros_like(h)) for h in run.heads]
    theory = output_gap(pairs, head) + dual_recursion(pairs, [None] * 20, 0.5, BETA).margin
    np.testing.assert_allclose(gap, theory, atol=1e-12)


def test_flip_times_of_every_kind() -> None:
    gap = np.array([-2.0, 2.0, -2.0, 2.0, -1.0, 0.0, 0.0, 0.0])
    rate = np.array([4.0, -4.0, -1.0, 1.0, 0.0, 3.0, -3.0, 0.0])
    time = flip_times(gap, rate)
    assert time[:7].tolist() == [0.5, 0.5, math.inf, math.inf, math.inf, 0.0, 0.0]
    assert math.isnan(time[7]) and not np.signbit(time[:7]).any()
    with pytest.raises(ValueError, match=r"expected \(P,\) both"):
        flip_times(gap, rate[:2])
    seen = observed_flips(
        np.array([0.0, 1.0, 2.0]), np.array([[1, -1, 0, 1], [0, 1, 1, 1], [-1, -1, 1, 2]])
    )
    assert seen[[0, 1, 3]].tolist() == [2.0, 1.0, math.inf] and math.isnan(seen[2])
    with pytest.raises(ValueError, match=r"\(E,\) and \(E, P\)"):
        observed_flips(np.zeros(2), np.zeros((3, 4)))


def test_boundary_turns_towards_the_difference_of_means() -> None:
    pairs, head = gaussian_pairs(4, (60,)), random_head(5, 8)
    d = class_differences(pairs, YES)[0]
    run = train(pairs, [None] * 10, 1e-3, BETA, head)
    boundary = np.stack([h[YES] - h[NO] for h in run.heads])
    time = 1e-3 * np.arange(11)
    np.testing.assert_allclose(
        boundary_angle(boundary[0], d, time, BETA), angle(boundary[0], boundary), rtol=5e-3
    )
    assert boundary_angle(boundary[0], d, time, BETA)[0] == 0


def test_angles() -> None:
    start = np.array([3.0, 0.0])
    now = np.array([[1.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [1.0, 1e-9], [0.0, 0.0]])
    got = angle(start, now)
    assert got[:4] == pytest.approx([0, math.pi / 2, math.pi, 1e-9], rel=1e-12)
    assert math.isnan(got[4])
    assert np.isnan(angle(np.zeros(2), now)).all()


def test_with_frozen_features_an_aligned_head_learns_the_same_and_flips_later() -> None:
    base = gaussian_pairs(6, (60,), spread=0.4)
    base_head = 0.3 * random_head(10, 8)
    aligned_head = train(base, [None] * 200, 0.5, BETA, base_head).heads[-1]
    pairs = flipped(base)
    told = compare_starts(pairs, pairs, base_head, aligned_head, BETA)
    assert told.same_features and told.speed == 1.0
    runs = [train(pairs, [None] * 60, 0.5, BETA, h) for h in (base_head, aligned_head)]
    np.testing.assert_allclose(runs[0].margin, runs[1].margin, atol=1e-11)
    np.testing.assert_allclose(runs[0].head_norm, runs[1].head_norm, atol=1e-12)
    right = [(output_gap(pairs, r.heads[20]) > 0).mean() for r in runs]
    assert right[0] > right[1] + 0.3
    both = np.isfinite(told.flip_time_base) & np.isfinite(told.flip_time_aligned)
    assert both.sum() > 5
    assert (told.flip_time_aligned[both] > told.flip_time_base[both]).all()


def test_features_that_moved_apart_make_the_loss_fall_faster() -> None:
    base = flipped(gaussian_pairs(8, (60,)))
    d = class_differences(base, YES)[0]
    sign = np.where(base.chosen == YES, 1, -1)[:, None]
    aligned = with_features(base, base.features + sign * d / 2)
    head = random_head(9, 8)
    told = compare_starts(base, aligned, head, head, BETA)
    assert not told.same_features and told.speed == pytest.approx(4.0, rel=1e-9)
    slope = [
        (dpo_loss(train(p, [None], 1e-5, BETA, head).margin[1], BETA).mean() - math.log(2)) / 1e-5
        for p in (base, aligned)
    ]
    assert [told.loss_rate_base, told.loss_rate_aligned] == pytest.approx(slope, rel=1e-4)
    with pytest.raises(ValueError, match="not the same pairs"):
        compare_starts(base, flipped(aligned), head, head, BETA)
