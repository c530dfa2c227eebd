"""Exact Gram matrices of head gradients in Triton, from the tiles of E where they lie.

Shapes: R rows, D hidden, V vocab, S segments, g group_size, B rows of a block, C tile width. One
program multiplies two blocks of rows, of E over a range of tiles and of hidden, and sums the
product of the two over the segments' rows: no (L, L) matrix is written, nothing added atomically.
Imports triton: import it where the backend is chosen, never from `__init__`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import AotCase, case_of
from ._launch import Launch, launch, recorded
from .segment import add_rows_

BLOCK_ROWS, STAGES = 64, 3
# (columns of E or hidden at a time, warps). float32 is multiplied as three products of
# TensorFloat32, which keeps its digits. Other shapes spill: kernels/README.md.
HALF_BLOCK, FLOAT_BLOCK = (128, 4), (32, 8)
PROGRAMS = 512  # at least, where there are enough tiles to share out


class Tiles(NamedTuple):
    """Tiles of E, one after the other, each (R, C) with -S' phi at the target."""

    exps: Tensor  # (columns, R)
    offsets: Tensor  # (N, R) what each tile is relative to
    width: int  # of every tile but the last


class Rows(NamedTuple):
    """Per row (R,)."""

    target: Tensor  # int64
    segment: Tensor  # int32; -1: not wanted
    final: Tensor  # the offset that `own` and `scale` go with
    own: Tensor  # -S' phi
    scale: Tensor  # k (1 - p) / S'


@triton.jit(do_not_specialize=["rows", "columns", "correct"])
def gram_tile_kernel(
    exps,  # tiles one after the other, each (R, C)
    offsets,  # (N, R) fp32
    hidden,  # (R, D)
    target,  # (R,) int64
    segment,  # (R,) int32
    final,  # (R,) fp32
    own,  # (R,) fp32
    scale,  # (R,) fp32
    pairs,  # (P, 2) int32, block i and block j >= i
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
):
    """Two blocks of B rows and a share of the tiles: (d_t . d_s)(h_t . h_s), summed by segment."""
    pair, split = tl.program_id(0), tl.program_id(1)
    block_i, block_j = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    row_i, row_j = block_i * B + tl.arange(0, B), block_j * B + tl.arange(0, B)
    in_i, in_j = row_i < rows, row_j < rows
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
            b = tl.load(line_j + c + col[:, None], mask=in_j[None, :] & inside[:, None], other=0.0)
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
    both = tl.where(block_i == block_j, 0.0, 1.0)  # a block with itself has both orders already
    for part in range(0, GROUP):
        of_i = tl.sum(tl.where((part_j == part)[None, :], dots, 0.0), 1)
        of_j = tl.sum(tl.where((part_i == part)[:, None], dots, 0.0), 0) * both
        tl.store(line + part, of_i)
        tl.store(line + B * GROUP + part, of_j)


def block_pairs(lengths: Sequence[int], wanted: Sequence[bool]) -> list[tuple[int, int]]:
    """(i, j >= i) of the blocks of BLOCK_ROWS rows that have rows of one wanted group in them."""
    found, start = set(), 0
    for length, use in zip(lengths, wanted, strict=True):
        if length and use:
            blocks = range(start // BLOCK_ROWS, (start + length - 1) // BLOCK_ROWS + 1)
            found |= {(i, j) for i in blocks for j in blocks if i <= j}
        start += length
    return sorted(found)


def add_gram(
    out: Tensor,  # (S, g) float64, added to
    tiles: Tiles,
    rows: Rows,
    hidden: Tensor,  # (R, D)
    pairs: Tensor,  # (P, 2) int32
    *,
    correct: bool,
) -> None:
    """What these tiles give to the Gram matrices: row s of `out` holds <G_s, G_b> for all parts b
    of the group of segment s."""
    block, warps = FLOAT_BLOCK if tiles.exps.dtype == torch.float32 else HALF_BLOCK
    count, splits, each = len(pairs), *_split(len(tiles.offsets), len(pairs))
    sums = hidden.new_empty(count, splits, 2, BLOCK_ROWS, out.shape[1], dtype=torch.float32)
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
            "B": BLOCK_ROWS,
            "C": block,
        },
        warps=warps,
        stages=STAGES,
    )
    row = pairs.unsqueeze(2) * BLOCK_ROWS + torch.arange(BLOCK_ROWS, device=pairs.device)
    last = max(hidden.shape[0] - 1, 0)
    segment = rows.segment[row.clamp(max=last)]
    # Rows that are not wanted have sums of 0.
    place = segment.clamp(min=0).to(torch.int64).flatten()
    by_row = sums.to(torch.float64).sum(1).flatten(0, 2)
    add_rows_(out, place, by_row)


def _split(tiles: int, pairs: int) -> tuple[int, int]:
    """(splits, tiles of each): the h . h of a pair is formed again for each split."""
    splits = min(tiles, max(1, -(-PROGRAMS // max(pairs, 1))))
    each = -(-tiles // max(splits, 1))
    return -(-tiles // each), each


def aot_cases() -> list[AotCase]:
    """E in every dtype for sm_90; bfloat16 for sm_80 and sm_100 too."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        width, rows, dim, tiles = 8192, 512, 4096, 4

        def row(kind: torch.dtype, rows: int = rows) -> Tensor:
            return torch.empty(rows, device="meta", dtype=kind)

        exps = torch.empty(width * tiles, rows, device="meta", dtype=dtype)
        floats = [row(torch.float32) for _ in range(3)]
        seen: list[Launch] = []
        with recorded(seen.append):
            add_gram(
                torch.empty(96, 3, device="meta", dtype=torch.float64),
                Tiles(exps, torch.empty(tiles, rows, device="meta"), width),
                Rows(row(torch.int64), row(torch.int32), *floats),
                torch.empty(rows, dim, device="meta", dtype=dtype),
                torch.empty(8, 2, device="meta", dtype=torch.int32),
                correct=True,
            )
        archs = (80, 90, 100) if dtype == torch.bfloat16 else (90,)
        name = f"gram_tile {str(dtype).removeprefix('torch.')}"
        cases += [case_of(name, one, archs) for one in seen]
    return cases
