"""Attention over packed branches in two calls of a backend for sequences of varying length.

The first takes prefix and first branch (of a pair: the chosen rest) as one causal sequence. The
second takes every other branch's queries against keys gathered from its prefix and itself, causal
from the bottom right: the branch's last token sees them all.

                 prefix  branch 1  branch 2          keys
        prefix     \\                          \\
        branch 1   x       \\                    |  first call
        branch 2   x                 \\          |  second call
        queries

Nothing is padded and no mask is made. Where no prompt has a second branch with tokens (a pair whose
completions are one token long) the packed order is the first call's own, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.attention_backends import Backend
from fastpref.attention_layout import Terms, in_autocast, on_device, ranges, rectangle


@dataclass(frozen=True)
class Call:
    """Where N sequences begin and end among queries and keys."""

    cu_q: Tensor  # (N + 1,) int32
    cu_k: Tensor  # (N + 1,) int32
    max_q: int
    max_k: int


@dataclass(frozen=True)
class Gather:
    """Which tokens stand where in the two calls, and the way back.

    T1 + T2 = T tokens are queries of the first call and of the second; no token is in both. Keys of
    the second call, K of them, are T2 tokens of branches and those of their prefixes, which are
    keys of the first call too and of every further branch of their prompt.
    """

    first: Tensor  # (T1,) tokens
    second: Tensor  # (T2,) tokens
    keys: Tensor  # (K,) tokens
    own: Tensor  # (T2,) places in `keys` of the branches' own tokens, in the order of `second`
    # Prefix tokens and their places in `keys`: of the first further branch of every prompt, of the
    # second, ... A token stands once in each, so that sums have one order.
    shared: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class VarlenLayout:
    """The calls of a batch; `gather` is None where one call takes the packed tokens as they are."""

    backend: Backend
    first: Call | None
    second: Call | None
    gather: Gather | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:  # (T, heads, d)
        """Attention of packed tokens: q (T, heads, d), k and v (T, kv heads, d).

        Raises ValueError for what the backend does not compute.
        """
        # Rotary embedding brings queries and keys back to the residual stream's float32.
        q, k, v = (in_autocast(x) for x in (q, k, v))
        self.backend.demand(q, v, terms)
        if self.gather is None:
            return self._call(self.first, q, k, v, terms)
        to = self.gather
        q1, q2 = _TakeQueries.apply(q, to)
        k1, k2 = _TakeKeys.apply(k, to)
        v1, v2 = _TakeKeys.apply(v, to)
        out1 = self._call(self.first, q1, k1, v1, terms)
        return _Merge.apply(out1, self._call(self.second, q2, k2, v2, terms), to)

    def _call(self, call: Call | None, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
        if call is None:  # no sequence at all
            return q
        assert self.backend.varlen
        return self.backend.varlen(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k,
            scale=terms.scale, window=terms.window, softcap=terms.softcap,
        )  # fmt: skip


def build_varlen(
    lengths: Sequence[Sequence[int]],  # of each pair: fed tokens of its prefix, of each branch
    device: torch.device | str,
    backend: Backend,
) -> VarlenLayout:
    """The calls for pairs packed in this order; made on the host, once per batch.

    Prefixes may differ in how many branches they have. Sequences without queries are left out: a
    backend need not know them.
    """
    parts = rectangle(lengths)
    start = np.cumsum(parts.sum(axis=1)) - parts.sum(axis=1)
    prefix, whole = parts[:, 0], parts[:, :2].sum(axis=1)
    pair, branch = np.nonzero(parts[:, 2:])
    branch += 2
    count = parts[pair, branch]
    branch_start = start[pair] + parts.cumsum(axis=1)[pair, branch - 1]
    sizes = whole[whole > 0]
    if not len(pair):
        (only,) = _calls([(sizes, sizes)], device)
        return VarlenLayout(backend, only, None, None)
    call1, call2 = _calls([(sizes, sizes), (count, prefix[pair] + count)], device)

    # A further branch's keys: its prefix's range of tokens, then its own.
    starts = np.stack([start[pair], branch_start], axis=1).ravel()
    counts = np.stack([prefix[pair], count], axis=1).ravel()
    place = np.cumsum(counts) - counts  # where each range begins in `keys`
    turn = np.arange(len(pair)) - np.searchsorted(pair, pair)  # 0 for a prompt's first of them
    shared = []
    for number in range(int(turn.max()) + 1):
        now = turn == number
        tokens = ranges(start[pair[now]], prefix[pair[now]])
        shared += [tokens, ranges(place[::2][now], prefix[pair[now]])]
    first, second, keys, own, *places = on_device(
        [
            ranges(start, whole),
            ranges(branch_start, count),
            ranges(starts, counts),
            ranges(place[1::2], count),
            *shared,
        ],
        device,
    )
    both = tuple(zip(places[::2], places[1::2], strict=True))
    return VarlenLayout(backend, call1, call2, Gather(first, second, keys, own, both))


def _calls(
    sizes: Sequence[tuple[np.ndarray, np.ndarray]],  # of each call's sequences: queries, keys
    device: torch.device | str,
) -> list[Call | None]:
    ends = [np.concatenate([[0], np.cumsum(own)]) for both in sizes for own in both]
    cu = on_device([end.astype(np.int32) for end in ends], device)
    # At least 2: flash-attn 2 takes other ways where queries are single, made for decoding.
    return [
        Call(cu_q, cu_k, max(2, int(q.max())), int(k.max())) if len(q) else None
        for (q, k), cu_q, cu_k in zip(sizes, cu[::2], cu[1::2], strict=True)
    ]


# Gathers whose way back is a copy to distinct places: autograd's own for `index_select` would add
# with atomics, in an order that changes from run to run.


class _TakeQueries(torch.autograd.Function):
    """(T, ...) -> (T1, ...) and (T2, ...): every token goes to one of the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Gather) -> tuple[Tensor, Tensor]:
        ctx.to = to
        return x.index_select(0, to.first), x.index_select(0, to.second)

    @staticmethod
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor, None]:
        return _merged(grad1, grad2, ctx.to), None


class _Merge(torch.autograd.Function):
    """(T1, ...) and (T2, ...) -> (T, ...)."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, to: Gather) -> Tensor:
        ctx.to = to
        return _merged(x1, x2, to)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad.index_select(0, ctx.to.first), grad.index_select(0, ctx.to.second), None


class _TakeKeys(torch.autograd.Function):
    """(T, ...) -> (T1, ...) and (K, ...): a prefix's tokens go to both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Gather) -> tuple[Tensor, Tensor]:
        ctx.to = to
        return x.index_select(0, to.first), x.index_select(0, to.keys)

    @staticmethod
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor, None]:
        to: Gather = ctx.to
        grad = _merged(grad1, grad2.index_select(0, to.own), to)
        for tokens, places in to.shared:
            total = grad.index_select(0, tokens) + grad2.index_select(0, places)
            grad.index_copy_(0, tokens, total)
        return grad, None


def _merged(x1: Tensor, x2: Tensor, to: Gather) -> Tensor:
    out = x1.new_empty(len(x1) + len(x2), *x1.shape[1:])
    out.index_copy_(0, to.first, x1)
    return out.index_copy_(0, to.second, x2)
