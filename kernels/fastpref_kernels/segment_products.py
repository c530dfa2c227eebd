"""Products that are accumulated in float32, and those over the rows of every segment.

Shapes: T rows, S segments, r narrow side, d other side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._head_checks import check_rows_of_segments
from ._launch import surroundings
from .spans import row_counts, starts


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of them is, float32 for everything else."""
    if any(x.dtype == torch.float64 for x in tensors):
        return torch.float64
    return torch.float32


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, accumulated and returned in `dtype`; half operands as they are on CUDA."""
    if a.is_cuda and a.dtype == b.dtype and a.itemsize == 2 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)  # knows no other pair of types
    return torch.mm(a.to(dtype), b.to(dtype))


def segment_products(
    left: Tensor,  # (T, r)
    right: Tensor,  # (T, d)
    segment_id: Tensor,  # (T,) non-decreasing
    num_segments: int,
    *,
    counts: Sequence[int] | None,
    backend: str,
    name: str,
) -> Tensor:  # (S, r, d)
    """left_s^T right_s over the rows of each segment; accumulated in float32 (float64)."""
    return _segment_products_op(
        left,
        right,
        segment_id,
        num_segments,
        None if counts is None else list(counts),
        f"{backend} {name}",
    )


def torch_segment_products(left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    """In plain torch, one product for every segment that has rows."""
    dtype = wide_dtype(left, right)
    out = left.new_zeros(len(counts), left.shape[1], right.shape[1], dtype=dtype)
    bounds = starts(counts)
    for segment, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if lo < hi:
            out[segment] = multiply(left[lo:hi].t(), right[lo:hi], dtype)
    return out


def counted(
    counts: Sequence[int] | None, segment_id: Tensor, segments: int, name: str
) -> Sequence[int]:
    """``counts``, or the rows of every segment where they are not given. On the CPU reading is
    free, and order and counts are checked whoever counted."""
    if counts is not None and segment_id.is_cuda:
        return counts
    found = row_counts(segment_id, segments, name=name)
    if counts is not None and found != list(counts):
        check_rows_of_segments(name, segment_id, counts)
    return found


@torch.library.custom_op(
    "fastpref::segment_products",
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor segment_id, SymInt segments, int[]? counts, "
    "str backend) -> Tensor",
)
def _segment_products_op(
    left: Tensor,
    right: Tensor,
    segment_id: Tensor,
    segments: int,
    counts: Sequence[int] | None,
    backend: str,
) -> Tensor:
    chosen, name = backend.split()
    counts = counted(counts, segment_id, segments, name)
    with surroundings(left.device):
        if chosen == "triton":
            from .triton_sketch import triton_segment_products

            return triton_segment_products(left, right, counts)
        return torch_segment_products(left, right, counts)


@_segment_products_op.register_fake
def _segment_products_fake(
    left: Tensor, right: Tensor, segment_id: Tensor, segments: int, *_: object
) -> Tensor:
    shape = (segments, left.shape[1], right.shape[1])
    return left.new_empty(shape, dtype=wide_dtype(left, right))
