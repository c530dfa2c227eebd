"""The output's decision boundary: when answers flip, how far it turns, and misalignment.

The answer given is decided by the gap z_i = a_i^T W h_i (`pairs.output_gap`), not by the margin;
where all pairs have the same two answers, by b.h with b = w_plus - w_minus. Training from the
reference moves it by the margin: z_i(t) = z_i(0) + m_i(t) (E32).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpref.theory.distinguish import directions
from fastpref.theory.dual import check_beta
from fastpref.theory.pairs import FrozenPairs, output_gap
from fastpref.theory.rates import initial_rates, pair_rates


def flip_times(gap: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """(P,) time at which each pair's output changes side, were its first rate to last (E33).

    gap: (P,) z_i before training. rate: (P,) `rates.pair_rates`. t_i = -z_i / rate_i; inf where the
    gap grows or stays, nan where both are 0 and the output is a tie for good. A rate above 0 turns
    wrong answers right, one below 0 right ones wrong. Good for early flips (`bounds.gap_radius`).
    """
    if np.shape(gap) != np.shape(rate):
        raise ValueError(f"gap {np.shape(gap)} and rate {np.shape(rate)}: expected (P,) both")
    z, speed = np.asarray(gap, np.float64), np.asarray(rate, np.float64)
    moving = np.where(speed == 0, 1.0, speed)
    time = np.where((speed != 0) & (z * speed <= 0), -z / moving, np.inf) + 0.0
    return np.where((speed == 0) & (z == 0), np.nan, time)


def observed_flips(time: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """(P,) first recorded time at which each output is on the other side than at the start.

    time: (E,). gap: (E, P) along a trajectory, `output_gap` of the start + its margins. inf where
    it never is; nan where the start is a tie and has no side.
    """
    if len(time) != len(gap):
        raise ValueError(f"time {np.shape(time)} and gap {np.shape(gap)}: expected (E,) and (E, P)")
    other = gap * np.sign(gap[0]) < 0
    first = np.where(other.any(axis=0), np.asarray(time)[other.argmax(axis=0)], np.inf)
    return np.where(gap[0] == 0, np.nan, first)


def boundary_angle(start: np.ndarray, d: np.ndarray, time: np.ndarray, beta: float) -> np.ndarray:
    """(E,) radians by which the boundary has turned: b(t) = b0 + (beta t / 2) d against b0 (E34).

    start: (D,) b0 = w_plus - w_minus of the head. d: (D,) mu+ - mu-, or the mixture's direction
    with the same "+". First order in t: db/dt at 0 is (beta/2) d. nan where b0 or b(t) is 0.
    """
    check_beta(beta)
    b0, moments = np.asarray(start, np.float64), np.asarray(time, np.float64)
    now = b0 + beta / 2 * moments[:, None] * np.asarray(d, np.float64)
    return angle(b0, now)


def angle(start: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(E,) radians between (D,) and each row of (E, D); nan where one of them is 0."""
    lengths = [np.linalg.norm(v, axis=-1, keepdims=True) for v in (start, now)]
    one, other = (v / np.where(n > 0, n, 1.0) for v, n in zip((start, now), lengths, strict=True))
    # Kahan's form: the arccos of the product would lose small angles.
    turned = 2 * np.arctan2(
        np.linalg.norm(other - one, axis=-1), np.linalg.norm(other + one, axis=-1)
    )
    return np.where((lengths[0] * lengths[1])[..., 0] > 0, turned, np.nan)


@dataclass(frozen=True)
class Misalignment:
    """Training the same (flipped) pairs from a base and from an aligned model."""

    same_features: (
        bool  # then margins, loss and ||W - W_start|| are the same for both, for all time
    )
    loss_rate_base: float  # dL/dt at 0, nats per unit of time
    loss_rate_aligned: float
    speed: float  # loss_rate_aligned / loss_rate_base = (delta'/delta)^2; nan where the base's is 0
    flip_time_base: (
        np.ndarray
    )  # (P,) first-order time at which each output takes the trained answer
    flip_time_aligned: np.ndarray


def compare_starts(
    base: FrozenPairs,
    aligned: FrozenPairs,
    base_head: np.ndarray,  # (V, D)
    aligned_head: np.ndarray,
    beta: float,
) -> Misalignment:
    """Is the aligned model easier to misalign? What frozen features say (E35, E36).

    `base` and `aligned` are the same pairs, labels as they will be trained (`pairs.flipped`), with
    the features of either model. Each model is its own reference. Then margins, loss and head
    change depend on the features alone: with the same features, whatever the heads, the two runs
    are the same, and outputs flip later from a head that is aligned. So the paper's observation
    that aligned models turn faster is a matter of features that moved: the loss then falls
    (delta'/delta)^2 times as fast.

    Raises ValueError where the two are not the same pairs.
    """
    if not all(
        np.array_equal(getattr(base, name), getattr(aligned, name))
        for name in ("chosen", "rejected", "behavior", "count")
    ):
        raise ValueError(
            "compare_starts: base and aligned are not the same pairs in the same order"
        )
    loss = [initial_rates(directions(p), p.fraction, beta).loss for p in (base, aligned)]
    flips = [
        flip_times(output_gap(p, head), pair_rates(p, beta))
        for p, head in ((base, base_head), (aligned, aligned_head))
    ]
    return Misalignment(
        same_features=np.array_equal(base.features, aligned.features),
        loss_rate_base=loss[0],
        loss_rate_aligned=loss[1],
        speed=loss[1] / loss[0] if loss[0] else np.nan,
        flip_time_base=flips[0],
        flip_time_aligned=flips[1],
    )
