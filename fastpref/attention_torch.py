"""torch's varlen attention, as `fastpref.attention_backends` takes it.

`torch.nn.attention.varlen.varlen_attn` computes the forward. Its own backward adds with atomics
unless torch is told, for the whole process, to be deterministic; here it is told so around the one
kernel that this concerns. Both directions are custom ops, so that torch.compile and selective
checkpointing see them as one each.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    deterministic: bool = True,
) -> Tensor:
    """`fastpref.attention_reference.varlen` without softcap, on CUDA in half precision."""
    assert softcap is None
    out, _ = _forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, _left(window), deterministic)
    return out


def _left(window: int | None) -> int:
    """Keys to the left of a query's own, as flash kernels count; -1: all."""
    return -1 if window is None else window - 1


@functools.cache
def _knows_groups(function: Any) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


@torch.library.custom_op("fastpref::varlen_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    left: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    # Early versions take fewer key heads than query heads without being told.
    grouped: Any = {"enable_gqa": True} if _knows_groups(varlen_attn) else {}
    out, lse = varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k,
        return_aux=AuxRequest(lse=True), scale=scale, window_size=(left, 0), **grouped,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fastpref::varlen_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    left: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # What the public function's backward calls; there is no dropout whose state would matter.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    # Uninitialised memory is filled in that mode, which costs a pass over it for nothing.
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    if deterministic:
        memory.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    try:
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, left < 0, state, unused,
            scale=scale, window_size_left=left, window_size_right=0,
        )  # fmt: skip
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            memory.fill_uninitialized_memory = fills
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.others = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, *ctx.others), *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_keep)


OP = torch.ops.fastpref.varlen_attention.default
