"""Sums over layers of what each contributes to a pair's gradient: squared norms, sketches, dots.

Shapes: T tokens, P pairs, G layer groups, d inputs, p outputs, D features, k sketch size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from fastpref_kernels import _native, embedding_norms
from fastpref_kernels.segment_products import multiply, wide_dtype
from torch import Tensor, nn

from fastpref.attention_layout import on_device
from fastpref.batch import PairBatch
from fastpref.dynamics.pair_ops import (
    BlockOps,
    FusedOps,
    LinearOutput,
    PairOps,
    Signs,
    VectorInput,
    by_token,
)
from fastpref.dynamics.places import Place


@dataclass
class PairParts:
    """The sums of one batch. Everything is added in the order in which it is given.

    Layers see all T tokens of it, or, in a narrowed block, the N that are read
    (fastpref.last_block); both are called T where it makes no difference.
    """

    batch: PairBatch
    signs: Signs
    tokens: int  # T
    ops: PairOps
    exact: bool
    more: bool  # than sketches, and norms of vectors: exact norms, or products with `changes`
    k: int
    # Times what layers see: sketches have it as they are added, all else in `Taps.collect`.
    scale: float
    norm_sq: Tensor  # (G, P)
    sketch: Tensor  # (G, P, k, k)
    change: Tensor | None = None  # (G, P) inner products with `changes`
    changes: Mapping[nn.Parameter, Tensor] | None = None
    # ids (T,), dy (T, D) and `scale` where embedding and head are one
    tied: tuple[Tensor, Tensor, float] | None = None
    _for_c: dict[int, _native.Sums | None] = field(default_factory=dict)  # by rows

    @staticmethod
    def of(
        batch: PairBatch,
        groups: int,
        exact: bool,
        k: int,
        signs: Signs,
        scale: float,
        changes: Mapping[nn.Parameter, Tensor] | None,
    ) -> PairParts:
        pair, pairs = batch.pair_of_token, batch.num_pairs
        device = pair.device
        counts = [sum(lengths) for lengths in batch.lengths]
        return PairParts(
            batch,
            signs,
            len(pair),
            _ops(pair, counts, signs, scale),
            exact,
            exact or changes is not None,
            k,
            scale,
            torch.zeros(groups, pairs, dtype=torch.float32, device=device),
            torch.zeros(groups, pairs, k, k, dtype=torch.float32, device=device),
            None
            if changes is None
            else torch.zeros(groups, pairs, dtype=torch.float32, device=device),
            changes,
        )

    @property
    def pairs(self) -> int:
        """P."""
        return self.norm_sq.shape[1]

    @functools.cached_property
    def read_counts(self) -> list[int]:
        """(P,) tokens of every pair that are read."""
        found: list[int] = self.batch.read_spans()[1].tolist()
        return found

    @functools.cached_property
    def read(self) -> int:
        """N."""
        return sum(self.read_counts)

    @functools.cached_property
    def read_ops(self) -> PairOps:
        """Of the N tokens that are read."""
        counts, device = self.read_counts, self.batch.pair_of_token.device
        (pair,) = on_device([np.repeat(np.arange(len(counts)), counts)], device)
        return _ops(pair, counts, self.signs, self.scale)

    def of_rows(self, x: Tensor) -> PairOps:
        """The operations for rows x (T, ...) | (1, T, D), which are all tokens or those that are
        read."""
        shape = x.shape
        return self._of(shape[1] if len(shape) == 3 and shape[0] == 1 else shape[0])

    def _of(self, rows: int) -> PairOps:
        if rows == self.tokens:
            return self.ops
        assert rows == self.read
        return self.read_ops

    def for_c(self, rows: int) -> _native.Sums | None:
        """What C adds to, of as many rows; None where it does not."""
        found = self._for_c.get(rows)
        if found is None and rows not in self._for_c:
            found = self._for_c[rows] = self._of(rows).for_c(self.norm_sq, self.sketch)
        return found

    def linear(self, x: Tensor, layers: Sequence[LinearOutput], sketched: bool = False) -> None:
        """Weights of linear layers of one input x (T, d) | (1, T, d)."""
        ops = self.of_rows(x)
        if not sketched:
            self._widen(x.dtype)
            ops.add_linear(self.sketch, x, layers)
        if self.exact:
            for group in dict.fromkeys(place.group for _, place in layers):
                own = [by_token(dy) for dy, place in layers if place.group == group]
                self._add_norms(group, ops.norms(by_token(x), own))
        if self.changes is not None:
            for dy, place in layers:
                self._linear_change(by_token(x), by_token(dy), place)

    def _linear_change(self, x: Tensor, dy: Tensor, place: Place) -> None:
        moved = self._changed(place)
        if moved is not None:
            wide = wide_dtype(dy, x)
            there = multiply(x, (moved if place.transposed else moved.t()).to(x.dtype), wide)
            self._add_change(place.group, (dy.to(wide) * there).sum(1))

    def vectors(self, given: Sequence[VectorInput], sketched: bool = False) -> None:
        """Gradients that are vectors, of the biases and the norm's weight of one input."""
        if not sketched:
            self._widen(given[0][1].dtype)
            self.of_rows(given[0][1]).add_vectors(self.norm_sq, self.sketch, given)
        if self.changes is not None:
            for one in given:
                self._vector_change(*one)

    def _vector_change(
        self, place: Place, dy: Tensor, x: Tensor | None, eps: float, centred: bool
    ) -> None:
        moved = self._changed(place)
        if moved is not None:
            assert self.change is not None
            rows = None if x is None else by_token(x)
            sums = self.of_rows(dy).sums(by_token(dy), rows, eps, centred)
            self.change[place.group] += sums @ moved.to(sums.dtype)

    def embedding(
        self, ids: Tensor, dy: Tensor, scale: float, padding_idx: int | None, place: Place
    ) -> None:
        """ids (T,), dy (T, D)."""
        padding = None if padding_idx is None else (ids == padding_idx).unsqueeze(1)
        if self.exact:
            norms = embedding_norms(
                ids,
                dy,
                self.batch.pair_of_token,
                num_segments=self.pairs,
                scale=scale,
                padding_idx=padding_idx,
            )
            self._add_norms(place.group, norms)
        inputs = self.ops.project(dy, place.key, "in", self.k)
        vocab = len(place.parameter)
        outputs = self.signs.of_vocabulary(ids, place.key, vocab, self.k, place.buckets)
        outputs = outputs.to(inputs.dtype)
        if padding is not None:
            outputs = outputs.masked_fill(padding, 0.0)
        if scale != 1.0:
            inputs *= scale
        self._widen(inputs.dtype)
        self.ops.add_products(self.sketch[place.group], outputs, inputs)
        moved = self._changed(place)
        if moved is not None:
            wide = wide_dtype(dy)
            rows = moved.index_select(0, ids).to(wide) * scale
            if padding is not None:
                rows = rows.masked_fill(padding, 0.0)
            self._add_change(place.group, (dy.to(wide) * rows).sum(1))

    def _changed(self, place: Place) -> Tensor | None:
        return None if self.changes is None else self.changes.get(place.parameter)

    def _add_norms(self, group: int, norms: Tensor) -> None:
        self._widen(norms.dtype)
        self.norm_sq[group] += norms

    def _add_change(self, group: int, per_token: Tensor) -> None:
        """per_token (T,)."""
        self._widen(per_token.dtype)
        assert self.change is not None
        ops = self.of_rows(per_token)
        self.change[group] += ops.sums(per_token.unsqueeze(1)).squeeze(1)

    def _widen(self, dtype: torch.dtype) -> None:
        """float64 sums once anything is float64."""
        if dtype == torch.float64 and self.sketch.dtype != dtype:
            self.norm_sq, self.sketch = self.norm_sq.double(), self.sketch.double()
            self._for_c.clear()
            self.change = None if self.change is None else self.change.double()


def _ops(pair: Tensor, counts: list[int], signs: Signs, scale: float) -> PairOps:
    """Of tokens of these pairs, ``counts`` of each."""
    return (BlockOps if pair.device.type == "cpu" else FusedOps)(pair, counts, signs, scale)
