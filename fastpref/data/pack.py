"""Tokenised pairs -> packed `PairBatch`es within a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastpref.batch import GROUP, PairBatch
from fastpref.data.tokenize import TokenPair


class Parts(NamedTuple):
    """Lengths in tokens of one pair in the packed layout."""

    prompt: int
    common: int  # completion tokens that both completions start with
    prefix: int  # fed: prompt + common
    chosen: int  # fed: the chosen rest without its last token
    rejected: int  # fed

    @property
    def fed(self) -> int:
        """Tokens the body computes for this pair."""
        return self.prefix + self.chosen + self.rejected


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common start of two 1-D arrays."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def parts(pair: TokenPair) -> Parts:
    """The packed layout's lengths of ``pair``."""
    prompt, common = len(pair.prompt), common_length(pair.chosen, pair.rejected)
    chosen, rejected = len(pair.chosen) - common, len(pair.rejected) - common
    return Parts(prompt, common, prompt + common, max(chosen - 1, 0), max(rejected - 1, 0))


def pack_pairs(pairs: Sequence[TokenPair]) -> PairBatch:
    """Pack ``pairs`` in the given order into one `PairBatch` on the CPU.

    Raises ValueError for a pair whose completions are equal: it has nothing to teach, and its
    layout would end in a token that predicts nothing.
    """
    lay = [parts(pair) for pair in pairs]
    tokens, positions, rows, target, segment = [], [], [], [], []
    start = 0
    for p, (pair, at) in enumerate(zip(pairs, lay, strict=True)):
        rest_c, rest_r = pair.chosen[at.common :], pair.rejected[at.common :]
        if not len(rest_c) and not len(rest_r):
            raise ValueError(
                f"pair {pair.pair_id}: chosen and rejected are the same {at.common} tokens"
            )
        tokens += [pair.prompt, pair.chosen[: at.common], rest_c[: at.chosen], rest_r[:-1]]
        branch = np.arange(at.prefix, at.prefix + max(at.chosen, at.rejected))
        positions += [np.arange(at.prefix), branch[: at.chosen], branch[: at.rejected]]

        last = start + at.prefix - 1  # the prefix's last token predicts both rests' first tokens
        chosen_at, rejected_at = start + at.prefix, start + at.prefix + at.chosen
        own_rows = (
            np.arange(start + at.prompt - 1, last),
            np.r_[last, chosen_at : chosen_at + at.chosen][: len(rest_c)],
            np.r_[last, rejected_at : rejected_at + at.rejected][: len(rest_r)],
        )
        own_target = (pair.chosen[: at.common], rest_c, rest_r)
        for s, (r, y) in enumerate(zip(own_rows, own_target, strict=True)):
            scored = r >= start  # an empty prompt: nothing precedes position 0, it is not scored
            rows.append(r[scored])
            target.append(y[scored])
            segment.append(np.full(int(scored.sum()), GROUP * p + s, np.int32))
        start += at.fed

    segment_id = np.concatenate(segment)
    counts = np.bincount(segment_id, minlength=GROUP * len(lay)).reshape(-1, GROUP)
    lengths = np.array([(at.prefix, at.chosen, at.rejected) for at in lay], np.int64)
    return PairBatch(
        tokens=_int64(np.concatenate(tokens)),
        positions=_int64(np.concatenate(positions)),
        rows=_int64(np.concatenate(rows)),
        target=_int64(np.concatenate(target)),
        segment_id=torch.from_numpy(segment_id),
        pair_of_token=_int64(np.repeat(np.arange(len(lay)), lengths.sum(axis=1))),
        prefix_len=_int64(lengths[:, 0]),
        chosen_len=_int64(lengths[:, 1]),
        rejected_len=_int64(lengths[:, 2]),
        chosen_scored=_int64(counts[:, 0] + counts[:, 1]),
        rejected_scored=_int64(counts[:, 0] + counts[:, 2]),
        pair_id=torch.tensor([pair.pair_id for pair in pairs], dtype=torch.int64),
        behavior=torch.tensor([pair.behavior for pair in pairs], dtype=torch.int64),
        ref_chosen=_reference([pair.ref_chosen for pair in pairs]),
        ref_rejected=_reference([pair.ref_rejected for pair in pairs]),
        lengths=tuple((at.prefix, at.chosen, at.rejected) for at in lay),
    )


def fed_tokens(pairs: Sequence[TokenPair]) -> np.ndarray:
    """(N,) tokens that the body computes for each pair."""
    return np.array([parts(pair).fed for pair in pairs], np.int64)


def demand_budget(fed: np.ndarray, max_tokens: int) -> None:
    """Raise ValueError where a single pair has more than ``max_tokens`` fed tokens."""
    longest = int(fed.max(initial=0))
    if longest > max_tokens:
        raise ValueError(
            f"a pair has {longest} packed tokens, but max_tokens_per_microbatch is {max_tokens}. "
            f"Set it to at least {longest}, or lower max_length."
        )


def demand_vocabulary(pairs: Sequence[TokenPair], vocab_size: int) -> None:
    """Raise ValueError where a token id lies outside the model's ``vocab_size`` embeddings."""
    for pair in pairs:
        top = max(int(ids.max(initial=0)) for ids in (pair.prompt, pair.chosen, pair.rejected))
        if top >= vocab_size:
            raise ValueError(
                f"pair {pair.pair_id} holds token id {top}, but the model has embeddings for ids "
                f"0 to {vocab_size - 1} only: the tokenizer is not this model's own."
            )


def plan_microbatches(fed: np.ndarray, indices: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Split ``indices`` into micro-batches of at most ``max_tokens`` fed tokens each.

    ``fed`` (N,) holds the fed tokens of every pair. Pairs are taken by length, so that a
    micro-batch holds pairs of similar length; ties by index, so that the plan is a function of its
    arguments alone. As few micro-batches as the budget allows when filled in that order, of about
    equal token counts.

    Raises ValueError where a single pair is larger than the budget.
    """
    order = indices[np.lexsort((indices, fed[indices]))]
    if len(order) == 0:
        return []
    demand_budget(fed[order], max_tokens)
    cuts = _greedy_cuts(fed[order], max_tokens)
    # The greedy fill leaves a small last one; the smallest budget with as many cuts evens it out.
    low, high = max(int(fed[order[-1]]), -(-int(fed[order].sum()) // (len(cuts) + 1))), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_greedy_cuts(fed[order], middle)) <= len(cuts):
            high = middle
        else:
            low = middle + 1
    return np.split(order, _greedy_cuts(fed[order], low))


def _greedy_cuts(lengths: np.ndarray, budget: int) -> list[int]:
    cuts, total = [], 0
    for i, n in enumerate(lengths.tolist()):
        if total + n > budget and i:
            cuts.append(i)
            total = 0
        total += n
    return cuts


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _reference(values: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float32)
