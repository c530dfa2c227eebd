"""Attention over packed branches of shared prefixes, for any model that uses `AttentionInterface`.

A pair is a prefix with two branches, the chosen and the rejected rest (design 2.4); a probed prompt
has as many as it has responses. A branch attends to its prefix and to itself, causally:

                 prefix  branch 1  branch 2          keys
        prefix     \\
        branch 1   x       \\
        branch 2   x       .         \\
        queries

`register()` makes the function known to transformers as ``attn_implementation="fastpref_pair"``;
the body of the model is called with the keyword ``pair_layout``, which transformers hands through.

The backend here is torch's scaled_dot_product_attention over pairs of similar length gathered into
dense blocks. Only attention sees the padding of a block; the rest of the body stays packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "fastpref_pair"
# A block's slots over its tokens before another block is opened: a launch per block and layer
# against the padding's share of attention, itself a small part of the arithmetic.
MAX_PADDING = 1.25
PREFIX, PAD = 0, -1  # branch b has number b, from 1
# Terms of the scores that transformers' models may hand to an attention function, not known here.
UNKNOWN_TERMS = ("position_bias", "alibi", "sinks", "attention_bias")


@dataclass(frozen=True)
class Block:
    """Pairs (prefixes with branches) of similar length: a (pairs, length) grid, padded."""

    pairs: int
    length: int
    part: Tensor  # (pairs, length) PREFIX | number of the branch | PAD
    position: Tensor  # (pairs, length)


@dataclass(frozen=True)
class PairLayout:
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


def build_layout(
    lengths: Sequence[Sequence[int]],  # of each pair: fed tokens of its prefix, of each branch
    device: torch.device | str,
) -> PairLayout:
    """The layout of pairs packed in this order; made on the host, once per batch.

    Prefixes may differ in how many branches they have.
    """
    part_lengths = _rectangle(lengths)
    fed = part_lengths.sum(axis=1)
    token_start = np.cumsum(fed) - fed
    blocks, gather, slot_of_token = [], [], np.empty(int(fed.sum()), np.int64)
    slots = 0
    for first, last in _block_ranges(fed):
        length = int(fed[first:last].max())
        column = np.arange(length)[None]
        ends = part_lengths[first:last].cumsum(axis=1)
        part = np.zeros((last - first, length), np.int16)
        for end in ends.T[:-1]:
            part += column >= end[:, None]
        # Tokens of earlier branches between a token and its prefix; none before the first branch.
        between = np.pad(ends[:, :-1] - ends[:, :1], ((0, 0), (1, 0)))
        position = column - np.take_along_axis(between, part, axis=1)
        part[column >= ends[:, -1:]] = PAD
        token = np.where(part == PAD, 0, token_start[first:last, None] + column)
        held = part != PAD
        slot_of_token[token[held]] = slots + np.flatnonzero(held)
        gather.append(token.ravel())
        blocks.append(
            Block(
                last - first,
                length,
                torch.from_numpy(part).to(device),
                torch.from_numpy(position).to(device),
            )
        )
        slots += part.size
    if slots == len(slot_of_token):
        return PairLayout(tuple(blocks), None, None, None)
    empty = np.setdiff1d(np.arange(slots), slot_of_token)
    to_slots, to_tokens, padding = (
        torch.from_numpy(index).to(device)
        for index in (np.concatenate(gather), slot_of_token, empty)
    )
    return PairLayout(tuple(blocks), to_slots, to_tokens, padding)


def _rectangle(lengths: Sequence[Sequence[int]]) -> np.ndarray:  # (P, parts)
    """The lengths as one array; what a pair lacks in branches are branches without tokens."""
    parts = max(map(len, lengths), default=1)
    if any(len(own) < parts for own in lengths):
        lengths = [[*own, *[0] * (parts - len(own))] for own in lengths]
    return np.asarray(lengths, np.int64).reshape(-1, parts)


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


_ambient: ContextVar[PairLayout | None] = ContextVar("pair_layout", default=None)


class _ToSlots(torch.autograd.Function):
    """(T, ...) -> (N, ...). Each token has one slot, so both directions are gathers, no scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PairLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.gather)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.layout.slot), None


