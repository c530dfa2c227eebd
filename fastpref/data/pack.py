"""Tokenised pairs -> packed `PairBatch`es within a token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpref.batch import GROUP, PairBatch
from fastpref.data.tokenize import TokenPair

Packer = Callable[[Sequence[TokenPair]], PairBatch]


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


def parts(pair: TokenPair, whole: bool = False) -> Parts:
    """The packed layout's lengths of ``pair``; ``whole``: as in `pack_pairs`."""
    prompt, common = len(pair.prompt), common_length(pair.chosen, pair.rejected)
    chosen, rejected = len(pair.chosen) - common, len(pair.rejected) - common
    if not whole:  # nothing is predicted from a last token
        chosen, rejected = max(chosen - 1, 0), max(rejected - 1, 0)
    return Parts(prompt, common, prompt + common, chosen, rejected)


class Rows(NamedTuple):
    """The scored rows of one pair: shared ones, the chosen rest's, the rejected rest's."""

    at: np.ndarray  # (rows,) int64, counted in the pair's fed tokens
    target: np.ndarray  # (rows,) int32
    part: np.ndarray  # (rows,) int32: 0 shared, 1 chosen rest, 2 rejected rest


def pair_rows(pair: TokenPair, at: Parts) -> Rows:
    """Which fed token of ``pair`` predicts which token.

    Raises ValueError where the completions are equal: such a pair has nothing to teach, and its
    layout would end in a token that predicts nothing.
    """
    rest_c, rest_r = pair.chosen[at.common :], pair.rejected[at.common :]
    if not len(rest_c) and not len(rest_r):
        raise ValueError(
            f"pair {pair.pair_id}: chosen and rejected are the same {at.common} tokens"
        )
    last = at.prefix - 1  # the prefix's last token predicts both rests' first tokens
    rest = np.arange(last, at.fed)
    chosen, rejected = rest[: at.chosen + 1], rest[at.chosen :].copy()
    rejected[0] = last
    rows = (np.arange(at.prompt - 1, last), chosen[: len(rest_c)], rejected[: len(rest_r)])
    found = Rows(
        np.concatenate(rows),
        np.concatenate((pair.chosen[: at.common], rest_c, rest_r)),
        np.repeat(np.arange(GROUP, dtype=np.int32), [len(own) for own in rows]),
    )
    if at.prompt:
        return found
    scored = found.at >= 0  # an empty prompt: nothing precedes position 0, it is not scored
    return Rows(*(values[scored] for values in found))


def pack_pairs(pairs: Sequence[TokenPair], whole: bool = False) -> PairBatch:
    """Pack ``pairs`` in the given order into one `PairBatch` on the CPU.

    ``whole``: completions' last tokens are fed as well, for what counts tokens, not predictions.
    Raises ValueError for a pair whose completions are equal, see `pair_rows`.
    """
    lay = [parts(pair, whole) for pair in pairs]
    tokens, positions, rows = [], [], []
    for pair, at in zip(pairs, lay, strict=True):
        rows.append(pair_rows(pair, at))
        rest_c, rest_r = pair.chosen[at.common :], pair.rejected[at.common :]
        tokens += [pair.prompt, pair.chosen[: at.common]]
        tokens += [rest_c[: at.chosen], rest_r[: at.rejected]]
        branch = np.arange(at.prefix, at.prefix + max(at.chosen, at.rejected))
        positions += [np.arange(at.prefix), branch[: at.chosen], branch[: at.rejected]]
    lengths = np.array([(at.prefix, at.chosen, at.rejected) for at in lay], np.int64)
    fed = lengths.sum(axis=1)
    number = np.repeat(np.arange(len(lay)), [len(own.at) for own in rows])
    at_row, target, part = (np.concatenate(column) for column in zip(*rows, strict=True))
    return PairBatch(
        tokens=_int64(np.concatenate(tokens)),
        positions=_int64(np.concatenate(positions)),
        rows=_int64(at_row + (np.cumsum(fed) - fed)[number]),
        pair_of_token=_int64(np.repeat(np.arange(len(lay)), fed)),
        whole=whole,
        **segments(number, target, part, lengths),
        **identities(pairs),
    )


def segments(
    number: np.ndarray,  # (R,) of the row's pair in the batch
    target: np.ndarray,  # (R,)
    part: np.ndarray,  # (R,) as in `Rows`
    lengths: np.ndarray,  # (P, 3) fed tokens of prefix, chosen rest, rejected rest
) -> dict[str, Any]:
    """Fields of a `PairBatch` that say what its rows are summed into."""
    segment_id = (GROUP * number + part).astype(np.int32)
    counts = np.bincount(segment_id, minlength=GROUP * len(lengths)).reshape(-1, GROUP)
    prefix, chosen, rejected = lengths.T
    return {
        "target": _int64(target),
        "segment_id": torch.from_numpy(segment_id),
        "prefix_len": _int64(prefix),
        "chosen_len": _int64(chosen),
        "rejected_len": _int64(rejected),
        "chosen_scored": _int64(counts[:, 0] + counts[:, 1]),
        "rejected_scored": _int64(counts[:, 0] + counts[:, 2]),
        "lengths": tuple(map(tuple, lengths.tolist())),
        "segment_rows": tuple(map(tuple, counts.tolist())),
    }


def identities(pairs: Sequence[TokenPair]) -> dict[str, Any]:
    """Fields of a `PairBatch` that say which pairs it holds, and their reference log-probs."""
    return {
        "pair_id": torch.tensor([pair.pair_id for pair in pairs], dtype=torch.int64),
        "behavior": torch.tensor([pair.behavior for pair in pairs], dtype=torch.int64),
        "ref_chosen": _reference([pair.ref_chosen for pair in pairs]),
        "ref_rejected": _reference([pair.ref_rejected for pair in pairs]),
    }


def fed_tokens(pairs: Sequence[TokenPair], whole: bool = False) -> np.ndarray:
    """(N,) tokens that the body computes for each pair; ``whole``: as in `pack_pairs`."""
    return np.array([parts(pair, whole).fed for pair in pairs], np.int64)


def scored_rows(pairs: Sequence[TokenPair]) -> np.ndarray:
    """(N,) rows of each pair, what a micro-batch without tokens consists of. A pair without prompt
    has one or two less."""
    return np.array(
        [len(p.chosen) + len(p.rejected) - common_length(p.chosen, p.rejected) for p in pairs],
        np.int64,
    )


def demand_budget(sizes: np.ndarray, max_tokens: int) -> None:
    """Raise ValueError where a single pair takes more than ``max_tokens``."""
    longest = int(sizes.max(initial=0))
    if longest > max_tokens:
        raise ValueError(
            f"a pair has {longest} packed tokens (trainable: head: scored rows), but "
            f"max_tokens_per_microbatch is {max_tokens}. Set it to at least {longest}, or lower "
            "max_length."
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

    ``fed`` (N,) holds the fed tokens of every pair, or its rows (`scored_rows`). Pairs are taken by
    length, so that a micro-batch holds pairs of similar length; ties by index, so that the plan is
    a function of its arguments alone. As few micro-batches as the budget allows when filled in that
    order, of about equal token counts.

    Raises ValueError where a single pair is larger than the budget.
    """
    order = indices[np.lexsort((indices, fed[indices]))]
    if len(order) == 0:
        return []
    demand_budget(fed[order], max_tokens)
    cuts = _greedy_cuts(fed[order], max_tokens)
    if not cuts:
        return [order]
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
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def _reference(values: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)
