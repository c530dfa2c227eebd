"""Sums over layers of what each contributes to a pair's gradient: squared norms, sketches, dots.

Shapes: T tokens, P pairs, G layer groups, d inputs, p outputs, D features, k sketch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastpref_kernels import embedding_norms, embedding_sketch, linear_norms
from fastpref_kernels._launch import resolve_backend
from fastpref_kernels.column_sums import column_sums
from fastpref_kernels.count_sketch import BUCKETS
from fastpref_kernels.projection import Projection, project
from fastpref_kernels.segment_products import multiply, segment_products, wide_dtype
from torch import Tensor, nn

from fastpref.batch import PairBatch


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


@dataclass
class PairParts:
    """The sums of one batch. Everything is added in the order of the backward."""

    segment_id: Tensor  # (T,) the pair of every token
    counts: list[int]  # (P,) its tokens
    exact: bool
    k: int
    seed: int
    norm_sq: Tensor  # (G, P)
    sketch: Tensor  # (G, P, k, k)
    change: Tensor | None = None  # (G, P) inner products with `changes`
    changes: Mapping[nn.Parameter, Tensor] | None = None
    tied: tuple[Tensor, Tensor] | None = (
        None  # (T,) ids, (T, D) dy of an embedding that is the head
    )

    @staticmethod
    def of(batch: PairBatch, groups: int, exact: bool, k: int, seed: int) -> PairParts:
        device = batch.pair_of_token.device
        pairs = batch.num_pairs
        return PairParts(
            batch.pair_of_token,
            [sum(lengths) for lengths in batch.lengths],
            exact,
            k,
            seed,
            torch.zeros(groups, pairs, dtype=torch.float32, device=device),
            torch.zeros(groups, pairs, k, k, dtype=torch.float32, device=device),
        )

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.segment_id)

    @property
    def pairs(self) -> int:
        """P."""
        return len(self.counts)

    def linear(
        self,
        x: Tensor,  # (T, d)
        layers: Sequence[tuple[Tensor, Place | None, Place | None]],  # (T, p), weight, bias
    ) -> None:
        """Linear layers of one input, of one group and one key."""
        weights = [(dy, place) for dy, place, _ in layers if place is not None]
        if weights:
            group = weights[0][1].group
            if self.exact:
                norms = linear_norms(
                    x,
                    [dy for dy, _ in weights],
                    self.segment_id,
                    num_segments=self.pairs,
                    counts=self.counts,
                )
                self._add_norms(group, norms)
            inputs = self._project(x, weights[0][1].key, "in")
            outputs = sum_of(
                [self._project(dy, place.key, "out", place.first_output) for dy, place in weights]
            )
            self._add_sketch(group, self._products(outputs, inputs) / self.k)
        for dy, place in weights:
            moved = self._changed(place)
            if moved is not None:
                wide = wide_dtype(dy, x)
                there = multiply(x, (moved if place.transposed else moved.t()).to(x.dtype), wide)
                self._add_change(place.group, (dy.to(wide) * there).sum(1))
        for dy, _, bias in layers:
            if bias is not None:
                self._vector(bias, column_sums(dy, self.segment_id, self.pairs))

    def norm(
        self,
        x: Tensor,  # (T, D) | (T, H, D)
        dy: Tensor,
        eps: float,
        centred: bool,
        weight: Place | None,
        bias: Place | None,
    ) -> None:
        """An RMSNorm or LayerNorm."""
        if weight is not None:
            sums = column_sums(dy, self.segment_id, self.pairs, x=x, eps=eps, centred=centred)
            self._vector(weight, sums)
        if bias is not None:
            self._vector(bias, column_sums(dy, self.segment_id, self.pairs))

    def embedding(
        self, ids: Tensor, dy: Tensor, scale: float, padding_idx: int | None, place: Place
    ) -> None:
        """ids (T,), dy (T, D)."""
        options: dict[str, Any] = {"num_segments": self.pairs, "scale": scale}
        options["padding_idx"] = padding_idx
        if self.exact:
            norms = embedding_norms(ids, dy, self.segment_id, **options)
            self._add_norms(place.group, norms)
        sketch = embedding_sketch(
            ids,
            dy,
            self.segment_id,
            self.k,
            seed=self.seed,
            key=place.key,
            counts=self.counts,
            buckets=place.buckets,
            **options,
        )
        self._add_sketch(place.group, sketch)
        moved = self._changed(place)
        if moved is not None:
            wide = wide_dtype(dy)
            rows = moved.index_select(0, ids).to(wide) * scale
            if padding_idx is not None:
                rows = rows.masked_fill((ids == padding_idx).unsqueeze(1), 0.0)
            self._add_change(place.group, (dy.to(wide) * rows).sum(1))

    def _vector(self, place: Place, sums: Tensor) -> None:
        """sums (P, D): the gradient itself, of a bias or a norm's weight."""
        self._add_norms(place.group, sums.square().sum(1))
        side = Projection.of(self.seed, place.key, "vector")
        flat = project(sums, side, self.k * self.k)
        self._add_sketch(place.group, flat.view(-1, self.k, self.k) / self.k)
        moved = self._changed(place)
        if moved is not None:
            self._widen(sums.dtype)
            assert self.change is not None
            self.change[place.group] += sums @ moved.to(sums.dtype)

    def _changed(self, place: Place) -> Tensor | None:
        return None if self.changes is None else self.changes.get(place.parameter)

    def _project(self, x: Tensor, key: str, side: str, first: int = 0) -> Tensor:  # (T, k)
        return project(x, Projection.of(self.seed, key, side), self.k, first_row=first)

    def _products(self, outputs: Tensor, inputs: Tensor) -> Tensor:  # (P, k, k)
        return segment_products(
            outputs,
            inputs,
            self.segment_id,
            self.pairs,
            counts=self.counts,
            backend=resolve_backend("auto", outputs.device, outputs.dtype, op="taps"),
            name="taps",
        )

    def _add_norms(self, group: int, norms: Tensor) -> None:
        self._widen(norms.dtype)
        self.norm_sq[group] += norms

    def _add_sketch(self, group: int, sketch: Tensor) -> None:
        self._widen(sketch.dtype)
        self.sketch[group] += sketch

    def _add_change(self, group: int, per_token: Tensor) -> None:
        """per_token (T,)."""
        self._widen(per_token.dtype)
        assert self.change is not None
        sums = column_sums(per_token.unsqueeze(1), self.segment_id, self.pairs)
        self.change[group] += sums.squeeze(1)

    def _widen(self, dtype: torch.dtype) -> None:
        """float64 sums once anything is float64."""
        if dtype == torch.float64 and self.sketch.dtype != dtype:
            self.norm_sq, self.sketch = self.norm_sq.double(), self.sketch.double()
            self.change = None if self.change is None else self.change.double()


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Sum in place of the first."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