class _ToTokens(torch.autograd.Function):
    """(N, ...) -> (T, ...), dropping the padding; its gradient is zero there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PairLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.slot)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slots = grad.index_select(0, ctx.layout.gather)
        return slots.index_fill_(0, ctx.layout.padding, 0), None


def pair_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, d)
    key: Tensor,  # (1, kv heads, T, d)
    value: Tensor,  # (1, kv heads, T, d)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (heads,) attention sinks
    pair_layout: PairLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, heads, d)
    """transformers' attention function; its signature is theirs.

    Raises ValueError when called without `pair_layout`, or with a term that it does not honour.
    """
    pair_layout = pair_layout or _ambient.get()
    if pair_layout is None:
        raise ValueError(
            f"attn_implementation {NAME!r} needs the keyword pair_layout, which "
            f"{type(module).__name__} did not receive: call the model through fastpref's PairModel."
        )
    for term in UNKNOWN_TERMS:
        if kwargs.get(term) is not None:
            raise ValueError(f"{type(module).__name__} passes {term}, which {NAME!r} lacks.")
    if not (getattr(module, "is_causal", True) and kwargs.get("is_causal", True)):
        raise ValueError(
            f"{type(module).__name__} attends to later tokens too; it is no causal LM."
        )
    if attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} passes an attention mask of its own to {NAME!r}."
        )

    # Token-major, so that a block is a view of consecutive slots.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if pair_layout.gather is not None:
        q, k, v = (_ToSlots.apply(x, pair_layout) for x in (q, k, v))
    outputs = []
    masks = pair_layout.mask(sliding_window, query.dtype)
    # Split, not sliced: a slice's backward fills a tensor of full size with zeros.
    sizes = [block.pairs * block.length for block in pair_layout.blocks]
    of_blocks = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
    for block, mask, qkv in zip(pair_layout.blocks, masks, of_blocks, strict=True):
        grid = (block.pairs, block.length)
        block_q, block_k, block_v = (x.unflatten(0, grid).transpose(1, 2) for x in qkv)
        attended = _attend(block_q, block_k, block_v, mask, scaling, dropout, softcap, s_aux)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if pair_layout.gather is not None:
        out = _ToTokens.apply(out, pair_layout)
    return out[None], None


def _attend(
    q: Tensor,  # (pairs, heads, length, d)
    k: Tensor,
    v: Tensor,
    mask: Tensor,  # (pairs, 1, length, length), additive
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,  # (heads,)
) -> Tensor:  # (pairs, heads, length, d)
    grouped = q.shape[1] // k.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped > 1
        )
    # scaled_dot_product_attention has neither: written out, softmax in float32 as models do.
    k, v = (x.repeat_interleave(grouped, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:  # one more key per head, which takes weight and gives nothing
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights[..., : k.shape[2]], dropout) @ v


@contextmanager
def ambient(layout: PairLayout) -> Iterator[None]:
    """Inside, attention finds ``layout`` where the model drops the keyword on its way there.

    Some layers (StableLM, Nemotron) take no keywords. The keyword goes first: it is bound to its
    call, whatever runs the layer again.
    """
    token = _ambient.set(layout)
    try:
        yield
    finally:
        _ambient.reset(token)


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as it runs here and now, whenever it is called: with the layout of `ambient`."""
    layout = _ambient.get()
    if layout is None:
        return function

    def inside(*args: Any, **kwargs: Any) -> Any:
        with ambient(layout):
            return function(*args, **kwargs)

    return inside


def register() -> None:
    """Make `pair_attention` known to transformers under NAME; harmless when repeated.

    transformers then makes no attention mask of its own for this name, which is what we need.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, pair_attention)
