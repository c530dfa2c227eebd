"""The Triton kernels of `pair_loss`: one launch forward, one backward.

Shapes: R rows, P pairs, g group_size. A program of the forward is a pair: it finds its rows by
bisection, sums each of its segments in float64 and forms everything that follows. No atomics.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._aot import AotCase, case_of

if TYPE_CHECKING:
    from .pair_loss import Plan

ROWS = 512  # summed at a time: a completion is some hundred rows
BACKWARD_ROWS = 1024
WARPS = 4
COLUMNS = 10  # of pair_loss.COLUMNS, in its order


@triton.jit
def _log1p(x):
    # log(1 + x) to the last digit for tiny x too: the rounding of 1 + x is divided out again.
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def _first_rows(segment_ptr, rows, key):
    # By bisection, for each of four ids: the first row whose id is not below it.
    low = tl.zeros((4,), tl.int32)
    high = low + rows
    span = rows
    while span > 0:
        middle = (low + high) // 2
        open_ = low < high
        below = open_ & (tl.load(segment_ptr + middle, mask=open_, other=0) < key)
        high = tl.where(open_ & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
        span = span // 2
    return low


@triton.jit
def _loss_and_slope(gap, beta, eps, SHAPE: tl.constexpr, ROBUST: tl.constexpr):
    # The loss of one pair and its derivative in `gap`, all float64: kernels/README.md's table.
    if SHAPE == 2:
        gap = gap - 0.5 / beta
        loss = gap * gap
        slope = 2.0 * gap
    elif SHAPE == 1:
        gap = 1.0 - beta * gap
        loss = tl.where(gap <= 0.0, 0.0, gap)
        slope = tl.where(gap > 0.0, -beta, 0.0)
    else:
        z = beta * gap
        small = tl.exp(-tl.abs(z))
        log1p = _log1p(small)
        minus_log_right = log1p - tl.where(z < 0.0, z, 0.0)  # -log sigma(z)
        minus_log_wrong = log1p + tl.where(z > 0.0, z, 0.0)  # -log sigma(-z)
        right = tl.where(z > 0.0, 1.0, small) / (1.0 + small)  # sigma(z)
        wrong = tl.where(z > 0.0, small, 1.0) / (1.0 + small)
        if ROBUST:
            norm = 1.0 / (1.0 - 2.0 * eps)
            other = -eps
        else:
            norm = 1.0
            other = eps
        loss = ((1.0 - eps) * minus_log_right + other * minus_log_wrong) * norm
        slope = (other * right - (1.0 - eps) * wrong) * (beta * norm)
    return loss, slope


@triton.jit
def pair_forward(
    logp_ptr,  # (R,) float32 | float64
    segment_ptr,  # (R,) int32 | int64, non-decreasing
    ref_chosen_ptr,  # (P,)
    ref_rejected_ptr,
    chosen_len_ptr,  # (P,)
    rejected_len_ptr,
    loss_ptr,  # (P,)
    table_ptr,  # (COLUMNS, P)
    rows,
    pairs,
    beta: tl.float64,
    eps: tl.float64,
    GROUP: tl.constexpr,  # 2 | 3
    SHAPE: tl.constexpr,  # 0 logistic, 1 hinge, 2 square
    PER_TOKEN: tl.constexpr,
    ROBUST: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair: sums of its segments, and every column of `PairLoss`."""
    pair = tl.program_id(0)
    dtype = logp_ptr.dtype.element_ty
    slot = tl.arange(0, 4)
    valid = rows >= 0
    if HAS_SEGMENTS:
        low = _first_rows(segment_ptr, rows, pair * GROUP + slot)
        # Rows of no pair would be left out in silence.
        last = tl.load(segment_ptr + rows - 1, mask=rows > 0, other=0)
        first_id = tl.load(segment_ptr, mask=rows > 0, other=0)
        valid = (last < GROUP * pairs) & (first_id >= 0)
    else:
        low = pair * GROUP + slot
    start = tl.sum(tl.where(slot == 0, low, 0), 0)
    second = tl.sum(tl.where(slot == 1, low, 0), 0)
    third = tl.sum(tl.where(slot == 2, low, 0), 0)
    end = tl.sum(tl.where(slot == GROUP, low, 0), 0)

    offset = tl.arange(0, BLOCK)
    sum_0 = tl.zeros((BLOCK,), tl.float64)
    sum_1 = tl.zeros((BLOCK,), tl.float64)
    sum_2 = tl.zeros((BLOCK,), tl.float64)
    strays = tl.zeros((BLOCK,), tl.int32)
    for begin in range(start, end, BLOCK):
        row = begin + offset
        x = tl.load(logp_ptr + row, mask=row < end, other=0.0).to(tl.float64)
        sum_0 += tl.where(row < second, x, 0.0)
        sum_1 += tl.where((row >= second) & (row < third), x, 0.0)
        if GROUP == 3:
            sum_2 += tl.where(row >= third, x, 0.0)
        if HAS_SEGMENTS:
            segment = pair * GROUP + (row >= second).to(tl.int32)
            if GROUP == 3:
                segment += (row >= third).to(tl.int32)
            found = tl.load(segment_ptr + row, mask=row < end, other=0)
            strays += ((row < end) & (found != segment)).to(tl.int32)
    if HAS_SEGMENTS:
        # Bisection gives every row to one pair at most, to one and no less if the first pair begins
        # at the first row and the last ends at the last: ids that fall are then seen by some pair.
        valid = valid & (tl.sum(strays, 0) == 0)
        valid = valid & ((pair > 0) | (start == 0)) & ((pair < pairs - 1) | (end == rows))
    # Rounded once, then added and subtracted as the caller would: a policy that is its own
    # reference then has a margin of exactly 0.
    part_0 = tl.sum(sum_0, 0).to(dtype)
    part_1 = tl.sum(sum_1, 0).to(dtype)
    if GROUP == 3:
        chosen = part_0 + part_1
        rejected = part_0 + tl.sum(sum_2, 0).to(dtype)
        chosen_rows = third - start
        rejected_rows = (second - start) + (end - third)
    else:
        chosen = part_0
        rejected = part_1
        chosen_rows = second - start
        rejected_rows = end - second
    chosen = tl.where(valid, chosen, float("nan"))
    chosen_ratio = chosen
    rejected_ratio = rejected
    if HAS_REFERENCE:
        chosen_ratio = chosen - tl.load(ref_chosen_ptr + pair).to(dtype)
        rejected_ratio = rejected - tl.load(ref_rejected_ptr + pair).to(dtype)
    margin = chosen_ratio - rejected_ratio

    # A pair's few numbers cost nothing in float64.
    one = tl.full((), 1.0, tl.float64)
    chosen_scale, rejected_scale = one, one
    gap = margin.to(tl.float64)
    if PER_TOKEN:
        if HAS_LENGTHS:
            chosen_scale = tl.load(chosen_len_ptr + pair).to(tl.float64)
            rejected_scale = tl.load(rejected_len_ptr + pair).to(tl.float64)
        else:
            chosen_scale = chosen_rows.to(tl.float64)
            rejected_scale = rejected_rows.to(tl.float64)
        chosen_scale = 1.0 / tl.where(chosen_scale < 1.0, 1.0, chosen_scale)
        rejected_scale = 1.0 / tl.where(rejected_scale < 1.0, 1.0, rejected_scale)
        gap = chosen_ratio.to(tl.float64) * chosen_scale
        gap -= rejected_ratio.to(tl.float64) * rejected_scale
    wide_beta = one * beta
    loss, slope = _loss_and_slope(gap, wide_beta, eps, SHAPE, ROBUST)

    reward_chosen = wide_beta * chosen_ratio
    reward_rejected = wide_beta * rejected_ratio
    tl.store(loss_ptr + pair, loss.to(dtype))
    cell = table_ptr + pair
    tl.store(cell, chosen)
    tl.store(cell + pairs, rejected)
    tl.store(cell + 2 * pairs, chosen_ratio)
    tl.store(cell + 3 * pairs, rejected_ratio)
    tl.store(cell + 4 * pairs, margin)
    tl.store(cell + 5 * pairs, reward_chosen.to(dtype))
    tl.store(cell + 6 * pairs, reward_rejected.to(dtype))
    tl.store(cell + 7 * pairs, (chosen_ratio > rejected_ratio).to(dtype))
    tl.store(cell + 8 * pairs, (slope * chosen_scale).to(dtype))
    tl.store(cell + 9 * pairs, (-slope * rejected_scale).to(dtype))


