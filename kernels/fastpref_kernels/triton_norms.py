"""Exact Gram matrices of head gradients on the Triton backend: which way each group goes, and the
tiles of E that are handed on.

Shapes: R rows, D hidden, V vocab, S segments, g group_size. Imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradient_tile import Lacking, Sets, gradient_products, make_sets, numbers_loaded
from .gram import Groups, RowTerms
from .gram_tile import Rows, Tiles, add_gram, plan_blocks, rows_loaded
from .spans import group_counts
from .torch_tiles import Saved, Transform
from .triton_tiles import (
    ScaledRows,
    TritonTile,
    bounds,
    kept_tile,
    largest_entries,
    padded_tiles,
    power_below,
)


def triton_gram(
    groups: Groups,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    terms: RowTerms,
    saved: Saved,
    tile: TritonTile,
) -> Tensor:  # (S / g, g, g)
    """The Gram matrices: from the kept tiles, and from the others as they are formed again, which
    is one more product with the head for those, whichever way groups go."""
    counts, size = tuple(groups.counts), groups.group_size
    (vocab, dim), device = weight.shape, hidden.device
    by_rows, by_gradients = sort_groups(counts, size, vocab, dim, hidden.dtype)
    plan = plan_blocks(counts, size, by_rows, hidden.dtype, device)
    out = hidden.new_zeros(groups.count * size, size, dtype=torch.float64)
    hidden = hidden.contiguous()
    final, total, _, phi = saved.row_state.unbind(0)
    segment, own = groups.segment_id.to(torch.int32), -total * phi
    rows = Rows(target.to(torch.int32), segment, final, own, terms.miss / terms.total)
    long = None
    if by_gradients:
        sets = make_sets(counts, by_gradients, size, hidden.dtype, device)
        long = _ByGradients(sets, len(counts), groups.segment_id, target, rows, hidden, vocab)
    kept, width = saved.offsets.shape[0], tile.width
    if kept and plan:
        add_gram(out, Tiles(saved.exps, saved.offsets, width), rows, hidden, plan, correct=True)
    if kept and long is not None:
        for i, (lo, hi) in enumerate(bounds(vocab, width)[:kept]):
            long.add(kept_tile(saved.exps, lo, hi), lo, saved.offsets[i])
    if not (plan or long):
        return out.view(groups.count, size, size)
    for lo, exps in padded_tiles(hidden, weight, target, transform, saved, tile, kept):
        if plan:
            again = Tiles(exps.view(exps.shape[1], -1), final.unsqueeze(0), exps.shape[1])
            add_gram(out, again, rows, hidden, plan, correct=lo == 0)
        if long is not None:
            long.add(exps, lo, final)
    found = out.view(groups.count, size, size)
    if long is not None:
        found.index_copy_(0, long.sets.groups, long.gram())
    return found


def sort_groups(
    counts: Sequence[int], group_size: int, vocab: int, dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Groups that go by products of rows, and by their gradients: whichever way programs load fewer
    numbers, of which both make less use than a GPU could (kernels/README.md). Groups without rows
    go neither way."""
    rows: list[int] = []
    gradients: list[int] = []
    for group, length in enumerate(group_counts(counts, group_size)):
        own = counts[group * group_size : (group + 1) * group_size]
        if length:
            by_rows = rows_loaded(length, vocab + dim, dtype)
            shorter = by_rows <= numbers_loaded(own, vocab, dim, dtype)
            (rows if shorter else gradients).append(group)
    return tuple(rows), tuple(gradients)


class _ByGradients:
    """The products of long groups' gradients, summed up over tiles.

    A row's factor, -m / S' with m = k (1 - p), stands before its hidden state, in units of a power
    of two for each segment: neither rounding to a half type nor a square loses a confident one.
    """

    def __init__(
        self,
        sets: Sets,
        segments: int,
        segment: Tensor,  # (R,) int64
        target: Tensor,  # (R,) int64
        rows: Rows,
        hidden: Tensor,
        vocab: int,
    ) -> None:
        self.sets = sets
        sizes = rows.scale.abs() * largest_entries(hidden)
        # A maximum does not depend on the order in which it is taken.
        largest = sizes.new_zeros(segments).scatter_reduce_(0, segment, sizes, "amax")
        self._unit = power_below(largest)
        factor = -rows.scale / self._unit[segment]
        self._operand = ScaledRows(hidden, factor, rows.final)
        self._total: Tensor | None = None
        self._lacking = None
        if hidden.dtype != torch.float32:
            # What is rounded in E is one entry of a row, but the largest by far.
            lost = rows.own - rows.own.to(hidden.dtype).to(torch.float32)
            self._lacking = Lacking.of(segment, target, lost, vocab)

    def add(self, exps: Tensor, low: int, offset: Tensor) -> None:
        """exps (R, C) of the ids from `low` on, relative to offset (R,)."""
        self._operand.turn_to(offset)
        operand = self._operand.rows
        found = gradient_products(exps, operand, self.sets, self._lacking, low)
        self._total = found if self._total is None else self._total + found

    def gram(self) -> Tensor:  # (G, g, g) float64
        """Of the groups of `sets`."""
        assert self._total is not None  # there is a tile at least
        gram = self._total[self.sets.pick]
        unit = self._unit.to(torch.float64).view(-1, gram.shape[1])[self.sets.groups]
        return gram * unit.unsqueeze(2) * unit.unsqueeze(1)
