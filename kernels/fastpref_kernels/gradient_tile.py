"""Gram matrices of segments' gradients in Triton, a tile of each gradient at a time, on the chip.

Shapes: T rows, p columns of `left`, d columns of `right`, S segments, g group_size, n segments of a
set, M x N a tile. The gradient of a segment is left_s^T right_s, (p, d). One program takes a set of
segments and one tile: it accumulates the tile of every segment's gradient in registers, one after
the other, multiplies each with each, and writes n (n + 1) / 2 numbers: no gradient reaches memory,
nothing is added atomically. Which groups go this way: kernels/README.md. Imports triton.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import AotCase, case_of
from ._launch import Launch, launch, recorded
from .spans import kept_tables, starts, to_device


class Shape(NamedTuple):
    """Of a program."""

    tile: tuple[int, int]  # M x N
    depth: int  # rows at a time
    warps: int
    stages: int


# By the segments of a set, the first that holds as many. More tiles in registers would spill; a
# larger group goes as all sets of two. float32, which the tensor cores take in three parts, is not
# pipelined: copies that are transposed on the way would be of 4 bytes.
HALF_SHAPES = (
    (2, Shape((128, 128), 64, 8, 3)),
    (3, Shape((128, 64), 64, 8, 3)),
    (5, Shape((64, 64), 64, 8, 3)),
)
FLOAT_SHAPES = ((3, Shape((64, 64), 32, 8, 1)),)
FEW = 32  # rows at a time whose target lies in a tile


@triton.jit
def _gradient(
    left,
    right,
    lo,
    hi,
    at_i,
    at_j,
    columns_left,
    columns_right,
    stride_left,
    stride_right,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of left^T right over the rows lo .. hi - 1."""
    acc = tl.zeros((at_i.shape[0], at_j.shape[0]), tl.float32)
    lane = tl.arange(0, DEPTH)
    for start in range(lo, hi, DEPTH):
        row = start + lane
        # Not clamped instead: a product with a row of another segment, which may be infinite.
        inside = (row < hi)[:, None]
        mask_left, mask_right = inside, inside
        if not EVEN:
            mask_left = inside & (at_i < columns_left)[None, :]
            mask_right = inside & (at_j < columns_right)[None, :]
        at = row.to(tl.int64)[:, None]
        a = tl.load(left + at * stride_left + at_i[None, :], mask=mask_left, other=0.0)
        b = tl.load(right + at * stride_right + at_j[None, :], mask=mask_right, other=0.0)
        if left.dtype.element_ty != right.dtype.element_ty:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _lost(
    acc,
    right,
    order,
    target,
    lost,
    lo,
    hi,
    low,
    at_i,
    at_j,
    columns_right,
    stride_right,
    FEW: tl.constexpr,
):
    """acc and what the rows order[lo .. hi - 1] lack at their target, which lies in this tile."""
    lane = tl.arange(0, FEW)
    for start in range(lo, hi, FEW):
        inside = start + lane < hi
        row = tl.load(order + start + lane, mask=inside, other=0)
        here = tl.load(target + row, mask=inside, other=-1) - low
        size = tl.load(lost + row, mask=inside, other=0.0)
        a = tl.where(here[:, None] == at_i[None, :], size[:, None], 0.0)
        b = tl.load(
            right + row.to(tl.int64)[:, None] * stride_right + at_j[None, :],
            mask=inside[:, None] & (at_j < columns_right)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(a.to(right.dtype.element_ty)), b, acc)
    return acc


