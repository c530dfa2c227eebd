"""Sums over the rows of every segment of vectors: gradients of biases and of norms' weights.

Shapes: T rows, S segments, D features, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch
from .linear_logprob import _surroundings
from .segment import add_rows_
from .segment_products import wide_dtype
from .spans import row_counts

CHUNK = 1 << 21  # numbers that are widened at a time


def column_sums(
    dy: Tensor,  # (T, D) | (T, H, D)
    segment_id: Tensor,  # (T,) non-decreasing
    num_segments: int,
    *,
    x: Tensor | None = None,  # as dy: what a norm normalises over D
    eps: float = 0.0,
    centred: bool = False,
    name: str = "column_sums",
    backend: str = "auto",
) -> Tensor:  # (S, D)
    """sum over the segment's rows (and heads) of dy, times the normalised x where there is one:
    x rsqrt(mean x^2 + eps), `centred`: (x - mean) rsqrt(variance + eps). float32, or float64."""
    wide = wide_dtype(dy) if x is None else wide_dtype(dy, x)
    chosen = _launch.resolve_backend(backend, dy.device, wide, op=name)
    return _column_sums_op(
        dy.detach(),
        None if x is None else x.detach(),
        segment_id,
        num_segments,
        eps,
        centred,
        f"{chosen} {name}",
    )


def torch_column_sums(
    dy: Tensor,
    x: Tensor | None,
    segment_id: Tensor,
    segments: int,
    eps: float,
    centred: bool,
) -> Tensor:
    """In plain torch, in chunks of rows; repeatable (`add_rows_`)."""
    dtype = wide_dtype(dy) if x is None else wide_dtype(dy, x)
    out = dy.new_zeros(segments, dy.shape[-1], dtype=dtype)
    step = max(CHUNK // max(dy[:1].numel(), 1), 1)
    for i in range(0, dy.shape[0], step):
        rows = dy[i : i + step].to(dtype)
        if x is not None:
            rows = rows * normalised(x[i : i + step].to(dtype), eps, centred)
        if rows.dim() == 3:
            rows = rows.sum(1)
        add_rows_(out, segment_id[i : i + step].to(torch.int64), rows)
    return out


def normalised(x: Tensor, eps: float, centred: bool) -> Tensor:
    """x over its root mean square, or its deviation over the standard deviation, along the last
    dimension; before any weight."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@torch.library.custom_op(
    "fastpref::column_sums",
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor segment_id, SymInt segments, float eps, bool centred, "
    "str backend) -> Tensor",
)
def _column_sums_op(
    dy: Tensor,
    x: Tensor | None,
    segment_id: Tensor,
    segments: int,
    eps: float,
    centred: bool,
    backend: str,
) -> Tensor:
    chosen, name = backend.split()
    if not dy.is_cuda:
        row_counts(segment_id, segments, name=name)
    with _surroundings(dy.device):
        if chosen == "triton":
            from .triton_column_sums import triton_column_sums

            return triton_column_sums(dy, x, segment_id, segments, eps, centred)
        return torch_column_sums(dy, x, segment_id, segments, eps, centred)


@_column_sums_op.register_fake
def _column_sums_fake(
    dy: Tensor, x: Tensor | None, segment_id: Tensor, segments: int, *_: object
) -> Tensor:
    dtype = wide_dtype(dy) if x is None else wide_dtype(dy, x)
    return dy.new_empty(segments, dy.shape[-1], dtype=dtype)
