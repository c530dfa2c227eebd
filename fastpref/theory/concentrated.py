"""One balanced behavior whose classes are points: the whole trajectory in closed form (E24, E25).

Assumes: every feature is mu+ or mu-, half of the pairs each, mu.d = 0 for mu = (mu+ + mu-)/2,
gradient flow from the reference. All margins are then equal. With spread it is optimistic. Where
mu.d is not 0, or for several behaviors, `dual.gradient_flow` over the class means
(`distinguish.class_moments`) takes its place.
"""

from __future__ import annotations

import math

import numpy as np

from fastpref.theory.dual import check_beta, dpo_loss


def time_constant(delta: float, beta: float) -> float:
    """2 / (beta^2 delta^2): the time scale of learning; inf, never, where delta is 0 (E25)."""
    _check(delta, beta)
    return 2 / (beta * delta) ** 2 if delta else math.inf


def margin_at(time: np.ndarray, delta: float, beta: float) -> np.ndarray:
    """(E,) m(t) in nats, from x + e^x - 1 = t beta^2 delta^2 / 2, x = beta m (E24)."""
    _check(delta, beta)
    t = np.asarray(time, np.float64)
    if not np.all(np.isfinite(t) & (t >= 0)):
        raise ValueError("time: expected finite numbers, none below 0")
    scaled = t * (beta * delta) ** 2 / 2
    # x + e^x - 1 is convex and x = log(1 + scaled) lies right of the root, so Newton comes down on
    # it without fail, and at once to all digits near 0.
    x = np.log1p(scaled)
    for _ in range(50):
        change = (x + np.expm1(x) - scaled) / (1 + np.exp(x))
        x = x - change
        if np.all(np.abs(change) <= 1e-15 * np.abs(x)):
            break
    return x / beta


def loss_at(time: np.ndarray, delta: float, beta: float) -> np.ndarray:
    """(E,) L(t) = log(1 + e^(-beta m)) in nats."""
    return dpo_loss(margin_at(time, delta, beta), beta)


def head_norm_at(time: np.ndarray, delta: float, beta: float) -> np.ndarray:
    """(E,) ||W - W0||_F = sqrt(2) m / delta; 0 where delta is 0."""
    margin = margin_at(time, delta, beta)
    return math.sqrt(2) * margin / delta if delta else margin


def time_to_margin(margin: float, delta: float, beta: float) -> float:
    """Time until every margin is `margin` nats: 2 (x + e^x - 1) / (beta^2 delta^2); inf: never."""
    _check(delta, beta)
    if not margin >= 0:
        raise ValueError(f"margin is {margin}, expected 0 or more")
    x = beta * margin
    return (x + math.expm1(x)) * time_constant(delta, beta) if margin else 0.0


def _check(delta: float, beta: float) -> None:
    check_beta(beta)
    if not (math.isfinite(delta) and delta >= 0):
        raise ValueError(f"delta is {delta}, expected a number of 0 or more")
