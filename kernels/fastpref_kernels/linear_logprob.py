"""Per-segment log-probabilities of a linear language-model head, without a float32 (R, V) tensor.

Shapes: R rows, D hidden, V vocab, S segments, g group_size. Mathematics, memory, numerics:
kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _head_checks, _launch, torch_tiles
from ._plan import Plan, make_plan
from ._route import is_plain
from .count_sketch import BUCKETS
from .head_norms import HeadNorms, SketchPlan
from .row_sums import row_statistics
from .segment import segment_expand, segment_sum

_SEGMENT_STATS, _ROW_FLOATS = _head_checks.SEGMENT_STATS, ("log1m_pmax", "row_norm_sq", "row_logp")


@dataclass(frozen=True)
class LinearLogprob:
    """Result of `linear_logprob`; float32 (float64 for float64 inputs), None where not asked for.

    Only `logp` is differentiable. The statistics are sums over the rows of each segment (S,),
    `argmax`, `log1m_pmax`, `row_norm_sq` and `row_logp` stand per row (R,).
    """

    logp: Tensor  # (S,) nats
    entropy: Tensor | None = None  # (S,) of - sum_v p log p, nats
    sum_sq_prob: Tensor | None = None  # (S,) of sum_v p^2
    log_sum_sq_prob: Tensor | None = None  # (S,) of log sum_v p^2
    residual_sq: Tensor | None = None  # (S,) of sum_v (p - [v is the target])^2
    top1: Tensor | None = None  # (S,) number of rows whose target is the first largest entry
    argmax_logp: Tensor | None = None  # (S,) of max_v log p, nats
    mean_logit: Tensor | None = None  # (S,) of the mean over v of the transformed logit
    argmax: Tensor | None = None  # (R,) int64, first largest entry
    log1m_pmax: Tensor | None = None  # (R,) log(1 - max_v p); see kernels/README.md on its floor
    row_norm_sq: Tensor | None = None  # (R,) ||d logp_t / d(hidden @ weight.T)||^2
    row_logp: Tensor | None = None  # (R,) nats, of every row's target
    gram: Tensor | None = None  # (S / g, g, g) <d logp[a] / dW, d logp[b] / dW>
    gram_error: Tensor | None = None  # (S / g, g, g) one standard error of a sketched gram
    sketch: Tensor | None = None  # (S, k, k) of d logp[s] / dW, as `linear_sketch`


def linear_logprob(
    hidden: Tensor,  # (R, D)  float64 | float32 | bfloat16 | float16
    weight: Tensor,  # (V, D)  same dtype
    target: Tensor,  # (R,)    int64, 0 .. V - 1
    segment_id: Tensor | None = None,  # (R,) int32 non-decreasing; None: one segment per row
    *,
    num_segments: int | None = None,
    counts: Sequence[int] | None = None,  # (S,) rows of every segment, as `row_counts` gives them
    group_size: int = 1,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    cache: int = -1,
    stats: Sequence[str] = (),
    norms: str | None = None,
    sketch_dim: int = 16,
    sketch_seed: int = 0,
    sketch_key: str = "lm_head",
    sketch_buckets: int = BUCKETS,
    backend: str = "auto",
) -> LinearLogprob:
    """Log-probability of every segment's targets, in nats; differentiable in hidden, weight, bias.

        logp[s] = sum over rows t of segment s of  z_t[y_t] - logsumexp_v z_t[v]
        z = softcap(logit_scale (hidden @ weight.T + bias)) / temperature,  softcap(x) = c tanh(x/c)

    A segment without rows has logp 0. `num_segments` is the last id + 1 if not given: on CUDA that
    waits for the device, under torch.compile it must be given. `norms` need the rows of every
    segment on the host: with `counts` nothing waits for the device, and the call can be captured in
    a CUDA graph (after one call with the same `counts`). `stats`: fields of `LinearLogprob`
    to compute. `norms="exact"`: `gram`, of the segments' gradients in `weight` (bias left out)
    within each group of `group_size` segments. `norms="sketch"`: an unbiased estimate of it from
    `sketch_buckets` buckets of the vocabulary, with its `gram_error`, and `sketch`, (k, k) with
    k = `sketch_dim` for every segment: it adds up over batches, ranks and uses of the weight, and
    is compared with other sketches of that seed, key, k and buckets: what `linear_sketch` calls
    seed, key, k, buckets has the prefix sketch_ here. `norms="both"`: exact `gram` and `sketch`.
    `backend`: triton on CUDA, else torch; or the one that is named.

    Memory    weight trained: one (R, V) buffer in its dtype, or `cache` tiles of it (0: none) at a
              fourth product. Weight and bias frozen: no such buffer, two products. No grad: one.
    Numerics  products accumulated, logits reduced in float32; 1 - p formed without cancellation.
              Repeatable: no atomics. Backward may run twice (retain_graph).
    Errors    ValueError with the offending value; on CUDA a target out of range gives NaN instead.
    Oracle    reference.linear_logprob
    """
    segments = _head_checks.check_linear_logprob(
        hidden,
        weight,
        target,
        segment_id,
        bias,
        num_segments=num_segments,
        counts=counts,
        group_size=group_size,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        cache=cache,
        stats=stats,
        norms=norms,
        sketch_dim=sketch_dim,
        sketch_buckets=sketch_buckets,
        sketch_seed=sketch_seed,
        sketch_key=sketch_key,
    )
    triton = _launch.resolve_backend(backend, hidden.device, hidden.dtype) == "triton"
    plan = make_plan(hidden, weight, bias, cache, group_size if norms else 0, triton)
    sketch = SketchPlan(sketch_dim, sketch_buckets, sketch_seed, norms == "both", sketch_key)
    call = (
        hidden,
        weight,
        target.contiguous(),  # kernels take it for R numbers in a row
        segment_id,
        bias,
        segments,
        (logit_scale, temperature) if softcap is None else (logit_scale, temperature, softcap),
        plan,
        ",".join(sorted(set(stats))),
        sketch.text() if norms in ("sketch", "both") else "",
        list(counts) if norms and counts is not None else None,
    )
    run: Callable[..., Any] = forward
    if not is_plain(*call[:5]):
        run = _forward_op
    elif plan.need_hidden or plan.need_weight or plan.need_bias:
        run = _Direct.apply
    logp, sums, argmax, row_floats, *of_norms = run(*call)
    fields: dict[str, Tensor] = {}
    if stats:
        asked = [name for name in _SEGMENT_STATS if name in stats]
        fields = dict(zip(asked, sums, strict=True)) if asked else {}
        if "argmax" in stats:
            fields["argmax"] = argmax
        asked = [name for name in _ROW_FLOATS if name in stats]
        fields.update(zip(asked, row_floats, strict=True) if asked else ())
    if norms:
        fields["gram"] = of_norms[0]
    if norms == "sketch":
        fields["gram_error"] = of_norms[1]
    if norms in ("sketch", "both"):
        fields["sketch"] = of_norms[2]
    return LinearLogprob(logp=logp, **fields)


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
    _head_checks.check_values(target, segment_id, vocab, segments, counts)
    what = Plan(*plan)
    wide = torch_tiles.accumulate_dtype(hidden.dtype)
    plain = bias is None and len(scales) == 2 and not stats and not what.group_size
    if plain and what.is_one_tile(vocab) and vocab > 1 and hidden.dtype == wide:
        return _forward_one_tile(hidden, weight, target, segment_id, segments, scales, what)
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
            hidden.shape[0],
            weight,
            what.kept * what.width >= vocab,
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
        logp_R = F.logsigmoid(-sums.odds)
        rows = row_statistics(sums, logp_R, vocab, target) if names else {}
        if "row_logp" in names:
            rows["row_logp"] = logp_R
        gram, gram_error, sketched = None, None, None
        if norms is not None:
            if "row_norm_sq" in names:
                rows["row_norm_sq"] = norms.row_norm_sq(transform, sums, saved)
            found = norms.finish(hidden, weight, target, transform, sums, saved, cut)
            gram, gram_error, sketched = found.gram, found.gram_error, found.sketch
    per_segment = [rows[name] for name in _SEGMENT_STATS if name in names]
    per_row = [rows[name] for name in _ROW_FLOATS if name in names]
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


def _forward_one_tile(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_id: Tensor | None,
    segments: int,
    scales: Sequence[float],
    what: Plan,
) -> tuple[Tensor | None, ...]:
    with _launch.surroundings(hidden.device):
        odds, saved = torch_tiles.forward_one_tile(
            hidden,
            weight,
            target,
            scales[0] / scales[1],
            need_hidden=bool(what.need_hidden),
            keep=bool(what.kept),
        )
        logp = segment_sum(F.logsigmoid(-odds), segment_id, segments)
    state = (saved.row_state, saved.hidden_grad, saved.exps, saved.offsets)
    return (logp, *[None] * 6, *state)


@torch.library.custom_op(
    "fastpref::linear_logprob_forward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? segment_id, Tensor? bias, "
    "SymInt segments, float[] scales, int[] plan, str stats, str sketch, SymInt[]? counts=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(*inputs: Any) -> tuple[Tensor, ...]:
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


@_forward_op.register_fake
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
        wide.new_empty(sum(name in _SEGMENT_STATS for name in names), segments),
        target.new_empty(rows if "argmax" in names else 0),
        wide.new_empty(sum(name in _ROW_FLOATS for name in names), rows),
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


_backward_op = torch.library.custom_op(
    "fastpref::linear_logprob_backward",
    backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? segment_id, "
    "Tensor? bias, Tensor row_state, Tensor hidden_grad, Tensor exps, Tensor offsets, "
    "float[] scales, int[] plan) -> (Tensor, Tensor, Tensor)",
)


@_backward_op.register_fake
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


_launch.refuse_second_derivative(_backward_op, "linear_logprob")


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
        run: Callable[..., tuple[Tensor, ...]] = backward if bare else _backward_op
        hidden, weight, bias = run(grad, *ctx.saved_tensors, ctx.scales, ctx.plan)
        grads[0] = hidden if what.need_hidden else None
        grads[1] = weight if what.need_weight else None
        grads[4] = bias if what.need_bias else None
    return tuple(grads)


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """`_forward_op` without torch's dispatcher, for tensors that `is_plain` says so of."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        found = forward(*inputs)
        outputs = found[:-4]
        ctx.mark_non_differentiable(*[x for x in outputs[1:] if x is not None])
        _save(ctx, inputs, found[-4:])
        return outputs

    backward = staticmethod(_autograd_backward)