@triton.jit(do_not_specialize=["low"])
def gradient_tile_kernel(
    left,  # (T, p)
    right,  # (T, d)
    first,  # (B n,) int32: first row of every segment of every set
    last,  # (B n,) int32: end of its rows
    out,  # (B, tiles, n (n + 1) / 2) fp32
    order,  # (T,) int32, rows by segment and target; None: nothing is lacking
    met,  # (B n, tiles of p + 1) int32: those of a segment with their target in a tile
    target,  # (T,) int32
    lost,  # (T,) fp32: what a row of `left` lacks at its target
    low,  # the id that column 0 of `left` stands for
    columns_left,  # p
    columns_right,  # d
    stride_left,
    stride_right,
    PARTS: tl.constexpr,  # n
    M: tl.constexpr,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    FEW: tl.constexpr,
    EVEN: tl.constexpr,  # p is a multiple of M, d of N
    PRECISION: tl.constexpr,  # of float32 operands
):
    """Inner products of the gradients of a set's segments within one tile of them."""
    block, own = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(columns_right, N)
    down = block // across
    at_i, at_j = down * M + tl.arange(0, M), (block % across) * N + tl.arange(0, N)
    gradients = ()
    for part in tl.static_range(PARTS):
        segment = own * PARTS + part
        lo, hi = tl.load(first + segment), tl.load(last + segment)
        acc = _gradient(
            left,
            right,
            lo,
            hi,
            at_i,
            at_j,
            columns_left,
            columns_right,
            stride_left,
            stride_right,
            DEPTH,
            EVEN,
            PRECISION,
        )
        if order is not None:
            some = met + segment * (tl.num_programs(0) // across + 1) + down
            acc = _lost(
                acc,
                right,
                order,
                target,
                lost,
                tl.load(some),
                tl.load(some + 1),
                low,
                at_i,
                at_j,
                columns_right,
                stride_right,
                FEW,
            )
        gradients = gradients + (acc,)  # type: ignore[assignment]  # noqa: RUF005
    count: tl.constexpr = PARTS * (PARTS + 1) // 2
    place = out + (own.to(tl.int64) * tl.num_programs(0) + block) * count
    for a in tl.static_range(PARTS):
        for b in tl.static_range(a, PARTS):
            # As one row: triton 3.6 fails on a sum along one side of a product on sm_100.
            both = tl.reshape(gradients[a] * gradients[b], (M * N,))
            tl.store(place + a * PARTS - a * (a - 1) // 2 + b - a, tl.sum(both, 0))


class Sets(NamedTuple):
    """Segments whose gradients are multiplied with each other, n at a time."""

    first: Tensor  # (B n,) int32
    last: Tensor  # (B n,) int32
    segment: Tensor  # (B n,) int64
    groups: Tensor  # (G,) int64
    pick: Tensor  # (G, g, g) int64: the number of B n (n + 1) / 2 that stands for two segments
    size: int  # n

    @property
    def number(self) -> int:
        """B."""
        return len(self.first) // self.size


class Lacking(NamedTuple):
    """What rows of `left` lack at their target, rounded as it is in there."""

    keys: Tensor  # (T,) int64: segment vocab + target, in rising order
    order: Tensor  # (T,) int32: the rows in that order
    target: Tensor  # (T,) int32
    lost: Tensor  # (T,) fp32
    vocab: int

    @staticmethod
    def of(segment: Tensor, target: Tensor, lost: Tensor, vocab: int) -> Lacking:
        """From `segment` and `target` (T,) int64, `lost` (T,)."""
        # A target out of range has made its row NaN already.
        target = target.clamp(0, vocab - 1)
        keys, order = (segment * vocab + target).sort(stable=True)
        return Lacking(keys, order.to(torch.int32), target.to(torch.int32), lost, vocab)


def make_sets(
    counts: tuple[int, ...],  # rows of every segment
    groups: tuple[int, ...],  # which go this way
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Sets:
    """A set for every group; of groups too large for the registers, one for every two segments."""
    return _sets(counts, groups, group_size, set_size(group_size, dtype), device)


def set_size(group_size: int, dtype: torch.dtype) -> int:
    """n: the group's g where as many tiles fit into registers, else 2."""
    return group_size if group_size <= _shapes(dtype)[-1][0] else 2


@kept_tables
def _sets(
    counts: tuple[int, ...],
    groups: tuple[int, ...],
    group_size: int,
    size: int,
    device: torch.device,
) -> Sets:
    parts = range(group_size)
    within = [tuple(parts)] if size == group_size else [(a, b) for b in parts for a in range(b)]
    per_set = size * (size + 1) // 2
    sets: list[list[int]] = []
    pick: list[int] = []
    for group in groups:
        place: dict[tuple[int, int], int] = {}
        for chosen in within:
            for i, a in enumerate(chosen):
                for j, b in enumerate(chosen[i:], i):
                    number = len(sets) * per_set + i * size - i * (i - 1) // 2 + j - i
                    place[a, b] = place[b, a] = number
            sets.append([group * group_size + part for part in chosen])
        pick += [place[a, b] for a in parts for b in parts]
    bounds, segments = starts(counts), sum(sets, [])
    columns = [
        [bounds[s] for s in segments],
        [bounds[s + 1] for s in segments],
        segments,
        list(groups),
        pick,
    ]
    packed = to_device(sum(columns, []), device)
    first, last, segment, own, picked = packed.split([len(c) for c in columns])
    shape = (len(groups), group_size, group_size)
    return Sets(first, last, segment.long(), own.long(), picked.long().view(shape), size)


def gradient_products(
    left: Tensor,  # (T, p), last dimension contiguous
    right: Tensor,  # (T, d), likewise
    sets: Sets,
    lacking: Lacking | None = None,
    low: int = 0,  # the id that column 0 of `left` stands for
) -> Tensor:  # (B n (n + 1) / 2,) float64
    """<left_a^T right_a, left_b^T right_b> of all segments a, b of every set.

    Memory    tiles of (p, d) times B n (n + 1) / 2 float32 numbers
    Numerics  gradients in float32, a tile's products in float32, their sum in float64
    """
    (columns_left, columns_right), size = (left.shape[1], right.shape[1]), sets.size
    wide = torch.promote_types(left.dtype, right.dtype)
    (tall, broad), depth, warps, stages = tile_shape(wide, size)
    down, across = -(-columns_left // tall), -(-columns_right // broad)
    out = left.new_empty(sets.number, down * across, size * (size + 1) // 2, dtype=torch.float32)
    met = None
    if lacking is not None:
        edges = torch.arange(down + 1, device=left.device) * tall + low
        edges = edges.clamp(max=min(low + columns_left, lacking.vocab))
        wanted = sets.segment.unsqueeze(1) * lacking.vocab + edges
        met = torch.searchsorted(lacking.keys, wanted, out_int32=True)
    launch(
        gradient_tile_kernel,
        (down * across, sets.number),
        {
            "left": left,
            "right": right,
            "first": sets.first,
            "last": sets.last,
            "out": out,
            "order": None if lacking is None else lacking.order,
            "met": met,
            "target": None if lacking is None else lacking.target,
            "lost": None if lacking is None else lacking.lost,
            "low": low,
            "columns_left": columns_left,
            "columns_right": columns_right,
            "stride_left": left.stride(0),
            "stride_right": right.stride(0),
            "PARTS": size,
            "M": tall,
            "N": broad,
            "DEPTH": depth,
            "FEW": FEW,
            "EVEN": columns_left % tall == 0 and columns_right % broad == 0,
            "PRECISION": "tf32x3",
        },
        warps=warps,
        stages=stages,
    )
    return out.sum(1, dtype=torch.float64).flatten()


def tile_shape(dtype: torch.dtype, size: int) -> Shape:
    """For sets of `size` segments, of operands of this dtype."""
    return next(shape for most, shape in _shapes(dtype) if size <= most)


def numbers_loaded(counts: Sequence[int], rows: int, columns: int, dtype: torch.dtype) -> int:
    """Operands that programs load for one group with `counts` rows in its segments, for gradients
    (rows, columns)."""
    size = set_size(len(counts), dtype)
    (tall, broad), depth, _, _ = tile_shape(dtype, size)
    padded = sum(-(-count // depth) * depth for count in counts)
    times = 1 if size == len(counts) else len(counts) - 1  # sets that a segment is in
    down, across = -(-rows // tall), -(-columns // broad)
    return times * padded * down * across * (tall + broad)


def _shapes(dtype: torch.dtype) -> tuple[tuple[int, Shape], ...]:
    return FLOAT_SHAPES if dtype == torch.float32 else HALF_SHAPES


def aot_cases() -> list[AotCase]:
    """Every entry of the tables for layers, and for the head with what is lacking at targets."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        archs = (90,) if dtype == torch.float16 else (80, 90, 100)
        for size in range(1, _shapes(dtype)[-1][0] + 1):
            for head in (False, True)[: 1 + (dtype != torch.float32)]:
                name = f"gradient_tile {str(dtype).removeprefix('torch.')} of {size}"
                for one in _launches(dtype, size, head):
                    case = case_of(f"{name}, head" if head else name, one, archs)
                    cases.append(replace(case, wide_loads=True))
    return cases


def _launches(dtype: torch.dtype, size: int, head: bool) -> list[Launch]:
    seen: list[Launch] = []
    rows, columns, dim = 512, 8192, 4096

    def numbers(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=kind)

    ids = numbers(size, kind=torch.int32)
    sets = Sets(ids, ids, numbers(size), numbers(1), numbers(1, size, size), size)
    lacking = None
    if head:
        lacking = Lacking.of(
            numbers(rows), numbers(rows), numbers(rows, kind=torch.float32), columns
        )
    with recorded(seen.append):
        left, right = numbers(rows, columns, kind=dtype), numbers(rows, dim, kind=dtype)
        gradient_products(left, right, sets, lacking)
    return seen
