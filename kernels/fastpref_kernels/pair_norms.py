"""Norms of weight gradients of every pair, from what a layer's backward has in hand.

    from fastpref_kernels import linear_norms
    squared = linear_norms(x, dy, pair_of_token, num_segments=P)          # (P,) ||G_p||_F^2

Shapes: T rows (packed tokens), S segments, g group_size, d inputs, p outputs, D features, H heads,
r adapter rank. A *segment* is a run of rows, by default all tokens of a pair; x is a layer's input
and dy the gradient of its output, where what was differentiated is the sum over pairs of a quantity
of each, the margin say. No pair's rows may meet another's before that sum.

Every function returns squared norms (S,), or for `group_size=g` the inner products (S / g, g, g) of
the gradients within groups of g neighbouring segments. From the rows of chosen and rejected, each
under a gradient of its own log-prob, the 2 x 2 matrix holds n_c^2, n_r^2 and <c, r>: any loss's
norm follows. Results are float32 (float64 for float64 inputs), never negative, and not
differentiable. Mathematics, cost, numerics: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _launch, _norm_checks
from ._launch import surroundings
from .column_sums import column_sums
from .pair_gram import is_narrow, narrow_gram, pair_gram
from .segment_products import counted, multiply, torch_segment_products, wide_dtype


def linear_norms(
    x: Tensor,  # (T, d) float64 | float32 | bfloat16 | float16
    dy: Tensor | Sequence[Tensor],  # (T, p), or several of one x: the sum over their weights
    segment_id: Tensor,  # (T,) int32 | int64, non-decreasing
    *,
    num_segments: int,
    group_size: int | None = None,
    counts: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:  # (S,) | (S / g, g, g)
    """Squared norm of sum_t dy_t x_t^T over the rows of each segment: of a linear layer's weight.

    The layout of the weight does not matter: GPT-2's Conv1D, (d, p), has the same norm. `dy` may be
    several tensors, of q, k, v or of gate and up, that share x: the result is the sum over their
    weights, and x . x is formed once. An expert of a mixture is a linear layer over its own rows.
    A group of T rows with T <= d p / (d + p) goes by its T x T Gram matrices, a longer one by its
    segments' gradients, a tile at a time; an adapter (d or p at most 128) always by the latter.

    `counts`: rows of every segment, as `row_counts` gives them; without it the device is read
    once a call.

    Memory    a tile: never (T, T) of more than one group, never a gradient of more than a tile
    Numerics  accumulated in float32 whatever the inputs; no atomics
    Errors    ValueError: shapes, dtypes, groups that do not divide, segments out of order (on CUDA
              with `counts` given, order is not read)
    Oracle    reference.linear_norms
    """
    return _linear_norms(
        "linear_norms", x, dy, segment_id, num_segments, group_size, counts, backend
    )


def _linear_norms(
    name: str,  # what messages call the caller
    x: Tensor,
    dy: Tensor | Sequence[Tensor],
    segment_id: Tensor,
    num_segments: int,
    group_size: int | None,
    counts: Sequence[int] | None,
    backend: str,
) -> Tensor:
    many = [dy] if isinstance(dy, Tensor) else list(dy)
    if not many:
        raise ValueError(f"{name}: dy is an empty sequence; expected (T, p) or several of them.")
    labels = ["dy"] if isinstance(dy, Tensor) else [f"dy[{i}]" for i in range(len(many))]
    _norm_checks.check_rows(name, ("x", x), *zip(labels, many, strict=True))
    for label, tensor in zip(("x", *labels), (x, *many), strict=True):
        _norm_checks.check_matrix(name, label, tensor)
    _norm_checks.check_ids(name, "segment_id", segment_id, "x", x)
    size = _norm_checks.check_segments(name, x.shape[0], num_segments, group_size, counts)
    chosen = _launch.resolve_backend(backend, x.device, wide_dtype(x, *many), op=name)
    gram = _pair_gram_op(
        x.detach(),
        [tensor.detach() for tensor in many],
        segment_id,
        num_segments,
        size,
        None if counts is None else list(counts),
        f"{chosen} {name}",
    )
    return gram.flatten() if group_size is None else gram


def bias_norms(
    dy: Tensor,  # (T, p)
    segment_id: Tensor,  # (T,) non-decreasing
    *,
    num_segments: int,
    group_size: int | None = None,
    backend: str = "auto",
) -> Tensor:  # (S,) | (S / g, g, g)
    """Squared norm of sum_t dy_t: of the bias of a linear layer, or of a LayerNorm."""
    name = "bias_norms"
    _norm_checks.check_rows(name, ("dy", dy))
    _norm_checks.check_matrix(name, "dy", dy)
    _check_ids(name, "dy", dy, segment_id, num_segments, group_size)
    sums = column_sums(dy, segment_id, num_segments, name=name, backend=backend)
    return of_sums(sums, group_size)


def rmsnorm_norms(
    x: Tensor,  # (T, D) | (T, H, D), before the norm
    dy: Tensor,  # as x
    segment_id: Tensor,  # (T,) non-decreasing
    *,
    eps: float,
    num_segments: int,
    group_size: int | None = None,
    backend: str = "auto",
) -> Tensor:  # (S,) | (S / g, g, g)
    """Squared norm of the gradient of an RMSNorm's weight: of sum_t dy_t x_t rsqrt(mean x_t^2 +
    eps).

    Gemma's norm, which multiplies by 1 + w, has the same gradient. A qk-norm's weight is shared by
    heads and tokens: give x and dy as (T, H, D), and the sum runs over both.
    """
    name = "rmsnorm_norms"
    _check_norm(name, x, dy, segment_id, eps, num_segments, group_size)
    sums = column_sums(dy, segment_id, num_segments, x=x, eps=eps, name=name, backend=backend)
    return of_sums(sums, group_size)


class LayerNormNorms(NamedTuple):
    """Of a LayerNorm's weight and of its bias."""

    weight: Tensor
    bias: Tensor


