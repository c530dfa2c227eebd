"""Attention over packed branches in dense blocks, with torch's scaled_dot_product_attention.

Pairs of similar length are gathered into padded blocks, each with its mask of who sees whom. Only
attention sees the padding; the rest of the body stays packed. Any device, any dtype, every term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.attention_layout import Terms, on_device, rectangle

# A block's slots over its tokens before another block is opened: a launch per block and layer
# against the padding's share of attention, itself a small part of the arithmetic.
MAX_PADDING = 1.25
PREFIX, PAD = 0, -1  # branch b has number b, from 1


@dataclass(frozen=True)
class Block:
    """Pairs (prefixes with branches) of similar length: a (pairs, length) grid, padded."""

    pairs: int
    length: int
    part: Tensor  # (pairs, length) PREFIX | number of the branch | PAD
    position: Tensor  # (pairs, length)


@dataclass(frozen=True)
class DenseLayout:
    """Where the tokens of a batch stand in the dense blocks, and who sees whom.

    N slots = the blocks one after another, padding included. `gather` is None when the packed
    order already is the padded one, which pairs of equal length give.
    """

    blocks: tuple[Block, ...]
    gather: Tensor | None  # (N,) token of each slot; padding points at token 0
    slot: Tensor | None  # (T,) slot of each token
    padding: Tensor | None  # slots that hold no token
    masks: dict[tuple[int | None, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        """Additive masks (pairs, 1, length, length), one per block; made once per layout."""
        key = (window, dtype)
        if key not in self.masks:
            self.masks[key] = [_block_mask(block, window, dtype) for block in self.blocks]
        return self.masks[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:  # (T, heads, d)
        """Attention of packed tokens: q (T, heads, d), k and v (T, kv heads, d)."""
        if self.gather is not None:
            q, k, v = (_ToSlots.apply(x, self) for x in (q, k, v))
        outputs = []
        masks = self.mask(terms.window, q.dtype)
        # Split, not sliced: a slice's backward fills a tensor of full size with zeros.
        sizes = [block.pairs * block.length for block in self.blocks]
        of_blocks = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        for block, mask, qkv in zip(self.blocks, masks, of_blocks, strict=True):
            grid = (block.pairs, block.length)
            block_q, block_k, block_v = (x.unflatten(0, grid).transpose(1, 2) for x in qkv)
            attended = _attend(block_q, block_k, block_v, mask, terms)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self.gather is not None:
            out = _ToTokens.apply(out, self)
        return out


def build_dense(
    lengths: Sequence[Sequence[int]],  # of each pair: fed tokens of its prefix, of each branch
    device: torch.device | str,
) -> DenseLayout:
    """The blocks of pairs packed in this order; made on the host, once per batch.

    Prefixes may differ in how many branches they have.
    """
    part_lengths = rectangle(lengths)
    fed = part_lengths.sum(axis=1)
    token_start = np.cumsum(fed) - fed
    shapes: list[tuple[int, int]] = []
    parts, positions, gather = [], [], []
    slot_of_token = np.empty(int(fed.sum()), np.int64)
    slots = 0
    for first, last in _block_ranges(fed):
        length = int(fed[first:last].max())
        column = np.arange(length)[None]
        ends = part_lengths[first:last].cumsum(axis=1)
        part = np.zeros((last - first, length), np.int64)
        for end in ends.T[:-1]:
            part += column >= end[:, None]
        # Tokens of earlier branches between a token and its prefix; none before the first branch.
        between = np.pad(ends[:, :-1] - ends[:, :1], ((0, 0), (1, 0)))
        positions.append(column - np.take_along_axis(between, part, axis=1))
        part[column >= ends[:, -1:]] = PAD
        token = np.where(part == PAD, 0, token_start[first:last, None] + column)
        held = part != PAD
        slot_of_token[token[held]] = slots + np.flatnonzero(held)
        gather.append(token)
        parts.append(part)
        shapes.append(part.shape)
        slots += part.size
    empty = np.setdiff1d(np.arange(slots), slot_of_token)
    padded = [*gather, slot_of_token, empty] if slots > len(slot_of_token) else []
    found = on_device([*parts, *positions, *padded], device)
    count = len(shapes)
    blocks = tuple(
        Block(*shape, part.view(shape), position.view(shape))
        for shape, part, position in zip(
            shapes, found[:count], found[count : 2 * count], strict=True
        )
    )
    if not padded:
        return DenseLayout(blocks, None, None, None)
    slot, padding = found[-2:]
    return DenseLayout(blocks, torch.cat(found[2 * count : -2]), slot, padding)


def _block_ranges(fed: np.ndarray) -> list[tuple[int, int]]:
    """Runs of consecutive pairs whose dense block is at most MAX_PADDING times their tokens."""
    ranges, first, total, longest = [], 0, 0, 0
    for i, n in enumerate(fed.tolist()):
        grown = max(longest, n)
        if i > first and grown * (i + 1 - first) > MAX_PADDING * (total + n):
            ranges.append((first, i))
            first, total, grown = i, 0, n
        total, longest = total + n, grown
    return [*ranges, (first, len(fed))] if len(fed) else []


def _block_mask(block: Block, window: int | None, dtype: torch.dtype) -> Tensor:
    part, position = block.part, block.position
    slot = torch.arange(block.length, device=part.device)
    query_part, key_part = part[:, :, None], part[:, None, :]
    visible = (slot[:, None] >= slot) & (key_part != PAD)
    visible &= _related(query_part, key_part)
    if window is not None:
        visible &= position[:, :, None] - position[:, None, :] < window
    visible |= slot[:, None] == slot  # a padding query must see something, or softmax gives nan
    mask = torch.zeros(visible.shape, dtype=dtype, device=part.device)
    return mask.masked_fill_(~visible, -torch.inf)[:, None]


def _related(query_part: Tensor, key_part: Tensor) -> Tensor:
    """Whether a key is of the prefix, or of the query's own branch."""
    return (key_part == PREFIX) | (key_part == query_part)


class _ToSlots(torch.autograd.Function):
    """(T, ...) -> (N, ...). Each token has one slot, so both directions are gathers, no scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: DenseLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.gather)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.layout.slot), None


class _ToTokens(torch.autograd.Function):
    """(N, ...) -> (T, ...), dropping the padding; its gradient is zero there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: DenseLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.slot)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slots = grad.index_select(0, ctx.layout.gather)
        return slots.index_fill_(0, ctx.layout.padding, 0), None


def _attend(
    q: Tensor,  # (pairs, heads, length, d)
    k: Tensor,
    v: Tensor,
    mask: Tensor,  # (pairs, 1, length, length), additive
    terms: Terms,
) -> Tensor:  # (pairs, heads, length, d)
    softcap, sinks = terms.softcap, terms.sinks
    grouped = q.shape[1] // k.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=terms.dropout, scale=terms.scale, enable_gqa=grouped > 1
        )
    # scaled_dot_product_attention has neither: written out, softmax in float32 as models do.
    k, v = (x.repeat_interleave(grouped, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if terms.scale is None else terms.scale
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:  # one more key per head, which takes weight and gives nothing
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights[..., : k.shape[2]], terms.dropout) @ v
