"""Sums over layers of what each contributes to a pair's gradient: squared norms, sketches, dots.

Shapes: T tokens, P pairs, G layer groups, d inputs, p outputs, D features, k sketch size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from fastpref_kernels import embedding_norms
from fastpref_kernels.count_sketch import BUCKETS
from fastpref_kernels.segment import add_rows_
from fastpref_kernels.segment_products import multiply, wide_dtype
from torch import Tensor, nn

from fastpref.attention_layout import on_device
from fastpref.batch import PairBatch
from fastpref.dynamics.pair_ops import BlockOps, FusedOps, PairOps, Signs, add_sketches
from fastpref.transfer import numbers

if TYPE_CHECKING:
    from fastpref.dynamics.tap_layers import Norm

WAITING = 1 << 22  # numbers that wait to be summed together


@dataclass(frozen=True, eq=False)
class Place:
    """A trained weight: its group, and under which projections its sketches are made."""

    name: str
    parameter: nn.Parameter
    group: int
    key: str
    transposed: bool = False
    first_output: int = 0
    buckets: int | None = None


class VocabularyPlace(Place):
    """Of an embedding or a head, whose outputs are a vocabulary."""

    @staticmethod
    def plain(name: str, parameter: nn.Parameter, group: int) -> VocabularyPlace:
        return VocabularyPlace(name, parameter, group, name)

    @staticmethod
    def hashed(name: str, parameter: nn.Parameter, group: int) -> VocabularyPlace:
        """As `linear_logprob` sketches a head."""
        return VocabularyPlace(name, parameter, group, name, buckets=BUCKETS)


@dataclass(eq=False)
class Factors:
    """Of linear layers of one input and key: sum over a pair's tokens of outputs_t inputs_t^T."""

    group: int
    ops: PairOps  # of the tokens that the layers see
    inputs: Tensor  # (T, k) the projected input
    outputs: Tensor | None = None  # (T, k) the projected gradients so far that are not summed yet


