"""The two custom ops of `linear_logprob`, and what of torch stands around them.

Shapes: R rows, D hidden, V vocab, S segments, g group_size. The tiles themselves: torch_tiles.py,
triton_tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _launch, torch_tiles
from ._head_checks import SEGMENT_STATS, check_values
from ._plan import Plan
from ._route import is_plain
from .head_norms import HeadNorms, SketchPlan
from .row_sums import log_prob, row_statistics
from .segment import segment_expand, segment_sum

ROW_FLOATS = ("log1m_pmax", "row_norm_sq", "row_logp")  # statistics per row that are no indices


def _transform(bias: Tensor | None, scales: Sequence[float]) -> torch_tiles.Transform:
    logit_scale, temperature, *softcap = scales
    return torch_tiles.Transform(bias, logit_scale, softcap[0] if softcap else None, temperature)


def _tiles(what: Plan) -> tuple[Any, dict[str, Any]]:
    """The backend's module, and how it is told to cut the logits."""
    if not what.warps:
        return torch_tiles, {"width": what.width}
    from . import triton_tiles  # here, so that machines without triton need not have it

    tile = _launch.TritonTile(what.width, what.warps, what.row_block)
    return triton_tiles, {"tile": tile}


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_id: Tensor | None,
    bias: Tensor | None,
    segments: int,
    scales: Sequence[float],
    plan: Sequence[int],
    stats: str,
    sketch: str,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor | None, ...]:
    """logp, segment statistics, argmax, other statistics per row, the three of `NormResults` (all
    None where not asked for), the four of `torch_tiles.Saved`."""
    vocab = weight.shape[0]
    check_values(target, segment_id, vocab, segments, counts)
    what = Plan(*plan)
    wide = torch_tiles.accumulate_dtype(hidden.dtype)
    transform = _transform(bias, scales)
    names = frozenset(stats.split(",")) - {""}
    norms = None
    if what.group_size or "row_norm_sq" in names:
        norms = HeadNorms.make(
            segment_id,
            segments,
            what.group_size,
            SketchPlan.read(sketch) if sketch else None,
            "row_norm_sq" in names,
            hidden,
            weight,
            what.kept * what.width >= vocab,
            what.width >= vocab,
            hidden.new_empty(0, dtype=wide),
            bool(what.warps),
            counts,
        )
    backend, cut = _tiles(what)
    with _launch.surroundings(hidden.device):
        sums, saved = backend.forward(
            hidden,
            weight,
            target,
            transform,
            **cut,
            kept=what.kept,
            need_hidden=bool(what.need_hidden),
            stats=names - {"row_norm_sq", "row_logp"},
            riders=norms.riders if norms else (),
        )
        logp_R = log_prob(sums.odds)
        rows = row_statistics(sums, logp_R, vocab, target) if names else {}
        if "row_logp" in names:
            rows["row_logp"] = logp_R
        gram, gram_error, sketched = None, None, None
        if norms is not None:
            if "row_norm_sq" in names:
                rows["row_norm_sq"] = norms.row_norm_sq(transform, sums, saved)
            found = norms.finish(hidden, weight, target, transform, sums, saved, cut)
            gram, gram_error, sketched = found.gram, found.gram_error, found.sketch
    per_segment = [rows[name] for name in SEGMENT_STATS if name in names]
    per_row = [rows[name] for name in ROW_FLOATS if name in names]
    return (
        segment_sum(logp_R, segment_id, segments),
        segment_sum(torch.stack(per_segment), segment_id, segments) if per_segment else None,
        rows.get("argmax"),
        torch.stack(per_row) if per_row else None,
        gram,
        gram_error,
        sketched,
        saved.row_state,
        saved.hidden_grad,
        saved.exps,
        saved.offsets,
    )


