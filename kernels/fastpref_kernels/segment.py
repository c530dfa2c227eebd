"""Sums over segments and rows whose bits do not depend on thread timing.

Shapes: R rows, S segments, V vocab, D hidden.

Both functions are repeatable: on the CPU `index_add_` walks the rows in order on one thread; on
CUDA `index_add_` would use atomics, so `index_put_(accumulate=True)` is used there, which sorts the
indices first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(
    rows: Tensor,  # (..., R)
    segment_id: Tensor | None,  # (R,) int32 | int64, non-decreasing; None: one segment per row
    num_segments: int,
) -> Tensor:  # (..., S), dtype of rows
    """Sum of the rows of every segment; a segment without rows gives 0.

    Numerics  sums in float64 where the device has it, rounded once: a segment may hold thousands of
              rows of the same sign, and the log-ratios that are formed of these sums are small
              differences.
    """
    if segment_id is None:
        return rows
    wide = rows.dtype if rows.device.type == "mps" else torch.float64
    out = rows.new_zeros((*rows.shape[:-1], num_segments), dtype=wide)
    if rows.is_cuda:
        index = segment_id.to(torch.int64)
        # Leading dimensions are few (the statistics asked for), so one sort each costs little.
        for total, row in zip(
            out.view(-1, num_segments), rows.reshape(-1, rows.shape[-1]), strict=True
        ):
            total.index_put_((index,), row.to(wide), accumulate=True)
    else:
        out.index_add_(-1, segment_id, rows.to(wide))
    return out.to(rows.dtype)


def segment_expand(
    per_segment: Tensor,  # (S,)
    segment_id: Tensor | None,  # (R,) or None: S = R
) -> Tensor:  # (R,)
    """Value of its segment for every row; the adjoint of `segment_sum`."""
    return per_segment if segment_id is None else per_segment.index_select(0, segment_id)


def add_rows_(
    out: Tensor,  # (V, D) | (V,)
    index: Tensor,  # (R,) int64, repeats allowed
    rows: Tensor,  # (R, D) | (R,)
) -> Tensor:
    """`out[index[r]] += rows[r]` in place, in an order that does not change between runs."""
    if out.is_cuda:
        return out.index_put_((index,), rows, accumulate=True)
    return out.index_add_(0, index, rows)
