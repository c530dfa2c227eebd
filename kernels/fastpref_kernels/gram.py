"""Gram matrices of head gradients within groups of segments, from the forward's vocabulary tiles.

Shapes: R rows, D hidden, V vocab, S segments, g group_size, C tile width; B groups of L rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _native
from .row_sums import Tiles
from .segment import add_rows_
from .spans import group_counts, kept_tables, starts, to_device
from .torch_tiles import Transform, exps_at


@dataclass(frozen=True)
class RowTerms:
    """Per row (R,): the non-target sum S', m = k (1 - p_y), and phi = (dz/da)/k at the target."""

    total: Tensor
    miss: Tensor
    phi: Tensor | None  # None: 1


@dataclass(frozen=True)
class GroupRows:
    """The B groups that have L rows."""

    group: Tensor  # (B,) which groups
    rows: Tensor  # (B, L) their rows
    span: tuple[int, int] | None  # the rows as one contiguous range, where they are one

    def of(self, x: Tensor) -> Tensor:
        """(R, ...) -> (B, L, ...), without a copy where the rows are one range."""
        if self.span is None:
            return x[self.rows]
        return x[slice(*self.span)].unflatten(0, self.rows.shape)

    def columns(self, x: Tensor) -> Tensor:
        """(C, R) -> (C, B, L)."""
        if self.span is None:
            x = x.index_select(1, self.rows.flatten())
        else:
            x = x[:, slice(*self.span)]
        return x.unflatten(1, self.rows.shape)


@dataclass(frozen=True)
class Groups:
    """Rows of every segment and group, as given, else read on the host once (a wait on CUDA)."""

    segment_id: Tensor  # (R,) int64
    group_size: int
    counts: list[int]  # rows of every segment

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.counts) // self.group_size

    @property
    def lengths(self) -> list[int]:
        """Rows of every group."""
        return group_counts(self.counts, self.group_size)

    def bounds(self, group: int) -> list[int]:
        """First row of each segment of a group, and the end of the last."""
        first = group * self.group_size
        return starts(self.counts)[first : first + self.group_size + 1]

    @staticmethod
    def make(
        segment_id: Tensor | None,
        num_segments: int,
        group_size: int,
        device: torch.device,
        counts: Sequence[int] | None,
    ) -> Groups:
        if segment_id is None:
            own = torch.arange(num_segments, device=device)
            return Groups(own, group_size, [1] * num_segments)
        ids = segment_id.to(torch.int64)
        if counts is None:
            counts = torch.bincount(ids, minlength=num_segments).tolist()
        return Groups(ids, group_size, list(counts))

    def by_length(self, most: int) -> list[GroupRows]:
        """The groups of 1 .. most rows, those of equal length together."""
        return _by_length(tuple(self.lengths), most, self.segment_id.device)

    def block_sums(self, batch: GroupRows, entries: Tensor) -> Tensor:  # (B, g, g) float64
        """Sums of entries (B, L, L) over the rows of every two segments of a group."""
        count, length = batch.rows.shape
        wide = entries.to(torch.float64)
        if self.group_size == 1:
            return wide.sum((1, 2)).view(count, 1, 1)
        part = batch.of(self.segment_id) % self.group_size
        place = torch.arange(count, device=part.device).unsqueeze(1) * self.group_size + part
        place = place.flatten()
        for _ in range(2):
            sums = wide.new_zeros(count * self.group_size, wide.shape[2])
            add_rows_(sums, place, wide.flatten(0, 1))
            wide = sums.view(count, self.group_size, -1).transpose(1, 2)
        return wide


@kept_tables
def _by_length(lengths: tuple[int, ...], most: int, device: torch.device) -> list[GroupRows]:
    of_length: dict[int, tuple[list[int], list[int]]] = {}  # groups, and their first rows
    start = 0
    for group, length in enumerate(lengths):
        if 0 < length <= most:
            groups, starts = of_length.setdefault(length, ([], []))
            groups.append(group)
            starts.append(start)
        start += length
    found = []
    for length in sorted(of_length):
        groups, starts = of_length[length]
        first, last = starts[0], starts[-1] + length
        span = (first, last) if last - first == length * len(starts) else None
        own, begin = to_device(groups + starts, device).long().view(2, -1)
        rows = begin.unsqueeze(1) + torch.arange(length, device=device)
        found.append(GroupRows(own, rows, span))
    return found


