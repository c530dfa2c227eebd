"""A linear language-model head and a preference loss in one call, for people with their own loop.

Shapes: R rows, D hidden, V vocab, S segments, P pairs, g group_size (S = g P).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._head_checks import check_counts, check_rows_of_segments
from .linear_logprob import linear_logprob
from .pair_checks import check_options
from .pair_loss import PairLoss, pair_loss


def linear_dpo(
    hidden: Tensor,  # (R, D)  float64 | float32 | bfloat16 | float16, scored positions only
    weight: Tensor,  # (V, D)  same dtype
    target: Tensor,  # (R,)    int64, 0 .. V - 1: the token that each row predicts
    segment_id: Tensor,  # (R,) int32 | int64 non-decreasing
    ref_chosen: Tensor | None = None,  # (P,) reference log-probs; None: no reference
    ref_rejected: Tensor | None = None,  # (P,)
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    group_size: int = 2,
    num_segments: int | None = None,
    counts: Sequence[int] | None = None,  # (S,) rows of every segment, as `row_counts` gives them
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    cache: int = -1,
    backend: str = "auto",
) -> PairLoss:
    """Losses, rewards, margins and log-probs of preference pairs, logits never held.

    The row log-probs of `linear_logprob` go straight into `pair_loss`; see there for what each
    argument means. Segments of pair p: 2p chosen, 2p + 1 rejected; with ``group_size=3`` 3p rows
    that both share, 3p + 1 and 3p + 2 the rests. `counts` say how many segments there are where
    `num_segments` does not, and are held against `segment_id` on the CPU. `loss` is differentiable
    in hidden, weight, bias: ``linear_dpo(...).loss.mean().backward()``.

    Memory    that of `linear_logprob`, and 12 numbers a pair.
    Errors    ValueError with the offending value: of `pair_loss` names and numbers before any work,
              what else it refuses once the rows' log-probs are there.
    Oracle    reference.linear_logprob into reference.pair_loss
    """
    check_options(beta, loss_type, label_smoothing, group_size)
    if counts is not None:
        num_segments = len(counts) if num_segments is None else num_segments
        check_counts("linear_dpo", hidden.shape[0], num_segments, counts)
        if not torch.compiler.is_compiling():
            check_rows_of_segments("linear_dpo", segment_id, counts)
    rows = _row_logp(
        hidden, weight, target, bias, softcap, logit_scale, temperature, cache, backend
    )
    return pair_loss(
        rows,
        segment_id,
        ref_chosen,
        ref_rejected,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        group_size=group_size,
        num_segments=num_segments,
        backend=backend,
    )


@torch.no_grad()
def sequence_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,)
    segment_id: Tensor,  # (R,) int32 | int64 non-decreasing
    *,
    num_segments: int,
    group_size: int = 2,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # (P,) each
    """Log-probs of the chosen and the rejected sequences, for a reference or an evaluation.

    What `linear_dpo` gives as logp_chosen and logp_rejected, the same bits, without a gradient and
    with one product: a policy that is its own reference has a margin of exactly 0.

    Memory    one tile of logits, (rows, tile width) float32.
    """
    rows = _row_logp(hidden, weight, target, bias, softcap, logit_scale, temperature, 0, backend)
    sums = pair_loss(
        rows,
        segment_id,
        beta=1.0,
        group_size=group_size,
        num_segments=num_segments,
        backend=backend,
    )
    return sums.logp_chosen, sums.logp_rejected


def _row_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    cache: int,
    backend: str,
) -> Tensor:  # (R,)
    return linear_logprob(
        hidden,
        weight,
        target,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        cache=cache,
        backend=backend,
    ).logp
