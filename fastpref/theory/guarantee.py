"""Lower bounds on how many training pairs are classified right, from the classes' moments.

The paper's claim: how concentrated the classes are, against how far apart, guarantees an accuracy
(its Theorems 4.2 and 4.3; the constants here are not the paper's but derived in docs/theory.md).

The idea: replace every class by its mean. That run, C pairs, is computed exactly. Gradient steps on
a convex loss bring no two heads further apart, so the real head stays within a radius of that one
which only the classes' spread feeds (E28). Around it Cantelli's inequality bounds the share of each
class on the wrong side (E29). Nothing is linearised and no distribution is assumed: it holds at
every step, and says 0 where it has nothing to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastpref.theory.bounds import max_learning_rate
from fastpref.theory.distinguish import ROUNDING, ClassMoments
from fastpref.theory.dual import Trajectory, dual_recursion
from fastpref.theory.pairs import (
    FrozenPairs,
    answer_rows,
    behavior_means,
    head_change,
    margins,
    output_gap,
)

# The largest |sigma''|, at x = log(2 + sqrt 3).
_BEND = 1 / (6 * math.sqrt(3))


@dataclass(frozen=True)
class Guarantee:
    """Shares of the training pairs, at least, at each of E steps (0 is before training)."""

    step: np.ndarray  # (E,)
    accuracy: np.ndarray  # (E,) over all pairs
    behavior_accuracy: np.ndarray  # (E, K)
    radius: np.ndarray  # (E,) ||W - W of the run on class means||_F is at most this


def initial_guarantee(
    delta: float, mu_dot_d: float, concentration: tuple[float, float], fraction_plus: float = 0.5
) -> float:
    """Share of a behavior's pairs with a margin above 0 after the first step, at least (E27).

        sum_c p_c a_c^2 / (a_c^2 + lambda_c delta^2),    a_c = delta^2/2 +- mu.d, 0 where a_c <= 0

    For mu.d = 0 and one concentration it is 1 / (1 + 4 lambda/delta^2), above 1 - 4 lambda/delta^2:
    concentration against distinguishability. concentration: (+, -). Assumes one behavior, balanced
    classes (fraction_plus only weighs them), any distribution. nan where delta is 0 or undefined.
    """
    if delta == 0 or math.isnan(delta):
        return math.nan
    if not (delta >= 0 and min(concentration) >= 0 and 0 <= fraction_plus <= 1):
        raise ValueError(f"expected 0 or more: {delta=}, {concentration=}, {fraction_plus=}")
    mean = np.array([delta**2 / 2 + mu_dot_d, delta**2 / 2 - mu_dot_d])
    deviation = delta * np.sqrt(np.asarray(concentration, np.float64))
    return float(_cantelli(mean, deviation) @ np.array([fraction_plus, 1 - fraction_plus]))


def accuracy_guarantee(
    moments: ClassMoments,
    steps: int,
    learning_rate: float,
    beta: float,
    head: np.ndarray | None = None,
) -> Guarantee:
    """Reward accuracy (margin > 0), or with the start's `head` (V, D) output accuracy (gap > 0).

    Assumes full-batch gradient descent from the reference with one learning rate; a flow is the
    limit of small ones. Uses each class's mean, count and concentration, and no pair.
    Raises ValueError for a learning rate above 2/c, where the argument does not hold.
    """
    means = moments.means
    mean_run, radius = _mean_run(moments, steps, learning_rate, beta)
    center, length = mean_run.margin, _lengths(means, mean_run, None)
    if head is not None:
        center, length = center + output_gap(means, head), _lengths(means, mean_run, head)
    slack = math.sqrt(2) * radius[:, None]  # of a_c^T W in R^D
    share = _cantelli(
        center - slack * np.linalg.norm(means.features, axis=1),
        (length + slack) * np.sqrt(moments.concentration),
    )
    return _guarantee(mean_run, means, share, radius)


def certified(
    pairs: FrozenPairs,
    moments: ClassMoments,  # of these pairs
    steps: int,
    learning_rate: float,
    beta: float,
    head: np.ndarray | None = None,
) -> Guarantee:
    """The same, looking at each pair: right for sure where its margin at the mean run's head is
    above sqrt(2) radius ||h_i|| (E30).

    Needs the features, and is the sharper of the two where classes have less spread along their
    difference than their concentration allows, or are wide against delta.
    """
    mean_run, radius = _mean_run(moments, steps, learning_rate, beta)
    start = np.zeros(len(pairs.features)) if head is None else output_gap(pairs, head)
    slack = math.sqrt(2) * np.linalg.norm(pairs.features, axis=1)
    sure = np.stack(
        [
            start + margins(pairs, head_change(moments.means, alpha)) > bound * slack
            for alpha, bound in zip(mean_run.alpha, radius, strict=True)
        ]
    ).astype(np.float64)
    return _guarantee(mean_run, pairs, sure, radius)


def _guarantee(
    run: Trajectory, of: FrozenPairs, right: np.ndarray, radius: np.ndarray
) -> Guarantee:
    """From each row's share that is right for sure, `right` (E, P), to means."""
    assert run.step is not None
    overall, each = right @ of.weight, behavior_means(of, right)
    # Rounding must not promise more than 1.
    return Guarantee(run.step, np.minimum(overall, 1.0), np.minimum(each, 1.0), radius)


def _mean_run(
    moments: ClassMoments, steps: int, learning_rate: float, beta: float
) -> tuple[Trajectory, np.ndarray]:
    """The run on class means, and (E,) how far the real head can be from it (E28)."""
    if steps < 0:
        raise ValueError(f"steps is {steps}, expected 0 or more")
    limit = max_learning_rate(moments.second_moment, beta)
    if not 0 < learning_rate <= limit:
        raise ValueError(
            f"learning_rate {learning_rate} is not within 0 to 2/c = {limit:g}: above it gradient "
            "descent can move heads apart, and no guarantee follows"
        )
    means = moments.means
    run = dual_recursion(means, [None] * steps, learning_rate, beta)
    width = np.sqrt(moments.concentration)
    # Standard deviation over the class of x = beta m, at the heads of the mean run.
    deviation = beta * width * _lengths(means, run, None)
    along_mean = np.minimum(_BEND / 2 * deviation**2, deviation / 4)
    force = along_mean * np.linalg.norm(means.features, axis=1) + deviation * width / 4
    each = math.sqrt(2) * beta * force @ means.weight
    # What rounding can do to the heads, so that a promise never rests on it.
    rounding = ROUNDING * beta * run.time * np.linalg.norm(means.features, axis=1).max()
    return run, learning_rate * np.concatenate([[0.0], np.cumsum(each[:-1])]) + rounding


def _lengths(means: FrozenPairs, run: Trajectory, head: np.ndarray | None) -> np.ndarray:
    """(E, C) ||a_c^T (W - W_start)||, or with the start's head ||a_c^T W||."""
    matrix = None if head is None else np.asarray(head, np.float64)
    start = 0.0 if matrix is None else matrix[means.chosen] - matrix[means.rejected]
    return np.stack(
        [
            np.linalg.norm(start + answer_rows(means, head_change(means, alpha)), axis=1)
            for alpha in run.alpha
        ]
    )


def _cantelli(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """P(X > 0) is at least mean^2 / (mean^2 + deviation^2) for a mean above 0, and 0 otherwise."""
    square = mean**2 + deviation**2
    return np.where(mean > 0, mean**2 / np.where(square > 0, square, 1.0), 0.0)
