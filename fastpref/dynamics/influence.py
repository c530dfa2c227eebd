"""From sketches of probes and of a step to rows of the `influence` table. Numpy only.

With P_c the mean gradient of log pi(y | x) over the probes of cell c (a behavior's, of one response
type), and G_l = -(1/N) sum of grad L_j over the pairs j of behavior l among the N of a step:

    <P_c, G_l>            per unit of learning rate, what l's pairs do to c's mean log-prob under
                          plain gradient descent, to first order; over l these sum to <P_c, G>
    <P_c, change>         the same of what the optimizer did to the weights, learning rate included

Inner products come from sketches with their standard errors (`fastpref.dynamics.rates`). Shapes: C
cells, K behaviors, L those with pairs in the step, G layer groups, k sketch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpref.dynamics import rates

Array = np.ndarray


@dataclass(frozen=True)
class Moved:
    """Around one step."""

    probes: Array  # (G, C, k, k) sketches of P_c at theta_t
    count: Array  # (C,) probes
    logp: Array  # (C,) their mean log-prob at theta_t, nats
    parts: Array  # (G, K, k, k) sketches of G_l; 0 without pairs
    present: Array  # (K,) of bool: l has pairs in the step
    update: Array  # (G, k, k) sketch of what the step did to the weights


def influence_rows(
    moved: Moved,
    logp_after: Array,  # (C,)
    cells: Sequence[tuple[str | None, str]],  # behavior, response type
    behaviors: Sequence[str],
) -> list[Mapping[str, Any]]:
    """C rows of the whole step, and C x L of the behaviors' parts in it."""
    teachers = np.flatnonzero(moved.present)
    whole = moved.parts.sum(axis=1, keepdims=True)
    sides = np.concatenate([whole, moved.parts[:, teachers]], axis=1)
    dot = rates.interactions(moved.probes, sides)
    cos = rates.cosines(moved.probes, sides)
    change = rates.first_order(moved.probes, moved.update)
    others = [None, *(behaviors[int(other)] for other in teachers)]
    rows: list[Mapping[str, Any]] = []
    for c, (behavior, kind) in enumerate(cells):
        for j, other in enumerate(others):
            row: dict[str, Any] = {
                "behavior": behavior,
                "response_type": kind,
                "other": other,
                "n": int(moved.count[c]),
                "dot": _known(dot.value[c, j]),
                "dot_error": _known(dot.error[c, j]),
                "cos": _known(cos.value[c, j]),
                "cos_error": _known(cos.error[c, j]),
            }
            if other is None:
                row["change_opt"] = _known(change.value[c])
                row["change_opt_error"] = _known(change.error[c])
                row["change_obs"] = _known(logp_after[c] - moved.logp[c])
            rows.append(row)
    return rows


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