@torch.library.custom_op(
    "fastpref::linear_logprob_forward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? segment_id, Tensor? bias, "
    "SymInt segments, float[] scales, int[] plan, str stats, str sketch, SymInt[]? counts=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(*inputs: Any) -> tuple[Tensor, ...]:
    """`forward` as one op, whose outputs are tensors all: of size 0 where not asked for."""
    found = forward(*inputs)
    logp, (hidden, _, target, _, _, segments, *_) = found[0], inputs
    assert logp is not None
    absent = {
        1: lambda: logp.new_empty(0, segments),
        2: lambda: target.new_empty(0),
        3: lambda: logp.new_empty(0, hidden.shape[0]),
    }
    return tuple(
        absent.get(i, lambda: logp.new_empty(0))() if x is None else x for i, x in enumerate(found)
    )


@forward_op.register_fake
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_id: Tensor | None,
    bias: Tensor | None,
    segments: int,
    scales: Sequence[float],
    plan: Sequence[int],
    stats: str,
    sketch: str,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    wide = hidden.new_empty(0, dtype=torch_tiles.accumulate_dtype(hidden.dtype))
    names = stats.split(",")
    what, g = Plan(*plan), plan[2]
    groups = (segments // g, g, g) if g else (0,)
    size, _, _, exact, _ = SketchPlan.read(sketch) if sketch else (0,) * 5
    states, exps_width, offsets = 4, _launch.padded(vocab), what.kept
    mixed = rows if what.need_hidden else 0
    if not what.warps:
        states, exps_width = 4 if len(scales) == 3 else 3, vocab
        entries = min(what.kept * what.width, vocab)
        offsets = torch_tiles.offset_rows(hidden.dtype, entries, vocab, what.width)
        if torch_tiles.holds_all(hidden.dtype, entries, vocab):
            mixed = 0
    return (
        wide.new_empty(segments),
        wide.new_empty(sum(name in SEGMENT_STATS for name in names), segments),
        target.new_empty(rows if "argmax" in names else 0),
        wide.new_empty(sum(name in ROW_FLOATS for name in names), rows),
        wide.new_empty(groups),
        wide.new_empty(groups if size and not exact else (0,)),
        wide.new_empty((segments, size, size) if size else (0,)),
        wide.new_empty(states, rows),
        wide.new_empty(mixed, dim),
        hidden.new_empty(min(what.kept * what.width, exps_width), rows),
        wide.new_empty(offsets, rows),
    )


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_id: Tensor | None,
    bias: Tensor | None,
    row_state: Tensor,
    hidden_grad: Tensor,
    exps: Tensor,
    offsets: Tensor,
    scales: Sequence[float],
    plan: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, from the gradient of every segment's logp."""
    what = Plan(*plan)
    backend, cut = _tiles(what)
    with _launch.surroundings(hidden.device):
        gradients: tuple[Tensor, Tensor, Tensor] = backend.backward(
            segment_expand(grad, segment_id),
            hidden,
            weight,
            target,
            _transform(bias, scales),
            torch_tiles.Saved(row_state, hidden_grad, exps, offsets),
            **cut,
            need_hidden=bool(what.need_hidden),
            need_weight=bool(what.need_weight),
            need_bias=bool(what.need_bias),
        )
    return gradients


backward_op = torch.library.custom_op(
    "fastpref::linear_logprob_backward",
    backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? segment_id, "
    "Tensor? bias, Tensor row_state, Tensor hidden_grad, Tensor exps, Tensor offsets, "
    "float[] scales, int[] plan) -> (Tensor, Tensor, Tensor)",
)


@backward_op.register_fake
def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    bias, what = rest[1], Plan(*rest[-1])
    vocab, dim = weight.shape
    return (
        hidden.new_empty(hidden.shape if what.need_hidden else (0,)),
        weight.new_empty(vocab if what.need_weight else 0, dim),
        (weight if bias is None else bias).new_empty(vocab if what.need_bias else 0),
    )


_launch.refuse_second_derivative(backward_op, "linear_logprob")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output[-4:])


def _save(ctx: Any, inputs: tuple[Any, ...], saved: Sequence[Tensor | None]) -> None:
    hidden, weight, target, segment_id, bias, _, ctx.scales, ctx.plan, *_ = inputs
    # Gradients of the outputs nobody differentiates stay None; as zeros one of them would be (R,
    # V).
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, segment_id, bias, *saved)


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 11
    if grad is not None:
        what = Plan(*ctx.plan)
        # The op where it is to be seen: as a node of a graph, and by whoever differentiates twice.
        bare = is_plain(grad) and not torch.is_grad_enabled()
        run: Callable[..., tuple[Tensor, ...]] = backward if bare else backward_op
        hidden, weight, bias = run(grad, *ctx.saved_tensors, ctx.scales, ctx.plan)
        grads[0] = hidden if what.need_hidden else None
        grads[1] = weight if what.need_weight else None
        grads[4] = bias if what.need_bias else None
    return tuple(grads)


forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


class Direct(torch.autograd.Function):
    """`forward_op` without torch's dispatcher, for tensors that `is_plain` says so of."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        found = forward(*inputs)
        outputs = found[:-4]
        ctx.mark_non_differentiable(*[x for x in outputs[1:] if x is not None])
        _save(ctx, inputs, found[-4:])
        return outputs

    backward = staticmethod(_autograd_backward)
