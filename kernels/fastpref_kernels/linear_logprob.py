"""Per-segment log-probabilities of a linear language-model head, without a float32 (R, V) tensor.

Shapes: R rows, D hidden, V vocab, S segments, g group_size. Mathematics, memory, numerics:
kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._head_checks import (
    SEGMENT_STATS,
    check_counts,
    check_tensors,
    last_segment,
    number_of_counts,
)
from ._prepare import prepare
from ._route import is_plain
from .count_sketch import BUCKETS
from .head_op import ROW_FLOATS, Direct, forward, forward_op
from .one_tile import one_tile_logprob


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
    Errors    ValueError with the offending value; on CUDA a target out of range gives NaN instead,
              or trips an index assertion (torch backend).
    Oracle    reference.linear_logprob
    """
    tensors = (hidden, weight, target, segment_id, bias)
    plain = is_plain(*tensors)
    if not plain:
        named = {"hidden": hidden, "weight": weight, "target": target}
        check_tensors(**named, segment_id=segment_id, bias=bias)
    if num_segments is None and segment_id is not None:
        if counts is not None:
            num_segments = number_of_counts("linear_logprob", counts)
        else:
            num_segments = last_segment(segment_id)
    asked = prepare(
        tensors,
        plain,
        num_segments,
        group_size,
        softcap,
        logit_scale,
        temperature,
        cache,
        tuple(stats) if isinstance(stats, (list, set, frozenset)) else stats,
        norms,
        sketch_dim,
        sketch_seed,
        sketch_key,
        sketch_buckets,
        backend,
    )
    if counts is not None:
        check_counts("linear_logprob", hidden.shape[0], asked.segments, counts)
    target = target.contiguous()  # kernels take it for R numbers in a row
    if asked.one_tile and plain:
        head = (hidden, weight, target, segment_id, asked.segments, logit_scale / temperature)
        return LinearLogprob(logp=one_tile_logprob(asked.differentiable, *head))
    run: Callable[..., Any] = forward
    if not plain:
        run = forward_op
    elif asked.differentiable:
        run = Direct.apply
    rows = list(counts) if norms and counts is not None else None
    what = (asked.segments, asked.scales, asked.plan, asked.stats, asked.sketch, rows)
    return _result(run(hidden, weight, target, segment_id, bias, *what), stats, norms)


def _result(found: Sequence[Tensor], stats: Sequence[str], norms: str | None) -> LinearLogprob:
    """Of what the op returned."""
    logp, sums, argmax, row_floats, *of_norms = found
    fields: dict[str, Tensor] = {}
    if stats:
        names = [name for name in SEGMENT_STATS if name in stats]
        fields = dict(zip(names, sums, strict=True)) if names else {}
        if "argmax" in stats:
            fields["argmax"] = argmax
        names = [name for name in ROW_FLOATS if name in stats]
        fields.update(zip(names, row_floats, strict=True) if names else ())
    if norms:
        fields["gram"] = of_norms[0]
    if norms == "sketch":
        fields["gram_error"] = of_norms[1]
    if norms in ("sketch", "both"):
        fields["sketch"] = of_norms[2]
    return LinearLogprob(logp=logp, **fields)
