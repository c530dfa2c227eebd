"""Exact Gram matrices of head gradients in Triton, from the tiles of E where they lie.

Shapes: R rows, D hidden, V vocab, S segments, g group_size, B rows of a block, C tile width. One
program multiplies two blocks of rows, of E over a range of tiles and of hidden, and sums the
product of the two over the segments' rows: no (L, L) matrix is written, nothing added atomically.
Imports triton: import it where the backend is chosen, never from `__init__`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gram_few
from ._aot import AotCase, case_of
from ._launch import Launch, launch, recorded
from .segment import add_rows_
from .spans import cut, group_counts, kept_tables, to_device

STAGES = 3
# Rows of a block: columns of E or hidden at a time, warps. float32 is multiplied as three products
# of TensorFloat32, which keeps its digits. Other shapes spill: kernels/README.md.
HALF_BLOCKS = {64: (128, 4), 32: (128, 4), 16: (256, 1)}
FLOAT_BLOCKS = {64: (32, 8), 32: (32, 4), 16: (32, 2)}
PROGRAMS = 128  # at least, where there are enough tiles to share out


class Tiles(NamedTuple):
    """Tiles of E, one after the other, each (R, C) with -S' phi at the target."""

    exps: Tensor  # (columns, R)
    offsets: Tensor  # (N, R) what each tile is relative to
    width: int  # of every tile but the last


class Rows(NamedTuple):
    """Per row (R,)."""

    target: Tensor  # int32
    segment: Tensor  # int32; -1: not wanted
    final: Tensor  # the offset that `own` and `scale` go with
    own: Tensor  # -S' phi
    scale: Tensor  # k (1 - p) / S'


