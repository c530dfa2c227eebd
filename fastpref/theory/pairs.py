"""Pairs with frozen features and one-token answers, and the two products that everything uses.

With a_i = e_chosen - e_rejected in R^V, the head W (V, D) and the features h_i (D,):

    margin  m_i = a_i^T (W - W_ref) h_i      gap  z_i = a_i^T W h_i = log pi(chosen) / pi(rejected)

The log-normaliser of the softmax is the same for both answers and cancels (E2), so W enters through
the rows of the answer tokens alone, and grad_W m_i = a_i h_i^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Answers:
    """The pairs answered with the same two tokens, whichever of them is chosen."""

    first: int  # the smaller token id
    second: int
    index: np.ndarray | slice  # which of the P pairs; all of them: a slice, which copies nothing
    sign: np.ndarray  # (number of those pairs,) +1 where `first` is chosen, -1 where `second` is


@dataclass(frozen=True)
class FrozenPairs:
    """P pairs in K behaviors. Made by `frozen_pairs`, which checks them."""

    features: np.ndarray  # (P, D) float64
    chosen: np.ndarray  # (P,) int64 token ids
    rejected: np.ndarray  # (P,)
    behavior: np.ndarray  # (P,) indices into `behaviors`
    behaviors: tuple[str, ...]  # (K,)
    count: np.ndarray  # (P,) float64, how many pairs of the data a row stands for; 1 as a rule

    @cached_property
    def tokens(self) -> np.ndarray:
        """(A,) the distinct answer tokens, ascending."""
        return np.unique(np.concatenate([self.chosen, self.rejected]))

    @cached_property
    def answers(self) -> tuple[Answers, ...]:
        """The pairs by their two tokens; one entry for a Yes/No set."""
        low, high = np.minimum(self.chosen, self.rejected), np.maximum(self.chosen, self.rejected)
        sign = np.where(self.chosen == low, 1.0, -1.0)
        both, which = np.unique(np.stack([low, high], 1), axis=0, return_inverse=True)
        if len(both) == 1:
            return (Answers(int(both[0, 0]), int(both[0, 1]), slice(None), sign),)
        order = np.argsort(which.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(which.ravel()))[:-1]
        return tuple(
            Answers(int(first), int(second), index, sign[index])
            for (first, second), index in zip(both, np.split(order, ends), strict=True)
        )

    @cached_property
    def weight(self) -> np.ndarray:
        """(P,) each row's fraction of the data: count / its sum."""
        return self.count / self.count.sum()

    @cached_property
    def fraction(self) -> np.ndarray:
        """(K,) q_k, each behavior's fraction of the data."""
        return np.bincount(self.behavior, self.weight, len(self.behaviors))


@dataclass(frozen=True)
class HeadRows:
    """Rows of a (V, D) matrix that is zero elsewhere, such as W - W_start."""

    tokens: np.ndarray  # (A,) ascending
    rows: np.ndarray  # (A, D) float64

    def row(self, token: int) -> np.ndarray:
        """(D,) the row of `token`, zeros where there is none."""
        place = int(np.searchsorted(self.tokens, token))
        if place < len(self.tokens) and self.tokens[place] == token:
            return self.rows[place]
        return np.zeros(self.rows.shape[1])

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(np.linalg.norm(self.rows))


def frozen_pairs(
    features: np.ndarray,
    chosen: np.ndarray | Sequence[int],
    rejected: np.ndarray | Sequence[int],
    behavior: np.ndarray | Sequence[int] | None = None,
    behaviors: Sequence[str] | None = None,
    count: np.ndarray | Sequence[float] | None = None,
) -> FrozenPairs:
    """Check and collect pairs.

    Args:
        features: (P, D) final hidden state, after the final norm, at the position that predicts the
            answer (last prompt token); times the model's logit scale, where it has one.
        chosen, rejected: (P,) ids of the answers' first tokens.
        behavior: (P,) indices into `behaviors`; None: all pairs are one behavior.
        behaviors: K names; None: "0", "1", ...
        count: (P,) pairs of the data that a row stands for; None: 1 each.

    Raises ValueError, naming row and value, for features that are not finite, answers that share
    their token, negative ids, shapes that do not fit and behaviors without a pair.
    """
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"features: expected (P, D) with P, D > 0, got shape {array.shape}")
    size = len(array)
    chosen_ids, rejected_ids = _ids("chosen", chosen, size), _ids("rejected", rejected, size)
    index = np.zeros(size, np.int64) if behavior is None else _ids("behavior", behavior, size)
    names = tuple(behaviors or map(str, range(int(index.max()) + 1)))
    if index.max() >= len(names):
        raise ValueError(f"behavior: index {index.max()} of row {index.argmax()}, {len(names)=}")
    empty = np.flatnonzero(np.bincount(index, minlength=len(names)) == 0)
    if empty.size:
        raise ValueError(f"behavior {names[empty[0]]!r} has no pair; leave it out of `behaviors`")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        value = array[bad[0]][~np.isfinite(array[bad[0]])][0]
        raise ValueError(
            f"features of pair {bad[0]} (behavior {names[index[bad[0]]]!r}) hold {value}; "
            f"{bad.size} of {size} pairs have a value that is not finite. Look at the model's "
            "hidden states in float32."
        )
    same = np.flatnonzero(chosen_ids == rejected_ids)
    if same.size:
        raise ValueError(
            f"pair {same[0]} (behavior {names[index[same[0]]]!r}): chosen and rejected begin with "
            f"the same token {chosen_ids[same[0]]} ({same.size} such pairs). Their one-token "
            "margin is 0 whatever the head is: take the position where the answers part, or leave "
            "them out"
        )
    number = np.ones(size) if count is None else np.asarray(count, np.float64)
    if number.shape != (size,) or not np.all(np.isfinite(number) & (number > 0)):
        raise ValueError(f"count: expected ({size},) positive numbers, got {number!r:.80}")
    return FrozenPairs(array, chosen_ids, rejected_ids, index, names, number)


