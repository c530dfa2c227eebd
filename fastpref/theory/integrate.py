"""An adaptive Runge-Kutta integrator, small because scipy is not among the dependencies.

Explicit steps are enough for gradient flow on a smooth convex loss: its fastest rate c is the one
that bounds the learning rate of gradient descent (2 / c), so wherever a run of n steps is stable,
this needs at most about n steps too, and with error control far fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Dormand & Prince 1980, table 2: the 5th-order pair with a 4th-order error estimate. The last
# stage of a step is the first of the next.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

MAX_STEPS = 1_000_000


def integrate(
    slope: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,  # (n,)
    times: Sequence[float] | np.ndarray,  # (E,) not decreasing, from 0 on
    error: Callable[[np.ndarray, np.ndarray], float],
) -> np.ndarray:  # (E, n)
    """States at `times` of dy/dt = slope(y), y(0) = start.

    error(estimate, y): the size of a step's error estimate over what is allowed at state y; steps
    above 1 are repeated smaller. Every time asked for is hit exactly, nothing is interpolated.
    Raises ValueError for times that decrease, and where MAX_STEPS steps do not reach the last one.
    """
    moments = np.asarray(times, np.float64)
    if moments.ndim != 1 or not np.all(np.diff(moments, prepend=0.0) >= 0):
        raise ValueError(
            f"times: expected (E,), none below 0 or its predecessor, got {times!r:.80}"
        )
    if not np.all(np.isfinite(moments)):
        raise ValueError("times: expected finite numbers")
    states = np.empty((len(moments), len(start)))
    now, state, first = 0.0, start, slope(start)
    width = float(moments[-1]) / 100 if len(moments) else 0.0
    taken = 0
    for row, end in enumerate(moments):
        while now < end:
            taken += 1
            if taken > MAX_STEPS:
                raise ValueError(
                    f"{MAX_STEPS} steps reached t = {now:g} of {moments[-1]:g}: too stiff"
                )
            last = now + width >= end
            step = end - now if last else width
            slopes = [first]
            new = state
            for stage in _STAGES:
                new = state + step * sum(c * k for c, k in zip(stage, slopes, strict=True) if c)
                slopes.append(slope(new))
            estimate = step * sum(c * k for c, k in zip(_ERROR, slopes, strict=True) if c)
            size = error(np.asarray(estimate), new)
            if size <= 1.0:
                now, state, first = (float(end) if last else now + step), new, slopes[-1]
                wider = step * min(5.0, 0.9 * size**-0.2 if size > 0 else 5.0)
                # A step cut short by a time to hit says nothing against wide ones.
                width = max(width, wider) if last else wider
            else:  # also where it is nan or inf, for which max gives 0.2
                width = step * max(0.2, 0.9 * size**-0.2)
        states[row] = state
    return states
