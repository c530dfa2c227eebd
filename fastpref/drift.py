"""How far decision boundaries have turned since the start of a run.

Where a behavior's pairs differ in one of two tokens, a and b, the model answers a where
h . (W_a - W_b) > 0, with h the hidden state before the answer: W_a - W_b is the normal of its
decision boundary (Im & Li, arXiv 2403.18742; docs/theory.md). The angle between it and what it was
tells how much of a behavior the head has learned; what features do is not in it (see `delta`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpref.data.pack import parts
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel


def answer_tokens(pairs: Iterable[TokenPair]) -> dict[int, tuple[int, int]]:
    """Of every behavior with two answer tokens these two, the smaller id first.

    They are the first tokens in which the completions part, the same two in all its pairs,
    whichever is the chosen one.
    """
    found: dict[int, tuple[int, int] | None] = {}
    for pair in pairs:
        if found.get(pair.behavior, ()) is None:
            continue  # another answer was seen
        at = parts(pair)
        chosen, rejected = pair.chosen[at.common :], pair.rejected[at.common :]
        own = None
        if len(chosen) and len(rejected) and at.prefix:
            first = sorted((int(chosen[0]), int(rejected[0])))
            own = first[0], first[1]
        found[pair.behavior] = own if found.get(pair.behavior, own) == own else None
    return {behavior: tokens for behavior, tokens in found.items() if tokens is not None}


@dataclass(frozen=True)
class Boundaries:
    """Normals of the decision boundaries as the run began, by behavior."""

    tokens: dict[int, tuple[int, int]] = field(default_factory=dict)
    start: dict[int, Tensor] = field(default_factory=dict)  # (D,) float64 on the CPU

    @staticmethod
    def of(model: PairModel, pairs: Iterable[TokenPair]) -> Boundaries:
        """As ``model``'s head has them now: call it before training."""
        tokens = answer_tokens(pairs)
        return Boundaries(tokens, _normals(model, tokens))

    def rotation(self, model: PairModel) -> dict[int, float | None]:
        """Angle in radians, 0 to pi, between every normal at the start and now; None where one of
        the two is 0 or not finite."""
        now = _normals(model, self.tokens)
        return {behavior: angle(self.start[behavior], now[behavior]) for behavior in self.tokens}


def _normals(model: PairModel, tokens: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
    if not tokens:
        return {}
    weight = model.head.weight.detach()
    ids = torch.tensor(list(tokens.values()), device=weight.device)
    rows = weight[ids].double().cpu()  # (behaviors, 2, D)
    return dict(zip(tokens, rows[:, 0] - rows[:, 1], strict=True))


def angle(a: Tensor, b: Tensor) -> float | None:
    """Between two vectors, in radians; accurate for small angles, where arccos is not."""
    a, b = a / a.norm(), b / b.norm()
    found = 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))
    return found if math.isfinite(found) else None
