"""`linear_logprob` of a small head: one vocabulary tile, log-probs and gradients and nothing else.

With few rows it is the calls that take time here, not the arithmetic: after a product has emptied
the caches each call, and each line of Python, costs many times what it costs in a loop
(docs/lab-log.md). So this is `torch_tiles` in half as many calls, with the same bits. Shapes: R
rows, D hidden, V vocab, S segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._head_checks import check_values
from ._launch import surroundings
from ._plan import Plan
from ._route import is_plain
from .head_op import backward_op
from .row_sums import FLOOR, column_maxima, column_sums, exp_, log_prob
from .segment import segment_expand, segment_sum


def one_tile_logprob(differentiable: bool, *inputs: Any) -> Tensor:
    """logp (S,) of plain tensors (`is_plain`) in float32 or float64; the inputs are `_forward`'s.
    V at least 2. All of E is kept if the weight is trained."""
    if differentiable:
        found: Tensor = _OneTile.apply(*inputs)
        return found
    return _forward(*inputs, keep=False, need_hidden=False)[0]


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_id: Tensor | None,
    segments: int,
    slope: float,
    *,
    keep: bool,
    need_hidden: bool,
) -> tuple[Tensor, ...]:
    """logp with z = slope hidden @ weight.T, and what `torch_tiles.Saved` has."""
    check_values(target, segment_id, weight.shape[0], segments)
    with surroundings(hidden.device):
        z = torch.mm(weight, hidden.t())
        if slope != 1.0:
            z.mul_(slope)
        if _native.fits(z):
            state, logp = _native.one_tile_(z, target, FLOOR, keep)
        else:
            state, logp = _rows(z, target, keep)
        nothing = z.new_empty(0, len(target))
        mixed, exps = z.new_empty(0, weight.shape[1]), z if keep else nothing
        if need_hidden and not keep:
            of_others = torch.mm(z.t(), weight)
            mixed = weight.index_select(0, target)
            mixed.addcdiv_(of_others, state[1].unsqueeze(1), value=-1)
        logp = segment_sum(logp, segment_id, segments)
    return logp, state, mixed, exps, nothing


def _rows(z: Tensor, target: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """As `_native.one_tile_`."""
    place = target.unsqueeze(0)
    own = z.gather(0, place)
    z.scatter_(0, place, -torch.inf)
    maximum = column_maxima(z)
    total = column_sums(exp_(z, maximum))
    odds = (maximum - own.squeeze(0)).add_(total.log())
    if keep:
        z.scatter_(0, place, total.neg().unsqueeze(0))
    return torch.stack((maximum, total, odds)), log_prob(odds)


class _OneTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        need_hidden, keep, *_ = ctx.needs_input_grad
        logp, *saved = _forward(*inputs, keep=keep, need_hidden=need_hidden)
        # What the op saves, one by one: checkpointing may see the op the second time.
        ctx.save_for_backward(*inputs[:4], None, *saved)
        ctx.slope = inputs[5]
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks but once
        hidden, weight, _, segment_id, _, state, mixed, exps, _ = saved
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or not is_plain(grad):
            # An onlooker, or whoever may differentiate twice, is to see the op.
            plan = Plan(len(weight), int(need_weight), 0, int(need_hidden), int(need_weight), 0)
            found = backward_op(grad, *saved, [ctx.slope, 1.0], plan)
            return found[0] if need_hidden else None, found[1] if need_weight else None, *[None] * 4
        _, total, odds = state.unbind(0)
        grad_hidden = grad_weight = None
        with surroundings(hidden.device):
            scale = odds.sigmoid().mul_(segment_expand(grad, segment_id)).unsqueeze(1)
            if ctx.slope != 1.0:
                scale.mul_(ctx.slope)
            if not need_weight:
                return mixed * scale, *[None] * 5
            others = scale.div_(total.unsqueeze(1)).neg_()  # what a row adds per unit of E
            buffer = torch.mul(hidden, others, out=hidden.new_empty(hidden.shape))
            grad_weight = torch.mm(exps, buffer)
            if need_hidden:
                grad_hidden = torch.mm(exps.t(), weight, out=buffer).mul_(others)
        return grad_hidden, grad_weight, *[None] * 4
