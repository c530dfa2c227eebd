"""What scored probes say: per response, per type and behavior, and the squeezing alarm. Numpy only.

Equations and what they mean: docs/probes.md. N probes of R scored positions in all, V vocabulary
entries; p is the model's distribution at a position, y the response's token there, e_y its unit
vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.probe_types import CHOSEN, REJECTED

# Per position, what a forward gives: sums over the vocabulary that never exist as (R, V).
POSITION_STATS = (
    "logp",  # log p_y
    "argmax_logp",  # max_v log p_v
    "entropy",
    "sum_sq_prob",  # sum_v p_v^2
    "residual_sq",  # ||p - e_y||^2
    "log1m_pmax",  # log(1 - max_v p_v)
)
# Columns of the `probes` table that `response_values` makes.
VALUES = (
    "logp",
    "argmax_logp",
    "entropy",
    "sum_sq_prob",
    "log1m_pmax",
    "energy",
    "residual",
    "a_norm",
)
# Of a response type, in a line of metrics.jsonl: means over its probes.
METRICS = ("logp", "argmax_logp", "entropy", "log1m_pmax", "energy", "argmax_changed")


def response_values(
    positions: np.ndarray,  # (6, R) POSITION_STATS
    scored: np.ndarray,  # (N,) positions of each response, at least 1, one response after another
    vocab: int,
) -> np.ndarray:  # (8, N) float64, VALUES
    """Log-probs summed over a response's positions, all else as the mean over them.

        energy = 1 - p_y,   residual = ||p - e_y||,   a_norm = ||I - 1 p^T||_F

    1 - p_y is -expm1(log p_y): no log of a rounded 1 - p anywhere. The norm of A = I - 1 p^T, which
    takes a change of logits to one of log-probs, is sqrt(V ||p||^2 + V - 2).
    """
    logp, argmax_logp, entropy, square, residual_sq, log1m = positions.astype(np.float64)
    per_position = np.stack(
        [
            logp,
            argmax_logp,
            entropy,
            square,
            log1m,
            -np.expm1(np.minimum(logp, 0.0)),
            np.sqrt(residual_sq),
            np.sqrt(np.maximum(vocab * square + vocab - 2, 0.0)),
        ]
    )
    starts = np.cumsum(scored) - scored
    sums = np.add.reduceat(per_position, starts, axis=1)
    sums[2:] /= scored
    return sums


def changed_fraction(
    argmax: np.ndarray,  # (R,)
    first: np.ndarray,  # (R,) at the first evaluation
    scored: np.ndarray,  # (N,)
) -> np.ndarray:  # (N,)
    """Part of each response's positions whose most likely token is another than at first."""
    starts = np.cumsum(scored) - scored
    return np.add.reduceat((argmax != first).astype(np.float64), starts) / scored


def type_means(
    values: Mapping[str, np.ndarray],  # (N,) each
    response_type: np.ndarray,  # (N,) of str
) -> dict[str, dict[str, float]]:
    """Mean of every value over the probes of each response type."""
    return {
        str(kind): {name: float(x[response_type == kind].mean()) for name, x in values.items()}
        for kind in sorted(set(response_type.tolist()))
    }


@dataclass(frozen=True)
class Levels:
    """Where a behavior's responses stand: means over its probes, in nats.

    `argmax` is of the chosen responses' positions: the likelihood of whatever the model would
    rather say there.
    """

    chosen: float
    rejected: float
    argmax: float


def levels(
    logp: np.ndarray,  # (N,)
    argmax_logp: np.ndarray,  # (N,)
    response_type: np.ndarray,  # (N,) of str
    behavior: np.ndarray,  # (N,) of int, -1: none
    names: Sequence[str],
) -> dict[str, Levels]:
    """`Levels` of every behavior that has probes of its chosen and of its rejected responses."""
    found = {}
    for k, name in enumerate(names):
        chosen = (behavior == k) & (response_type == CHOSEN)
        rejected = (behavior == k) & (response_type == REJECTED)
        if chosen.any() and rejected.any():
            found[name] = Levels(
                float(logp[chosen].mean()),
                float(logp[rejected].mean()),
                float(argmax_logp[chosen].mean()),
            )
    return found


@dataclass(frozen=True)
class Squeeze:
    """How a behavior's levels changed between two evaluations, and whether that is squeezing."""

    behavior: str
    chosen: float
    rejected: float
    argmax: float

    @property
    def alarm(self) -> bool:
        """Both responses of the pairs lose likelihood, and what the model says already gains it:
        the squeezing effect of Ren & Sutherland."""
        return self.argmax > 0 and self.chosen < 0 and self.rejected < 0


def squeezes(before: Mapping[str, Levels], now: Mapping[str, Levels]) -> list[Squeeze]:
    """One `Squeeze` for every behavior in both."""
    return [
        Squeeze(
            name,
            level.chosen - before[name].chosen,
            level.rejected - before[name].rejected,
            level.argmax - before[name].argmax,
        )
        for name, level in now.items()
        if name in before
    ]
