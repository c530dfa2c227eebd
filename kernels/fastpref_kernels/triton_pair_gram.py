# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The Triton kernels of `linear_norms`: Gram matrices of rows, multiplied and summed on the chip.

Shapes: T rows, d inputs, p outputs, S segments, g group_size; a tile is BLOCK rows of one span
(`spans.cut`: some small groups, or one group), J the most tiles that a span has. One program takes
a tile and the j-th tile after it of the same span: x . x and dy . dy of their rows accumulate in
registers, their product is summed over the other tile's rows of each segment. What leaves the chip
is (J, g, T) numbers, and (2, g, S) after the second kernel; no atomics. Formulas:
kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import AotCase
from ._launch import launch
from .gradient_tile import gradient_products, make_sets
from .pair_gram import longest_pair_gram
from .spans import cut, group_counts, kept_tables, runs, starts, to_device

# Tile rows, depth of a step of a product, warps, stages. The larger one has twice the arithmetic
# per byte that is read.
LARGE = (128, 64, 8, 3)
SMALL = (64, 64, 4, 3)
SPLIT = (64, 32, 4, 3)  # float32, which the tensor cores take in three parts


@triton.jit
def _dots(
    data,
    stride,
    rows_i,
    rows_j,
    columns,
    active,
    acc,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + data[rows_i] data[rows_j]^T over all columns; nothing where not `active`."""
    left = data + rows_i.to(tl.int64)[:, None] * stride
    right = data + rows_j.to(tl.int64)[:, None] * stride
    depth = tl.arange(0, DEPTH)
    for k in range(0, tl.where(active, columns, 0), DEPTH):
        at = (k + depth)[None, :]
        if EVEN:
            a, b = tl.load(left + at), tl.load(right + at)
        else:
            a = tl.load(left + at, mask=at < columns, other=0.0)
            b = tl.load(right + at, mask=at < columns, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def pair_gram_kernel(
    x,  # (T, d)
    dy0,  # (T, p0); dy1, dy2 as far as OUTPUTS says
    dy1,
    dy2,
    segment,  # (T,)
    tile_first,  # (N,) int32: first row of every tile
    tile_last,  # (N,) int32: end of its rows
    span_tiles,  # (N,) int32: tiles of its span from this one on
    out,  # (J, g, T) fp32
    rows,
    inputs,
    outputs0,
    outputs1,
    outputs2,
    stride_x,
    stride0,
    stride1,
    stride2,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,  # every number of columns is a multiple of DEPTH
    PRECISION: tl.constexpr,  # of float32 operands
):
    """out[j, b, t] = sum over rows s of part b, of t's group, in the j-th tile from t's on."""
    tile, j = tl.program_id(0), tl.program_id(1)
    active = j < tl.load(span_tiles + tile)
    other = tl.where(active, tile + j, tile)
    lane = tl.arange(0, BLOCK)
    row_i, row_j = tl.load(tile_first + tile) + lane, tl.load(tile_first + other) + lane
    last_i, last_j = tl.load(tile_last + tile), tl.load(tile_last + other)
    inside_i, inside_j = row_i < last_i, row_j < last_j
    # Rows beyond a tile are read as its last one, and left out of the sums: a mask on rows would
    # split the loads.
    row_i, row_j = tl.minimum(row_i, last_i - 1), tl.minimum(row_j, last_j - 1)

    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    acc = _dots(dy0, stride0, row_i, row_j, outputs0, active, acc, DEPTH, EVEN, PRECISION)
    if OUTPUTS > 1:
        acc = _dots(dy1, stride1, row_i, row_j, outputs1, active, acc, DEPTH, EVEN, PRECISION)
    if OUTPUTS > 2:
        acc = _dots(dy2, stride2, row_i, row_j, outputs2, active, acc, DEPTH, EVEN, PRECISION)
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    acc *= _dots(x, stride_x, row_i, row_j, inputs, active, zero, DEPTH, EVEN, PRECISION)

    segment_i, segment_j = tl.load(segment + row_i), tl.load(segment + row_j)
    same = (segment_i // GROUP)[:, None] == (segment_j // GROUP)[None, :]
    same = same & inside_j[None, :] & active
    for part in tl.static_range(GROUP):
        own = same & (segment_j % GROUP == part)[None, :]
        total = tl.sum(tl.where(own, acc, 0.0), 1)
        place = out + (j * GROUP + part) * rows + row_i
        tl.store(place, total, mask=inside_i)


@triton.jit
def segment_rows_kernel(
    data,  # (J, g, T) fp32
    first,  # (S + 1,) int32: first row of every segment
    out,  # (2, g, S) fp32: of tiles with themselves, of tiles with later ones
    rows,
    segments,
    tiles,  # J
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the rows of every segment, those of j = 0 apart from the others."""
    segment, part, later = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lo, hi = tl.load(first + segment), tl.load(first + segment + 1)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(later, tl.where(later > 0, tiles, 1)):
        source = data + (j * GROUP + part) * rows
        for start in range(lo, hi, BLOCK):
            total += tl.load(source + start + lane, mask=start + lane < hi, other=0.0)
    tl.store(out + (later * GROUP + part) * segments + segment, tl.sum(total, 0))


def triton_pair_gram(
    x: Tensor,
    dy: Sequence[Tensor],
    segment_id: Tensor,
    counts: Sequence[int],
    group_size: int,
) -> Tensor:  # (S / g, g, g)
    """As `pair_gram.pair_gram`."""
    groups, rows = len(counts) // group_size, group_counts(counts, group_size)
    out = x.new_zeros(groups, group_size, group_size, dtype=torch.float32)
    x, *dy = (a if a.stride(-1) == 1 else a.contiguous() for a in (x, *dy))
    segment_id = segment_id.contiguous()
    if len(dy) > 3:
        dy = [torch.cat(list(dy), 1)]
    longest = longest_pair_gram(x.shape[1], sum(y.shape[1] for y in dy))
    bounds, long = starts(counts), []
    for short, first, last in runs(rows, longest):
        own = tuple(counts[first * group_size : last * group_size])
        lo, hi = bounds[first * group_size], bounds[last * group_size]
        if short and lo < hi:
            parts = [a[lo:hi] for a in (x, *dy)]
            out[first:last] = _gram(parts[0], parts[1:], segment_id[lo:hi], own, group_size)
        elif not short:
            long.append(first)
    if long:
        _by_gradients_(out, x, dy, tuple(counts), tuple(long), group_size)
    out.diagonal(dim1=1, dim2=2).clamp_(min=0.0)
    return out


def _by_gradients_(
    out: Tensor,  # written for `groups`
    x: Tensor,
    dy: Sequence[Tensor],
    counts: tuple[int, ...],
    groups: tuple[int, ...],
    group_size: int,
) -> None:
    wide = reduce(torch.promote_types, [a.dtype for a in dy], x.dtype)
    sets = make_sets(counts, groups, group_size, wide, x.device)
    total = gradient_products(dy[0], x, sets)
    for outputs in dy[1:]:
        total += gradient_products(outputs, x, sets)
    out.index_copy_(0, sets.groups, total[sets.pick].to(out.dtype))


def _gram(
    x: Tensor, dy: Sequence[Tensor], segment_id: Tensor, counts: tuple[int, ...], group_size: int
) -> Tensor:
    """All groups by the kernels."""
    rows, segments = x.shape[0], len(counts)
    wide = torch.float32 if any(a.dtype == torch.float32 for a in (x, *dy)) else x.dtype
    block, depth, warps, stages = tile_shape(wide, max(group_counts(counts, group_size)))
    first, last, left, bounds = _tables(counts, group_size, block, x.device)
    tiles = int(_most_tiles(counts, group_size, block))
    sums = x.new_empty(tiles, group_size, rows, dtype=torch.float32)
    outputs = [*dy, *[dy[0]] * (3 - len(dy))]
    columns = [x.shape[1], *(y.shape[1] for y in outputs)]
    launch(
        pair_gram_kernel,
        (len(first), tiles),
        {
            "x": x,
            **{f"dy{i}": y for i, y in enumerate(outputs)},
            "segment": segment_id,
            "tile_first": first,
            "tile_last": last,
            "span_tiles": left,
            "out": sums,
            "rows": rows,
            "inputs": columns[0],
            **{f"outputs{i}": n for i, n in enumerate(columns[1:])},
            "stride_x": x.stride(0),
            **{f"stride{i}": y.stride(0) for i, y in enumerate(outputs)},
            "GROUP": group_size,
            "OUTPUTS": len(dy),
            "BLOCK": block,
            "DEPTH": depth,
            "EVEN": all(n % depth == 0 for n in columns),
            "PRECISION": "tf32x3",
        },
        warps=warps,
        stages=stages,
    )
    totals = x.new_empty(2, group_size, segments, dtype=torch.float32)
    launch(
        segment_rows_kernel,
        (segments, group_size, 2),
        {
            "data": sums,
            "first": bounds,
            "out": totals,
            "rows": rows,
            "segments": segments,
            "tiles": tiles,
            "GROUP": group_size,
            "BLOCK": 128,
        },
        warps=1,
    )
    own, later = totals.view(2, group_size, -1, group_size).permute(0, 2, 3, 1)
    return own + later + later.transpose(1, 2)


def tile_shape(dtype: torch.dtype, longest: int) -> tuple[int, int, int, int]:
    """Tile rows, depth, warps, stages, by dtype and the rows of the longest group."""
    if dtype == torch.float32:
        return SPLIT
    return SMALL if longest <= SMALL[0] else LARGE


@kept_tables
def _tables(
    counts: tuple[int, ...], group_size: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First row, end, and tiles left of its span, of every tile; first row of every segment."""
    first, last, left = [], [], []
    for lo, hi in _span_bounds(counts, group_size, block):
        for start in range(lo, hi, block):
            first.append(start)
            last.append(min(start + block, hi))
            left.append(-(-(hi - start) // block))
    columns = [first, last, left, starts(counts)]
    packed = to_device(sum(columns, []), device)
    return tuple(packed.split([len(c) for c in columns]))


def _span_bounds(counts: Sequence[int], group_size: int, block: int) -> list[tuple[int, int]]:
    rows = group_counts(counts, group_size)
    return [(span.lo, span.hi) for span in cut(rows, 0, len(rows), block)]


def _most_tiles(counts: Sequence[int], group_size: int, block: int) -> int:
    return max(-(-(hi - lo) // block) for lo, hi in _span_bounds(counts, group_size, block))


def aot_cases() -> list[AotCase]:
    """The specialisations of the tile table, with the head's and the layers' usual shapes."""
    pointers = ("x", "dy0", "dy1", "dy2", "out")
    numbers = ("inputs", "outputs0", "outputs1", "outputs2")
    strides = ("stride_x", "stride0", "stride1", "stride2")
    cases = []
    for dtype, shape, archs in (
        ("bf16", LARGE, (80, 90, 100)),
        ("bf16", SMALL, (80, 90, 100)),
        ("fp16", LARGE, (90,)),
        ("fp32", SPLIT, (80, 90, 100)),
    ):
        for group, outputs in ((1, 1), (1, 3), (2, 1), (3, 2)):
            block, depth, warps, stages = shape
            cases.append(
                AotCase(
                    name=f"pair_gram {dtype} {block}x{depth} g{group} outputs{outputs}",
                    kernel=pair_gram_kernel,
                    signature={
                        **dict.fromkeys(pointers[:4], f"*{dtype}"),
                        "out": "*fp32",
                        "segment": "*i32",
                        **dict.fromkeys(("tile_first", "tile_last", "span_tiles"), "*i32"),
                        **dict.fromkeys(("rows", *numbers, *strides), "i32"),
                    },
                    constexprs={
                        "GROUP": group,
                        "OUTPUTS": outputs,
                        "BLOCK": block,
                        "DEPTH": depth,
                        "EVEN": True,
                        "PRECISION": "tf32x3",
                    },
                    divisible=(*pointers, *numbers, *strides, "segment"),
                    warps=warps,
                    stages=stages,
                    archs=archs,
                    wide_loads=True,
                )
            )
    cases.append(
        AotCase(
            name="segment_rows",
            kernel=segment_rows_kernel,
            signature={
                "data": "*fp32",
                "first": "*i32",
                "out": "*fp32",
                **dict.fromkeys(("rows", "segments", "tiles"), "i32"),
            },
            constexprs={"GROUP": 3, "BLOCK": 128},
            divisible=("data", "out"),
            warps=1,
            archs=(80, 90, 100),
        )
    )
    return cases
