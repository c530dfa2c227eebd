"""Several behaviors in one run: which of them moves the head, and which is taught first.

`directions` (K, F) are the behaviors' pulls d_k: `distinguish.directions` for what is exact for the
pairs at hand, `distinguish.class_differences` for the paper's definition, which takes each behavior
as balanced. The mixture pulls along dbar = sum_k q_k d_k, q_k the fraction of the pairs (E14).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastpref.theory.distinguish import without_rounding
from fastpref.theory.dual import check_beta, dpo_weight
from fastpref.theory.pairs import FrozenPairs, behavior_sums

Counts = np.ndarray | Sequence[float]


def mixture_direction(directions: np.ndarray, counts: Counts) -> np.ndarray:
    """(F,) dbar = sum_k q_k d_k with q = counts / their sum (E14); exactly 0 where they cancel.

    Raises ValueError for counts that are not positive or not one per behavior.
    """
    pull = np.asarray(directions, np.float64)
    number = np.asarray(counts, np.float64)
    if pull.ndim != 2 or number.shape != (len(pull),):
        raise ValueError(f"directions {pull.shape} need (K, F), counts {number.shape} need (K,)")
    if not np.all(np.isfinite(number) & (number > 0)):
        raise ValueError(f"counts: expected positive numbers of pairs, got {number.tolist()!r:.80}")
    if not np.isfinite(pull).all():
        raise ValueError("directions: expected finite numbers")
    fraction = number / number.sum()
    return without_rounding(fraction @ pull, float(fraction @ np.linalg.norm(pull, axis=1)))


def priority_levels(directions: np.ndarray, counts: Counts) -> np.ndarray:
    """(K,) p_k = <dbar, d_k> / ||dbar||, in the features' unit (E15).

    The update rate of behavior k at the start of training is (beta/4) ||dbar|| p_k. nan, undefined,
    where the behaviors' pulls cancel and dbar is 0.
    """
    mean = mixture_direction(directions, counts)
    length = float(np.linalg.norm(mean))
    return directions @ mean / length if length > 0 else np.full(len(directions), np.nan)


def mixture_shares(directions: np.ndarray, counts: Counts) -> np.ndarray:
    """(K,) share_k = q_k <dbar, d_k> / ||dbar||^2 of the first update; they sum to 1 (E17).

    Below 0: the mixture unteaches the behavior. nan where dbar is 0.
    """
    mean = mixture_direction(directions, counts)
    square = float(mean @ mean)
    fraction = np.asarray(counts, np.float64) / np.sum(counts)
    return (
        fraction * (directions @ mean) / square if square > 0 else np.full(len(directions), np.nan)
    )


def priority_matrix(directions: np.ndarray) -> np.ndarray:
    """(K, K) [k, l]: lead of behavior k over l when these two are trained together, equally often.

    (p_k - p_l) / max(||d_k||, ||d_l||) with p of these two alone, the official code's measure; it
    has no unit and is at most 2 in size. p_k - p_l = (||d_k||^2 - ||d_l||^2) / (2 ||dbar||) (E16):
    the sign depends on the two delta alone. Antisymmetric; nan where d_k = -d_l or both are 0.
    Raises ValueError for a single behavior: a priority compares.
    """
    pull = np.asarray(directions, np.float64)
    if pull.ndim != 2 or len(pull) < 2:
        raise ValueError(f"priority compares behaviors: expected 2 or more, got {pull.shape[:1]}")
    if not np.isfinite(pull).all():
        raise ValueError("directions: expected finite numbers")
    delta = np.linalg.norm(pull, axis=1)
    result = np.zeros((len(pull), len(pull)))
    for k in range(len(pull)):
        for other in range(k):
            level = priority_levels(pull[[k, other]], (1, 1))  # nan where both delta are 0
            gap = (level[0] - level[1]) / (max(delta[k], delta[other]) or np.nan)
            result[k, other], result[other, k] = gap, -gap
    return result


def interaction(
    pairs: FrozenPairs, margin: np.ndarray, beta: float, label_smoothing: float = 0.0
) -> np.ndarray:
    """(K, K) Gamma_kl = <M_k, G_l>, nat per unit of time: how l, as it stands, moves k (E18).

    M_k is the mean margin gradient of behavior k, G_l the part of the loss's descent direction that
    comes from l at the margins (P,). A row's sum is the update rate of its behavior under the flow;
    an entry below 0 says that l unteaches k. `gram` of the records holds what a run observed.
    """
    check_beta(beta)
    weight = dpo_weight(margin, beta, label_smoothing)
    learns = behavior_sums(pairs, pairs.weight / pairs.fraction[pairs.behavior])
    teaches = behavior_sums(pairs, pairs.weight * weight)
    size = len(pairs.behaviors)
    return learns.reshape(size, -1) @ teaches.reshape(size, -1).T


def shares_at(
    pairs: FrozenPairs, margin: np.ndarray, beta: float, label_smoothing: float = 0.0
) -> np.ndarray:
    """(K,) <G_k, G> / ||G||^2 at the margins (P,): `mixture_shares` later in training (E17)."""
    check_beta(beta)
    teaches = behavior_sums(pairs, pairs.weight * dpo_weight(margin, beta, label_smoothing))
    flat = teaches.reshape(len(teaches), -1)
    return mixture_shares(flat, np.ones(len(flat)))


def order_agreement(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Fraction of the pairs of behaviors that both (K,) put in the same order, 1/2 for a tie.

    Pairs with an undefined (nan) value are left out; nan where none is left.
    """
    if np.shape(predicted) != np.shape(observed) or np.ndim(predicted) != 1:
        raise ValueError(f"expected two (K,), got {np.shape(predicted)} and {np.shape(observed)}")
    first, second = np.triu_indices(len(predicted), 1)
    signs = [np.sign(v[first] - v[second]) for v in map(np.asarray, (predicted, observed))]
    agree = (1 + signs[0] * signs[1]) / 2
    return float(np.nanmean(agree)) if np.isfinite(agree).any() else float("nan")
