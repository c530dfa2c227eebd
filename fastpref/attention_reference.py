"""Attention over sequences of varying length in plain torch, any dtype: what backends equal."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen(
    q: Tensor,  # (sum of query lengths, heads, d)
    k: Tensor,  # (sum of key lengths, kv heads, d)
    v: Tensor,  # (sum of key lengths, kv heads, d)
    cu_q: Tensor,  # (N + 1,) int32, where each sequence's queries begin, and the end
    cu_k: Tensor,  # (N + 1,) int32
    max_q: int,  # at least the longest sequence's queries
    max_k: int,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (sum of query lengths, heads, d)
    """Softmax attention within each of N sequences, causal from the bottom right.

    The last query of a sequence sees all its keys; the one before, all but the last: query i of n
    stands where key i + m - n of m does. With a ``window`` it sees that many, its own included.
    """
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    assert (ends_q[-1], ends_k[-1]) == (len(q), len(k))
    outputs = []
    for i in range(len(ends_q) - 1):
        own_q = q[ends_q[i] : ends_q[i + 1]]
        own_k, own_v = (
            x[ends_k[i] : ends_k[i + 1]].repeat_interleave(group, dim=1) for x in (k, v)
        )
        n, m = len(own_q), len(own_k)
        assert 0 < n <= m and n <= max_q and m <= max_k
        scores = scale * torch.einsum("qhd,khd->hqk", own_q, own_k)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query, key = (torch.arange(count, device=q.device) for count in (n, m))
        behind = query[:, None] + (m - n) - key
        visible = behind >= 0
        if window is not None:
            visible &= behind < window
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, own_v))
    return torch.cat(outputs)
