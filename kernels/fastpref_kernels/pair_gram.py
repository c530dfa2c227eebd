"""Inner products of weight gradients within groups of segments, in plain torch.

Shapes: T rows, d inputs, p outputs, S segments, g group_size. The gradient of segment s is
G_s = sum over its rows t of dy_t x_t^T (p, d); what is wanted is <G_a, G_b> for the segments of one
group. Formulas, cost and numerics: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .segment_products import multiply, torch_segment_products, wide_dtype
from .spans import Span, cut, group_counts, runs, starts

# Rows that one product of the Gram matrix covers. Small groups share a block of MERGE rows: a
# product of a few rows costs its launch, not its arithmetic.
TILE, MERGE = 128, 64
# Entries of a segment's gradient that stand in memory at a time; a GPU wants larger products.
PRODUCT_ENTRIES, PRODUCT_ENTRIES_CUDA = 1 << 20, 1 << 22
NARROW, NARROW_ENTRIES = 128, 1 << 24  # an adapter's side; entries of gradients at a time


def longest_pair_gram(inputs: int, outputs: int) -> int:
    """Rows of a group up to which its Gram matrix costs no more than its gradient.

    Gram 2 T^2 (d + p) operations, gradient 2 T d p: T <= d p / (d + p).
    """
    return inputs * outputs // max(inputs + outputs, 1)


def pair_gram(
    x: Tensor,  # (T, d)
    dy: Sequence[Tensor],  # each (T, p_j); their weights share x, p = sum p_j
    segment_id: Tensor,  # (T,) non-decreasing
    counts: Sequence[int],  # (S,) rows of every segment
    group_size: int,
) -> Tensor:  # (S / g, g, g)
    """<G_a, G_b> of all segments a, b of every group, by the cheaper way for each group's length.

    Memory    MERGE^2 or TILE * L numbers for a group of L rows; PRODUCT_ENTRIES * g where gradients
              are formed. Half inputs on the CPU: one block's rows in float32.
    Numerics  accumulated in float32 (float64), reduced in float64, diagonal never negative.
    """
    dtype = wide_dtype(x, *dy)
    groups, rows = len(counts) // group_size, group_counts(counts, group_size)
    out = x.new_zeros(groups, group_size, group_size, dtype=dtype)
    longest = longest_pair_gram(x.shape[1], sum(y.shape[1] for y in dy))
    for short, first, last in runs(rows, longest):
        if short:
            _short(out, x, dy, segment_id, rows, first, last, group_size)
        else:
            bounds = starts(counts)[first * group_size : last * group_size + 1]
            out[first] = pair_product_gram(x, dy, bounds)
    out.diagonal(dim1=1, dim2=2).clamp_(min=0.0)
    return out


def _short(
    out: Tensor,
    x: Tensor,
    dy: Sequence[Tensor],
    segment_id: Tensor,
    rows: Sequence[int],
    first: int,
    last: int,
    group_size: int,
) -> None:
    for span in cut(rows, first, last, MERGE):
        part = _span_gram(x, dy, segment_id, span, group_size)
        # A group that is not finite would spoil its neighbours in the reduction (0 * inf).
        if span.last - span.first > 1 and not bool(part.isfinite().all()):
            for own in cut(rows, span.first, span.last, 0):
                out[own.first : own.last] = _span_gram(x, dy, segment_id, own, group_size)
        else:
            out[span.first : span.last] = part


def _span_gram(
    x: Tensor, dy: Sequence[Tensor], segment_id: Tensor, span: Span, group_size: int
) -> Tensor:  # (groups of the span, g, g)
    """Blocks of TILE rows against themselves and against all later rows of the span."""
    dtype = wide_dtype(x, *dy)
    lo, hi, groups = span.lo, span.hi, span.last - span.first
    segments = groups * group_size
    operands = [a[lo:hi] if a.is_cuda else a[lo:hi].to(dtype) for a in (x, *dy)]
    own = None
    if segments > 1:
        parts = torch.arange(segments, device=x.device) + span.first * group_size
        own = (segment_id[lo:hi].unsqueeze(1) == parts).to(dtype)
    total = x.new_zeros(segments, segments, dtype=torch.float64)
    for i in range(0, hi - lo, TILE):
        end = min(i + TILE, hi - lo)
        dots = _dots(operands[0], i, end, dtype)
        other = _dots(operands[1], i, end, dtype)
        for operand in operands[2:]:
            other += _dots(operand, i, end, dtype)
        dots *= other
        square, rest = dots[:, : end - i], dots[:, end - i :]
        if own is None:
            total += square.sum(dtype=torch.float64)
            total += 2.0 * rest.sum(dtype=torch.float64)
        else:
            left = own[i:end].t()
            total += left @ (square @ own[i:end])
            if rest.shape[1]:
                later = left @ (rest @ own[end:])
                total += later + later.t()
    if groups == 1:
        return total.unsqueeze(0)
    blocks = total.view(groups, group_size, groups, group_size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _dots(operand: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    return multiply(operand[first:last], operand[first:].t(), dtype)


def is_narrow(x: Tensor, dy: Sequence[Tensor]) -> bool:
    """One side is so small that gradients are cheaper than Gram matrices at nearly any length."""
    return len(dy) == 1 and min(x.shape[1], dy[0].shape[1]) <= NARROW


def narrow_gram(
    x: Tensor,
    dy: Tensor,
    counts: Sequence[int],
    group_size: int,
    products: Callable[[Tensor, Tensor, Sequence[int]], Tensor] = torch_segment_products,
) -> Tensor:  # (S / g, g, g)
    """As `pair_gram`, by the gradients of many segments at once. `products`: see
    `torch_segment_products`."""
    narrow, other = (dy, x) if dy.shape[1] <= x.shape[1] else (x, dy)
    size = narrow.shape[1] * other.shape[1] * group_size
    step = max(NARROW_ENTRIES // max(size, 1), 1) * group_size
    bounds, found = starts(counts), []
    for first in range(0, len(counts), step):
        own = counts[first : first + step]
        lo, hi = bounds[first], bounds[first + len(own)]
        flat = products(narrow[lo:hi], other[lo:hi], own).flatten(1)
        grouped = flat.view(len(own) // group_size, group_size, -1)
        if group_size == 1:
            found.append(grouped.square().sum(-1, keepdim=True))
        else:
            found.append(torch.bmm(grouped, grouped.transpose(1, 2)))
    if found:
        return torch.cat(found)
    return x.new_zeros(0, group_size, group_size, dtype=wide_dtype(x, dy))


def pair_product_gram(x: Tensor, dy: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:  # (g, g)
    """The Gram matrix of one group by its segments' gradients, formed a tile of rows at a time.

    `bounds`: first row of each of the g segments, and the end of the last.
    """
    dtype, size = wide_dtype(x, *dy), len(bounds) - 1
    total = x.new_zeros(size, size, dtype=torch.float64)
    lo = bounds[0]
    inputs = x[lo : bounds[-1]]
    if not x.is_cuda:
        inputs = inputs.to(dtype)
    entries = PRODUCT_ENTRIES_CUDA if x.is_cuda else PRODUCT_ENTRIES
    step = max(entries // max(x.shape[1], 1), 1)
    for outputs in dy:
        for i in range(0, outputs.shape[1], step):
            columns = outputs[lo : bounds[-1], i : i + step]
            if not x.is_cuda:
                columns = columns.to(dtype)
            gradients = [
                multiply(columns[a - lo : b - lo].t(), inputs[a - lo : b - lo], dtype).flatten()
                for a, b in zip(bounds, bounds[1:], strict=False)
            ]
            if size == 1:
                total += gradients[0].square_().sum()  # no sign, so nothing cancels
            else:
                flat = torch.stack(gradients).double()
                total += flat @ flat.t()
    return total
