"""Scored rows of many pairs, laid out once, so that a batch of them is a few gathers.

For training that needs no tokens, because the body's states at all scored positions are known
(`trainable: head`). A pair's *states* are those of its fed tokens from the prompt's last one on:
every one of them is scored, the prefix's last one by both completions, and it is there once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastpref.batch import PairBatch
from fastpref.data.pack import identities, pair_rows, parts, segments
from fastpref.data.tokenize import TokenPair


class RowIndex:
    """Where the rows and states of ``pairs``, none of them flipped, stand in tables of all of them.

    R rows and N states over all n pairs; 12 bytes a row are kept.
    """

    def __init__(self, pairs: Sequence[TokenPair]) -> None:
        self.number = {pair.pair_id: i for i, pair in enumerate(pairs)}
        assert len(self.number) == len(pairs), "pair_ids are unique in a run"
        lay = [parts(pair) for pair in pairs]
        self.lengths = np.array([(at.prefix, at.chosen, at.rejected) for at in lay], np.int64)
        self.first = np.array([max(at.prompt - 1, 0) for at in lay], np.int64)  # fed, not a state
        rows = [pair_rows(pair, at) for pair, at in zip(pairs, lay, strict=True)]
        self.rows = np.array([len(own.at) for own in rows], np.int64)  # (n,)
        self.states = self.lengths.sum(axis=1) - self.first  # (n,)
        self.row_start, self.state_start = (np.cumsum(x) - x for x in (self.rows, self.states))
        self.target = np.concatenate([own.target for own in rows])  # (R,)
        self.part = np.concatenate([own.part for own in rows]).astype(np.uint8)  # (R,)
        self.state = np.concatenate(  # (R,) counted in the pair's states
            [(own.at - first).astype(np.int32) for own, first in zip(rows, self.first, strict=True)]
        )

    @property
    def num_states(self) -> int:
        """N."""
        return int(self.states.sum())

    def pack(self, pairs: Sequence[TokenPair], table: np.ndarray) -> PairBatch:
        """What `pack_pairs` gives, with states from ``table`` (N, D) in the place of tokens.

        The table may lie on disk: only the rows of these pairs are read.
        """
        own = np.array([self.number[pair.pair_id] for pair in pairs], np.int64)
        row_of, row = _ranges(self.row_start[own], self.rows[own])
        state_of, state = _ranges(self.state_start[own], self.states[own])
        first = np.cumsum(self.states[own]) - self.states[own]
        part, lengths = self.part[row], self.lengths[own]
        flipped = np.array([pair.flipped for pair in pairs])
        if flipped.any():  # the sides change places, the states stay where they are
            part = np.where(flipped[row_of] & (part > 0), 3 - part, part).astype(part.dtype)
            in_order = np.lexsort((part, row_of))
            row, part = row[in_order], part[in_order]
            lengths = np.where(flipped[:, None], lengths[:, [0, 2, 1]], lengths)
        nothing = torch.empty(0, dtype=torch.int64)
        return PairBatch(
            tokens=nothing,
            positions=nothing,
            rows=torch.from_numpy(self.state[row] + first[row_of]),
            pair_of_token=torch.from_numpy(state_of),
            hidden=torch.from_numpy(np.asarray(table[state])),
            **segments(row_of, self.target[row], part, lengths),
            **identities(pairs),
        )


def _ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(range number, value) of start[i], start[i] + 1, ... of every range i, one after another."""
    number = np.repeat(np.arange(len(length)), length)
    before = np.cumsum(length) - length
    return number, np.arange(len(number)) + (start - before)[number]
