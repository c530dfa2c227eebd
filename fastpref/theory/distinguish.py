"""How far apart the answers of a behavior lie in feature space: delta, and what goes with it.

The *classes* of a behavior are its pairs with the same chosen and the same rejected token. A Yes/No
behavior has two, D+ (the positive answer is chosen) and D-. All moments are those of the pairs
given, divided by their number, not one less: what is said of the training pairs is exact for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpref.theory.pairs import FrozenPairs, behavior_sums, frozen_pairs

# A difference of means below this fraction of the features' length is rounding, hence 0.
ROUNDING = 1e-13


@dataclass(frozen=True)
class ClassMoments:
    """The C classes of a set of pairs, by behavior, chosen token and rejected token."""

    means: FrozenPairs  # C pairs: the classes' mean features, `count` their number of pairs
    concentration: np.ndarray  # (C,) largest eigenvalue of the class's covariance, feature^2
    trace: np.ndarray  # (C,) trace of the class's covariance, feature^2
    second_moment: float  # largest eigenvalue of E[h h^T] over all pairs, not centred, feature^2


@dataclass(frozen=True)
class BehaviorStatistics:
    """One behavior. What needs two classes is nan where its pairs have several pairs of answers.

    Lengths are in the features' unit. "+" is the class that chooses `positive_token`.
    """

    behavior: str
    n: int  # pairs
    n_plus: int  # pairs of D+; -1 where undefined
    n_minus: int
    positive_token: int  # -1 where undefined
    delta: float  # distinguishability ||mu+ - mu-|| (E8)
    effective_delta: float  # 2 ||p+ mu+ - p- mu-||, for any answers; delta if balanced (E11)
    mu_dot_d: float  # <(mu+ + mu-)/2, mu+ - mu->
    mu_norm: float  # ||(mu+ + mu-)/2||
    concentration_plus: float  # largest eigenvalue of D+'s covariance
    concentration_minus: float
    concentration: float  # the larger of the two
    trace: float  # the larger of the two classes' traces
    spread_plus: float  # standard deviation of D+'s features along mu+ - mu-; nan if delta is 0
    spread_minus: float
    second_moment: float  # largest eigenvalue of E[h h^T], not centred
    coherence: float  # ||mean grad m||^2 / mean ||grad m||^2 (E12); nan where all features are 0


def class_moments(pairs: FrozenPairs) -> ClassMoments:
    """Means, concentrations and traces of the classes of `pairs`."""
    keys = np.stack([pairs.behavior, pairs.chosen, pairs.rejected], axis=1)
    classes, which = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(which.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(which.ravel()))[:-1]
    sides = [_side(pairs, own) for own in np.split(order, ends)]
    means = frozen_pairs(
        np.stack([side.mean for side in sides]),
        *(classes[:, 1], classes[:, 2], classes[:, 0]),
        behaviors=pairs.behaviors,
        count=[side.count for side in sides],
    )
    return ClassMoments(
        means,
        concentration=np.array([largest_eigenvalue(side.centred) for side in sides]),
        trace=np.array([(side.centred**2).sum() for side in sides]),
        second_moment=second_moment(pairs),
    )


def behavior_statistics(
    pairs: FrozenPairs, positive_token: int | None = None
) -> list[BehaviorStatistics]:
    """Statistics of each behavior, in order.

    positive_token: the answer whose choosers are "+", " Yes" in the paper; None: of a behavior's
    two tokens the smaller id. It decides the sign of mu_dot_d and which class is called plus.

    Raises ValueError for a behavior of two answers of which one is never chosen (its class is empty
    and delta does not exist), or neither of which is `positive_token`.
    """
    effective = np.linalg.norm(directions(pairs), axis=1)
    result = []
    for k, name in enumerate(pairs.behaviors):
        own = np.flatnonzero(pairs.behavior == k)
        weight = pairs.count[own] / pairs.count[own].sum()
        rooted = np.sqrt(weight)[:, None] * pairs.features[own]
        square = float((rooted**2).sum())
        sides = _sides(pairs, k, positive_token)
        result.append(
            BehaviorStatistics(
                behavior=name,
                n=round(float(pairs.count[own].sum())),
                effective_delta=float(effective[k]),
                second_moment=largest_eigenvalue(rooted),
                # ||M_k||^2 = effective^2 / 2, and ||grad m_i||^2 = 2 ||h_i||^2.
                coherence=float(effective[k] ** 2 / (4 * square)) if square > 0 else np.nan,
                **(_UNDEFINED if sides is None else _two_classes(*sides)),  # type: ignore[arg-type]
            )
        )
    return result


@dataclass(frozen=True)
class _Side:
    """One class."""

    count: float
    mean: np.ndarray  # (D,)
    centred: np.ndarray  # (n, D) deviations from the mean, times the roots of their weights
    size: float  # root of the mean squared length of the features


def _sides(pairs: FrozenPairs, k: int, positive: int | None) -> tuple[int, _Side, _Side] | None:
    """The positive token of behavior k, D+ and D-; None where it has more than two answers."""
    own = np.flatnonzero(pairs.behavior == k)
    name, chosen = pairs.behaviors[k], pairs.chosen[own]
    tokens = np.unique(np.concatenate([chosen, pairs.rejected[own]]))
    if len(tokens) > 2:
        return None
    if positive is None:
        positive = int(tokens[0])
    elif positive not in tokens:
        raise ValueError(
            f"behavior {name!r}: its answers are the tokens {tokens[0]} and {tokens[1]}; "
            f"positive_token {positive} is neither"
        )
    if (chosen == chosen[0]).all():
        raise ValueError(
            f"behavior {name!r}: all {len(own)} pairs choose token {chosen[0]}; the class that "
            f"chooses {int(tokens[tokens != chosen[0]][0])} is empty, so that delta, the distance "
            "of the classes' means, does not exist. Were the columns of the answers read right?"
        )
    plus, minus = (_side(pairs, own[(chosen == positive) == wanted]) for wanted in (True, False))
    return positive, plus, minus


def _side(pairs: FrozenPairs, own: np.ndarray) -> _Side:
    features, count = pairs.features[own], float(pairs.count[own].sum())
    weight = pairs.count[own] / count
    mean = weight @ features
    centred = np.sqrt(weight)[:, None] * (features - mean)
    return _Side(count, mean, centred, float(np.sqrt(weight @ (features**2).sum(axis=1))))


def _difference(plus: _Side, minus: _Side) -> np.ndarray:
    """(D,) d = mu+ - mu-."""
    return without_rounding(plus.mean - minus.mean, max(plus.size, minus.size))


_UNDEFINED: dict[str, float] = dict.fromkeys(("n_plus", "n_minus", "positive_token"), -1) | (
    dict.fromkeys(
        (
            *("delta", "mu_dot_d", "mu_norm", "concentration", "trace"),
            *("concentration_plus", "concentration_minus", "spread_plus", "spread_minus"),
        ),
        float("nan"),
    )
)


def _two_classes(positive: int, plus: _Side, minus: _Side) -> dict[str, float]:
    """The fields of `BehaviorStatistics` that need D+ and D-."""
    d, middle = _difference(plus, minus), (plus.mean + minus.mean) / 2
    delta = float(np.linalg.norm(d))
    spread = [
        float(np.linalg.norm(s.centred @ d)) / delta if delta else np.nan for s in (plus, minus)
    ]
    concentration = [largest_eigenvalue(s.centred) for s in (plus, minus)]
    return {
        "n_plus": round(plus.count),
        "n_minus": round(minus.count),
        "positive_token": positive,
        "delta": delta,
        "mu_dot_d": float(middle @ d),
        "mu_norm": float(np.linalg.norm(middle)),
        "concentration_plus": concentration[0],
        "concentration_minus": concentration[1],
        "concentration": max(concentration),
        "trace": max(float((s.centred**2).sum()) for s in (plus, minus)),
        "spread_plus": spread[0],
        "spread_minus": spread[1],
    }


def directions(pairs: FrozenPairs) -> np.ndarray:
    """(K, F) sqrt(2) mean grad m of each behavior: where it pulls the head at first (E11).

    Its length is the effective delta. Where all pairs have the same two answers, F = D and the rows
    are 2 (p+ mu+ - p- mu-), with "+" the smaller token id: d_k = mu+ - mu- for a balanced behavior.
    Otherwise F = A D, the rows of all answer tokens.
    """
    weight = pairs.weight / pairs.fraction[pairs.behavior]
    sums = behavior_sums(pairs, weight)
    rows = 2 * sums[:, 0] if len(pairs.answers) == 1 else np.sqrt(2) * sums.reshape(len(sums), -1)
    square = np.bincount(pairs.behavior, weight * (pairs.features**2).sum(axis=1))
    return np.stack(
        [
            without_rounding(row, float(scale))
            for row, scale in zip(rows, np.sqrt(square), strict=True)
        ]
    )


def class_differences(pairs: FrozenPairs, positive_token: int | None = None) -> np.ndarray:
    """(K, D) d_k = mu+ - mu- of each behavior (E8): `directions` as if every one were balanced.

    Raises ValueError like `behavior_statistics`, and where the behaviors do not share two answers.
    """
    if len(pairs.answers) != 1:
        raise ValueError(
            f"the pairs have {len(pairs.answers)} different pairs of answers; class differences "
            "can be compared only where all have the same two. `directions` takes any answers."
        )
    sides = [_sides(pairs, k, positive_token) for k in range(len(pairs.behaviors))]
    return np.stack([_difference(*side[1:]) for side in sides if side is not None])


def second_moment(pairs: FrozenPairs) -> float:
    """lambda_M: the largest eigenvalue of E[h h^T] over the pairs, not centred, in feature^2."""
    return largest_eigenvalue(np.sqrt(pairs.weight)[:, None] * pairs.features)


def largest_eigenvalue(rows: np.ndarray) -> float:
    """Of rows^T rows, (n, D), by the smaller of the two Gram matrices."""
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    return max(0.0, float(np.linalg.eigvalsh(gram)[-1]))


def without_rounding(vector: np.ndarray, scale: float) -> np.ndarray:
    """`vector`, a mean of vectors as long as `scale`; exactly 0 where it is only rounding."""
    return vector if np.linalg.norm(vector) > ROUNDING * scale else np.zeros_like(vector)