def _ids(name: str, values: np.ndarray | Sequence[int], size: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (size,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected ({size},) integers like the rows of features, got {array.dtype} of "
            f"shape {array.shape}"
        )
    if array.min() < 0:
        raise ValueError(f"{name}[{array.argmin()}] is {array.min()}, expected 0 or more")
    return array.astype(np.int64)


def flipped(pairs: FrozenPairs) -> FrozenPairs:
    """The same pairs with chosen and rejected exchanged: misalignment training (E35)."""
    return replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen)


def with_features(pairs: FrozenPairs, features: np.ndarray) -> FrozenPairs:
    """The same pairs seen by another model. Raises ValueError like `frozen_pairs`."""
    return frozen_pairs(
        features, pairs.chosen, pairs.rejected, pairs.behavior, pairs.behaviors, pairs.count
    )


def head_change(pairs: FrozenPairs, alpha: np.ndarray) -> HeadRows:
    """sum_i alpha_i grad m_i = sum_i alpha_i a_i h_i^T, alpha (P,): any state of training (E4)."""
    rows = np.zeros((len(pairs.tokens), pairs.features.shape[1]))
    for answers in pairs.answers:
        pull = (alpha[answers.index] * answers.sign) @ pairs.features[answers.index]
        rows[np.searchsorted(pairs.tokens, answers.first)] += pull
        rows[np.searchsorted(pairs.tokens, answers.second)] -= pull
    return HeadRows(pairs.tokens, rows)


def margins(pairs: FrozenPairs, change: HeadRows) -> np.ndarray:
    """(P,) a_i^T change h_i: the margins, in nats, where `change` is W - W_ref (E1)."""
    if change.rows.shape[1] != pairs.features.shape[1]:
        raise ValueError(
            f"the head's rows have width {change.rows.shape[1]}, the features of the pairs "
            f"{pairs.features.shape[1]}: they belong to different models"
        )
    result = np.empty(len(pairs.features))
    for answers in pairs.answers:
        direction = change.row(answers.first) - change.row(answers.second)
        result[answers.index] = answers.sign * (pairs.features[answers.index] @ direction)
    return result


def answer_rows(
    pairs: FrozenPairs, change: HeadRows, index: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """(n, D) a_i^T change of the pairs at `index`; `change` must have rows for all their tokens."""
    chosen = np.searchsorted(change.tokens, pairs.chosen[index])
    rejected = np.searchsorted(change.tokens, pairs.rejected[index])
    return change.rows[chosen] - change.rows[rejected]


def output_gap(pairs: FrozenPairs, head: np.ndarray) -> np.ndarray:
    """(P,) z_i = log pi(chosen) - log pi(rejected), in nats, under the head (V, D) (E2).

    The output is right where z_i > 0. Raises ValueError where `head` does not fit the pairs.
    """
    matrix = np.asarray(head, np.float64)
    if matrix.ndim != 2 or matrix.shape[1] != pairs.features.shape[1]:
        raise ValueError(
            f"head: expected (V, {pairs.features.shape[1]}) for these features, got {matrix.shape}"
        )
    if pairs.tokens[-1] >= len(matrix):
        raise ValueError(f"answer token {pairs.tokens[-1]}, but the head has {len(matrix)} rows")
    rows = matrix[pairs.tokens]
    if not np.isfinite(rows).all():
        raise ValueError("head: a row of an answer token is not finite")
    return margins(pairs, HeadRows(pairs.tokens, rows))


def kernel(pairs: FrozenPairs, others: FrozenPairs | None = None) -> np.ndarray:
    """(P, P') K_ij = <grad m_i, grad m_j> = <a_i, a_j> h_i.h_j, in nat^2 (E4).

    dm_i/dt = sum_j K_ij weight_j (-dloss/dm)_j: how pair j teaches pair i. Margins follow without
    it from `head_change` and `margins`, in P D instead of P P' memory.
    """
    others = pairs if others is None else others

    def equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a[:, None] == b[None, :]).astype(np.float64)

    tokens = equal(pairs.chosen, others.chosen) + equal(pairs.rejected, others.rejected)
    tokens -= equal(pairs.chosen, others.rejected) + equal(pairs.rejected, others.chosen)
    return tokens * (pairs.features @ others.features.T)


def behavior_means(pairs: FrozenPairs, values: np.ndarray) -> np.ndarray:
    """(..., K) mean over each behavior's pairs of `values` (..., P)."""
    member = np.zeros((len(pairs.features), len(pairs.behaviors)))
    member[np.arange(len(member)), pairs.behavior] = pairs.weight
    return (values @ member) / pairs.fraction


def behavior_sums(pairs: FrozenPairs, alpha: np.ndarray) -> np.ndarray:
    """(K, A, D) sum over each behavior's pairs of alpha_i a_i h_i^T: `head_change` by behavior."""
    result = np.zeros((len(pairs.behaviors), len(pairs.tokens), pairs.features.shape[1]))
    for answers in pairs.answers:
        signed = alpha[answers.index] * answers.sign
        behavior = pairs.behavior[answers.index]
        features = pairs.features[answers.index]
        for k in np.unique(behavior):
            pull = signed[behavior == k] @ features[behavior == k]
            result[k, np.searchsorted(pairs.tokens, answers.first)] += pull
            result[k, np.searchsorted(pairs.tokens, answers.second)] -= pull
    return result
