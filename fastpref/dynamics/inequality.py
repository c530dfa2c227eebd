"""How unequally behaviors fare: indices of inequality over one number per behavior. Numpy only.

Both come from the study of incomes and are free of scale: rates in nats or milli-nats per step
have the same index. 0 is equality. The Gini coefficient is the mean difference between two
behaviors relative to their mean; the Atkinson index is the part of the total that could be given up
if what is left were dealt out equally, for somebody who dislikes inequality by ``epsilon``: the
larger that is, the more the worst-off count.

What is not known is not guessed: a nan among the values gives nan. A time to a threshold that was
never reached is known to exceed the run, and `restricted_times` says how such times enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Values = np.ndarray | Sequence[float]


def gini(values: Values) -> float:
    """Gini coefficient of (K,) values, 0 (all equal) to (K - 1)/K (one has everything).

        G = sum_kl |x_k - x_l| / (2 K sum_k |x_k|)

    For values of one sign this is the textbook's, half the relative mean difference (Gini 1912;
    Sen, On Economic Inequality, 1973), in population form, not multiplied by K/(K - 1). Rates can
    be of both signs, some behaviors unlearned while others learn; |x_k| in the denominator keeps
    the index within its bounds there (Raffinetti, Siletti and Vernizzi 2015, Stat. Methods Appl.
    24:507, up to that factor). Zeros only: 0, they are equal. nan where there is no value, or one
    that is not finite. The relative error is about 1e-15, whatever the scale.
    """
    x = _values(values)
    if not x.size or not np.isfinite(x).all():
        return math.nan
    largest = np.abs(x).max()
    if largest == 0:
        return 0.0
    x = np.sort(x / largest)  # neither the sums nor the differences overflow
    # sum_kl |x_k - x_l| = 2 sum over gaps of gap x values below x values above: no cancellation.
    below = np.arange(1, x.size)
    differences = np.diff(x) @ (below * (x.size - below))
    return float(differences / (x.size * np.abs(x).sum()))


def atkinson(values: Values, epsilon: float = 0.5) -> float:
    """Atkinson index of (K,) values of 0 or more, 0 (all equal) to below 1.

        A = 1 - (mean x^(1 - epsilon))^(1 / (1 - epsilon)) / mean x,
        A = 1 - geometric mean / mean for epsilon = 1

    Atkinson 1970, J. Economic Theory 2:244. A zero among positive values gives 1 for epsilon >= 1:
    nothing makes up for it. Zeros only: 0. nan where it does not exist: no value, a negative one
    (powers of it), one that is not finite. Raises ValueError for an epsilon below 0 or not finite.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon: expected a finite number of 0 or more, got {epsilon!r}")
    x = _values(values)
    if not x.size or not np.isfinite(x).all() or x.min() < 0:
        return math.nan
    if x.max() == x.min():
        return 0.0
    x = x / x.max()
    power = 1 - epsilon
    if x.min() == 0 and power <= 0:
        return 1.0
    with np.errstate(divide="ignore"):
        log = np.log(x) - math.log(x.mean())  # -inf of a zero, whose power is 0
    # Rounding puts equal values a hair apart; the index is never below 0.
    return max(0.0, -math.expm1(_log_power_mean(log, power)))


def restricted_times(times: Values, horizon: float) -> np.ndarray:
    """(K,) min(time, ``horizon``), where nan and inf stand for "not within the horizon".

    A behavior that has not come to its threshold when the run ends is at least as late as that, and
    this least is what counts: the restricted time of survival analysis, whose Gini index is that of
    Bonetti, Gigliarano and Muliere 2009 (Lifetime Data Anal. 15:493). Indices of restricted times
    compare only between runs of one horizon, and say little where hardly any behavior arrives: give
    the number that did beside them. Raises ValueError for negative times and for a horizon that is
    not positive and finite.
    """
    if not (math.isfinite(horizon) and horizon > 0):
        raise ValueError(f"horizon: expected a positive, finite number of steps, got {horizon!r}")
    x = _values(times)
    if (x < 0).any():
        raise ValueError(f"times: expected 0 or more, nan for never, got {x[x < 0][0]:g}")
    return np.fmin(x, horizon)


def _log_power_mean(log: np.ndarray, power: float) -> float:
    """log (mean exp(power log))^(1/power), the mean of ``log`` for power 0."""
    if power == 0:
        return float(log.mean())
    scaled = power * log
    if np.abs(scaled).max() < 1:  # near power 0, where the other form divides rounding by it
        return float(np.log1p(np.expm1(scaled).mean()) / power)
    top = scaled.max()
    return float((top + np.log(np.exp(scaled - top).mean())) / power)


def _values(values: Values) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1:
        raise ValueError(f"expected one value per behavior, (K,), got shape {x.shape}")
    return x
