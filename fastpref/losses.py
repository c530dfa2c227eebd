"""The losses: ``loss(PairLogp, beta, label_smoothing) -> (P,)``, one value per pair.

A loss knows log-probabilities and nothing of the vocabulary; the head knows nothing of the loss
(design 2.1). Its gradient reaches the model through one number per segment of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PairLogp:
    """Summed log-probabilities in nats, float32 (float64 in tests), and scored lengths."""

    chosen: Tensor  # (P,) policy, differentiable
    rejected: Tensor  # (P,)
    ref_chosen: Tensor  # (P,) reference
    ref_rejected: Tensor  # (P,)
    chosen_len: Tensor  # (P,) scored tokens |y|
    rejected_len: Tensor  # (P,)

    @property
    def chosen_ratio(self) -> Tensor:
        """(P,) log pi - log pi_ref of the chosen completion."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """(P,) log pi - log pi_ref of the rejected completion."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """(P,) m = chosen log-ratio - rejected log-ratio, without beta."""
        return self.chosen_ratio - self.rejected_ratio


@dataclass(frozen=True)
class Loss:
    """A loss of the family and what the trainer must know about it."""

    fn: Callable[[PairLogp, float, float], Tensor]
    needs_reference: bool  # reads ref_chosen, ref_rejected
    margin_only: bool  # depends on the margin alone: rows shared by both completions cancel
    batch_coupled: bool  # a pair's value depends on the other pairs of the step
    smoothing: bool  # label_smoothing is defined for it
    at_equal: Callable[[float, float], float]  # (beta, smoothing) -> value where policy = reference


def sigmoid(x: PairLogp, beta: float, label_smoothing: float) -> Tensor:  # (P,)
    """DPO; with smoothing eps its conservative form (cDPO).

        L = -(1 - eps) log sigma(beta m) - eps log sigma(-beta m)

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences", eq. 3. TRL 1.16 accepts label_smoothing here and ignores it.
    """
    reward_margin = beta * x.margin
    return (label_smoothing - 1) * F.logsigmoid(reward_margin) - label_smoothing * F.logsigmoid(
        -reward_margin
    )


def ipo(x: PairLogp, beta: float, label_smoothing: float) -> Tensor:  # (P,)
    """Squared distance of the per-token margin from 1/(2 beta).

        L = (r_c/|y_c| - r_r/|y_r| - 1/(2 beta))^2,   r = log pi - log pi_ref

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, with |y| = scored tokens, TRL's convention.
    """
    margin = x.chosen_ratio / x.chosen_len - x.rejected_ratio / x.rejected_len
    return (margin - 0.5 / beta) ** 2


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        sigmoid,
        needs_reference=True,
        margin_only=True,
        batch_coupled=False,
        smoothing=True,
        at_equal=lambda beta, smoothing: math.log(2.0),
    ),
    "ipo": Loss(
        ipo,
        needs_reference=True,
        margin_only=False,
        batch_coupled=False,
        smoothing=False,
        at_equal=lambda beta, smoothing: 0.25 / beta**2,
    ),
}


def get_loss(name: str, label_smoothing: float = 0.0) -> Loss:
    """The loss called ``name``.

    Raises ValueError for an unknown name, and where smoothing is asked of a loss that has none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss_type={name!r} is not one of {', '.join(sorted(LOSSES))}.")
    loss = LOSSES[name]
    if label_smoothing and not loss.smoothing:
        having = ", ".join(sorted(n for n, known in LOSSES.items() if known.smoothing))
        raise ValueError(
            f"label_smoothing={label_smoothing} is not defined for loss_type={name!r} "
            f"(it is for: {having}). Set label_smoothing to 0."
        )
    return loss


def pair_logp(
    logp: Tensor,  # (3 P,) per segment
    ref_chosen: Tensor,  # (P,)
    ref_rejected: Tensor,  # (P,)
    chosen_len: Tensor,  # (P,)
    rejected_len: Tensor,  # (P,)
) -> PairLogp:
    """Adds a pair's shared segment to both of its sequences (design 2.4)."""
    shared, chosen, rejected = logp.view(-1, 3).unbind(dim=1)
    return PairLogp(
        shared + chosen, shared + rejected, ref_chosen, ref_rejected, chosen_len, rejected_len
    )


@torch.no_grad()
def pair_norms(gram: Tensor) -> dict[str, Tensor]:
    """Norms of a pair's gradients from the Gram matrix of its three segments.

    ``gram[p, a, b] = <grad logp_a, grad logp_b>`` (P, 3, 3) for shared, chosen rest, rejected rest.
    With g_c = g_0 + g_1, g_r = g_0 + g_2 and grad m = g_1 - g_2 (design 2.5) returns (P,) each:
    ``gnorm_m = ||grad m||``, ``gnorm_chosen``, ``gnorm_rejected`` and
    ``dot_chosen_rejected = <g_c, g_r>``.
    """

    def square(a: int, b: int) -> Tensor:
        return gram[:, a, a] + 2 * gram[:, a, b] + gram[:, b, b]

    margin = gram[:, 1, 1] - 2 * gram[:, 1, 2] + gram[:, 2, 2]
    dot = gram[:, 0, 0] + gram[:, 0, 1] + gram[:, 0, 2] + gram[:, 1, 2]
    # Rounding can push a square that is zero in exact arithmetic below it.
    return {
        "gnorm_m": margin.clamp(min=0).sqrt(),
        "gnorm_chosen": square(0, 1).clamp(min=0).sqrt(),
        "gnorm_rejected": square(0, 2).clamp(min=0).sqrt(),
        "dot_chosen_rejected": dot,
    }