def layernorm_norms(
    x: Tensor,  # (T, D), before the norm
    dy: Tensor,  # (T, D)
    segment_id: Tensor,  # (T,) non-decreasing
    *,
    eps: float,
    num_segments: int,
    group_size: int | None = None,
    backend: str = "auto",
) -> LayerNormNorms:  # each (S,) | (S / g, g, g)
    """Squared norms of a LayerNorm: of its weight, the gradient being the sum over rows of
    dy (x - mean) rsqrt(variance + eps), and of its bias, sum of dy."""
    name = "layernorm_norms"
    _check_norm(name, x, dy, segment_id, eps, num_segments, group_size)
    weight = column_sums(
        dy, segment_id, num_segments, x=x, eps=eps, centred=True, name=name, backend=backend
    )
    bias = column_sums(dy, segment_id, num_segments, name=name, backend=backend)
    return LayerNormNorms(of_sums(weight, group_size), of_sums(bias, group_size))


class LoraNorms(NamedTuple):
    """Of an adapter's A (r, d) and of its B (p, r)."""

    a: Tensor
    b: Tensor


def lora_norms(
    x: Tensor,  # (T, d), what A is applied to: after the adapter's dropout
    dy: Tensor,  # (T, p)
    lora_a: Tensor,  # (r, d)
    lora_b: Tensor,  # (p, r)
    segment_id: Tensor,  # (T,) non-decreasing
    *,
    scale: float,
    num_segments: int,
    group_size: int | None = None,
    counts: Sequence[int] | None = None,
    backend: str = "auto",
) -> LoraNorms:  # each (S,) | (S / g, g, g)
    """Squared norms of an adapter y = W x + scale B (A x): A has input x and gradient scale B^T dy,
    B has input A x and gradient scale dy."""
    name = "lora_norms"
    _norm_checks.check_scale(name, scale)
    inner, outer = adapter_sides(name, x, dy, lora_a, lora_b)
    a, b = (
        _linear_norms(name, inputs, outputs, segment_id, num_segments, group_size, counts, backend)
        for inputs, outputs in ((x, outer), (inner, dy))
    )
    return LoraNorms(a * (scale * scale), b * (scale * scale))


