"""The last decoder block, for the tokens whose final states something reads.

Behind its attention a block works token by token: output projection, MLP, residual sums. In the
last block what they give a token reaches that token's final state alone. The head reads the states
that predict a scored token; of a prompt that is the last one. So for all others the output
projection and the MLP of the last block, most of its arithmetic, are left out, forward and
backward: values and gradients of what is read are the same sums, and the weights' gradients lose
summands that are zero.

    narrow(block, width)        once, when a model is prepared: its layers compute what is read ...
    with reading(read): ...     ... inside, and everything outside of it

A narrowed layer gives zeros for tokens that nobody reads. It has a `forward` of its own in the
place of its class's; parameters, names and copies of the module are as before. A block in which
anything is not known to work token by token is left as it is: a mixture of experts, whose routers
count every token, or a convolution. What no look at a module tells (a block that runs twice), the
self-check finds, and widens it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.attention_layout import on_device, ranges
from fastpref.batch import PairBatch, ProbeBatch

ATTENTION = ("attn", "attention")  # in the name of a block's part


@dataclass(frozen=True)
class Read:
    """The packed tokens whose final states are read."""

    rows: Tensor  # (N,) int64, ascending
    tokens: int  # T


_read: ContextVar[Read | None] = ContextVar("read", default=None)


def read_tokens(batch: PairBatch | ProbeBatch, device: torch.device | str) -> Read | None:
    """The tokens that ``batch`` scores anything from; None: all of them. Made on the host."""
    starts, counts = batch.read_spans()
    if int(counts.sum()) == batch.num_tokens:
        return None
    (rows,) = on_device([ranges(starts, counts)], device)
    return Read(rows, batch.num_tokens)


@contextmanager
def reading(read: Read | None) -> Iterator[None]:
    """Inside, narrowed layers compute what ``read`` tells; None: everything."""
    token = _read.set(read)
    try:
        yield
    finally:
        _read.reset(token)


def current() -> Read | None:
    """What `reading` tells here and now."""
    return _read.get()


def narrow(block: nn.Module, width: int) -> list[nn.Module]:
    """Narrow what `find` finds, in place; harmless when repeated."""
    found = [part for part in find(block, width) if "forward" not in part.__dict__]
    for part in found:
        part.__dict__["forward"] = MethodType(_only_read, part)
    return found


def widen(module: nn.Module) -> int:
    """Undo `narrow` in all of ``module``; how many layers were narrowed."""
    found = narrowed(module)
    for part in found:
        del part.__dict__["forward"]
    return len(found)


def narrowed(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` that `narrow` has changed."""
    own = ((m, m.__dict__.get("forward")) for m in module.modules())
    return [m for m, forward in own if getattr(forward, "__func__", None) is _only_read]


def find(block: nn.Module, width: int) -> list[nn.Module]:
    """What a decoder block of states ``width`` wide computes behind its attention: the attention's
    output projection, and the other parts that multiply, an MLP or the linear layers of one.

    None where one of these is not known to work token by token.
    """
    found = []
    for name, part in block.named_children():
        if all(p.ndim < 2 for p in part.parameters()):  # a norm; or there are none
            continue
        if any(word in name.lower() for word in ATTENTION):
            outputs = [m for m in _linear_layers(part) if _outputs(m) == width]
            found += outputs[-1:]
        elif _outputs(part) is not None or _is_mlp(part, width):
            found.append(part)
        else:
            return []
    return found


def _is_mlp(part: nn.Module, width: int) -> bool:
    """Whether ``part`` is linear layers and functions between them, and works token by token."""
    if any(isinstance(m, nn.ModuleList) for m in part.modules()):  # experts, one by one
        return False
    known = {id(p) for m in _linear_layers(part) for p in m.parameters()}
    if any(p.ndim >= 2 and id(p) not in known for p in part.parameters()):
        return False
    kept = next(iter(part.parameters()))
    dtype = kept.dtype if kept.is_floating_point() else torch.float32
    x = torch.arange(3 * width, device=kept.device, dtype=torch.float32)
    x = (1.7 * x).sin().to(dtype).view(1, 3, width)
    try:
        with torch.no_grad(), reading(None):
            every, some = part(x), part(x[:, 1:])
    except Exception:  # it takes more than the states, or whatever a model's code may raise
        return False
    if not isinstance(every, Tensor) or every.shape != x.shape or some.shape != x[:, 1:].shape:
        return False
    if x.is_meta:
        return True
    close = torch.finfo(every.dtype).eps ** 0.5
    return bool((every[:, 1:] - some).abs().max() <= close * every.abs().max())


def _linear_layers(part: nn.Module) -> list[nn.Module]:
    """Those within ``part``, in the order of their definition; of an adapted one the whole."""
    if _outputs(part) is not None:
        return [part]
    return [layer for child in part.children() for layer in _linear_layers(child)]


def _outputs(layer: nn.Module) -> int | None:
    """Outputs of a linear layer; None where it is none."""
    if type(layer).__name__ == "Conv1D":  # transformers', of GPT-2
        return int(layer.weight.shape[1])  # type: ignore[index]
    sizes = [getattr(layer, name, None) for name in ("in_features", "out_features")]
    return sizes[1] if all(isinstance(n, int) for n in sizes) else None


def _only_read(self: nn.Module, x: Tensor, *more: Any, **named: Any) -> Any:
    """The forward of a narrowed layer, x (1, T, d) or (T, d)."""
    plain, read = type(self).forward, _read.get()
    # In training mode transformers' own checkpointing may be on, which runs a block again when what
    # is read is no longer known.
    if read is None or self.training or more or named or x.shape[:-1].numel() != read.tokens:
        return plain(self, x, *more, **named)
    rows = _Take.apply(x.reshape(read.tokens, -1), read)
    y = plain(self, rows.view(*x.shape[:-2], -1, x.shape[-1]))
    return _Put.apply(y.reshape(len(read.rows), -1), read).view(*x.shape[:-1], -1)


class _Take(torch.autograd.Function):
    """(T, d) -> (N, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Read) -> Tensor:
        ctx.read = read
        return x.index_select(0, read.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _put(grad, ctx.read), None


class _Put(torch.autograd.Function):
    """(N, d) -> (T, d), zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, read: Read) -> Tensor:
        ctx.read = read
        return _put(y, read)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.read.rows), None


def _put(rows: Tensor, read: Read) -> Tensor:
    return rows.new_zeros(read.tokens, rows.shape[1]).index_copy_(0, read.rows, rows)