@triton.jit
def pair_backward(
    grad_ptr,  # (P,) at stride grad_stride: a mean's gradient is one number, stride 0
    table_ptr,  # (COLUMNS, P)
    segment_ptr,  # (R,)
    out_ptr,  # (R,)
    rows,
    pairs,
    grad_stride,
    GROUP: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK rows: each the gradient of its pair's loss times its segment's slope."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    segment = row
    if HAS_SEGMENTS:
        segment = tl.load(segment_ptr + row, mask=inside, other=0).to(tl.int32)
    pair = segment // GROUP
    part = segment - pair * GROUP
    # An id outside 0 .. g P - 1 reads nothing; the forward has made its loss NaN.
    inside_pair = inside & (pair >= 0) & (pair < pairs)
    chosen = tl.load(table_ptr + 8 * pairs + pair, mask=inside_pair, other=0.0)
    rejected = tl.load(table_ptr + 9 * pairs + pair, mask=inside_pair, other=0.0)
    grad = tl.load(grad_ptr + pair * grad_stride, mask=inside_pair, other=0.0)
    if GROUP == 3:
        slope = tl.where(part == 0, chosen + rejected, tl.where(part == 1, chosen, rejected))
    else:
        slope = tl.where(part == 0, chosen, rejected)
    tl.store(out_ptr + row, grad * slope, mask=inside)


def forward(
    logp: Tensor,
    segment_id: Tensor | None,
    reference: tuple[Tensor | None, Tensor | None],
    lengths: tuple[Tensor | None, Tensor | None],
    pairs: int,
    numbers: Sequence[float],
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """`pair_loss._forward_op` in one launch."""
    logp = logp.contiguous()
    loss, table = logp.new_empty(pairs), logp.new_empty(COLUMNS, pairs)
    ids, given = _contiguous(segment_id), [_contiguous(x) for x in (*reference, *lengths)]
    names = ("ref_chosen_ptr", "ref_rejected_ptr", "chosen_len_ptr", "rejected_len_ptr")
    # An argument that its flag switches off is never read; any tensor may stand there.
    arguments: dict[str, Any] = {
        name: logp if x is None else x for name, x in zip(names, given, strict=True)
    }
    arguments |= {
        "logp_ptr": logp,
        "segment_ptr": logp if ids is None else ids,
        "loss_ptr": loss,
        "table_ptr": table,
        "rows": logp.shape[0],
        "pairs": pairs,
        "beta": numbers[0],
        "eps": numbers[1],
        **constexprs(plan, ids is not None, given[0] is not None, given[2] is not None),
    }
    _launch.launch(pair_forward, (pairs,), arguments, warps=WARPS)
    return loss, table


def constexprs(
    plan: Plan, has_segments: bool, has_reference: bool, has_lengths: bool
) -> dict[str, Any]:
    """The forward's compile-time arguments."""
    return {
        "GROUP": plan.group,
        "SHAPE": plan.shape,
        "PER_TOKEN": bool(plan.per_token),
        "ROBUST": bool(plan.robust),
        "HAS_SEGMENTS": has_segments,
        "HAS_REFERENCE": has_reference,
        "HAS_LENGTHS": has_lengths,
        "BLOCK": ROWS,
    }


def backward(
    grad: Tensor, table: Tensor, segment_id: Tensor | None, rows: int, plan: Plan
) -> Tensor:
    """`pair_loss._backward_op` in one launch."""
    out, ids = table.new_empty(rows), _contiguous(segment_id)
    arguments = {
        "grad_ptr": grad,
        "table_ptr": table,
        "segment_ptr": table if ids is None else ids,
        "out_ptr": out,
        "rows": rows,
        "pairs": table.shape[1],
        "grad_stride": grad.stride(0),
        "GROUP": plan.group,
        "HAS_SEGMENTS": ids is not None,
        "BLOCK": BACKWARD_ROWS,
    }
    _launch.launch(pair_backward, (triton.cdiv(rows, BACKWARD_ROWS),), arguments, warps=WARPS)
    return out


def aot_cases() -> list[AotCase]:
    """Every loss in both layouts, float32: launches recorded on tensors without memory."""
    from .pair_loss import LOSS_TYPES, make_plan

    pairs, rows = 16, 4096
    of_pair = torch.empty(pairs, device="meta")
    logp = torch.empty(rows, device="meta")
    ids = torch.empty(rows, device="meta", dtype=torch.int32)
    cases = []
    for loss_type in LOSS_TYPES:
        for group in (2, 3):
            plan = make_plan(loss_type, group, "triton")
            seen: list[_launch.Launch] = []
            with _launch.recorded(seen.append):
                reference = (of_pair, of_pair)
                _, table = forward(logp, ids, reference, (None, None), pairs, [0.1, 0.0], plan)
                if loss_type == "sigmoid":
                    backward(of_pair, table, ids, rows, plan)
            for launch in seen:
                name = "pair_forward" if launch.kernel is pair_forward else "pair_backward"
                archs = (80, 90, 100) if loss_type == "sigmoid" else (90,)
                cases.append(case_of(f"{name} {loss_type}, groups of {group}", launch, archs))
    return cases


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
