"""Gram matrices of long groups: each segment's head gradient is formed, a tile of it at a time.

Shapes: R rows, D hidden, V vocab, g group_size, C tile width; L rows of one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .segment import add_rows_
from .torch_tiles import half_product

# Entries of a segment's gradient that stand in memory at a time: a CPU's second-level cache holds
# what three of them and their copies in float64 take; a GPU wants larger products.
HEAD_ENTRIES, HEAD_ENTRIES_CUDA = 1 << 17, 1 << 20


def longest_head_gram(vocab: int, dim: int, group_size: int, kept: bool) -> int:
    """Rows of a group up to which L x L products cost no more than its segments' gradients.

    Operations of a group of L rows: 2 L^2 (V + D) by L x L products; 2 L V D for its gradients, as
    many again where the tiles of E are not kept, and 2 g^2 V D for the gradients' products.
    """
    first, products = (1 if kept else 2) * vocab * dim, group_size**2 * vocab * dim
    # The positive root of L^2 (V + D) - first L - products = 0.
    root = (first * first + 4 * (vocab + dim) * products) ** 0.5
    return int((first + root) / (2 * (vocab + dim)))


def head_product_gram(
    tiles: Iterable[tuple[int, int, Tensor, Tensor]],
    hidden: Tensor,  # (L, D) of the group
    target: Tensor,  # (L,)
    own: Tensor,  # (L,) d_t at the target, m phi
    bounds: Sequence[int],  # (g + 1,) first row of every segment in the group, and L
    dtype: torch.dtype,
) -> Tensor:  # (g, g) float64
    """<G_a, G_b> of one group, G_s = sum over the rows t of s of d_t h_t^T.

    `tiles` gives (first id, last id, F (C, L), factor (L,)) with d_t = factor_t F_t but for what
    stands at the target.

    Memory    3 g HEAD_ENTRIES numbers
    Numerics  gradients in float32 (float64), as dW has them; their products in float64
    """
    size, wide = len(bounds) - 1, hidden.to(dtype)
    total = hidden.new_zeros(size, size, dtype=torch.float64)
    entries = HEAD_ENTRIES_CUDA if hidden.is_cuda else HEAD_ENTRIES
    step = max(entries // max(hidden.shape[1], 1), 1)
    for low, high, exps, factor in tiles:
        operand = wide * factor.unsqueeze(1)
        for i in range(0, high - low, step):
            some = exps[i : min(i + step, high - low)]
            first, last = low + i, low + i + some.shape[0]
            gradients = wide.new_empty(size, some.shape[0], wide.shape[1])
            for gradient, a, b in zip(gradients, bounds, bounds[1:], strict=False):
                half_product(some[:, a:b], operand[a:b], hidden.dtype, gradient)
                if a < b:
                    # Whatever F holds at the target, which may be rounded, makes room for m phi.
                    here = (target[a:b] >= first) & (target[a:b] < last)
                    place = (target[a:b] - first).clamp(0, last - first - 1)
                    there = some[:, a:b].gather(0, place.unsqueeze(0)).squeeze(0)
                    lacks = own[a:b] - factor[a:b] * there.to(dtype)
                    scale = lacks.masked_fill(~here, 0.0).unsqueeze(1)
                    add_rows_(gradient, place, wide[a:b] * scale)
            flat = gradients.flatten(1).double()
            total += flat @ flat.t()
    return total
