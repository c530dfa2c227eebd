"""From row log-probs to losses of preference pairs and what they ask of every row.

Shapes: R rows, S segments, P pairs, g group_size (S = g P). Formulas: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _head_checks, _launch
from .pair_checks import LOSS_TYPES, check_pair_loss
from .segment import segment_sum

# How a loss looks as a function of its margin; the kernels know no other names.
LOGISTIC, HINGE, SQUARE = 0, 1, 2
SHAPE = {"sigmoid": LOGISTIC, "robust": LOGISTIC, "hinge": HINGE, "ipo": SQUARE}
SHAPE["sigmoid_norm"] = LOGISTIC
PER_TOKEN = frozenset({"ipo", "sigmoid_norm"})
assert set(SHAPE) == set(LOSS_TYPES)

COLUMNS = (
    "logp_chosen",
    "logp_rejected",
    "ratio_chosen",
    "ratio_rejected",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "accuracy",
    "slope_chosen",
    "slope_rejected",
)


@dataclass(frozen=True)
class PairLoss:
    """Result of `pair_loss` and `linear_dpo`, (P,) each; only `loss` is differentiable."""

    loss: Tensor
    logp_chosen: Tensor  # nats, summed over the completion's rows
    logp_rejected: Tensor
    ratio_chosen: Tensor  # log-ratio: logp - reference logp
    ratio_rejected: Tensor
    margin: Tensor  # ratio_chosen - ratio_rejected, without beta
    reward_chosen: Tensor  # beta x log-ratio, never per token
    reward_rejected: Tensor
    accuracy: Tensor  # 1.0 where reward_chosen > reward_rejected, else 0.0
    slope_chosen: Tensor  # d loss / d logp_chosen
    slope_rejected: Tensor


def pair_loss(
    logp: Tensor,  # (R,) float32 | float64: one log-prob per row; per segment without segment_id
    segment_id: Tensor | None = None,  # (R,) int32 | int64 non-decreasing
    ref_chosen: Tensor | None = None,  # (P,) reference log-probs; None: 0 (no reference)
    ref_rejected: Tensor | None = None,  # (P,)
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    group_size: int = 2,
    num_segments: int | None = None,
    chosen_len: Tensor | None = None,  # (P,) scored tokens; None: the rows are counted
    rejected_len: Tensor | None = None,  # (P,)
    backend: str = "auto",
) -> PairLoss:
    """Loss of every pair from the log-probs of its rows, differentiable in `logp`.

    Segments of pair p with ``group_size=2``: 2p chosen, 2p + 1 rejected. With 3: 3p rows that both
    completions share, added to both; 3p + 1 the rest of chosen, 3p + 2 the rest of rejected.

    ``loss_type``: sigmoid, robust, sigmoid_norm (`label_smoothing` defined), hinge, ipo. ipo and
    sigmoid_norm divide each log-ratio by the completion's scored tokens; an empty one counts as 1.
    The loss of a step is ``out.loss.sum() / pairs of the step``: sum and divide over all its
    micro-batches.

    Memory    12 numbers a pair; the gradient is one launch over the rows.
    Numerics  segment sums in float64, rounded once; log-sigmoid without overflow or cancellation.
              No atomics: the same bits every time. One launch with Triton, forward and backward.
    Errors    ValueError with the offending value; on CUDA ids that fall or are out of range give
              NaN (Triton) or, out of range, an index assertion (torch). A second derivative raises.
    Oracle    reference.pair_loss
    """
    pairs = check_pair_loss(
        logp,
        segment_id,
        ref_chosen,
        ref_rejected,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        group_size=group_size,
        num_segments=num_segments,
        chosen_len=chosen_len,
        rejected_len=rejected_len,
        per_token=loss_type in PER_TOKEN,
    )
    chosen_backend = _launch.resolve_backend(backend, logp.device, logp.dtype, op="pair_loss")
    plan = make_plan(loss_type, group_size, chosen_backend)
    loss, table = _forward_op(
        logp,
        segment_id,
        ref_chosen,
        ref_rejected,
        chosen_len if plan.per_token else None,
        rejected_len if plan.per_token else None,
        pairs,
        [beta, label_smoothing],
        [int(x) for x in plan],
    )
    return PairLoss(loss, *table.unbind(0))


class Plan(NamedTuple):
    """What the ops do, as a list of integers: every argument of a custom op costs time a call."""

    shape: int
    per_token: int
    robust: int
    group: int
    triton: int


def make_plan(loss_type: str, group_size: int, backend: str) -> Plan:
    """The plan of a loss by name."""
    return Plan(
        shape=SHAPE[loss_type],
        per_token=loss_type in PER_TOKEN,
        robust=loss_type == "robust",
        group=group_size,
        triton=backend == "triton",
    )


@torch.library.custom_op(
    "fastpref::pair_loss_forward",
    mutates_args=(),
    schema="(Tensor logp, Tensor? segment_id, Tensor? ref_chosen, Tensor? ref_rejected, "
    "Tensor? chosen_len, Tensor? rejected_len, SymInt pairs, float[] numbers, int[] plan) "
    "-> (Tensor, Tensor)",
)
def _forward_op(
    logp: Tensor,
    segment_id: Tensor | None,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_len: Tensor | None,
    rejected_len: Tensor | None,
    pairs: int,
    numbers: Sequence[float],
    plan: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """loss (P,) and the table (len(COLUMNS), P)."""
    what = Plan(*plan)
    if segment_id is not None:
        _head_checks.check_segments("pair_loss", segment_id, what.group * pairs)
    if what.triton:
        from .pair_kernels import forward

        reference, lengths = (ref_chosen, ref_rejected), (chosen_len, rejected_len)
        with _launch.surroundings(logp.device):
            return forward(logp, segment_id, reference, lengths, pairs, numbers, what)
    segments = segment_sum(logp, segment_id, what.group * pairs)
    chosen, rejected = _sequence_sums(segments, what.group)
    ratios = [
        x if ref is None else x - ref.to(x.dtype)
        for x, ref in ((chosen, ref_chosen), (rejected, ref_rejected))
    ]
    counts = None
    if what.per_token:
        given = (chosen_len, rejected_len)
        counts = _lengths(given, segment_id, pairs, what.group, logp.dtype)
    loss, slopes = _losses(ratios, counts, numbers, what)
    beta = numbers[0]
    rewards = [beta * ratio for ratio in ratios]
    rows = [chosen, rejected, *ratios, ratios[0] - ratios[1], *rewards]
    rows.append((rewards[0] > rewards[1]).to(logp.dtype))
    return loss, torch.stack([*rows, *slopes])


@_forward_op.register_fake
def _forward_fake(logp: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    pairs = rest[5]
    return logp.new_empty(pairs), logp.new_empty(len(COLUMNS), pairs)


@torch.library.custom_op(
    "fastpref::pair_loss_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor table, Tensor? segment_id, Tensor logp, int[] plan) -> Tensor",
)
def _backward_op(
    grad: Tensor, table: Tensor, segment_id: Tensor | None, logp: Tensor, plan: Sequence[int]
) -> Tensor:
    """(R,) gradient of every row: its pair's gradient times its segment's slope.

    Of `logp` only the shape is read; it is here so that a second derivative is seen, and refused.
    """
    what = Plan(*plan)
    if what.triton:
        from .pair_kernels import backward

        with _launch.surroundings(logp.device):
            return backward(grad, table, segment_id, logp.shape[0], what)
    chosen, rejected = table[-2], table[-1]
    parts = [chosen, rejected] if what.group == 2 else [chosen + rejected, chosen, rejected]
    segments = (torch.stack(parts, 1) * grad.unsqueeze(1)).flatten()
    return segments if segment_id is None else segments.index_select(0, segment_id)


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, table: Tensor, segment_id: Tensor | None, logp: Tensor, plan: Sequence[int]
) -> Tensor:
    return logp.new_empty(logp.shape)


_launch.refuse_second_derivative(_backward_op, "pair_loss")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logp, segment_id, *_, ctx.plan = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], segment_id, logp)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 9
    if grad is not None:
        grads[0] = _backward_op(grad, *ctx.saved_tensors, ctx.plan)
    return tuple(grads)


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _sequence_sums(segments: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(P,) chosen, rejected from (S,)."""
    parts = segments.view(-1, group).unbind(1)
    if group == 2:
        return parts[0], parts[1]
    return parts[0] + parts[1], parts[0] + parts[2]


