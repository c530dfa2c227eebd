"""All that can be said of a set of pairs before training: each behavior alone, and in the mixture.

Puts together what the other modules compute; docs/theory-command.md shows it as the command
`fastpref theory` prints it. Rates are those of the first moment of training, from the reference,
with frozen features and one-token answers; they are per unit of time, or per step where a learning
rate is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpref.theory.bounds import max_learning_rate, validity_window
from fastpref.theory.distinguish import (
    BehaviorStatistics,
    behavior_statistics,
    directions,
    second_moment,
)
from fastpref.theory.mixture import mixture_direction, priority_levels, priority_matrix
from fastpref.theory.pairs import FrozenPairs
from fastpref.theory.rates import batch_head_rate, initial_rates, pair_rates


@dataclass(frozen=True)
class Prediction:
    """One behavior. nan: undefined."""

    statistics: BehaviorStatistics
    order: int  # 1: the mixture teaches it fastest; 0: undefined
    fraction: float  # q_k, of the pairs
    head_rate: float  # of ||W - W0||_F, trained alone (E10)
    margin_rate: float  # of the mean margin in nats, trained alone (E10)
    mixture_rate: float  # of its mean margin in nats, in this mixture (E14)
    level: float  # priority level, in the features' unit (E15)
    share: float  # of the first update; all of them sum to 1 (E17)


@dataclass(frozen=True)
class Mixture:
    """All pairs together. nan: undefined."""

    pull: float  # ||dbar||, the mixture's effective delta (E14)
    head_rate: float
    loss_rate: float
    accuracy: float  # share of the pairs with a margin above 0 after the first full step, exact
    batch_size: int  # 0: as many pairs as there are, or one batch holds more
    batch_rate: float  # like head_rate of one random batch of that size, root mean square (E13)
    window: float  # steps or time until the head is at most 10 % below the first rate (E22)
    max_learning_rate: float  # full-batch steps are stable up to here (E19)


@dataclass(frozen=True)
class Overview:
    """K behaviors, the fastest first."""

    behaviors: list[Prediction]
    priority: np.ndarray | None  # (K, K) in that order; None for a single behavior (E16)
    mixture: Mixture
    beta: float
    learning_rate: float | None  # None: rates are per unit of time


def overview(
    pairs: FrozenPairs,
    beta: float,
    learning_rate: float | None = None,
    *,
    batch_size: int = 0,
    positive_token: int | None = None,
    linear: bool = True,
) -> Overview:
    """Statistics, rates, order, shares and priorities of ``pairs``.

    Args:
        batch_size: of a random batch whose first step is compared with that of all pairs; 0: none.
        positive_token: as in `behavior_statistics`.
        linear: False for a model that caps its logits, where margins are not linear in the head:
            every rate, level, share and coherence is undefined then, the statistics remain.

    Behaviors with the same rate share their order. Raises ValueError as `behavior_statistics` does.
    """
    if learning_rate is not None and not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}, expected a number above 0")
    statistics = behavior_statistics(pairs, positive_token)
    pull = directions(pairs)
    per = 1.0 if learning_rate is None else learning_rate
    per = per if linear else np.nan
    mixed = initial_rates(pull, pairs.fraction, beta)
    level = priority_levels(pull, pairs.fraction) * (1.0 if linear else np.nan)
    share = mixed.share * (1.0 if linear else np.nan)
    rate = mixed.margin * per
    order = [0 if np.isnan(share[k]) else 1 + int((rate > rate[k]).sum()) for k in range(len(rate))]
    behaviors = []
    for k, own in enumerate(statistics):
        alone = initial_rates(pull[k : k + 1], (1,), beta)
        behaviors.append(
            Prediction(
                statistics=own if linear else _without_gradients(own),
                order=order[k],
                fraction=float(pairs.fraction[k]),
                head_rate=alone.head * per,
                margin_rate=float(alone.margin[0]) * per,
                mixture_rate=float(rate[k]),
                level=float(level[k]),
                share=float(share[k]),
            )
        )
    fastest = sorted(range(len(behaviors)), key=lambda k: _place(behaviors[k]))
    return Overview(
        behaviors=[behaviors[k] for k in fastest],
        priority=priority_matrix(pull[fastest]) if len(fastest) > 1 else None,
        mixture=_mixture(pairs, pull, beta, learning_rate, batch_size, per),
        beta=beta,
        learning_rate=learning_rate,
    )


def _place(own: Prediction) -> tuple[float, float, str]:
    """Sorts by rate; without rates by distinguishability."""
    rate = own.mixture_rate if own.order else -np.inf
    return -rate, -own.statistics.effective_delta, own.statistics.behavior


def _without_gradients(own: BehaviorStatistics) -> BehaviorStatistics:
    """Coherence speaks of gradients; the other statistics are of the features."""
    return BehaviorStatistics(**{**vars(own), "coherence": np.nan})


def _mixture(
    pairs: FrozenPairs,
    pull: np.ndarray,
    beta: float,
    learning_rate: float | None,
    batch_size: int,
    per: float,
) -> Mixture:
    rates = initial_rates(pull, pairs.fraction, beta)
    moment = second_moment(pairs)
    undefined = 1.0 if np.isfinite(per) else np.nan
    smaller = 0 < batch_size < len(pairs.features)
    return Mixture(
        pull=float(np.linalg.norm(mixture_direction(pull, pairs.fraction))),
        head_rate=rates.head * per,
        loss_rate=rates.loss * per,
        accuracy=float(pairs.weight @ (pair_rates(pairs, beta) > 0)) * undefined,
        batch_size=batch_size if smaller else 0,
        batch_rate=batch_head_rate(pairs, batch_size, beta) * per if smaller else np.nan,
        window=validity_window(moment, beta, learning_rate=learning_rate or 1.0) * undefined,
        max_learning_rate=max_learning_rate(moment, beta) * undefined,
    )
