"""Segments of similar length as dense blocks, for sums over their rows on a CPU.

    blocks = TokenBlocks.make(counts, device)      # once a batch
    blocks.products(y, x)                          # (E, S, a, b) sums of y_t x_t^T over segments
    blocks.norms(x, [dy])                          # (S,) squared norm of that, for wide y and x

A batched product over a block costs one call where a loop costs one for every segment, and much of
a small model's time goes to calls. Shapes: T rows, S segments, B segments of a block, L its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .pair_gram import longest_pair_gram, pair_product_gram
from .segment_products import wide_dtype
from .spans import starts

MAX_PADDING = 1.25  # slots of a block over its rows, before another block is opened
MIN_LENGTH = 8  # shorter segments share a block, whatever the padding
STRIPS, LEAST_STRIP = 4, 48  # of a Gram matrix; rows of one
ENTRIES = 1 << 22  # of a block's Gram matrices or gradients, which stand in memory at a time


@dataclass(frozen=True)
class Block:
    """Segments of one dense (B, L) grid; slots beyond a segment's rows point at its last row."""

    segments: Tensor  # (B,) int64
    lengths: list[int]  # (B,)
    length: int  # L
    index: Tensor | None  # (B L,) row of every slot; None: the rows first .. first + B L - 1
    first: int
    padding: Tensor | None  # slots that hold no row

    def dense(self, x: Tensor, zero: bool) -> Tensor:  # (..., T, d) -> (..., B, L, d)
        """The block's rows; ``zero``: padding is 0."""
        if self.index is None:
            own = x.narrow(-2, self.first, len(self.lengths) * self.length)
        else:
            own = x.index_select(-2, self.index)
            if zero and self.padding is not None:
                own.index_fill_(-2, self.padding, 0.0)
        return own.unflatten(-2, (len(self.lengths), self.length))


@dataclass(frozen=True)
class TokenBlocks:
    """All segments that have rows, in blocks."""

    counts: list[int]  # (S,)
    blocks: list[Block]

    @staticmethod
    def make(counts: Sequence[int], device: torch.device) -> TokenBlocks:
        """Of segments with ``counts`` rows each, one after another."""
        return _blocks(tuple(counts), device)

    def products(self, y: Tensor, x: Tensor) -> Tensor:
        """(E, S, a, b) sums over each segment's rows of y_t x_t^T, for each of E matrices; y (E, T,
        a), x (E, T, b), a and b small."""
        out = y.new_zeros(len(y), len(self.counts), y.shape[2], x.shape[2])
        for block in self.blocks:
            left, right = block.dense(y, zero=True), block.dense(x, zero=False)
            out[:, block.segments] = torch.matmul(left.transpose(2, 3), right)
        return out

    def norms(self, x: Tensor, dy: Sequence[Tensor]) -> Tensor:
        """(S,) squared norms of sum_t dy_t x_t^T, summed over the dy, as `linear_norms`.

        Numerics  products in float32 (float64), reduced in float64
        """
        dtype = wide_dtype(x, *dy)
        x, dy = x.to(dtype), [y.to(dtype) for y in dy]
        out = x.new_zeros(len(self.counts), dtype=torch.float64)
        outputs = sum(y.shape[1] for y in dy)
        # Strips spare 3/8 of what that rule counts.
        longest = longest_pair_gram(x.shape[1], outputs) * 8 // 5
        first = starts(self.counts)
        for block in self.blocks:
            if block.length <= longest:
                _gram_norms(out, block, x, dy)
            elif x.shape[1] * outputs * len(block.lengths) <= ENTRIES:
                _product_norms(out, block, x, dy)
            else:
                for segment in block.segments.tolist():
                    bounds = [first[segment], first[segment + 1]]
                    out[segment] = pair_product_gram(x, dy, bounds)[0, 0]
        return out.clamp_(min=0.0).to(dtype)


@lru_cache(maxsize=8)  # one-token answers have the same counts in every batch
def _blocks(counts: tuple[int, ...], device: torch.device) -> TokenBlocks:
    first = starts(counts)
    order = sorted((s for s, n in enumerate(counts) if n), key=lambda s: (counts[s], s))
    runs: list[list[int]] = []
    rows = 0
    for segment in order:
        count = counts[segment]
        slots = (len(runs[-1]) + 1) * count if runs else 0
        alike = slots <= MAX_PADDING * (rows + count) or count <= MIN_LENGTH
        if runs and alike and slots * count <= ENTRIES:
            runs[-1].append(segment)
            rows += count
        else:
            runs.append([segment])
            rows = count
    return TokenBlocks(list(counts), [_block(run, counts, first, device) for run in runs])


def _block(
    run: Sequence[int], counts: Sequence[int], first: Sequence[int], device: torch.device
) -> Block:
    lengths = [counts[s] for s in run]
    longest = lengths[-1]
    segments = torch.tensor(run, device=device)
    together = run[-1] - run[0] == len(run) - 1 and lengths[0] == longest
    if together and all(b == a + 1 for a, b in zip(run, run[1:], strict=False)):
        return Block(segments, lengths, longest, None, first[run[0]], None)
    place = torch.arange(longest)
    count = torch.tensor(lengths).unsqueeze(1)
    begin = torch.tensor([first[s] for s in run]).unsqueeze(1)
    index = begin + torch.minimum(place, count - 1)
    padding = (place >= count).flatten().nonzero().squeeze(1)
    return Block(
        segments,
        lengths,
        longest,
        index.flatten().to(device),
        0,
        padding.to(device) if len(padding) else None,
    )


def _gram_norms(out: Tensor, block: Block, x: Tensor, dy: Sequence[Tensor]) -> None:
    """By the L x L Gram matrices of rows, of which strips up to the diagonal's squares."""
    strips = _strips(block.length)
    inputs = block.dense(x, zero=True)
    dots = [torch.bmm(inputs[:, lo:hi], inputs[:, :hi].transpose(1, 2)) for lo, hi in strips]
    del inputs
    other: list[Tensor] = []
    for y in dy:
        own = block.dense(y, zero=False)
        for i, (lo, hi) in enumerate(strips):
            sides = own[:, lo:hi], own[:, :hi].transpose(1, 2)
            if len(other) == i:
                other.append(torch.bmm(*sides))
            else:
                other[i].baddbmm_(*sides)
    for strip, factor, (lo, _) in zip(dots, other, strips, strict=True):
        strip.mul_(factor)
        sums = strip.sum((1, 2), dtype=torch.float64)
        if lo:  # rows before the strip are met here alone
            sums += strip[:, :, :lo].sum((1, 2), dtype=torch.float64)
        out.index_add_(0, block.segments, sums)


def _strips(length: int) -> list[tuple[int, int]]:
    """Rows of each strip: STRIPS of them save three eighths of the products, a few rows nothing."""
    count = min(STRIPS, max(length // LEAST_STRIP, 1))
    bounds = [length * i // count for i in range(count + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def _product_norms(out: Tensor, block: Block, x: Tensor, dy: Sequence[Tensor]) -> None:
    """By the gradients themselves."""
    inputs = block.dense(x, zero=True)
    total = out.new_zeros(len(block.lengths))
    for y in dy:
        gradients = torch.bmm(block.dense(y, zero=False).transpose(1, 2), inputs)
        total += gradients.flatten(1).square_().sum(1, dtype=torch.float64)
    out[block.segments] = total
