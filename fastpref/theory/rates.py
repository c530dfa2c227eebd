"""How fast things start: head, margins, loss and accuracy at the first moment of training.

Training starts from the reference, so every margin is 0 and every pair weighs beta/2. All rates are
then linear in where the pairs lie, and exact. They are per unit of time; times the learning rate
they are per step, and the first full-batch step moves the head by exactly that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fastpref.theory.distinguish import without_rounding
from fastpref.theory.dual import check_beta
from fastpref.theory.mixture import Counts, mixture_direction, mixture_shares
from fastpref.theory.pairs import FrozenPairs, head_change, margins


@dataclass(frozen=True)
class InitialRates:
    """Rates at t = 0 of a mixture of K behaviors, per unit of time."""

    head: float  # d||W - W0||_F / dt
    loss: float  # dL/dt, below 0, in nats
    margin: np.ndarray  # (K,) d(mean margin)/dt, nats: the update rate
    behavior_loss: np.ndarray  # (K,) d(mean loss of the behavior)/dt, nats
    share: np.ndarray  # (K,) of the first update, sum 1; nan where the behaviors cancel


def initial_rates(directions: np.ndarray, counts: Counts, beta: float) -> InitialRates:
    """Rates from the behaviors' pulls alone (E10, E14).

        head = beta ||dbar|| / (2 sqrt 2)    margin_k = (beta/4) <dbar, d_k>
        loss = -beta^2 ||dbar||^2 / 8        loss_k = -(beta^2/8) <dbar, d_k>

    For one balanced behavior ||dbar|| = delta: the paper's dependence of the update on
    distinguishability (its Theorem 4.1). Exact for `distinguish.directions`; with
    `class_differences` up to the imbalance of labels (E9).
    """
    check_beta(beta)
    mean = mixture_direction(directions, counts)
    inner = directions @ mean
    length = float(np.linalg.norm(mean))
    return InitialRates(
        head=beta * length / math.sqrt(8),
        loss=-(beta**2) * length**2 / 8,
        margin=beta / 4 * inner,
        behavior_loss=-(beta**2) / 8 * inner,
        share=mixture_shares(directions, counts),
    )


def pair_rates(
    pairs: FrozenPairs, beta: float, probes: FrozenPairs | None = None
) -> np.ndarray:  # (P,)
    """dm_i/dt at t = 0 of each pair, or of each probe: (beta/2) <grad m_i, mean grad m> (E10).

    For one balanced behavior (beta/2) s_i h_i.d, with s_i = 1 in D+ and -1 in D-. Below 0: the
    first update goes against the pair. The share of pairs above 0 is the reward accuracy after the
    first step, exactly.
    """
    check_beta(beta)
    first = head_change(pairs, beta / 2 * pairs.weight)
    size = beta / 2 * math.sqrt(2 * float(pairs.weight @ (pairs.features**2).sum(axis=1)))
    return margins(probes or pairs, replace(first, rows=without_rounding(first.rows, size)))


def batch_head_rate(pairs: FrozenPairs, batch_size: int, beta: float) -> float:
    """Root of the mean squared gradient norm of the first random batch (E13).

    (beta/2) sqrt(||M||^2 + (2 E||h||^2 - ||M||^2) / B (P - B) / (P - 1)), M the mean margin
    gradient of all P pairs, batches drawn without replacement. Times the learning rate: how far one
    batch moves the head. Where ||mu|| is much above delta the second term, labels that do not
    balance within the batch, is the larger one, and a single batch says little of delta. Raises
    ValueError for a batch size beyond 1 to P, or rows that stand for several pairs.
    """
    check_beta(beta)
    size = len(pairs.features)
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size is {batch_size}, expected 1 to {size}, the number of pairs")
    if not (pairs.count == 1).all():
        raise ValueError("batch_head_rate: needs the pairs themselves, count 1 each")
    mean = head_change(pairs, pairs.weight).norm ** 2
    variance = 2 * float((pairs.features**2).sum(axis=1).mean()) - mean
    spare = (size - batch_size) / (size - 1) if size > 1 else 0.0
    return beta / 2 * math.sqrt(max(0.0, mean + variance / batch_size * spare))


def initial_accuracy(
    delta: float,
    mu_dot_d: float,
    spread: tuple[float, float],
    fraction_plus: float = 0.5,
) -> float:
    """Share of a behavior's pairs with a margin above 0 just after the start, Gaussian (E26).

        sum_c p_c Phi((delta/2 +- mu.d/delta) / spread_c)

    Args:
        delta, mu_dot_d: of `BehaviorStatistics`. spread: standard deviations (+, -) along d.
        fraction_plus: p+; it only weighs the classes: the direction is that of balanced ones.

    Assumes one behavior, trained alone, whose features are Gaussian along d. nan where delta is 0
    or undefined, or a class without spread has a mean margin of 0. Raises ValueError for lengths
    below 0.
    """
    if delta == 0 or math.isnan(delta):
        return math.nan
    if not (delta >= 0 and min(spread) >= 0 and 0 <= fraction_plus <= 1):
        raise ValueError(f"expected lengths: {delta=}, {spread=}; a fraction: {fraction_plus=}")
    total = 0.0
    for fraction, sign, width in zip(
        (fraction_plus, 1 - fraction_plus), (1, -1), spread, strict=True
    ):
        mean = delta / 2 + sign * mu_dot_d / delta
        if width == 0:
            total += fraction * (math.nan if mean == 0 else float(mean > 0))
        else:
            total += fraction * 0.5 * (1 + math.erf(mean / width / math.sqrt(2)))
    return total
