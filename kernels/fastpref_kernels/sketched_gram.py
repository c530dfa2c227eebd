"""Gram matrices of head gradients from a CountSketch of the rows' probabilities, with their errors.

Only q_t . q_s of different rows is estimated; what holds the target, and every row with itself, is
exact. With N_ab = sum over t in a, s in b, t != s of (h_t . h_s) m_t q_t (m_s q_s)^T, (V, V), the
estimate misses gram[a, b] by the sum of sign(v) sign(w) N_ab[v, w] over the ids v != w that share a
bucket. Two ids of different blocks do with probability 1 / K, so that

    variance  <=  (2 / K) (1 - K / V) (||N_ab||^2 - sum_v N_ab[v, v]^2)      (= where a is b)

||N_ab||^2 = tr(G_aa X_ab G_bb X_ba), G the dots of m q and X those of h. The diagonal shows in the
buckets: with M_ab the (K, K) matrix that the sketches give in place of N_ab,
E sum_j M_ab[j, j]^2 = sum_v N_ab[v, v]^2 + (2 / K) (the rest of ||N_ab||^2), at most.

Shapes: R rows, K buckets, S segments, g group_size; B groups of L rows each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import GroupGram, GroupRows, Groups, RowTerms, hidden_dots


def sketched_gram(
    out: Tensor,  # (S / g, g, g) written for the groups that have rows
    gram: GroupGram,
    sketches: Tensor,  # (R, K) of q
    squares: Tensor,  # (R,) sum F^2
    hidden: Tensor,
    target: Tensor,
    terms: RowTerms,
    vocab: int,
) -> Tensor:  # (S / g, g, g)
    """The Gram matrices, and one standard error of each entry.

    Cost    2 R L (K + D) operations for groups of L rows, and (1 + g) 2 R L K for the errors
    Memory  some (L, L) matrices for every group
    """
    groups, buckets = gram.groups, sketches.shape[1]
    spread = 2.0 / buckets * max(0.0, 1.0 - buckets / vocab)
    error = torch.zeros_like(out)
    for j, batch in enumerate(gram.batches):
        total, miss, rows = batch.of(terms.total), batch.of(terms.miss), batch.of(sketches)
        products = torch.bmm(rows, rows.transpose(1, 2))
        products.diagonal(dim1=1, dim2=2).copy_(batch.of(squares) / total / total)
        dots = hidden_dots(batch, hidden, total.dtype)
        if spread:
            others = dots.clone()
            others.diagonal(dim1=1, dim2=2).zero_()
            scaled = products * (miss.unsqueeze(2) * miss.unsqueeze(1))
            spots = _diagonals(groups, batch, rows * miss.unsqueeze(2), others)
            variance = _variance(_sizes(groups, batch, scaled, others), spots, buckets)
            error[batch.group] = variance.mul_(spread).sqrt_().to(error.dtype)
        dots *= gram.logit_dots(j, products, target, terms)
        out[batch.group] = groups.block_sums(batch, dots).to(out.dtype)
    return error


def _variance(sizes: Tensor, spots: Tensor, buckets: int) -> Tensor:
    """||N||^2 without its diagonal, from ||N||^2 and sum_j M[j, j]^2.

    Both are estimates, whose difference may be negative; what the two can tell apart is the least
    that is reported.
    """
    sizes = sizes.clamp(min=0.0)
    rest = (sizes - spots) / (1.0 - 2.0 / buckets)
    return torch.minimum(rest.maximum(sizes * (2.0 / buckets)), sizes)


def _sizes(groups: Groups, batch: GroupRows, scaled: Tensor, others: Tensor) -> Tensor:
    """||N_ab||^2, (B, g, g)."""
    segment = batch.of(groups.segment_id)
    within = scaled * (segment.unsqueeze(2) == segment.unsqueeze(1))
    mixed = torch.bmm(within, others)
    return groups.block_sums(batch, mixed * mixed.transpose(1, 2))


def _diagonals(groups: Groups, batch: GroupRows, rows: Tensor, others: Tensor) -> Tensor:
    """sum_j M_ab[j, j]^2, (B, g, g), of rows (B, L, K) m q as sketched."""
    size = groups.group_size
    part = (batch.of(groups.segment_id) % size).unsqueeze(1)
    belongs = (part == torch.arange(size, device=part.device).unsqueeze(1)).to(rows.dtype)
    found = []
    for own in belongs.unbind(1):  # (B, L)
        mixed = torch.bmm(others * own.unsqueeze(1), rows).mul_(rows)  # (B, L, K)
        found.append(torch.bmm(belongs, mixed).square().sum(2))
    return torch.stack(found, 2).to(torch.float64)
