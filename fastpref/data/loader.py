"""Which pairs make up which optimizer step: a function of (seed, epoch, rank) alone.

Nothing here has state, so a resumed run needs no more than the number of its next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.data.pack import demand_budget, fed_tokens, plan_microbatches
from fastpref.data.tokenize import TokenPair


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: its pairs over all ranks, and this rank's micro-batches."""

    step: int  # 1-based, over the whole run
    epoch: float  # epochs completed once this step is done
    num_pairs: int  # over all ranks: what the step's sum of losses is divided by
    num_tokens: int  # over all ranks, as TRL counts: the prompt once for each completion
    micro_batches: list[np.ndarray]  # indices into the training pairs


class Loader:
    """Plans the optimizer steps of a run over ``pairs``.

    The last step of an epoch holds what is left and may be smaller. Raises ValueError when there
    is nothing to train on, or when a pair is larger than the token budget.
    """

    def __init__(
        self,
        pairs: Sequence[TokenPair],
        *,
        seed: int,
        batch_size: int,
        max_tokens: int,
        shuffle: bool = True,
        stratify: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not pairs:
            raise ValueError("there are no training pairs.")
        self.num_pairs, self.batch_size = len(pairs), batch_size
        self.seed, self.shuffle, self.max_tokens = seed, shuffle, max_tokens
        self.rank, self.world = rank, world
        self.fed = fed_tokens(pairs)
        self.tokens = np.array([sequence_tokens(pair) for pair in pairs], np.int64)
        strata = {key: n for n, key in enumerate(sorted({(p.behavior, p.label) for p in pairs}))}
        self.stratum = np.array([strata[p.behavior, p.label] for p in pairs]) if stratify else None
        demand_budget(self.fed, max_tokens)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the pairs."""
        return math.ceil(self.num_pairs / self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(N,) the pairs in the order of ``epoch`` (0-based)."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.num_pairs) if self.shuffle else np.arange(self.num_pairs)
        return order if self.stratum is None else _spread(order, self.stratum, rng)

    def plan(self, first_step: int, last_step: int) -> Iterator[StepPlan]:
        """The steps ``first_step``..``last_step``, both included, 1-based."""
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(first_step, last_step + 1):
            now, within = divmod(step - 1, self.steps_per_epoch)
            if now != epoch:
                epoch, order = now, self.order(now)
            chosen = order[within * self.batch_size : (within + 1) * self.batch_size]
            done = epoch + min((within + 1) * self.batch_size / self.num_pairs, 1.0)
            own = self._share(chosen)
            batches = plan_microbatches(self.fed, own, self.max_tokens)
            yield StepPlan(step, done, len(chosen), int(self.tokens[chosen].sum()), batches)

    def _share(self, indices: np.ndarray) -> np.ndarray:
        """This rank's part: dealt out by length, there and back, so that token counts are even."""
        by_length = indices[np.lexsort((indices, -self.fed[indices]))]
        turn = np.arange(len(indices)) % (2 * self.world)
        return by_length[np.minimum(turn, 2 * self.world - 1 - turn) == self.rank]


def sequence_tokens(pair: TokenPair) -> int:
    """Tokens of the pair as two separate sequences."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def _spread(order: np.ndarray, stratum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`order` rearranged so that every stretch holds each stratum in about its proportion.

    The j-th of the n pairs of a stratum is put at (j + u) / n of the way, with one offset u per
    stratum: any B consecutive pairs then hold B n / N of it, to within one at either end.
    """
    names, own, count = np.unique(stratum[order], return_inverse=True, return_counts=True)
    by_stratum = np.argsort(own, kind="stable")
    j = np.empty(len(order), np.int64)
    j[by_stratum] = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    place = (j + rng.random(len(names))[own]) / count[own]
    return order[np.argsort(place, kind="stable")]
