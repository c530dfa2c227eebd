"""How long the first rates last: two-sided bounds from delta and lambda_M, and their window.

With g = beta delta / (2 sqrt 2), the norm of the first gradient, and c = beta^2 lambda_M / 2, which
bounds the loss's curvature, everything here follows from convexity (E19-E23). delta is the
effective one of the whole mixture, the length of `mixture.mixture_direction`; for one balanced
behavior it is the paper's. lambda_M is `distinguish.second_moment` of all pairs.

They hold for gradient flow at every t, and for full-batch gradient descent at t = the sum of its
learning rates as long as none is above `max_learning_rate`. They assume a start from the reference.
"""

from __future__ import annotations

import math

import numpy as np

from fastpref.theory.dual import check_beta
from fastpref.theory.pairs import FrozenPairs


def curvature(second_moment: float, beta: float) -> float:
    """c = beta^2 lambda_M / 2, per unit of time: no eigenvalue of the loss's Hessian is above it.

    Reached at the start where all pairs have the same two answers, an upper bound otherwise (E19).
    """
    check_beta(beta)
    if not (math.isfinite(second_moment) and second_moment >= 0):
        raise ValueError(f"second_moment is {second_moment}, expected a number of 0 or more")
    return beta**2 * second_moment / 2


def max_learning_rate(second_moment: float, beta: float) -> float:
    """2 / c: full-batch gradient descent is stable up to here; inf where the features are 0."""
    c = curvature(second_moment, beta)
    return 2 / c if c else math.inf


def validity_window(
    second_moment: float, beta: float, tolerance: float = 0.1, learning_rate: float = 1.0
) -> float:
    """Steps within which ||W - W0|| is `tolerance` below the straight line at most (E22).

    2 tolerance / c of time, over the learning rate: 4 tolerance / (learning_rate beta^2 lambda_M).
    inf where the features are 0. With learning_rate 1 it is a time.
    """
    if not (tolerance > 0 and learning_rate > 0):
        raise ValueError(f"expected positive numbers: {tolerance=}, {learning_rate=}")
    c = curvature(second_moment, beta)
    return 2 * tolerance / c / learning_rate if c else math.inf


def head_bounds(
    time: np.ndarray, delta: float, second_moment: float, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) (E,) of ||W(t) - W0||_F (E19, E20).

        g t (1 - c t / 2) <= ||W - W0|| <= g t

    The upper one, linear in the number of steps and in delta, holds for all time (the form of the
    paper's Theorem 4.1); the lower one is cut at 0, where it says nothing any more.
    """
    t, g, c = _terms(time, delta, second_moment, beta)
    # The norm's lower bound rises until t = 1/c and says less after. That the norm itself did not
    # fall is not known, so the bound is not held at its maximum.
    return np.maximum(0.0, g * t * (1 - c * t / 2)), g * t


def loss_bounds(
    time: np.ndarray,
    delta: float,
    second_moment: float,
    beta: float,
    learning_rate: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) (E,) of the mean loss over the pairs, in nats (E21).

        log 2 - g^2 t <= L <= log 2 - g^2 (1 - (1 - c t)^3) / (3 c)

    the upper one up to t = 1/c, and constant after. learning_rate: the largest one of the run; the
    upper bound then falls by (1 - learning_rate c / 2) of that. 0: gradient flow. Raises ValueError
    for rates that are not stable.
    """
    t, g, c = _terms(time, delta, second_moment, beta)
    if not 0 <= learning_rate * c <= 2:
        raise ValueError(f"learning_rate {learning_rate} is above {2 / c:g}, not stable (2 / c)")
    # (1 - (1 - x)^3) / (3 x) = 1 - x + x^2/3, without cancellation for small x = c t.
    until = np.minimum(t, 1 / c) if c else t
    fall = g**2 * until * (1 - c * until + (c * until) ** 2 / 3)
    return np.maximum(0.0, math.log(2) - g**2 * t), math.log(2) - (1 - learning_rate * c / 2) * fall


def gap_radius(
    pairs: FrozenPairs, time: np.ndarray, delta: float, second_moment: float, beta: float
) -> np.ndarray:
    """(E, P) |m_i(t) - t dm_i/dt(0)| is at most this, in nats (E23): sqrt(2) ||h_i|| g c t^2 / 2.

    For one behavior beta^3 lambda_M delta t^2 / 8 times ||h_i||. A pair whose start gap + t x first
    rate is above it is answered right at t for certain (E31); `guarantee.certified` says more.
    """
    t, g, c = _terms(time, delta, second_moment, beta)
    return np.outer(g * c * t**2 / 2, math.sqrt(2) * np.linalg.norm(pairs.features, axis=1))


def _terms(
    time: np.ndarray, delta: float, second_moment: float, beta: float
) -> tuple[np.ndarray, float, float]:
    """t, g and c of the module's docstring."""
    t = np.asarray(time, np.float64)
    if not np.all(np.isfinite(t) & (t >= 0)):
        raise ValueError("time: expected finite numbers, none below 0")
    if not (math.isfinite(delta) and delta >= 0):
        raise ValueError(f"delta is {delta}, expected a number of 0 or more")
    return t, beta * delta / math.sqrt(8), curvature(second_moment, beta)
