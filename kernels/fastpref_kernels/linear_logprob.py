"""Per-segment log-probabilities of a linear language-model head, without a float32 (R, V) tensor.

Shapes: R rows, D hidden, V vocab, S segments, g group_size. Mathematics, memory, numerics: kernels/README.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch, torch_tiles
from .gram import GroupGram, RowTerms
from .segment import segment_expand, segment_sum

_SEGMENT_STATS = _launch.SEGMENT_STATS


@dataclass(frozen=True)
class LinearLogprob:
    """Result of `linear_logprob`; float32 (float64 for float64 inputs), None where not asked for.

    Only `logp` is differentiable. The statistics are sums over the rows of each segment (S,), `argmax` and
    `log1m_pmax` stand per row (R,).
    """

    logp: Tensor  # (S,) nats
    entropy: Tensor | None = None  # (S,) of - sum_v p log p, nats
    sum_sq_prob: Tensor | None = None  # (S,) of sum_v p^2
    log_sum_sq_prob: Tensor | None = None  # (S,) of log sum_v p^2
    top1: Tensor | None = None  # (S,) number of rows whose target is the first largest entry
    mean_logit: Tensor | None = None  # (S,) of the mean over v of the transformed logit
    argmax: Tensor | None = None  # (R,) int64, first largest entry
    log1m_pmax: Tensor | None = None  # (R,) log(1 - max_v p), -inf where that is below what the dtype holds
    gram: Tensor | None = None  # (S / g, g, g) <d logp[a] / dW, d logp[b] / dW>


def linear_logprob(
    hidden: Tensor,  # (R, D)  float64 | float32 | bfloat16 | float16
    weight: Tensor,  # (V, D)  same dtype
    target: Tensor,  # (R,)    int64, 0 .. V - 1
    segment_id: Tensor | None = None,  # (R,) int32 non-decreasing; None: one segment per row
    *,
    num_segments: int | None = None,
    group_size: int = 1,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    cache: int = -1,
    stats: Sequence[str] = (),
    norms: str | None = None,
    backend: str = "auto",
) -> LinearLogprob:
    """Log-probability of the targets of every segment, in nats; differentiable in hidden, weight and bias.

        logp[s] = sum over rows t of segment s of  z_t[y_t] - logsumexp_v z_t[v]
        z = softcap(logit_scale (hidden @ weight.T + bias)) / temperature,   softcap(x) = c tanh(x / c)

    A segment without rows has logp 0. `num_segments` is the last id + 1 if not given (on CUDA that waits for the
    device; under torch.compile it must be given). `stats`: names of fields of `LinearLogprob` to compute, from entropy,
    sum_sq_prob, log_sum_sq_prob, top1, mean_logit, argmax, log1m_pmax. `norms="exact"`: `gram`, the inner products of
    the segments' gradients in `weight` (bias left out) within each group of `group_size` segments.

    Memory    hidden and weight require grad: one (R, V) buffer in their dtype, or only `cache` tiles of it (0: none)
              at a fourth matrix product. Weight and bias frozen: no (R, V) buffer, two products. No grad: one.
    Numerics  products accumulated and logits reduced in float32; 1 - p formed without cancellation, so gradients of
              confident rows keep their digits. Repeatable: no atomics. Backward may run twice (retain_graph).
    Errors    ValueError with the offending value; on CUDA a target out of range gives NaN instead.
    Oracle    reference.linear_logprob
    """
    segments = _launch.check_linear_logprob(
        hidden,
        weight,
        target,
        segment_id,
        bias,
        num_segments=num_segments,
        group_size=group_size,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        cache=cache,
        stats=stats,
        norms=norms,
    )
    _launch.resolve_backend(backend)
    grad = torch.is_grad_enabled()
    logp, sums, argmax, log1m_pmax, gram, *_ = _forward_op(
        hidden,
        weight,
        target,
        segment_id,
        bias,
        segments,
        group_size if norms else 0,
        softcap,
        float(logit_scale),
        float(temperature),
        cache,
        _launch.tile_width(hidden.shape[1], weight.shape[0], hidden.dtype),
        ",".join(stats),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    asked = [name for name in _SEGMENT_STATS if name in stats]
    fields: dict[str, Tensor] = {
        name: row.detach() for name, row in zip(asked, sums.unbind(0), strict=True)
    }
    if "argmax" in stats:
        fields["argmax"] = argmax
    if "log1m_pmax" in stats:
        fields["log1m_pmax"] = log1m_pmax.detach()
    if norms:
        fields["gram"] = gram.detach()
    return LinearLogprob(logp=logp, **fields)


def _kept_tiles(vocab: int, width: int, cache: int, need: bool) -> int:
    count = -(-vocab // width)
    return 0 if not need else count if cache < 0 else min(cache, count)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round the tile products to a half type behind the op's back."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@torch.library.custom_op(
    "fastpref::linear_logprob_forward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? segment_id, Tensor? bias, SymInt segments, "
    "int group_size, float? softcap, float logit_scale, float temperature, int cache, int width, str stats, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
)
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_id: Tensor | None,
    bias: Tensor | None,
    segments: int,
    group_size: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    cache: int,
    width: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """Returns logp, segment statistics, argmax, log1m_pmax, gram, and the four tensors of `torch_tiles.Saved`."""
    _launch.check_values(target, segment_id, weight.shape[0], segments)
    transform = torch_tiles.Transform(bias, logit_scale, softcap, temperature)
    dtype = torch_tiles.accumulate_dtype(hidden.dtype)
    empty = hidden.new_empty(0, dtype=dtype)
    names = frozenset(stats.split(",")) - {""}
    gram = GroupGram(segment_id, segments, group_size, empty) if group_size else None
    with _no_autocast(hidden.device):
        sums, saved = torch_tiles.forward(
            hidden,
            weight,
            target,
            transform,
            width=width,
            kept=_kept_tiles(weight.shape[0], width, cache, need_weight or need_bias),
            need_hidden=need_hidden,
            stats=names,
            gram=gram,
        )
        _, total, log_odds, phi = saved.row_state
        logp_R = F.logsigmoid(-log_odds)
        rows = row_statistics(sums, saved.row_state, logp_R, weight.shape[0], target)
        asked = [rows[name] for name in _SEGMENT_STATS if name in names]
        gram_out = empty
        if gram is not None:
            terms = RowTerms(sums.maximum, total, log_odds.sigmoid() * transform.slope, phi)
            gram_out = gram.finish(
                hidden,
                weight,
                target,
                terms,
                lambda z, y: transform.apply_(z, None if bias is None else bias[y].unsqueeze(1)),
            )
    return (
        segment_sum(logp_R, segment_id, segments),
        segment_sum(torch.stack(asked), segment_id, segments)
        if asked
        else empty.new_empty(0, segments),
        rows.get("argmax", target.new_empty(0)),
        rows.get("log1m_pmax", empty.new_empty(0)),
        gram_out,
        saved.row_state,
        saved.hidden_grad,
        saved.exps,
        saved.offsets,
    )


def row_statistics(
    sums: torch_tiles.RowSums, row_state: Tensor, logp: Tensor, vocab: int, target: Tensor
) -> dict[str, Tensor]:
    """Statistics per row (R,) from sums over the non-target entries and a = log((1 - p) / p).

    With q the distribution given "not the target", H(q) = log S' - X / S':

        entropy = -p log p - (1-p) log(1-p) + (1-p) H(q)           every term >= 0
        sum_v p_v^2 = p^2 + (1-p)^2 Q / S'^2
        1 - p_max = 1 - p if the target is the largest entry, else (rest + e_y) / (S' + e_y), e_y = exp(z_y - max)
    """
    maximum, total, log_odds, _ = row_state
    out: dict[str, Tensor] = {}
    log1m, miss = F.logsigmoid(log_odds), log_odds.sigmoid()
    if "entropy" in sums.stats:
        own = -logp.exp() * logp + torch.special.entr(miss)
        out["entropy"] = own + miss * (total.log() - sums.plogp / total)
    if "sum_sq_prob" in sums.stats:
        out["sum_sq_prob"] = logp.exp().square() + miss.square() * sums.square / total.square()
    if "log_sum_sq_prob" in sums.stats:
        others = 2 * log1m + sums.square.log() - 2 * total.log()
        out["log_sum_sq_prob"] = torch.logaddexp(2 * logp, others)
    if "mean_logit" in sums.stats:
        out["mean_logit"] = sums.logit / vocab
    if sums.stats & {"argmax", "top1", "log1m_pmax"}:
        target_logit = sums.target_logit
        tie = (target_logit == maximum) & (target < sums.argmax)
        top1 = (target_logit > maximum) | tie
        if "top1" in sums.stats:
            out["top1"] = top1.to(logp.dtype)
        if "argmax" in sums.stats:
            out["argmax"] = torch.where(top1, target, sums.argmax)
        if "log1m_pmax" in sums.stats:
            gap = target_logit - maximum
            others = torch.logaddexp(sums.rest.log(), gap) - torch.logaddexp(total.log(), gap)
            out["log1m_pmax"] = torch.where(top1, log1m, others)
    return out


@_forward_op.register_fake
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_id: Tensor | None,
    bias: Tensor | None,
    segments: int,
    group_size: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    cache: int,
    width: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    wide = hidden.new_empty(0, dtype=torch_tiles.accumulate_dtype(hidden.dtype))
    names = stats.split(",")
    kept = _kept_tiles(vocab, width, cache, need_weight or need_bias)
    groups = (segments // group_size, group_size, group_size) if group_size else (0,)
    return (
        wide.new_empty(segments),
        wide.new_empty(sum(name in _SEGMENT_STATS for name in names), segments),
        target.new_empty(rows if "argmax" in names else 0),
        wide.new_empty(rows if "log1m_pmax" in names else 0),
        wide.new_empty(groups),
        wide.new_empty(4, rows),
        wide.new_empty(rows if need_hidden else 0, dim),
        hidden.new_empty(min(kept * width, vocab), rows),
        wide.new_empty(kept, rows),
    )


@torch.library.custom_op(
    "fastpref::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? segment_id, Tensor? bias, "
    "Tensor row_state, Tensor hidden_grad, Tensor exps, Tensor offsets, float? softcap, float logit_scale, "
    "float temperature, int width, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
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
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    width: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(hidden.device):
        return torch_tiles.backward(
            segment_expand(grad, segment_id),
            hidden,
            weight,
            target,
            torch_tiles.Transform(bias, logit_scale, softcap, temperature),
            torch_tiles.Saved(row_state, hidden_grad, exps, offsets),
            width=width,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    bias, (need_hidden, need_weight, need_bias) = rest[1], rest[-3:]
    vocab, dim = weight.shape
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        weight.new_empty(vocab if need_weight else 0, dim),
        (weight if bias is None else bias).new_empty(vocab if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, segment_id, bias, _, _, *numbers = inputs
    softcap, logit_scale, temperature, _, width, _, *ctx.needs = numbers
    ctx.numbers = (softcap, logit_scale, temperature, width)
    # Gradients of the outputs nobody differentiates stay None; as zeros one of them would be (R, V).
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, segment_id, bias, *output[-4:])


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 16
    if grad is not None:
        hidden, weight, bias = _backward_op(grad, *ctx.saved_tensors, *ctx.numbers, *ctx.needs)
        need_hidden, need_weight, need_bias = ctx.needs
        grads[0] = hidden if need_hidden else None
        grads[1] = weight if need_weight else None
        grads[4] = bias if need_bias else None
    return tuple(grads)


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
