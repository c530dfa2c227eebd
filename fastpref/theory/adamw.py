"""What AdamW makes of the head on frozen features: the recursion of `dual`, by another optimizer.

AdamW divides each weight's mean gradient by the root of its mean square, so W - W_start is no sum
of alpha_i a_i h_i^T any more and P numbers do not hold it. The rows of the answer tokens do: the
margins' gradient over every other row of the head is 0. Per weight, with g the loss's gradient,

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    W <- W - lr (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)                              (E37)

after n steps (Kingma & Ba, 2015; Loshchilov & Hutter, 2019, without weight decay). The first step
moves every weight by lr whatever the size of its gradient: that is why rates under AdamW are not
those of `rates.initial_rates`.

Assumes what `dual` assumes, with AdamW in the place of SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.theory.dual import Batch, batch_index, batch_pull, check_beta, dpo_weight, step_rates
from fastpref.theory.pairs import FrozenPairs, HeadRows, margins


@dataclass(frozen=True)
class HeadPath:
    """The start and every step after it."""

    step: np.ndarray  # (E,) optimizer steps taken
    margin: np.ndarray  # (E, P) nats
    head_norm: np.ndarray  # (E,) ||W - W_start|| over the rows of answer tokens
    probe_margin: np.ndarray | None  # (E, P') margins of the pairs that are only looked at


def adamw_recursion(
    pairs: FrozenPairs,
    batches: Sequence[Batch],
    learning_rate: float | Sequence[float] | np.ndarray,
    beta: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    max_grad_norm: float | None = None,
    probes: FrozenPairs | None = None,
) -> HeadPath:
    """Margins and head change of AdamW on the head, from the reference, step by step (E37).

    Arguments as in `dual.dual_recursion`. Raises ValueError as that does, and for probes whose
    answer tokens are none of the pairs' (their rows do not move, which is no prediction).
    """
    check_beta(beta)
    rates = step_rates(learning_rate, len(batches))
    if probes is not None and not np.isin(probes.tokens, pairs.tokens).all():
        raise ValueError(
            f"probes have the answer tokens {probes.tokens.tolist()}, the pairs only "
            f"{pairs.tokens.tolist()}"
        )
    shape = (len(pairs.tokens), pairs.features.shape[1])
    change, mean, square = (np.zeros(shape) for _ in range(3))
    margin = [np.zeros(len(pairs.features))]
    probe = [] if probes is None else [np.zeros(len(probes.features))]
    norms = [0.0]
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), 1):
        index = batch_index(batch, len(pairs.features), step)
        taught = dpo_weight(margin[-1][index], beta) * pairs.count[index]
        touched, pull = batch_pull(pairs, index, taught / pairs.count[index].sum())
        gradient = np.zeros(shape)
        gradient[touched] = -pull
        if max_grad_norm is not None:
            gradient *= min(1.0, max_grad_norm / (float(np.linalg.norm(gradient)) + 1e-6))
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        root = np.sqrt(square / (1 - betas[1] ** step)) + epsilon
        change = change - rate * mean / (1 - betas[0] ** step) / root
        rows = HeadRows(pairs.tokens, change)
        norms.append(rows.norm)
        margin.append(margins(pairs, rows))
        if probes is not None:
            probe.append(margins(probes, rows))
    return HeadPath(
        step=np.arange(len(batches) + 1),
        margin=np.stack(margin),
        head_norm=np.array(norms),
        probe_margin=np.stack(probe) if probe else None,
    )