class GroupGram:
    """<d logp[a] / dW, d logp[b] / dW> for all segments a, b of one group; W without the bias.

    The gradient of a segment is sum_t d_t h_t^T with d_t = m_t (phi_t 1[y_t] - q_t),
    m = k (1 - p), q_t = F_t / S'_t zero at y_t, so that

        d_t . d_s  = m_t m_s (phi_t phi_s 1[y_t=y_s] - phi_t q_s[y_t] - phi_s q_t[y_s] + q_t . q_s)
        gram[a, b] = sum over t in a, s in b of  (d_t . d_s) (h_t . h_s)

    Rides on the forward's loop over tiles: q_t . q_s is summed up there, q_t[y_s] read where y_s
    passes. Without `riding`, both come from elsewhere afterwards.

    Memory    2 sum of L^2 over the groups; groups of equal row count are taken together.
    Cost      2 R L V for q.q, 2 R L D for h.h.
    Numerics  no cancellation for confident rows: (1 - p) is a factor and every bracket is formed
              without the target. Summed over rows in float64.
    """

    def __init__(
        self, groups: Groups, batches: Sequence[GroupRows], like: Tensor, riding: bool = True
    ) -> None:
        self.groups, self.batches = groups, batches
        self.target_terms: list[Tensor] = []  # (B, L, L): of row t, column s: F_s at t's target
        self.products: list[Tensor] = []  # (B, L, L): F_t . F_s
        for batch in batches:
            count, length = batch.rows.shape
            if riding:
                self.target_terms.append(like.new_zeros(count, length, length))
                self.products.append(like.new_zeros(count, length, length))

    def add_tile(self, exps: Tensor, shrink: Tensor | None, tiles: Tiles, i: int) -> None:
        """exps (C, R) relative to the running maximum; shrink as from `RowSums`."""
        for j, batch in enumerate(self.batches):
            picked = batch.columns(exps)  # (C, B, L)
            by_group, factor = picked.permute(1, 0, 2), None
            if shrink is not None:
                factor = batch.of(shrink)
                self.target_terms[j].mul_(factor.unsqueeze(1))
            local, inside = batch.of(tiles.local[i].squeeze(0)).unsqueeze(2), tiles.inside[i]
            met = by_group.gather(1, local.expand_as(self.target_terms[j]))
            if inside is None:
                self.target_terms[j] = met
            else:
                self.target_terms[j] = torch.where(
                    batch.of(inside).unsqueeze(2), met, self.target_terms[j]
                )
            products = self.products[j]
            if factor is not None:
                products.mul_(factor.unsqueeze(2)).mul_(factor.unsqueeze(1))
            products.baddbmm_(picked.permute(1, 2, 0), by_group)

    def look_up_targets(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        transform: Transform,
        maximum: Tensor,  # (R,) what F is relative to
    ) -> None:
        """Where no tile was handed in: F at the other rows' targets, of products with their rows of
        the head; 2 R L D operations."""
        for batch in self.batches:
            # A target out of range has made its row NaN already.
            ids = batch.of(target).clamp(0, weight.shape[0] - 1)
            bias = None if transform.bias is None else transform.bias[ids].unsqueeze(2)
            logits = batched_dots(weight[ids], batch.of(hidden), maximum.dtype)
            exps_at(logits, transform, bias, batch.of(maximum).unsqueeze(1))
            self.target_terms.append(logits)

    def finish(
        self, out: Tensor, hidden: Tensor, target: Tensor, terms: RowTerms
    ) -> None:  # out (S / g, g, g), written for the groups of the batches
        """The Gram matrices, of products that were summed over the tiles."""
        for j, batch in enumerate(self.batches):
            total = batch.of(terms.total)
            # One division after the other: the product of two totals may underflow.
            products = self.products[j] / total.unsqueeze(2) / total.unsqueeze(1)
            dots = self.logit_dots(j, products, target, terms)
            dots *= hidden_dots(batch, hidden, total.dtype)
            out[batch.group] = self.groups.block_sums(batch, dots).to(out.dtype)

    def logit_dots(self, j: int, products: Tensor, target: Tensor, terms: RowTerms) -> Tensor:
        """d_t . d_s (B, L, L) of batch j from q_t . q_s, which is overwritten."""
        batch = self.batches[j]
        target_BL, miss = batch.of(target), batch.of(terms.miss)
        same = target_BL.unsqueeze(2) == target_BL.unsqueeze(1)
        met = (self.target_terms[j] / batch.of(terms.total).unsqueeze(1)).masked_fill_(same, 0.0)
        if terms.phi is None:
            products += same
        else:
            phi = batch.of(terms.phi)
            met *= phi.unsqueeze(2)
            products += same * (phi.unsqueeze(2) * phi.unsqueeze(1))
        products -= met + met.transpose(1, 2)
        return products.mul_(miss.unsqueeze(2) * miss.unsqueeze(1))


MOST_SHORT = 16  # rows of a group that C multiplies with each other, faster than small products do
MOST_PRODUCTS = 1 << 14  # as many for every row, of which C keeps several sets


class ShortGram:
    """`GroupGram` of short groups and one tile, in C."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.first = torch.tensor(starts(groups.lengths), device="cpu")
        self.found: tuple[Tensor, Tensor] | None = None  # of `_native.group_products`

    @staticmethod
    def serves(groups: Groups, hidden: Tensor) -> bool:
        """Of float32 rows (R, D) on a CPU; a head of one tile is for the caller to know."""
        longest = max(groups.lengths, default=0)
        few = 0 < longest <= MOST_SHORT and longest * hidden.shape[0] <= MOST_PRODUCTS
        return few and _native.fits(hidden)

    def add_tile(self, exps: Tensor, shrink: Tensor | None, tiles: Tiles, i: int) -> None:
        """As `GroupGram.add_tile`."""
        most, target = max(self.groups.lengths), tiles.local[i].squeeze(0)
        self.found = _native.group_products(exps, target, self.first, most)

    def finish(self, out: Tensor, hidden: Tensor, target: Tensor, terms: RowTerms) -> None:
        """As `GroupGram.finish`."""
        assert self.found is not None
        rows = (target, self.groups.segment_id, terms.total, terms.miss, terms.phi)
        _native.group_gram_(out, self.found, hidden, *rows, self.first)


def hidden_dots(batch: GroupRows, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """h_t . h_s, (B, L, L)."""
    rows = batch.of(hidden)
    return batched_dots(rows, rows, dtype)


def batched_dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T for a, b (B, L, D), accumulated and returned in `dtype`; (B, L, L)."""
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b.transpose(1, 2), out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype).transpose(1, 2))
