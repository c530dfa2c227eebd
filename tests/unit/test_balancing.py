"""The update rule of `balance` on systems whose answer is known, before any model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref.balance import target_shares, window_means
from fastpref.dynamics.balancing import (
    MAX_ERROR,
    ShareController,
    bounded_weights,
    share_errors,
)
from fastpref.theory.mixture import priority_levels

EXACT = np.zeros(3)  # standard errors of a system that is known
THIRDS = np.full(3, 1 / 3)


def controller(
    fraction: np.ndarray, target: np.ndarray, gain: float, lead: float = 0.0, limit: float = 1e6
) -> ShareController:
    return ShareController(fraction, target, gain=gain, lead=lead, limit=limit)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8),
    st.lists(st.floats(0.05, 1), min_size=8, max_size=8),
    st.floats(1.01, 20),
)
def test_weights_keep_their_mean_their_limits_and_their_proportions(
    raw: list[float], parts: list[float], limit: float
) -> None:
    u, q = np.array(raw), np.array(parts[: len(raw)])
    q = q / q.sum()
    w = bounded_weights(u, q, limit)
    assert w @ q == pytest.approx(1, rel=1e-9)
    assert w.min() >= 1 / limit and w.max() <= limit
    free = (w > 1.000001 / limit) & (w < 0.999999 * limit)
    if free.any():
        scale = w[free] / u[free]
        assert scale == pytest.approx(scale[0], rel=1e-9)
        # A weight at a limit would lie beyond it.
        assert (scale[0] * u[w >= limit] >= 0.999999 * limit).all()
        assert (scale[0] * u[w <= 1 / limit] <= 1.000001 / limit).all()


def test_errors_are_logarithms_bounded_and_without_noise() -> None:
    e = share_errors(np.array([2.0, 1.0, 1.0]), EXACT, THIRDS)
    assert e == pytest.approx(np.log([4 / 6, 4 / 3, 4 / 3]))
    far = share_errors(np.array([1.0, 99.0, 0.0]), EXACT, THIRDS)
    assert far.tolist() == [MAX_ERROR, -MAX_ERROR, MAX_ERROR]
    assert share_errors(np.array([-3.0, 1.0, 2.0]), EXACT, THIRDS)[0] == MAX_ERROR  # unlearned
    # The gap of the first is 2/3: at a standard error as large half of the error is left.
    noisy = share_errors(np.array([2.0, 1.0, 1.0]), np.array([2 / 3, 0.0, 1e9]), THIRDS)
    assert noisy == pytest.approx([0.5 * e[0], e[1], 0.0], abs=1e-12)
    assert share_errors(np.zeros(3), EXACT, THIRDS).tolist() == [0, 0, 0]
    assert share_errors(np.ones(3), np.ones(3), THIRDS).tolist() == [0, 0, 0]


def test_what_is_not_known_is_left_out() -> None:
    value, target = np.array([3.0, math.nan, 1.0]), np.array([0.25, 0.5, 0.25])
    e = share_errors(value, EXACT, target)
    assert e[[0, 2]] == pytest.approx(np.log([0.5 / 0.75, 0.5 / 0.25])) and math.isnan(e[1])
    assert np.isnan(share_errors(np.array([3.0, math.nan, math.nan]), EXACT, target)).all()
    own = controller(THIRDS, target, 0.5, lead=1.0)
    own.update(np.array([1.0, 3.0, 1.0]), EXACT)
    before = own.weights.copy(), own.errors.copy()
    own.update(np.full(3, math.nan), EXACT)  # no pair of any behavior: nothing changes
    assert (own.weights == before[0]).all() and (own.errors == before[1]).all()
    own.update(np.array([1.0, math.nan, 4.0]), EXACT)
    assert own.errors[1] == before[1][1] and own.errors[0] != before[1][0]


@pytest.mark.parametrize("target", [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2)])
def test_rates_of_behaviors_that_do_not_meddle(target: tuple[float, ...]) -> None:
    """Orthogonal pulls: rate_k = (beta/4) q_k w_k delta_k^2, so that w_k goes as t_k / (q_k
    delta_k^2), and what is missing, as a logarithm, shrinks by 1 - gain with every update."""
    delta, q, t = np.array([2.0, 1.5, 1.2]), np.array([0.5, 0.2, 0.3]), np.array(target)
    answer = bounded_weights(t / (q * delta**2), q, 1e6)
    own = controller(q, t, gain=0.4)
    behind = []
    for _ in range(12):
        rate = priority_levels(np.diag(delta), q * own.weights)  # up to a common factor
        own.update(rate, EXACT)
        gap = np.log(own.weights / answer)
        behind.append(np.ptp(gap))  # weights of one proportion have no gap
    assert behind[-1] < 0.01 * behind[0]
    assert np.array(behind[4:]) / behind[3:-1] == pytest.approx(0.6, abs=1e-9)
    assert own.weights @ q == pytest.approx(1)


def test_rates_of_behaviors_that_teach_each_other() -> None:
    """w solves A w = c t with A_kl = <d_k, d_l> q_l; near it the slowest part of what is missing
    shrinks by 1 - gain x the smallest eigenvalue of the interaction, docs/balance.md."""
    pull = np.array([[2.0, 0.0, 0.0], [0.6, 1.4, 0.0], [0.3, 0.5, 1.0]])
    q, t, gain = np.array([0.4, 0.35, 0.25]), np.array([0.3, 0.4, 0.3]), 0.5
    matrix = pull @ pull.T * q
    answer = np.linalg.solve(matrix, t)
    assert answer.min() > 0
    answer = bounded_weights(answer, q, 1e6)
    own = controller(q, t, gain)
    gaps = []
    for _ in range(200):
        rate = priority_levels(pull, q * own.weights)
        own.update(rate, EXACT)
        gaps.append(np.abs(np.log(own.weights / answer)).max())
    assert own.weights == pytest.approx(answer, rel=1e-6)
    interaction = matrix * answer / (matrix @ answer)[:, None]
    slowest = np.sort(np.linalg.eigvals(interaction).real)[0]
    assert 0 < slowest < 1  # one eigenvalue is 1, that of all weights together
    seen = (gaps[110] / gaps[100]) ** 0.1
    assert seen == pytest.approx(1 - gain * slowest, abs=1e-4)


def test_a_share_that_no_weights_can_give_ends_at_the_limits() -> None:
    """Parallel pulls: the rates keep their ratio whatever the weights. Nothing blows up."""
    pull, q = np.array([[3.0, 0.0], [1.0, 0.0]]), np.array([0.5, 0.5])
    own = controller(q, np.full(2, 0.5), gain=0.5, limit=4.0)
    for _ in range(50):
        own.update(priority_levels(pull, q * own.weights), np.zeros(2))
    assert own.weights == pytest.approx([0.25, 1.75])  # the mean is 1, so the other stays below 4


def margins(own: ShareController, speed: np.ndarray, updates: int) -> np.ndarray:
    """(updates, K) margins that grow by ``speed`` w at every update, a step a unit of time."""
    m, seen = np.zeros(len(speed)), []
    for _ in range(updates):
        m = m + speed * own.weights * own.fraction
        own.update(m, np.zeros(len(speed)))
        seen.append(m)
    return np.array(seen)


def test_margins_follow_the_bessel_function_of_the_theory() -> None:
    """t z'' + (2 + lead) z' + gain z = 0 for the logarithm z of share over target: z goes as
    J_(1 + lead)(2 sqrt(gain t)) / t^((1 + lead)/2), which `lead` damps (docs/balance.md)."""
    speed, q, gain = np.array([1.02, 0.98]), np.array([0.5, 0.5]), 2e-3
    t = np.arange(1, 10001)
    for lead in (0.0, 1.0):
        seen = margins(controller(q, q, gain, lead), speed, len(t))
        z = np.log(seen[:, 0] / seen[:, 1]) / 2
        x = torch.from_numpy(2 * np.sqrt(gain * t))
        first, zeroth = torch.special.bessel_j1(x), torch.special.bessel_j0(x)
        start = np.log(speed[0] / speed[1]) / 2 / (1 + lead)
        bessel, scale = (first, 2.0) if lead == 0 else (2 * first / x - zeroth, 8.0)
        theory = start * scale * bessel.numpy() / x.numpy() ** (1 + lead)
        # The first steps have the weights that nothing was measured for.
        assert np.abs(z - theory)[9:].max() < 0.01 * start


def test_margins_reach_their_target_and_weights_their_place() -> None:
    """With its own settings, of behaviors ten times as fast as each other."""
    speed, q = np.array([10.0, 3.0, 1.0]), THIRDS
    own = controller(q, THIRDS, gain=0.5, lead=1.0, limit=100.0)
    seen = margins(own, speed, 200)
    assert seen[-1] / seen[-1].sum() == pytest.approx(THIRDS, rel=0.02)
    assert own.weights * speed / (own.weights @ speed) == pytest.approx(THIRDS, rel=0.1)


def test_noise_moves_little_and_signal_much() -> None:
    rng = np.random.default_rng(0)
    q = np.full(8, 1 / 8)
    still, told = controller(q, q, 0.5), controller(q, q, 0.5)
    for _ in range(10):
        noise = 0.3 * rng.standard_normal(8)
        still.update(1 + noise, np.full(8, 0.3))  # all behaviors alike
        told.update(1 + noise + np.arange(8), np.full(8, 0.3))
    assert np.log(still.weights).std() < 0.35 < 1 < np.log(told.weights).std()


def test_a_state_is_exact() -> None:
    own, other = (controller(THIRDS, THIRDS, 0.5, lead=1.0) for _ in range(2))
    own.update(np.array([1.0, 2.0, 4.0]), np.full(3, 0.1))
    other.load_state_dict(own.state_dict())
    for each in (own, other):
        each.update(np.array([1.5, 2.0, 3.0]), np.full(3, 0.1))
    assert (own.weights == other.weights).all() and own.weights.std() > 0


def test_target_shares() -> None:
    names = ["calm", "kind", "terse"]
    assert target_shares({}, names) == pytest.approx(THIRDS)
    assert target_shares({"kind": 0.5}, names) == pytest.approx([0.25, 0.5, 0.25])
    all_of_them = {"kind": 0.5, "calm": 0.2, "terse": 0.3}
    assert target_shares(all_of_them, names) == pytest.approx([0.2, 0.5, 0.3])
    for given_shares, names_, message in (
        ({"kimd": 0.5}, names, "has the behavior 'kimd'. Did you mean 'kind'"),
        ({"zzz": 0.5}, names, "There are: calm, kind, terse"),
        ({"kind": 0.6, "calm": 0.4}, names, "sum to 1, which leaves nothing to the 1 other"),
        ({"kind": 0.6, "calm": 0.4, "terse": 0.1}, names, "sum to 1.1, not to 1"),
        ({}, ["calm"], "'calm' is the only one that is trained"),
    ):
        with pytest.raises(ValueError, match=message):
            target_shares(given_shares, names_)


def test_window_means() -> None:
    m = np.array([1.0, 2.0, 4.0])
    sums = np.array([[3, m.sum(), (m**2).sum()], [1, 5.0, 25.0], [0, 0, 0]])
    mean, error = window_means(sums)
    assert mean[0] == pytest.approx(m.mean()) and np.isnan(mean[1:]).all()
    assert error[0] == pytest.approx(m.std(ddof=1) / math.sqrt(3))