def adapter_sides(
    name: str, x: Tensor, dy: Tensor, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor]:
    """A x and B^T dy, (T, r) each: the input of B and, times the scale, the gradient that reaches
    A.

    Narrow, so cheap to keep in float32: nothing is rounded on the way.
    """
    _norm_checks.check_rows(name, ("x", x), ("dy", dy))
    _norm_checks.check_matrix(name, "x", x)
    _norm_checks.check_matrix(name, "dy", dy)
    _norm_checks.check_matrix(name, "lora_a", lora_a, x.shape[1])
    _norm_checks.check_matrix(name, "lora_b", lora_b, lora_a.shape[0])
    _norm_checks.check_device(name, "x", x, "lora_a", lora_a)
    _norm_checks.check_device(name, "x", x, "lora_b", lora_b)
    if lora_b.shape[0] != dy.shape[1]:
        raise ValueError(
            f"{name}: expected lora_b with the {dy.shape[1]} outputs of dy as rows, got "
            f"{tuple(lora_b.shape)}."
        )
    dtype = wide_dtype(x, dy, lora_a, lora_b)
    with torch.no_grad(), surroundings(x.device):
        return multiply(x, lora_a.t(), dtype), multiply(dy, lora_b, dtype)


def of_sums(sums: Tensor, group_size: int | None) -> Tensor:
    """Squared norms or Gram matrices of the gradients themselves, (S, D)."""
    if group_size is None:
        return sums.square().sum(1)
    grouped = sums.unflatten(0, (-1, group_size)) if len(sums) else sums.view(0, group_size, 0)
    with surroundings(sums.device):
        return torch.bmm(grouped, grouped.transpose(1, 2))


def _check_ids(
    name: str,
    lead: str,
    model: Tensor,
    segment_id: Tensor,
    num_segments: int,
    group_size: int | None,
) -> None:
    _norm_checks.check_ids(name, "segment_id", segment_id, lead, model)
    _norm_checks.check_segments(name, model.shape[0], num_segments, group_size, None)


def _check_norm(
    name: str,
    x: Tensor,
    dy: Tensor,
    segment_id: Tensor,
    eps: float,
    num_segments: int,
    group_size: int | None,
) -> None:
    _norm_checks.check_rows(name, ("x", x), ("dy", dy))
    if x.shape != dy.shape or x.dim() > 3:
        raise ValueError(
            f"{name}: expected x and dy of one shape, (T, D) or (T, H, D), got {tuple(x.shape)} "
            f"and {tuple(dy.shape)}."
        )
    if not eps >= 0:
        raise ValueError(f"{name}: eps must be >= 0, got {eps!r}.")
    _check_ids(name, "x", x, segment_id, num_segments, group_size)


@torch.library.custom_op(
    "fastpref::pair_gram",
    mutates_args=(),
    schema="(Tensor x, Tensor[] dy, Tensor segment_id, SymInt segments, int group_size, "
    "int[]? counts, str backend) -> Tensor",
)
def _pair_gram_op(
    x: Tensor,
    dy: Sequence[Tensor],
    segment_id: Tensor,
    segments: int,
    group_size: int,
    counts: Sequence[int] | None,
    backend: str,
) -> Tensor:
    chosen, name = backend.split()
    counts = counted(counts, segment_id, segments, name)
    with surroundings(x.device):
        products = torch_segment_products
        if chosen == "triton":
            from .triton_pair_gram import triton_pair_gram
            from .triton_sketch import triton_segment_products

            if not is_narrow(x, dy):
                return triton_pair_gram(x, dy, segment_id, counts, group_size)
            products = triton_segment_products
        if is_narrow(x, dy):
            return narrow_gram(x, dy[0], counts, group_size, products)
        return pair_gram(x, dy, segment_id, counts, group_size)


@_pair_gram_op.register_fake
def _pair_gram_fake(
    x: Tensor, dy: Sequence[Tensor], segment_id: Tensor, segments: int, group_size: int, *_: object
) -> Tensor:
    shape = (segments // group_size, group_size, group_size)
    return x.new_empty(shape, dtype=wide_dtype(x, *dy))
