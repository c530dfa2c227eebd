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
    phi: Tensor


@dataclass(frozen=True)
class _Batch:
    group: Tensor  # (B,) which groups
    rows: Tensor  # (B, L) their rows
    span: tuple[int, int] | None  # the rows as one contiguous range, where they are one
    products: Tensor  # (B, L, L) sum over the vocabulary so far of F_t F_s


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
        count = torch.bincount(self.segment_id // group_size, minlength=self.groups).cpu()
        start = torch.cumsum(count, 0) - count
        self.batches: list[_Batch] = []
        for length in count.unique().tolist():
            if length == 0:
                continue
            group = (count == length).nonzero().squeeze(1)
            rows = start[group].unsqueeze(1) + torch.arange(length)
            first, last = int(rows[0, 0]), int(rows[-1, -1])
            span = (first, last + 1) if last + 1 - first == rows.numel() else None
            products = like.new_zeros(len(group), length, length)
            device = like.device
            self.batches.append(_Batch(group.to(device), rows.to(device), span, products))

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
        for batch in self.batches:
            hidden_BLD = hidden[batch.rows].to(dtype)
            target_BL = target[batch.rows]
            total, weight_BL, phi = (x[batch.rows] for x in (terms.total, terms.weight, terms.phi))
            same = target_BL.unsqueeze(2) == target_BL.unsqueeze(1)
            # other[t, s] = q_t[y_s]: what row t gives to the target of row s.
            other = torch.bmm(hidden_BLD, weight[target_BL].to(dtype).transpose(1, 2))
            other = exps(other, target_BL.unsqueeze(1), terms.maximum[batch.rows].unsqueeze(2))
            other = (other / total.unsqueeze(2)).masked_fill_(same, 0.0) * phi.unsqueeze(1)
            # One division after the other: the product of two totals may underflow.
            dots = batch.products / total.unsqueeze(2) / total.unsqueeze(1)
            dots += same * (phi.unsqueeze(2) * phi.unsqueeze(1))
            dots -= other + other.transpose(1, 2)
            dots *= weight_BL.unsqueeze(2) * weight_BL.unsqueeze(1)
            dots *= torch.bmm(hidden_BLD, hidden_BLD.transpose(1, 2))
            member = torch.nn.functional.one_hot(
                self.segment_id[batch.rows] % self.group_size, self.group_size
            ).to(dtype)
            gram[batch.group] = torch.bmm(member.transpose(1, 2), torch.bmm(dots, member))
        return gram
