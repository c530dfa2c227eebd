"""From pairs to behaviors: means per group, update rates, times to a threshold. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.theory.distinguish import behavior_statistics
from fastpref.theory.pairs import frozen_pairs

MARGIN_THRESHOLD = 1.0
ACCURACY_THRESHOLD = 0.9

# Columns of `pairs` whose mean is the column of the same name of `behaviors`.
_MEANS = (
    "margin",
    "weight",
    "loss",
    "reward_accuracy",
    "output_accuracy",
    "logp_chosen",
    "logp_rejected",
    "head_gnorm_m",
    "gnorm_m",
)


def behavior_rows(
    behaviors: Sequence[str], behavior: np.ndarray, **columns: np.ndarray
) -> list[dict[str, Any]]:
    """Aggregate evaluated pairs into rows of the `behaviors` table, one per behavior present.

    Args:
        behaviors: the K names. behavior: (P,) integers, the pairs' indices into them.
        columns: (P,) columns of `pairs`: margin (nats), loss, weight, logp_chosen, logp_rejected,
            ref_logp_chosen, head_gnorm_m, gnorm_m, ...; those that are missing give no column.
            reward_accuracy (margin > 0) and output_accuracy (logp_chosen > logp_rejected) are
            computed if they are not given.

    Returns rows with `behavior`, `n`, `fraction`, means under the columns' own names, margin_std,
    mean squares of the norms and displaced_frac. Sums are in float64, in the order of the pairs.
    Raises ValueError when shapes differ or an index is out of range.
    """
    index = np.asarray(behavior)
    data = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    for name, values in data.items():
        if values.shape != index.shape or index.ndim != 1:
            raise ValueError(f"{name} has shape {values.shape}, behavior {index.shape}: need (P,)")
    if index.size and not 0 <= index.min() <= index.max() < len(behaviors):
        raise ValueError(
            f"behavior indices span {index.min()} to {index.max()}, there are {len(behaviors)}"
        )
    if "margin" in data:
        data.setdefault("reward_accuracy", (data["margin"] > 0).astype(np.float64))
    if "logp_chosen" in data and "logp_rejected" in data:
        higher = data["logp_chosen"] > data["logp_rejected"]
        data.setdefault("output_accuracy", higher.astype(np.float64))

    count = np.bincount(index, minlength=len(behaviors))
    present = np.flatnonzero(count)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(index, values, len(behaviors)) / np.maximum(count, 1)

    result = {name: mean(data[name]) for name in _MEANS if name in data}
    if "margin" in data:
        result["margin_std"] = np.sqrt(mean((data["margin"] - result["margin"][index]) ** 2))
    for name in ("head_gnorm_m", "gnorm_m"):
        if name in data:
            result[f"{name}_sq"] = mean(data[name] ** 2)
    if "logp_chosen" in data and "ref_logp_chosen" in data:
        displaced = data["logp_chosen"] < data["ref_logp_chosen"]
        result["displaced_frac"] = mean(displaced.astype(np.float64))
    return [
        {
            "behavior": behaviors[int(k)],
            "n": int(count[k]),
            "fraction": float(count[k] / index.size),
            **{name: float(values[k]) for name, values in result.items()},
        }
        for k in present
    ]


def feature_rows(
    behavior: np.ndarray,  # (P,) integers
    features: np.ndarray,  # (P, D) of `fastpref.frozen`
    chosen: np.ndarray,  # (P,) the tokens that the features are to predict, -1 where there is none
    rejected: np.ndarray,
) -> dict[int, dict[str, float | None]]:
    """How far apart the answers of each behavior lie among the evaluated pairs, by its index.

    `delta`, `lambda_max` (the theory's concentration), `trace` and `mu_dot_d` of the `behaviors`
    table, as `fastpref.theory.distinguish` defines them, with the smaller token id as "+". None
    where they do not exist: a behavior with other than two answers, one of which is never chosen,
    or features that are not finite.
    """
    rows: dict[int, dict[str, float | None]] = {}
    for k in np.unique(behavior).tolist():
        own = np.flatnonzero(behavior == k)
        answers = sorted(set(zip(chosen[own].tolist(), rejected[own].tolist(), strict=True)))
        both = len(answers) == 2 and answers[0] == answers[1][::-1] and -1 not in answers[0]
        if not both or not np.isfinite(features[own]).all():
            rows[k] = dict.fromkeys(("delta", "lambda_max", "trace", "mu_dot_d"))
            continue
        (found,) = behavior_statistics(frozen_pairs(features[own], chosen[own], rejected[own]))
        rows[k] = {
            "delta": found.delta,
            "lambda_max": found.concentration,
            "trace": found.trace,
            "mu_dot_d": found.mu_dot_d,
        }
    return rows


def update_rate(step: np.ndarray, margin: np.ndarray) -> float | None:
    """Mean update rate over a curve: (last margin - first) / (last step - first), nats per step.

    step, margin: (E,) the evaluations in order, margin nan where unknown. None if fewer than two
    are known.
    """
    known = np.flatnonzero(~np.isnan(margin))
    if known.size < 2:
        return None
    first, last = known[0], known[-1]
    return float((margin[last] - margin[first]) / (step[last] - step[first]))


def time_to_threshold(step: np.ndarray, values: np.ndarray, threshold: float) -> int | None:
    """First evaluated step at which the curve `values` (E,) is above `threshold`, None if never.

    The answer is as fine as the evaluations are frequent; nothing is interpolated.
    """
    above = np.flatnonzero(values > threshold)
    return int(step[above[0]]) if above.size else None