@dataclass
class PairParts:
    """The sums of one batch. Everything is added in the order of the backward.

    Layers see all T tokens of it, or, in a narrowed block, the N that are read
    (fastpref.last_block); both are called T where it makes no difference.
    """

    batch: PairBatch
    signs: Signs
    tokens: int  # T
    ops: PairOps
    exact: bool
    k: int
    norm_sq: Tensor  # (G, P)
    sketch: Tensor  # (G, P, k, k)
    change: Tensor | None = None  # (G, P) inner products with `changes`
    changes: Mapping[nn.Parameter, Tensor] | None = None
    # Few calls for many of them: narrow matrices whose products are still to be summed over each
    # pair's tokens; gradients still to be projected, (P, D) each.
    narrow: list[Factors] = field(default_factory=list)
    vectors: list[tuple[Place, Tensor]] = field(default_factory=list)
    tied: tuple[Tensor, Tensor] | None = (
        None  # ids (T,), dy (T, D) where embedding and head are one
    )

    @staticmethod
    def of(batch: PairBatch, groups: int, exact: bool, k: int, signs: Signs) -> PairParts:
        pair, pairs = batch.pair_of_token, batch.num_pairs
        device = pair.device
        counts = [sum(lengths) for lengths in batch.lengths]
        return PairParts(
            batch,
            signs,
            len(pair),
            _ops(pair, counts, signs),
            exact,
            k,
            torch.zeros(groups, pairs, dtype=torch.float32, device=device),
            torch.zeros(groups, pairs, k, k, dtype=torch.float32, device=device),
        )

    @property
    def pairs(self) -> int:
        """P."""
        return self.norm_sq.shape[1]

    @functools.cached_property
    def read(self) -> int:
        """N."""
        return int(self.batch.read_spans()[1].sum())

    @functools.cached_property
    def read_ops(self) -> PairOps:
        """Of the N tokens that are read."""
        counts = self.batch.read_spans()[1]
        device = self.batch.pair_of_token.device
        (pair,) = on_device([np.repeat(np.arange(len(counts)), counts)], device)
        return _ops(pair, counts.tolist(), self.signs)

    def of_rows(self, x: Tensor) -> PairOps:
        """The operations for rows x (T, ...), which are all tokens or those that are read."""
        if len(x) == self.tokens:
            return self.ops
        assert len(x) == self.read
        return self.read_ops

    def project_input(self, x: Tensor, place: Place) -> Factors:
        """Of the input x (T, d) of linear layers."""
        ops = self.of_rows(x)
        return Factors(place.group, ops, ops.project(x, place.key, "in", self.k))

    def project_output(self, factors: Factors, dy: Tensor, place: Place) -> None:
        """The gradient dy (T, p) of a layer's output, as it comes, so that none has to wait."""
        project = factors.ops.project
        before = factors.outputs
        if before is None:
            self._make_room(factors)
            self.narrow.append(factors)
        factors.outputs = project(dy, place.key, "out", self.k, place.first_output, before)

    def linear(self, x: Tensor, layers: Sequence[tuple[Tensor, Place]]) -> None:
        """What else is asked of linear layers of one input x (T, d) and one group; (T, p), weight
        each."""
        if self.exact:
            norms = self.of_rows(x).norms(x, [dy for dy, _ in layers])
            self._add_norms(layers[0][1].group, norms)
        for dy, place in layers:
            moved = self._changed(place)
            if moved is not None:
                wide = wide_dtype(dy, x)
                there = multiply(x, (moved if place.transposed else moved.t()).to(x.dtype), wide)
                self._add_change(place.group, (dy.to(wide) * there).sum(1))

    def bias(self, dy: Tensor, place: Place) -> None:
        """A linear layer's or a norm's, dy (T, D)."""
        self._vector(place, self.of_rows(dy).sums(dy))

    def norm(
        self,
        x: Tensor,  # (T, D) | (T, H, D) its input; its output where `gain` is given
        dy: Tensor,
        kind: Norm,
        weight: Place | None,
        bias: Place | None,
        gain: Tensor | None,
    ) -> None:
        """An RMSNorm or LayerNorm."""
        if weight is not None:
            ops = self.of_rows(dy)
            if gain is None:
                sums = ops.sums(dy, x, kind.eps, kind.centred)
            else:
                sums = ops.sums(dy, x, None).div_(gain)
            self._vector(weight, sums)
        if bias is not None:
            self.bias(dy, bias)

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
        outputs = self.ops.vocabulary(ids, place.key, vocab, self.k, place.buckets).to(inputs.dtype)
        if padding is not None:
            outputs = outputs.masked_fill(padding, 0.0)
        if scale != 1.0:
            inputs *= scale
        factors = Factors(place.group, self.ops, inputs, outputs)
        self._make_room(factors)
        self.narrow.append(factors)
        moved = self._changed(place)
        if moved is not None:
            wide = wide_dtype(dy)
            rows = moved.index_select(0, ids).to(wide) * scale
            if padding is not None:
                rows = rows.masked_fill(padding, 0.0)
            self._add_change(place.group, (dy.to(wide) * rows).sum(1))

    def _vector(self, place: Place, sums: Tensor) -> None:
        """sums (P, D): the gradient itself, of a bias or a norm's weight."""
        self.vectors.append((place, sums))
        moved = self._changed(place)
        if moved is not None:
            self._widen(sums.dtype)
            assert self.change is not None
            self.change[place.group] += sums @ moved.to(sums.dtype)

    def _changed(self, place: Place) -> Tensor | None:
        return None if self.changes is None else self.changes.get(place.parameter)

    def _add_norms(self, group: int, norms: Tensor) -> None:
        self._widen(norms.dtype)
        self.norm_sq[group] += norms

    def finish(self) -> None:
        """Sum what has waited."""
        self._finish_products()
        if not self.vectors:
            return
        by_size: dict[int, list[tuple[Place, Tensor]]] = {}
        for place, sums in self.vectors:
            by_size.setdefault(sums.shape[1], []).append((place, sums))
        for own in by_size.values():  # few calls: they are small
            every = torch.stack([sums for _, sums in own])
            groups, k = [place.group for place, _ in own], self.k
            sketches = [
                self.ops.project(sums, place.key, "vector", k * k)
                for (place, _), sums in zip(own, every, strict=True)
            ]
            self._widen(every.dtype)
            add_sketches(self.sketch, groups, torch.stack(sketches).unflatten(-1, (k, k)))
            norms = every.square_().sum(2).to(self.norm_sq.dtype)
            add_rows_(self.norm_sq, numbers(groups, norms.device), norms)
        self.vectors = []

    def _make_room(self, factors: Factors) -> None:
        """Before more is kept waiting."""
        if (len(self.narrow) + 1) * factors.inputs.numel() > WAITING:
            self._finish_products()

    def _finish_products(self) -> None:
        waiting, self.narrow = self.narrow, []
        if not waiting:
            return
        for ops in dict.fromkeys(factors.ops for factors in waiting):
            own = [factors for factors in waiting if factors.ops is ops]
            outputs = [factors.outputs for factors in own if factors.outputs is not None]
            inputs = [factors.inputs for factors in own]
            self._widen(wide_dtype(*outputs, *inputs))
            ops.add_products(self.sketch, [factors.group for factors in own], outputs, inputs)
        for factors in waiting:  # what comes later of the same layers is a sum of its own
            factors.outputs = None

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
            self.change = None if self.change is None else self.change.double()


def _ops(pair: Tensor, counts: list[int], signs: Signs) -> PairOps:
    """Of tokens of these pairs, ``counts`` of each."""
    return (BlockOps if pair.device.type == "cpu" else FusedOps)(pair, counts, signs)
