"""The exact trajectory of head-only DPO: by steps as the run took them (E5), or as a flow (E6).

Every state of training is W - W_start = sum_i alpha_i a_i h_i^T. alpha_i, what pair i has taught so
far, obeys a recursion that reads the margins alone, and these are m = m_start + K alpha (E4). So P
numbers replace the V x D weights, without approximation.

Assumes: nothing but the head learns, features do not change, answers are one token, the optimizer
is SGD without momentum or weight decay, the loss is DPO's. Learning-rate schedules, label
smoothing, clipping, any tokens, any labels, any mixture and any order of batches are inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.theory.integrate import integrate
from fastpref.theory.pairs import FrozenPairs, HeadRows, answer_rows, head_change, margins

Batch = np.ndarray | None  # indices of pairs; None: all of them


@dataclass(frozen=True)
class Trajectory:
    """E recorded moments, from the start on; `alpha` says all there is to say of the weights."""

    time: np.ndarray  # (E,) sum of the learning rates of the steps taken, times their clipping
    alpha: np.ndarray  # (E, P); W - W_start = head_change(pairs, alpha[e])
    margin: np.ndarray  # (E, P) nats
    head_norm: np.ndarray  # (E,) ||W - W_start||, Frobenius
    probe_margin: np.ndarray | None  # (E, P') margins of the pairs that are only looked at
    step: np.ndarray | None  # (E,) optimizer steps taken; None for the flow


def dpo_weight(margin: np.ndarray, beta: float, label_smoothing: float = 0.0) -> np.ndarray:
    """-dloss/dmargin = beta (sigma(-beta m) - label_smoothing), in 1/nat; at m = 0 beta/2 (E3)."""
    return beta * (np.exp(-np.logaddexp(0.0, beta * margin)) - label_smoothing)


def dpo_loss(margin: np.ndarray, beta: float, label_smoothing: float = 0.0) -> np.ndarray:
    """-(1-eps) log sigma(beta m) - eps log sigma(-beta m), in nats, for each margin (E3)."""
    reward = beta * margin
    return np.logaddexp(0.0, -reward) + label_smoothing * reward


def dual_recursion(
    pairs: FrozenPairs,
    batches: Sequence[Batch],
    learning_rate: float | Sequence[float] | np.ndarray,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    max_grad_norm: float | None = None,
    start: HeadRows | None = None,
    probes: FrozenPairs | None = None,
    record_every: int = 1,
) -> Trajectory:
    """What SGD makes of the head, step by step (E5): alpha_j += lr count_j weight(m_j) / |batch|.

    Args:
        batches: for each optimizer step the (n,) indices of its pairs, over all ranks and
            micro-batches; None stands for all pairs.
        learning_rate: one number, or one per step.
        max_grad_norm: the head's gradient is scaled to at most this, torch's rule; None: never.
        start: W_start - W_ref, where training does not start from the reference.
        probes: pairs whose margins are followed but not trained on.
        record_every: steps between records; the start and the last step are always recorded.

    Raises ValueError for indices, rates and betas that make no sense.
    """
    check_beta(beta)
    rates = step_rates(learning_rate, len(batches))
    if record_every < 1:
        raise ValueError(f"record_every is {record_every}, expected 1 or more")
    offset = margins(pairs, start) if start else np.zeros(len(pairs.features))
    change = HeadRows(pairs.tokens, np.zeros((len(pairs.tokens), pairs.features.shape[1])))
    alpha = np.zeros(len(pairs.features))
    time = 0.0
    kept: list[tuple[int, float, np.ndarray, float, np.ndarray, np.ndarray | None]] = []

    def record(step: int) -> None:
        probe = None if probes is None else _probe(probes, change, start)
        margin = offset + margins(pairs, change)
        kept.append((step, time, alpha.copy(), change.norm, margin, probe))

    record(0)
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), 1):
        index = batch_index(batch, len(alpha), step)
        if isinstance(index, slice):
            margin = offset + margins(pairs, change)
        else:
            direction = answer_rows(pairs, change, index)
            margin = offset[index] + np.einsum("pd,pd->p", direction, pairs.features[index])
        taught = dpo_weight(margin, beta, label_smoothing) * pairs.count[index]
        taught /= pairs.count[index].sum()
        touched, gradient = batch_pull(pairs, index, taught)
        if max_grad_norm is not None:
            rate *= min(1.0, max_grad_norm / (float(np.linalg.norm(gradient)) + 1e-6))
        time += rate
        change.rows[touched] += rate * gradient
        np.add.at(alpha, np.arange(len(alpha))[index], rate * taught)
        if step % record_every == 0 or step == len(batches):
            record(step)
    steps, moments, alphas, norms, margin_rows, probe_rows = zip(*kept, strict=True)
    return Trajectory(
        time=np.array(moments),
        alpha=np.stack(alphas),
        margin=np.stack(margin_rows),
        head_norm=np.array(norms),
        probe_margin=None if probes is None else np.stack(probe_rows),
        step=np.array(steps),
    )


def gradient_flow(
    pairs: FrozenPairs,
    times: Sequence[float] | np.ndarray,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    start: HeadRows | None = None,
    probes: FrozenPairs | None = None,
    tolerance: float = 1e-8,
) -> Trajectory:
    """The limit of small learning rates over all pairs: dalpha_j/dt = weight(m_j) / P (E6).

    times: (E,) increasing, from 0 on. tolerance: of ||W - W_start||, relative, per step; margins
    are then off by at most sqrt(2) ||h_i|| times that norm's error. Raises ValueError like
    `integrate`, whose adaptive steps it takes.
    """
    check_beta(beta)
    offset = margins(pairs, start) if start else np.zeros(len(pairs.features))
    length = np.sqrt(2.0) * np.linalg.norm(pairs.features, axis=1)

    def slope(alpha: np.ndarray) -> np.ndarray:
        margin = offset + margins(pairs, head_change(pairs, alpha))
        return pairs.weight * dpo_weight(margin, beta, label_smoothing)

    def error(estimate: np.ndarray, alpha: np.ndarray) -> float:
        # The second term is what rounding alone does to the sum over pairs.
        allowed = tolerance * head_change(pairs, alpha).norm + 1e-14 * float(np.abs(alpha) @ length)
        return head_change(pairs, estimate).norm / allowed if allowed > 0 else 0.0

    alphas = integrate(slope, np.zeros(len(pairs.features)), times, error)
    states = [head_change(pairs, alpha) for alpha in alphas]
    return Trajectory(
        time=np.asarray(times, np.float64),
        alpha=alphas,
        margin=np.stack([offset + margins(pairs, state) for state in states]),
        head_norm=np.array([state.norm for state in states]),
        probe_margin=np.stack([_probe(probes, s, start) for s in states]) if probes else None,
        step=None,
    )


def check_beta(beta: float) -> None:
    """Raise ValueError unless beta is a positive number."""
    if not (np.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}, expected a positive number")


def _probe(probes: FrozenPairs, change: HeadRows, start: HeadRows | None) -> np.ndarray:
    margin = margins(probes, change)
    return margin if start is None else margin + margins(probes, start)


def batch_pull(
    pairs: FrozenPairs, index: np.ndarray | slice, alpha: np.ndarray
) -> tuple[np.ndarray | slice, np.ndarray]:
    """`head_change` over some pairs: places among `pairs.tokens`, and what their rows gain."""
    if isinstance(index, slice):
        return index, head_change(pairs, alpha).rows
    ends = np.concatenate([pairs.chosen[index], pairs.rejected[index]])
    tokens, place = np.unique(ends, return_inverse=True)
    column = np.arange(len(index))
    pull = np.zeros((len(tokens), len(index)))
    pull[place.ravel()[: len(index)], column] = alpha
    pull[place.ravel()[len(index) :], column] = -alpha
    return np.searchsorted(pairs.tokens, tokens), pull @ pairs.features[index]


def step_rates(learning_rate: float | Sequence[float] | np.ndarray, steps: int) -> np.ndarray:
    """(steps,) learning rates from one for all or one each; ValueError for what is no rate."""
    rates = np.asarray(learning_rate, np.float64)
    if rates.ndim == 0:
        rates = np.full(steps, rates)
    if rates.shape != (steps,):
        raise ValueError(f"learning_rate: {rates.shape} rates for {steps} batches")
    if not np.all(np.isfinite(rates) & (rates >= 0)):
        raise ValueError("learning_rate: expected finite numbers, none below 0")
    return rates


def batch_index(batch: Batch, size: int, step: int) -> np.ndarray | slice:
    """What selects the pairs of a batch; ValueError for indices beyond the ``size`` pairs."""
    if batch is None:
        return slice(None)
    index = np.asarray(batch)
    if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
        raise ValueError(
            f"batch {step}: expected (n,) indices of pairs, got {index.dtype} of shape "
            f"{index.shape}"
        )
    if index.min() < 0 or index.max() >= size:
        raise ValueError(f"batch {step} holds index {index.min()} or {index.max()}; {size} pairs")
    return index
