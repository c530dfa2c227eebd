"""What the theory is compared with: a head trained on the DPO loss over the full softmax, float64.

Written the long way on purpose: all V logits, their log-softmax, the reference's log-probs, the
softmax's whole Jacobian. Nothing here knows that normalisers cancel or that two rows suffice.
`test_pairs.py` compares its gradient with differences of its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.theory.pairs import FrozenPairs, frozen_pairs

YES, NO = 5, 2
VOCABULARY = 9


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def true_margins(pairs: FrozenPairs, head: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(P,) from four log-probs of the full softmax each."""
    rows = np.arange(len(pairs.features))
    policy = log_softmax(pairs.features @ head.T)
    ref = log_softmax(pairs.features @ reference.T)
    chosen = policy[rows, pairs.chosen] - ref[rows, pairs.chosen]
    return chosen - (policy[rows, pairs.rejected] - ref[rows, pairs.rejected])


def loss_of(margin: np.ndarray, beta: float, smoothing: float = 0.0) -> np.ndarray:
    p = 1 / (1 + np.exp(-beta * margin))
    return -(1 - smoothing) * np.log(p) - smoothing * np.log(1 - p)


def gradient(
    pairs: FrozenPairs,
    index: np.ndarray,
    head: np.ndarray,
    reference: np.ndarray,
    beta: float,
    smoothing: float = 0.0,
) -> np.ndarray:
    """(V, D) of the mean loss over the pairs at `index`."""
    part = frozen_pairs(pairs.features[index], pairs.chosen[index], pairs.rejected[index])
    margin = true_margins(part, head, reference)
    p = 1 / (1 + np.exp(-beta * margin))
    slope = beta * (p - 1 + smoothing)  # dloss/dmargin
    softmax = np.exp(log_softmax(part.features @ head.T))
    eye = np.eye(len(head))
    to_chosen, to_rejected = eye[part.chosen] - softmax, eye[part.rejected] - softmax
    weight = slope * pairs.count[index] / pairs.count[index].sum()
    logits = weight[:, None] * (to_chosen - to_rejected)
    return logits.T @ part.features


@dataclass
class Run:
    """Heads and margins before every step and after the last."""

    heads: list[np.ndarray]
    margin: np.ndarray  # (S + 1, P)
    head_norm: np.ndarray  # (S + 1,)


def train(
    pairs: FrozenPairs,
    batches: Sequence[np.ndarray | None],
    learning_rate: float | Sequence[float],
    beta: float,
    head: np.ndarray,
    reference: np.ndarray | None = None,
    smoothing: float = 0.0,
    max_grad_norm: float | None = None,
) -> Run:
    reference = head if reference is None else reference
    rates = np.broadcast_to(learning_rate, (len(batches),))
    heads = [head]
    for batch, rate in zip(batches, rates, strict=True):
        index = np.arange(len(pairs.features)) if batch is None else batch
        step = gradient(pairs, index, heads[-1], reference, beta, smoothing)
        if max_grad_norm is not None:
            step = step * min(1.0, max_grad_norm / (np.linalg.norm(step) + 1e-6))
        heads.append(heads[-1] - rate * step)
    return Run(
        heads,
        np.stack([true_margins(pairs, h, reference) for h in heads]),
        np.array([np.linalg.norm(h - head) for h in heads]),
    )


def random_head(seed: int, width: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(vocabulary, width)) / np.sqrt(width)


def gaussian_pairs(
    seed: int,
    sizes: Sequence[int] = (60,),
    delta: float = 3.0,
    width: int = 8,
    spread: float = 0.5,
    mean: float = 1.0,
    plus: float = 0.5,
) -> FrozenPairs:
    """Yes/No behaviors: Gaussian classes `delta` apart in random directions around one mean."""
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=width)
    middle *= mean / np.linalg.norm(middle)
    features, chosen, behavior = [], [], []
    for k, size in enumerate(sizes):
        d = rng.normal(size=width)
        d *= delta / np.linalg.norm(d)
        sign = np.where(np.arange(size) < round(plus * size), 1, -1)
        noise = spread * rng.normal(size=(size, width))
        features.append(middle + sign[:, None] * d / 2 + noise)
        chosen += [YES if s > 0 else NO for s in sign]
        behavior += [k] * size
    chosen_ids = np.array(chosen)
    return frozen_pairs(
        np.concatenate(features),
        chosen_ids,
        np.where(chosen_ids == YES, NO, YES),
        behavior,
        [f"b{k}" for k in range(len(sizes))],
    )


def mixed_pairs(seed: int, size: int = 40, width: int = 6, behaviors: int = 3) -> FrozenPairs:
    """Any tokens, any labels: features and answers drawn at random."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(VOCABULARY, size=size)
    rejected = (chosen + rng.integers(1, VOCABULARY, size=size)) % VOCABULARY
    return frozen_pairs(
        rng.normal(size=(size, width)) + 0.5,
        chosen,
        rejected,
        np.arange(size) % behaviors,
        [f"b{k}" for k in range(behaviors)],
    )
