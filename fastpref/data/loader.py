"""Which pairs make up which optimizer step: a function of (seed, epoch, rank) alone.

Nothing here has state, so a resumed run needs no more than the number of its next step.
"""

from __future__ import annotations

import hashlib
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

    ``weights`` holds, for each source (`TokenPair.origin`), the times that each of its pairs is
    taken per epoch; none: once. What is left over a whole number is a part of the source's pairs:
    each epoch takes the next stretch of them, in the order of a hash and round again, so that all
    come equally often (two epochs at 0.5 take every pair once).

    The last step of an epoch holds what is left and may be smaller. Raises ValueError when there
    is nothing to train on, when a weight leaves no pair of its source, or when a pair is larger
    than the token budget. ``sizes`` (N,) is what a pair takes of it; its fed tokens, if not given.
    """

    def __init__(
        self,
        pairs: Sequence[TokenPair],
        *,
        seed: int,
        batch_size: int,
        max_tokens: int,
        sizes: np.ndarray | None = None,
        shuffle: bool = True,
        stratify: bool = False,
        weights: Sequence[float] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not pairs:
            raise ValueError("there are no training pairs.")
        self.sources = _sources(pairs, weights, seed)
        self.num_pairs, self.batch_size = sum(s.per_epoch for s in self.sources), batch_size
        self.seed, self.shuffle, self.max_tokens = seed, shuffle, max_tokens
        self.rank, self.world = rank, world
        self.sizes = fed_tokens(pairs) if sizes is None else sizes
        self.tokens = np.array([sequence_tokens(pair) for pair in pairs], np.int64)
        strata = {key: n for n, key in enumerate(sorted({(p.behavior, p.label) for p in pairs}))}
        self.stratum = np.array([strata[p.behavior, p.label] for p in pairs]) if stratify else None
        demand_budget(self.sizes, max_tokens)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, which is the same number in all."""
        return math.ceil(self.num_pairs / self.batch_size)

    def times(self) -> np.ndarray:
        """(N,) how often each pair is taken per epoch, on average over epochs."""
        found = np.zeros(len(self.tokens))
        for source in self.sources:
            found[source.ranked] = source.whole + source.part / max(len(source.ranked), 1)
        return found

    def order(self, epoch: int) -> np.ndarray:
        """(M,) indices of pairs in the order of ``epoch`` (0-based); without weights each once."""
        rng = np.random.default_rng([self.seed, epoch])
        taken = np.concatenate([source.taken(epoch) for source in self.sources])
        # First each pair's first time, in the files' order, then each one's second time, ...
        taken = taken[np.lexsort((taken[:, 1], taken[:, 0])), 1]
        order = taken[rng.permutation(len(taken))] if self.shuffle else taken
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
            batches = plan_microbatches(self.sizes, own, self.max_tokens)
            yield StepPlan(step, done, len(chosen), int(self.tokens[chosen].sum()), batches)

    def _share(self, indices: np.ndarray) -> np.ndarray:
        """This rank's part: dealt out by length, there and back, so that token counts are even."""
        by_length = indices[np.lexsort((indices, -self.sizes[indices]))]
        turn = np.arange(len(indices)) % (2 * self.world)
        return by_length[np.minimum(turn, 2 * self.world - 1 - turn) == self.rank]


@dataclass(frozen=True)
class _Source:
    """The pairs of one source, and how many are taken in an epoch."""

    ranked: np.ndarray  # (n,) indices into the training pairs, in the order of a hash
    whole: int  # times that every pair is taken
    part: int  # pairs that are taken once more

    @property
    def per_epoch(self) -> int:
        return self.whole * len(self.ranked) + self.part

    def taken(self, epoch: int) -> np.ndarray:
        """(per_epoch, 2): the how-manieth time in the epoch, index of the pair."""
        count = len(self.ranked)
        again = self.ranked[(epoch * self.part + np.arange(self.part)) % count]
        indices = np.concatenate([np.tile(self.ranked, self.whole), again])
        times = np.arange(self.per_epoch) // count
        return np.stack([times, indices], axis=1)


def _sources(pairs: Sequence[TokenPair], weights: Sequence[float], seed: int) -> list[_Source]:
    if not weights:
        return [_Source(np.arange(len(pairs)), 1, 0)]
    origin = np.array([pair.origin for pair in pairs])
    found = []
    for number, weight in enumerate(weights):
        mine = np.flatnonzero(origin == number).tolist()
        mine.sort(key=lambda i: _rank(seed, pairs[i].pair_id))
        whole = math.floor(weight)
        part = math.floor((weight - whole) * len(mine) + 0.5)
        source = _Source(np.array(mine, np.int64), whole, part)
        if mine and not source.per_epoch:
            raise ValueError(
                f"dataset_weights: {weight} of the {len(mine)} training pairs of entry "
                f"{number + 1} is not one pair. Give it a larger weight, or leave the entry out."
            )
        found.append(source)
    return found


def _rank(seed: int, pair_id: int) -> bytes:
    return hashlib.sha256(f"weight {seed} {pair_id}".encode()).digest()


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
