"""Norms of head gradients that `linear_logprob` computes on request: exact, sketched, per row.

Shapes: R rows, D hidden, V vocab, S segments, g group_size, K buckets, k sketch size; B groups of L
rows. Formulas, cost and variance: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from .count_sketch import (
    Buckets,
    CountSketch,
    ProjectedTiles,
    SquareSums,
    vocabulary_signs,
)
from .gram import GroupGram, Groups, RowTerms, ShortGram
from .gram_products import head_product_gram, longest_head_gram
from .projection import Projection, native_signs, sign_rows
from .row_sums import RowSums
from .segment_products import multiply, torch_segment_products
from .sketched_gram import sketched_gram
from .spans import starts
from .token_blocks import TokenBlocks
from .torch_tiles import Rider, Saved, Transform, tiles_again


class SketchPlan(NamedTuple):
    """What `norms="sketch"` or "both" was asked for."""

    size: int  # k
    buckets: int  # K
    seed: int
    exact: bool  # the Gram matrices are not estimated
    key: str

    def text(self) -> str:
        """As one argument of a custom op."""
        return f"{self.size} {self.buckets} {self.seed} {int(self.exact)} {self.key}"

    @staticmethod
    def read(text: str) -> SketchPlan:
        size, buckets, seed, exact, key = text.split(" ", 4)
        return SketchPlan(int(size), int(buckets), int(seed), exact == "1", key)


@dataclass(frozen=True)
class NormResults:
    """Tensors of size 0 where not asked for."""

    gram: Tensor  # (S / g, g, g)
    gram_error: Tensor  # (S / g, g, g)
    sketch: Tensor  # (S, k, k)


@dataclass
class HeadNorms:
    """What rides on the forward's loop, and what is made of it afterwards."""

    groups: Groups | None
    sketch: SketchPlan | None
    like: Tensor  # dtype and device of the results
    riders: list[Rider] = field(default_factory=list)
    gram: GroupGram | ShortGram | None = None
    squares: SquareSums | None = None
    counted: CountSketch | None = None
    projected: ProjectedTiles | None = None
    longest: int = 0  # rows of a group up to which the torch backend multiplies rows with rows

    @property
    def estimated(self) -> bool:
        """Whether the Gram matrices come from the sketches."""
        return self.sketch is not None and not self.sketch.exact

    @staticmethod
    def make(
        segment_id: Tensor | None,
        segments: int,
        group_size: int,  # 0: no Gram matrices
        sketch: SketchPlan | None,
        row_norms: bool,
        hidden: Tensor,  # (R, D)
        weight: Tensor,  # (V, D)
        kept: bool,  # all tiles of E
        one_tile: bool,
        like: Tensor,
        triton: bool,
        counts: Sequence[int] | None,  # rows of every segment; None: read from the device
    ) -> HeadNorms:
        (vocab, dim), rows = weight.shape, hidden.shape[0]
        norms = HeadNorms(None, sketch, like, longest=rows)
        if group_size:
            norms.groups = Groups.make(segment_id, segments, group_size, like.device, counts)
            if not norms.estimated:
                norms.longest = longest_head_gram(vocab, dim, group_size, kept)
            exact_here = not (norms.estimated or triton)
            if exact_here and one_tile and ShortGram.serves(norms.groups, hidden):
                norms.gram, norms.longest = ShortGram(norms.groups), rows
            elif norms.estimated or not triton:
                batches = norms.groups.by_length(norms.longest)
                norms.gram = GroupGram(norms.groups, batches, like, riding=not norms.estimated)
            if norms.gram is not None and not norms.estimated:
                norms.riders.append(norms.gram)
        if sketch is not None and sketch.exact and like.device.type == "cpu" and not triton:
            asked = (sketch.seed, sketch.key, sketch.buckets)
            norms.projected = ProjectedTiles(vocab, sketch.size, rows, like, *asked)
            norms.riders.append(norms.projected)
        elif sketch is not None:
            buckets = Buckets.of(sketch.seed, sketch.key, sketch.buckets)
            norms.counted = CountSketch(buckets, vocab, rows, like)
            norms.squares = norms.counted.squares
            norms.riders.append(norms.counted)
        if row_norms and norms.squares is None:
            norms.squares = SquareSums(rows, like)
            norms.riders.append(norms.squares)
        return norms

    def finish(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        transform: Transform,
        sums: RowSums,
        saved: Saved,
        cut: dict[str, Any],  # how the backend cuts the logits
    ) -> NormResults:
        """After the last tile."""
        none = [self.like.new_empty(0) for _ in range(3)]  # outputs of an op are no aliases
        if self.groups is None:
            return NormResults(*none)
        head = (hidden, weight, target, transform)
        terms, size = row_terms(transform, sums, saved), self.groups.group_size
        gram = self.like.new_zeros(self.groups.count, size, size)
        if isinstance(self.gram, GroupGram) and self.estimated:
            self.gram.look_up_targets(*head, sums.maximum)
            assert self.counted is not None
            squares, counted = self.counted.squares.total(), self.counted.rows(terms.total)
            error = sketched_gram(
                gram, self.gram, counted, squares, hidden, target, terms, weight.shape[0]
            )
            return NormResults(gram, error, self._sketches(counted, head, terms))
        if self.gram is None:
            from .triton_norms import triton_gram  # here: machines without triton need not have it

            gram.copy_(triton_gram(self.groups, *head, terms, saved, **cut))
        else:
            self.gram.finish(gram, hidden, target, terms)
            for group, length in enumerate(self.groups.lengths):
                if length > self.longest:
                    gram[group] = self._long_group(group, head, terms, saved, cut)
        sketch = none[2]
        if self.projected is not None:
            sketch = self._sketches(None, head, terms)
        elif self.counted is not None:
            sketch = self._sketches(self.counted.rows(terms.total), head, terms)
        return NormResults(gram, none[1], sketch)

    def _long_group(
        self,
        group: int,
        head: tuple[Tensor, Tensor, Tensor, Transform],
        terms: RowTerms,
        saved: Saved,
        cut: dict[str, Any],
    ) -> Tensor:  # (g, g)
        assert self.groups is not None
        bounds = self.groups.bounds(group)
        rows = slice(bounds[0], bounds[-1])
        tiles = tiles_again(rows, *head, saved, **cut)
        miss = terms.miss[rows]
        per_unit = -miss / terms.total[rows]
        own = miss if terms.phi is None else miss * terms.phi[rows]
        return head_product_gram(
            (
                (lo, hi, exps, per_unit if factor is None else per_unit * factor)
                for lo, hi, exps, factor in tiles
            ),
            head[0][rows],
            head[2][rows],
            own,
            [row - bounds[0] for row in bounds],
            self.like.dtype,
        )

    def _sketches(
        self,
        counted: Tensor | None,  # (R, K) q in its buckets; None: `projected` has more than that
        head: tuple[Tensor, Tensor, Tensor, Transform],
        terms: RowTerms,
    ) -> Tensor:  # (S, k, k)
        """Sum over the rows of each segment of (R_out^T d_t) (R_in^T h_t)^T / k."""
        assert self.groups and self.sketch
        hidden, weight, target, _ = head
        plan, dtype, device = self.sketch, terms.total.dtype, hidden.device
        side, counts = Projection.of(plan.seed, plan.key, "in"), self.groups.counts
        in_c = self.projected is not None and _native.fits(hidden)
        signs = native_signs(side, 0, hidden.shape[1], plan.size) if in_c else None
        if signs is not None and self.projected is not None:
            per_row = (target, terms.total, terms.miss, terms.phi)
            outputs = _native.head_outputs(self.projected.sums, self.projected.table, *per_row)
            inputs = _native.project(hidden, signs)
            sketch = hidden.new_zeros(len(counts), plan.size, plan.size)
            first = torch.tensor(starts(counts), device="cpu")
            _native.segment_products_(sketch, outputs, inputs, first, 1.0 / plan.size)
            return sketch
        outputs = self._outputs(counted, target, terms, weight.shape[0])
        rows = sign_rows(side, hidden.shape[1], plan.size, hidden.dtype, device)
        inputs = multiply(hidden, rows, dtype)
        if device.type == "cpu":
            blocks = TokenBlocks.make(counts, device)
            return blocks.products(outputs.unsqueeze(0), inputs.unsqueeze(0))[0] / plan.size
        return torch_segment_products(outputs, inputs, counts) / plan.size

    def _outputs(
        self, counted: Tensor | None, target: Tensor, terms: RowTerms, vocab: int
    ) -> Tensor:  # (R, k)
        """R_out^T d_t."""
        assert self.sketch
        plan, dtype, device = self.sketch, terms.total.dtype, target.device
        if counted is None:
            assert self.projected is not None
            outputs = self.projected.rows(terms.total)
            # A target out of range has made its row NaN already.
            own = self.projected.table[target.clamp(0, vocab - 1)]
        else:
            side = Projection.of(plan.seed, plan.key, "out")
            outputs = counted @ sign_rows(side, plan.buckets, plan.size, dtype, device)
            own = vocabulary_signs(
                target, plan.size, dtype, seed=plan.seed, key=plan.key, buckets=plan.buckets
            )
        outputs *= -terms.miss.unsqueeze(1)
        miss = terms.miss if terms.phi is None else terms.miss * terms.phi
        return outputs.addcmul_(own, miss.unsqueeze(1))

    def row_norm_sq(self, transform: Transform, sums: RowSums, saved: Saved) -> Tensor:  # (R,)
        """||d logp_t / d raw logits||^2 = m^2 (phi^2 + sum F^2 / S'^2), no cancellation."""
        assert self.squares is not None
        terms = row_terms(transform, sums, saved)
        others = self.squares.total() / terms.total / terms.total
        own = 1.0 if terms.phi is None else terms.phi * terms.phi
        return terms.miss * terms.miss * (others + own)


def row_terms(transform: Transform, sums: RowSums, saved: Saved) -> RowTerms:
    """What turns F into a row's gradient."""
    phi = None if transform.softcap is None else saved.row_state[3]
    # S' = 0 where nothing but the target is possible; 1 - p is then 0.
    total = torch.where(sums.total == 0.0, 1.0, sums.total)
    return RowTerms(total, sums.odds.sigmoid() * transform.slope, phi)
