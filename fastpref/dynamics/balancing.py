"""From measured shares of behaviors to weights of their losses: the update rule of `balance`.

Numpy only; docs/balance.md derives the rule and says when it is stable. `fastpref.balance` measures
in a run and applies the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MAX_ERROR = 1.0  # of a logarithm: an update moves no weight by more than e^(gain + 2 lead)


def share_errors(value: np.ndarray, error: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(K,) how far below its target each behavior's share is, as a logarithm.

        e_k = log(t_k X / x_k) c_k,       X = sum_l |x_l|,
        c_k = g^2 / (g^2 + s_k^2),        g = t_k X - x_k

    Args:
        value: (K,) x, what is shared: mean margins or update rates, in any unit; nan: not known.
        error: (K,) s, their standard errors.
        target: (K,) t, the wanted shares; those of unknown behaviors are dealt out to the others.

    Of positive values e is the log of target over share. A behavior of no or negative value counts
    as the furthest below, and no |e_k| exceeds MAX_ERROR. The factor c, Wiener's, takes back what
    may well be noise: at a gap of one standard error half. nan where nothing is known of a
    behavior, or of less than two; zeros where all values are 0.
    """
    known = np.isfinite(value) & np.isfinite(error)
    found = np.full(len(value), np.nan)
    if np.count_nonzero(known) < 2:
        return found
    x, noise = value[known], error[known]
    total = np.abs(x).sum()
    if total == 0:
        found[known] = 0.0
        return found
    wanted, have = target[known] / target[known].sum(), x / total
    with np.errstate(divide="ignore"):
        far = np.where(have > 0, np.log(wanted) - np.log(np.maximum(have, 0)), np.inf)
    gap = (wanted - have) ** 2
    spread = (noise / total) ** 2
    trust = np.where(gap > 0, gap / np.where(gap > 0, gap + spread, 1), 0)
    found[known] = np.clip(far, -MAX_ERROR, MAX_ERROR) * trust
    return found


def bounded_weights(raw: np.ndarray, fraction: np.ndarray, limit: float) -> np.ndarray:
    """(K,) clip(c raw, 1/limit, limit) with the one c for which sum_k fraction_k w_k = 1.

    So the weights keep their proportions where the limits allow it, and the mean weight of a pair
    is 1. ``raw`` (K,) is positive, ``fraction`` (K,) sums to 1, ``limit`` is above 1.
    """
    low, high = 1 / limit, limit
    # The mean weight grows with c, linearly between the values where a weight meets a limit.
    bends = np.sort(np.concatenate([low / raw, high / raw]))
    mean = np.clip(bends[:, None] * raw, low, high) @ fraction
    return np.clip(np.interp(1.0, mean, bends) * raw, low, high)


class ShareController:
    """Weights (K,) that drive measured shares towards their targets.

        log w  <-  log w + gain e + lead (e - e before),   then `bounded_weights`

    e are the `share_errors`. Of a quantity that answers to the weights at once (update rates) the
    first term suffices; of one that accumulates (margins) it overshoots, which the second, ahead
    of it by a quarter turn, damps. Deterministic: the same measurements give the same bits.
    """

    def __init__(
        self,
        fraction: np.ndarray,  # (K,) part of the training pairs
        target: np.ndarray,  # (K,) wanted shares
        *,
        gain: float,
        lead: float,
        limit: float,
    ) -> None:
        assert fraction.shape == target.shape and fraction.min() > 0 and target.min() > 0
        self.fraction, self.target = fraction / fraction.sum(), target / target.sum()
        self.gain, self.lead, self.limit = gain, lead, limit
        self.weights = np.ones(len(fraction))
        self.errors = np.zeros(len(fraction))

    def update(self, value: np.ndarray, error: np.ndarray) -> None:
        """Take in a measurement, (K,) values and standard errors; nan: not known this time."""
        found = share_errors(value, error, self.target)
        found = np.where(np.isnan(found), self.errors, found)
        fresh = np.isfinite(value) & np.isfinite(error)
        step = np.where(fresh, self.gain * found + self.lead * (found - self.errors), 0.0)
        self.errors = found
        if step.any():
            raw = self.weights * np.exp(step)
            self.weights = bounded_weights(raw, self.fraction, self.limit)

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, exact as JSON."""
        return {"weights": self.weights.tolist(), "errors": self.errors.tolist()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue from `state_dict`."""
        self.weights = np.array(state["weights"], np.float64)
        self.errors = np.array(state["errors"], np.float64)