@triton.jit(do_not_specialize=["rows", "columns", "correct"])
def gram_tile_kernel(
    exps,  # tiles one after the other, each (R, C)
    offsets,  # (N, R) fp32
    hidden,  # (R, D)
    target,  # (R,) int32
    segment,  # (R,) int32
    final,  # (R,) fp32
    own,  # (R,) fp32
    scale,  # (R,) fp32
    pairs,  # (P, 4) int32: first row and end of block i, and of block j, i or a later one
    sums,  # (P, splits, 2, B, g) fp32 out: over the rows of j for each of i, and vice versa
    rows,  # R
    columns,  # of all tiles, padding included
    tile_width,
    tiles_each,  # of a split
    correct,  # whether the target's term is to be brought from E's dtype to float32
    DIM: tl.constexpr,  # D
    GROUP: tl.constexpr,  # g
    B: tl.constexpr,
    C: tl.constexpr,
    ALONE: tl.constexpr,  # every block is met by itself alone, and read once
):
    """Two blocks of B rows and a share of the tiles: (d_t . d_s)(h_t . h_s), summed by segment."""
    pair, split = tl.program_id(0), tl.program_id(1)
    first_i, first_j = tl.load(pairs + 4 * pair), tl.load(pairs + 4 * pair + 2)
    row_i, row_j = first_i + tl.arange(0, B), first_j + tl.arange(0, B)
    in_i, in_j = row_i < tl.load(pairs + 4 * pair + 1), row_j < tl.load(pairs + 4 * pair + 3)
    col = tl.arange(0, C)

    final_i = tl.load(final + row_i, mask=in_i, other=0.0)
    final_j = tl.load(final + row_j, mask=in_j, other=0.0)
    dots = tl.zeros((B, B), tl.float32)
    first = split * tiles_each * tile_width
    for low in range(first, min(first + tiles_each * tile_width, columns), tile_width):
        stride = tl.multiple_of(min(tile_width, columns - low), 16)
        tile = exps + rows.to(tl.int64) * low
        line_i = tile + row_i[:, None].to(tl.int64) * stride
        line_j = tile + row_j[None, :].to(tl.int64) * stride
        here = tl.zeros((B, B), tl.float32)
        for c in range(0, stride, C):
            inside = c + col < stride
            a = tl.load(line_i + c + col[None, :], mask=in_i[:, None] & inside[None, :], other=0.0)
            if ALONE:
                b = tl.trans(a)
            else:
                at = line_j + c + col[:, None]
                b = tl.load(at, mask=in_j[None, :] & inside[:, None], other=0.0)
            here = tl.dot(a, b, here, input_precision="tf32x3")
        offset = offsets + rows.to(tl.int64) * (low // tile_width)
        move_i = tl.exp(tl.load(offset + row_i, mask=in_i, other=0.0) - final_i)
        move_j = tl.exp(tl.load(offset + row_j, mask=in_j, other=0.0) - final_j)
        dots += here * move_i[:, None] * move_j[None, :]

    states = tl.zeros((B, B), tl.float32)
    line_i = hidden + row_i[:, None].to(tl.int64) * DIM
    line_j = hidden + row_j[None, :].to(tl.int64) * DIM
    for d in range(0, DIM, C):
        inside = d + col < DIM
        a = tl.load(line_i + d + col[None, :], mask=in_i[:, None] & inside[None, :], other=0.0)
        b = tl.load(line_j + d + col[:, None], mask=in_j[None, :] & inside[:, None], other=0.0)
        states = tl.dot(a, b, states, input_precision="tf32x3")

    if (correct != 0) & (split == 0):
        # What is rounded in E is one entry of a row, but the largest by far.
        own_i = tl.load(own + row_i, mask=in_i, other=0.0)
        own_j = tl.load(own + row_j, mask=in_j, other=0.0)
        kept_i = own_i.to(exps.dtype.element_ty).to(tl.float32)
        kept_j = own_j.to(exps.dtype.element_ty).to(tl.float32)
        y_i = tl.load(target + row_i, mask=in_i, other=-1)
        y_j = tl.load(target + row_j, mask=in_j, other=-1)
        lost = own_i[:, None] * own_j[None, :] - kept_i[:, None] * kept_j[None, :]
        dots += tl.where(y_i[:, None] == y_j[None, :], lost, 0.0)

    dots *= tl.load(scale + row_i, mask=in_i, other=0.0)[:, None]
    dots *= tl.load(scale + row_j, mask=in_j, other=0.0)[None, :]
    dots *= states
    segment_i = tl.load(segment + row_i, mask=in_i, other=-1)
    segment_j = tl.load(segment + row_j, mask=in_j, other=-1)
    group_i, group_j = segment_i // GROUP, segment_j // GROUP
    wanted = (segment_i >= 0)[:, None] & (segment_j >= 0)[None, :]
    dots = tl.where(wanted & (group_i[:, None] == group_j[None, :]), dots, 0.0)
    part_i, part_j = segment_i - group_i * GROUP, segment_j - group_j * GROUP
    out = sums + (pair * tl.num_programs(1) + split).to(tl.int64) * 2 * B * GROUP
    line = out + tl.arange(0, B) * GROUP
    both = tl.where(first_i == first_j, 0.0, 1.0)  # a block with itself has both orders already
    for part in range(0, GROUP):
        of_i = tl.sum(tl.where((part_j == part)[None, :], dots, 0.0), 1)
        of_j = tl.sum(tl.where((part_i == part)[:, None], dots, 0.0), 0) * both
        tl.store(line + part, of_i)
        tl.store(line + B * GROUP + part, of_j)


class Blocks(NamedTuple):
    """Pairs of blocks of one size; or, for a size of at most gram_few.MOST, groups of so many."""

    rows: int  # B, or L
    pairs: Tensor  # (P, 4) int32, as the kernel takes them; (P, 1) first rows of groups
    alone: bool  # blocks meet none but themselves


def block_rows(length: int, dtype: torch.dtype) -> int:
    """Rows of the blocks that a group of `length` rows is cut into: the most with which its block
    pairs are no more than length^2 entries, or, where no size does that, the fewest entries. A
    group of a few rows is met row by row."""
    if length <= gram_few.MOST:
        return length
    sizes = sorted(_blocks(dtype), reverse=True)
    entries = {size: _pairs(length, size) * size * size for size in sizes}
    within = [size for size in sizes if entries[size] <= length * length]
    return within[0] if within else min(reversed(sizes), key=entries.__getitem__)


def rows_loaded(length: int, columns: int, dtype: torch.dtype) -> int:
    """Numbers that programs load for a group of `length` rows; `columns` is V + D."""
    size = block_rows(length, dtype)
    return _pairs(length, size) * 2 * size * columns


def _entries(size: int) -> int:
    """Of a row of a plan's table."""
    return 1 if size <= gram_few.MOST else 4


def _pairs(length: int, size: int) -> int:
    count = -(-length // size)
    return count * (count + 1) // 2


def plan_blocks(
    counts: tuple[int, ...],  # rows of every segment
    group_size: int,
    groups: tuple[int, ...],  # which go this way
    dtype: torch.dtype,
    device: torch.device,
) -> list[Blocks]:
    """Blocks of rows that begin where a group does; groups that fit into one block together share
    it."""
    return [
        Blocks(size, table.view(-1, _entries(size)), alone)
        for size, alone, table in _plan(counts, group_size, groups, dtype, device)
    ]


@kept_tables
def _plan(
    counts: tuple[int, ...],
    group_size: int,
    groups: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[int, bool, Tensor]]:
    lengths, wanted = group_counts(counts, group_size), frozenset(groups)
    size_of = [block_rows(n, dtype) if i in wanted else 0 for i, n in enumerate(lengths)]
    found: dict[int, list[int]] = {}
    first = 0
    for size, same in groupby(size_of):
        last = first + len(list(same))
        few = size <= gram_few.MOST
        for span in cut(lengths, first, last, 0 if few else size) if size else ():
            if few:
                found.setdefault(size, []).append(span.lo)
                continue
            ends = [(lo, min(lo + size, span.hi)) for lo in range(span.lo, span.hi, size)]
            for i, block in enumerate(ends):
                for other in ends[i:]:
                    found.setdefault(size, []).extend((*block, *other))
        first = last
    plan = []
    for size in sorted(found):
        table = found[size]
        alone = size <= gram_few.MOST or table[0::4] == table[2::4]
        plan.append((size, alone, to_device(table, device)))
    return plan


def add_gram(
    out: Tensor,  # (S, g) float64, added to
    tiles: Tiles,
    rows: Rows,
    hidden: Tensor,  # (R, D)
    plan: Sequence[Blocks],
    *,
    correct: bool,
) -> None:
    """What these tiles give to the Gram matrices: row s of `out` holds <G_s, G_b> for all parts b
    of the group of segment s."""
    for blocks in plan:
        add = _add_few if blocks.rows <= gram_few.MOST else _add_blocks
        add(out, tiles, rows, hidden, blocks, correct)


def _add_blocks(
    out: Tensor, tiles: Tiles, rows: Rows, hidden: Tensor, blocks: Blocks, correct: bool
) -> None:
    size, pairs = blocks.rows, blocks.pairs
    columns, warps = _blocks(tiles.exps.dtype)[size]
    count, splits, each = len(pairs), *_split(len(tiles.offsets), len(pairs))
    sums = hidden.new_empty(count, splits, 2, size, out.shape[1], dtype=torch.float32)
    launch(
        gram_tile_kernel,
        (count, splits),
        {
            "exps": tiles.exps,
            "offsets": tiles.offsets,
            "hidden": hidden,
            **rows._asdict(),
            "pairs": pairs,
            "sums": sums,
            "rows": hidden.shape[0],
            "columns": tiles.exps.shape[0],
            "tile_width": tiles.width,
            "DIM": hidden.shape[1],
            "GROUP": out.shape[1],
            "tiles_each": each,
            "correct": int(correct),
            "B": size,
            "C": columns,
            "ALONE": blocks.alone,
        },
        warps=warps,
        stages=STAGES,
    )
    row = pairs[:, ::2].unsqueeze(2) + torch.arange(size, device=pairs.device)
    # Rows beyond a block have sums of 0.
    _add_sums(out, rows, row.clamp(max=max(hidden.shape[0] - 1, 0)), sums)


def _add_few(
    out: Tensor, tiles: Tiles, rows: Rows, hidden: Tensor, groups: Blocks, correct: bool
) -> None:
    length, first = groups.rows, groups.pairs
    half = tiles.exps.dtype != torch.float32
    count, splits, each = len(first), *_split(len(tiles.offsets), len(first))
    sums = hidden.new_empty(count, splits, length, out.shape[1], dtype=torch.float32)
    launch(
        gram_few.gram_few_kernel,
        (count, splits),
        {
            "exps": tiles.exps,
            "offsets": tiles.offsets,
            "hidden": hidden,
            **rows._asdict(),
            "first": first,
            "sums": sums,
            "rows": hidden.shape[0],
            "columns": tiles.exps.shape[0],
            "tile_width": tiles.width,
            "tiles_each": each,
            "correct": int(correct),
            "DIM": hidden.shape[1],
            "GROUP": out.shape[1],
            "PARTS": triton.next_power_of_2(out.shape[1]),
            "L": length,
            "C": gram_few.HALF_COLUMNS if half else gram_few.FLOAT_COLUMNS,
        },
        warps=gram_few.WARPS,
        stages=STAGES,
    )
    _add_sums(out, rows, first + torch.arange(length, device=first.device), sums)


def _add_sums(out: Tensor, rows: Rows, row: Tensor, sums: Tensor) -> None:
    """out[s] += what `sums` (P, splits, ..., g) hold for the rows of segment s."""
    segment = rows.segment[row].to(torch.int64).flatten()
    add_rows_(out, segment, sums.to(torch.float64).sum(1).flatten(0, -2))


def _blocks(dtype: torch.dtype) -> dict[int, tuple[int, int]]:
    return FLOAT_BLOCKS if dtype == torch.float32 else HALF_BLOCKS


def _split(tiles: int, pairs: int) -> tuple[int, int]:
    """(splits, tiles of each): the h . h of a pair is formed again for each split."""
    splits = min(tiles, max(1, -(-PROGRAMS // max(pairs, 1))))
    each = -(-tiles // max(splits, 1))
    return -(-tiles // each), each


def aot_cases() -> list[AotCase]:
    """Every size of blocks; bfloat16 for all chips, other dtypes for sm_90."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        archs = (80, 90, 100) if dtype == torch.bfloat16 else (90,)
        few = [(length, True) for length in range(1, gram_few.MOST + 1)]
        for size, alone in [*product(_blocks(dtype), (False, True)), *few]:
            kind = "gram_few" if size <= gram_few.MOST else "gram_tile"
            name = f"{kind} {str(dtype).removeprefix('torch.')} {size}"
            for one in _launches(dtype, size, alone):
                case = case_of(
                    f"{name}, alone" if alone and size > gram_few.MOST else name, one, archs
                )
                cases.append(replace(case, wide_loads=True))
    return cases


def _launches(dtype: torch.dtype, size: int, alone: bool) -> list[Launch]:
    width, rows, dim, tiles = 8192, 512, 4096, 4

    def numbers(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=kind)

    seen: list[Launch] = []
    with recorded(seen.append):
        add_gram(
            numbers(96, 3, kind=torch.float64),
            Tiles(numbers(width * tiles, rows, kind=dtype), numbers(tiles, rows), width),
            Rows(
                *(numbers(rows, kind=torch.int32) for _ in range(2)),
                *(numbers(rows) for _ in range(3)),
            ),
            numbers(rows, dim, kind=dtype),
            [Blocks(size, numbers(8, _entries(size), kind=torch.int32), alone)],
            correct=True,
        )
    return seen
