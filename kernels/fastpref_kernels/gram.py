"""Gram matrices of head gradients within groups of segments, from the forward's vocabulary tiles.

Shapes: R rows, D hidden, V vocab, S segments, g group_size, C tile width; B groups of L rows each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowTerms:
    """Per row (R,): non-target maximum and sum, k (1 - p_y), and phi = (dz/da)/k at the target."""

    maximum: Tensor
    total: Tensor
    weight: Tensor
    phi: Tensor | None  # None: 1


@dataclass(frozen=True)
class _Batch:
    group: Tensor  # (B,) which groups
    rows: Tensor  # (B, L) their rows
    span: tuple[int, int] | None  # the rows as one contiguous range, where they are one
    products: Tensor  # (B, L, L) sum over the vocabulary so far of F_t F_s

    def of(self, x: Tensor) -> Tensor:
        """(R, ...) -> (B, L, ...), without a copy where the rows are one range."""
        if self.span is None:
            return x[self.rows]
        return x[slice(*self.span)].unflatten(0, self.rows.shape)


class GroupGram:
    """<d logp[a] / dW, d logp[b] / dW> for all segments a, b of one group; W without the bias.

    The gradient of a segment is sum_t d_t h_t^T with d_t = m_t (phi_t 1[y_t] - q_t),
    m = k (1 - p), q_t = F_t / S'_t zero at y_t, so that

        d_t . d_s  = m_t m_s (phi_t phi_s 1[y_t=y_s] - phi_t q_s[y_t] - phi_s q_t[y_s] + q_t . q_s)
        gram[a, b] = sum over t in a, s in b of  (d_t . d_s) (h_t . h_s)

    Memory    sum of L^2 over groups; groups of equal row count are multiplied together.
    Cost      2 R L V for q.q, 4 R L D for h.h and q[y].
    Numerics  no cancellation for confident rows: (1 - p) is a factor and every bracket is formed
              without the target.
    Reads the row counts on the host once (a synchronisation on CUDA).
    """

    def __init__(
        self, segment_id: Tensor | None, num_segments: int, group_size: int, like: Tensor
    ) -> None:
        self.groups, self.group_size = num_segments // group_size, group_size
        if segment_id is None:
            segment_id = torch.arange(num_segments, device=like.device)
        self.segment_id = segment_id.to(torch.int64)
        count = torch.bincount(self.segment_id // group_size, minlength=self.groups).tolist()
        of_length: dict[int, tuple[list[int], list[int]]] = {}  # groups, and their first rows
        start = 0
        for group, length in enumerate(count):
            if length:
                groups, starts = of_length.setdefault(length, ([], []))
                groups.append(group)
                starts.append(start)
            start += length
        self.batches: list[_Batch] = []
        for length in sorted(of_length):
            groups, starts = of_length[length]
            first, last, device = starts[0], starts[-1] + length, like.device
            span = (first, last) if last - first == length * len(starts) else None
            rows = torch.tensor(starts, device=device).unsqueeze(1)
            rows = rows + torch.arange(length, device=device)
            products = like.new_zeros(len(groups), length, length)
            self.batches.append(_Batch(torch.tensor(groups, device=device), rows, span, products))

    def add_tile(self, exps: Tensor, shrink: Tensor | None) -> None:
        """exps (C, R) relative to the running maximum; shrink as from `RowSums`."""
        for batch in self.batches:
            count, length = batch.rows.shape
            if batch.span is None:
                picked = exps.index_select(1, batch.rows.flatten())
            else:
                picked = exps[:, slice(*batch.span)]
            picked = picked.view(exps.shape[0], count, length)
            if shrink is not None:
                factor = shrink[batch.rows]
                batch.products.mul_(factor.unsqueeze(2)).mul_(factor.unsqueeze(1))
            batch.products.baddbmm_(picked.permute(1, 2, 0), picked.permute(1, 0, 2))

    def finish(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        terms: RowTerms,
        exps: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:  # (S / g, g, g)
        """The Gram matrices. `exps(raw logits, their vocabulary ids, row maximum)` gives F."""
        dtype = terms.total.dtype
        gram = terms.total.new_zeros(self.groups, self.group_size, self.group_size)
        part = torch.arange(self.group_size, device=hidden.device)
        for batch in self.batches:
            hidden_BLD = batch.of(hidden).to(dtype)
            target_BL = batch.of(target)
            total, weight_BL = batch.of(terms.total), batch.of(terms.weight)
            same = target_BL.unsqueeze(2) == target_BL.unsqueeze(1)
            # other[t, s] = q_t[y_s]: what row t gives to the target of row s.
            other = torch.bmm(hidden_BLD, weight[target_BL].to(dtype).transpose(1, 2))
            other = exps(other, target_BL.unsqueeze(1), batch.of(terms.maximum).unsqueeze(2))
            other = (other / total.unsqueeze(2)).masked_fill_(same, 0.0)
            # One division after the other: the product of two totals may underflow.
            dots = batch.products / total.unsqueeze(2) / total.unsqueeze(1)
            if terms.phi is None:
                dots += same
            else:
                phi = batch.of(terms.phi)
                other *= phi.unsqueeze(1)
                dots += same * (phi.unsqueeze(2) * phi.unsqueeze(1))
            dots -= other + other.transpose(1, 2)
            dots *= weight_BL.unsqueeze(2) * weight_BL.unsqueeze(1)
            dots *= torch.bmm(hidden_BLD, hidden_BLD.transpose(1, 2))
            own = (batch.of(self.segment_id) % self.group_size).unsqueeze(2)
            member = (own == part).to(dtype)
            gram[batch.group] = torch.bmm(member.transpose(1, 2), torch.bmm(dots, member))
        return gram
