"""Norms and sketches on the device against float64: for the `correctness` part of `bench gpu`.

A check gives numbers and their bounds, as there; without a GPU the same go through the torch
backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fastpref_kernels import (
    embedding_norms,
    layernorm_norms,
    linear_norms,
    linear_sketch,
    lora_norms,
    reference,
    rmsnorm_norms,
)
from torch import Tensor

from bench.capture import waiting_is_an_error

Found = Mapping[str, tuple[float, float]]  # what -> (measured, bound)
Check = Callable[[Any], Found]  # takes a session, of which the device alone is read
# Rows of the segments: some that share a tile, several tiles, and, at these widths, gradients.
COUNTS = [3, 40, 1, 0, 200, 333, 700, 64]
WIDTHS = (768, (512, 128, 128))
CLOSE = 2e-4  # of a norm: float32 accumulation, whatever the inputs


def checks() -> Iterator[tuple[str, Check]]:
    """(name, check), the most important first."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for group in (None, 2):
            name = f"linear_norms, {str(dtype)[6:]}, group_size {group}"
            yield name, functools.partial(_linear, dtype=dtype, group=group)
    yield "norms of norms, embeddings and adapters", _others
    yield "sketches have the CPU's signs", _sketches
    yield "norms: same bits twice, no wait for the device", _same_bits


def _rows(session: Any, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(sum(COUNTS), *shape, generator=g) + torch.randn(*shape, generator=g)
    return noise.to(dtype).to(session.device)


def _ids(session: Any) -> Tensor:
    counts = torch.tensor(COUNTS)
    return torch.arange(len(COUNTS)).repeat_interleave(counts).int().to(session.device)


def _error(ours: Tensor, truth: Tensor) -> float:
    """Relative to the norms: an inner product's to the product of both."""
    ours, truth = ours.double(), truth.double()
    if truth.dim() == 3:
        lengths = truth.diagonal(dim1=1, dim2=2).sqrt()
        scale = lengths.unsqueeze(1) * lengths.unsqueeze(2)
    else:
        scale = truth
    return float(((ours - truth).abs() / scale.clamp(min=1e-30)).max())


def _linear(session: Any, dtype: torch.dtype, group: int | None) -> Found:
    d, outputs = WIDTHS
    x = _rows(session, d, dtype=dtype)
    dy = [_rows(session, p, dtype=dtype, seed=p) for p in outputs]
    same: dict[str, Any] = {"num_segments": len(COUNTS), "group_size": group}
    ours = linear_norms(x, dy, _ids(session), **same)
    truth = reference.linear_norms(x.double(), torch.cat(dy, 1).double(), _ids(session), **same)
    return {"norms": (_error(ours, truth), CLOSE)}


def _others(session: Any) -> Found:
    """Against the same functions on the CPU in float64, which the tests hold against autograd."""
    found: dict[str, tuple[float, float]] = {}
    dtype, ids = torch.bfloat16, _ids(session)
    x, dy = (_rows(session, 384, dtype=dtype, seed=seed) for seed in (0, 1))
    a, b = x[:16].contiguous(), dy[:384, :16].contiguous()
    token = torch.arange(len(ids), device=session.device) % 11
    calls: dict[str, Callable[..., Any]] = {
        "rmsnorm": lambda x, dy, ids, **o: rmsnorm_norms(x, dy, ids, eps=1e-5, **o),
        "layernorm": lambda x, dy, ids, **o: layernorm_norms(x, dy, ids, eps=1e-5, **o).weight,
        "embedding": lambda x, dy, ids, **o: embedding_norms(token.to(ids.device), dy, ids, **o),
        "lora": lambda x, dy, ids, **o: lora_norms(x, dy, a.to(x), b.to(x), ids, scale=0.5, **o).a,
    }
    for name, call in calls.items():
        ours = call(x, dy, ids, num_segments=len(COUNTS))
        truth = call(x.cpu().double(), dy.cpu().double(), ids.cpu(), num_segments=len(COUNTS))
        found[name] = (_error(ours.cpu(), truth), CLOSE)
    return found


def _sketches(session: Any) -> Found:
    x, dy = (_rows(session, 384, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    same: dict[str, Any] = {"seed": 0, "key": "w", "num_segments": len(COUNTS)}
    found = {}
    for k in (8, 32, 64):
        ours = linear_sketch(x, dy, _ids(session), k, **same).cpu().double()
        wide = (x.cpu().double(), dy.cpu().double(), _ids(session).cpu())
        truth = linear_sketch(*wide, k, **same)
        found[f"k {k}"] = (float((ours - truth).norm() / truth.norm()), 1e-4)
    return found


def _same_bits(session: Any) -> Found:
    d, outputs = WIDTHS
    x = _rows(session, d, dtype=torch.bfloat16)
    dy = [_rows(session, p, dtype=torch.bfloat16, seed=p) for p in outputs]
    ids = _ids(session)

    def call() -> Tensor:
        return linear_norms(x, dy, ids, num_segments=len(COUNTS), counts=COUNTS)

    first = call()
    with waiting_is_an_error(session.device):
        second = call()
    return {"differing": (float((first != second).sum()), 0.0)}
