"""Exact Gram matrices of head gradients of groups of a few rows, in Triton: every product of two
rows once, in plain arithmetic, where a product of blocks would be nearly all padding.

Shapes: R rows, D hidden, S segments, g group_size, L rows of a group, C columns at a time. What is
computed and how it is summed up: gram_tile.py. Imports triton.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

MOST = 4  # rows of a group: L (L + 1) / 2 sums of C columns stand in registers
HALF_COLUMNS, FLOAT_COLUMNS, WARPS = 256, 128, 1  # 16 bytes a thread


@triton.jit
def _add_products(sums, lines, L: tl.constexpr):
    """sums[n] + lines[t] lines[s] for t <= s, n counting them."""
    found = ()
    for t in tl.static_range(L):
        for s in tl.static_range(t, L):
            total = sums[t * L - t * (t - 1) // 2 + s - t] + lines[t] * lines[s]
            found = found + (total,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _zeros(COUNT: tl.constexpr, C: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((C,), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit(do_not_specialize=["rows", "columns", "correct"])
def gram_few_kernel(
    exps,  # tiles one after the other, each (R, C)
    offsets,  # (N, R) fp32
    hidden,  # (R, D)
    target,  # (R,) int32
    segment,  # (R,) int32
    final,  # (R,) fp32
    own,  # (R,) fp32
    scale,  # (R,) fp32
    first,  # (P,) int32: first row of every group
    sums,  # (P, splits, L, g) fp32 out: over the rows of each segment, for each row
    rows,  # R
    columns,  # of all tiles, padding included
    tile_width,
    tiles_each,  # of a split
    correct,  # whether the target's term is to be brought from E's dtype to float32
    DIM: tl.constexpr,  # D
    GROUP: tl.constexpr,  # g
    PARTS: tl.constexpr,  # a power of two, at least g
    L: tl.constexpr,
    C: tl.constexpr,
):
    """One group and a share of the tiles: (d_t . d_s)(h_t . h_s), summed by segment."""
    group, split = tl.program_id(0), tl.program_id(1)
    count: tl.constexpr = L * (L + 1) // 2
    begin, col = tl.load(first + group), tl.arange(0, C)
    dots = _zeros(count, C)
    low_tile = split * tiles_each * tile_width
    for low in range(low_tile, min(low_tile + tiles_each * tile_width, columns), tile_width):
        stride = tl.multiple_of(min(tile_width, columns - low), 16)
        tile = exps + rows.to(tl.int64) * low
        offset = offsets + rows.to(tl.int64) * (low // tile_width)
        moves = ()
        for t in tl.static_range(L):
            move = tl.exp(tl.load(offset + begin + t) - tl.load(final + begin + t))
            moves = moves + (move,)  # type: ignore[assignment]  # noqa: RUF005
        for c in range(0, stride, C):
            lines = ()
            for t in tl.static_range(L):
                at = tile + (begin + t).to(tl.int64) * stride + c + col
                line = tl.load(at, mask=c + col < stride, other=0.0).to(tl.float32)
                lines = lines + (line * moves[t],)  # type: ignore[assignment]  # noqa: RUF005
            dots = _add_products(dots, lines, L)
    states = _zeros(count, C)
    for d in range(0, DIM, C):
        lines = ()
        for t in tl.static_range(L):
            at = hidden + (begin + t).to(tl.int64) * DIM + d + col
            line = tl.load(at, mask=d + col < DIM, other=0.0).to(tl.float32)
            lines = lines + (line,)  # type: ignore[assignment]  # noqa: RUF005
        states = _add_products(states, lines, L)

    found = ()
    for t in tl.static_range(L):
        for s in tl.static_range(t, L):
            dot = tl.sum(dots[t * L - t * (t - 1) // 2 + s - t], 0)
            if (correct != 0) & (split == 0):
                # What is rounded in E is one entry of a row, but the largest by far.
                own_t, own_s = tl.load(own + begin + t), tl.load(own + begin + s)
                kept_t = own_t.to(exps.dtype.element_ty).to(tl.float32)
                kept_s = own_s.to(exps.dtype.element_ty).to(tl.float32)
                same = tl.load(target + begin + t) == tl.load(target + begin + s)
                dot += tl.where(same, own_t * own_s - kept_t * kept_s, 0.0)
            dot *= tl.load(scale + begin + t)
            dot *= tl.load(scale + begin + s)
            dot *= tl.sum(states[t * L - t * (t - 1) // 2 + s - t], 0)
            found = found + (dot,)  # type: ignore[assignment]  # noqa: RUF005

    out = sums + (group * tl.num_programs(1) + split).to(tl.int64) * L * GROUP
    part = tl.arange(0, PARTS)
    for t in tl.static_range(L):
        total = tl.zeros((PARTS,), tl.float32)
        for s in tl.static_range(0, t):
            own_part = tl.load(segment + begin + s) % GROUP == part
            total += tl.where(own_part, found[s * L - s * (s - 1) // 2 + t - s], 0.0)
        for s in tl.static_range(t, L):
            own_part = tl.load(segment + begin + s) % GROUP == part
            total += tl.where(own_part, found[t * L - t * (t - 1) // 2 + s - t], 0.0)
        tl.store(out + t * GROUP + part, total, mask=part < GROUP)