def _lengths(
    given: tuple[Tensor | None, Tensor | None],
    segment_id: Tensor | None,
    pairs: int,
    group: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(P,) scored tokens of chosen and rejected, at least 1."""
    chosen, rejected = given
    if chosen is None or rejected is None:
        assert segment_id is not None
        # By bisection: a count would wait for the device.
        ids = torch.arange(group * pairs + 1, device=segment_id.device, dtype=segment_id.dtype)
        counts = torch.searchsorted(segment_id.contiguous(), ids).diff()
        chosen, rejected = _sequence_sums(counts, group)
    return chosen.to(dtype).clamp(min=1), rejected.to(dtype).clamp(min=1)


def _losses(
    ratios: Sequence[Tensor],
    lengths: tuple[Tensor, Tensor] | None,
    numbers: Sequence[float],
    plan: Plan,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(P,) losses and their slopes in the log-probs of chosen and rejected."""
    beta, eps = numbers
    if lengths is None:
        margin = ratios[0] - ratios[1]
    else:
        margin = ratios[0] / lengths[0] - ratios[1] / lengths[1]
    if plan.shape == SQUARE:
        gap = margin - 0.5 / beta
        loss, slope = gap**2, 2 * gap
    elif plan.shape == HINGE:
        gap = 1 - beta * margin
        loss, slope = torch.relu(gap), -beta * (gap > 0).to(gap.dtype)
    else:
        z, other, norm = beta * margin, eps, 1.0
        if plan.robust:
            other, norm = -eps, 1 - 2 * eps
        loss = ((eps - 1) * F.logsigmoid(z) - other * F.logsigmoid(-z)) / norm
        slope = ((eps - 1) * torch.sigmoid(-z) + other * torch.sigmoid(z)) * (beta / norm)
    if lengths is None:
        return loss, (slope, -slope)
    return loss, (slope / lengths[0], -slope / lengths[1])
