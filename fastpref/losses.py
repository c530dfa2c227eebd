"""The registry of losses, lists of them, and what stands between log-probs and a loss.

A loss knows log-probabilities and nothing of the vocabulary; the head knows nothing of the loss
(design 2.1). Its gradient reaches the model through one number per segment of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref import loss_functions
from fastpref.loss_functions import LossOptions, PairLogp
from fastpref.loss_table import ALIASES, TABLE

__all__ = ["LOSSES", "Loss", "LossOptions", "PairLogp", "dpo_loss", "get_loss"]


@dataclass(frozen=True)
class Loss:
    """A loss of the family, or a weighted list of them, and what the trainer must know about it."""

    fn: Callable[[PairLogp, LossOptions], Tensor]  # one value per pair, (P,)
    needs_reference: bool  # reads ref_chosen, ref_rejected
    margin_only: bool  # depends on the margin alone: rows shared by both completions cancel
    batch_coupled: str  # what of the step's other pairs a value depends on, see `Facts`
    smoothing: bool  # label_smoothing is defined for it
    at_equal: Callable[[float, float], float] | None  # (beta, smoothing) -> value at the reference
    per_token: bool = False  # its rewards are beta x log-ratio per token


LOSSES: dict[str, Loss] = {
    name: Loss(
        getattr(loss_functions, name),
        facts.needs_reference,
        facts.margin_only,
        facts.batch_coupled,
        facts.smoothing,
        facts.at_equal,
        facts.per_token,
    )
    for name, facts in TABLE.items()
}


def get_loss(names: str | Sequence[str], weights: Sequence[float] = ()) -> Loss:
    """The loss called ``names``, or sum of weight x loss over a list; no weights: 1 each.

    Raises ValueError for an unknown name and where weights and names differ in number.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    weights = tuple(weights) or (1.0,) * len(names)
    if not names or len(weights) != len(names):
        raise ValueError(f"{len(names)} losses and {len(weights)} loss_weights: give one for each.")
    for name in names:
        if name not in LOSSES and name not in ALIASES:
            raise ValueError(f"loss_type={name!r} is not one of {', '.join(sorted(LOSSES))}.")
    parts = [LOSSES[ALIASES.get(name, name)] for name in names]
    if weights == (1.0,):
        return parts[0]

    def weighted_sum(x: PairLogp, options: LossOptions) -> Tensor:
        return torch.stack([w * p.fn(x, options) for w, p in zip(weights, parts, strict=True)]).sum(
            dim=0
        )

    def at_equal(beta: float, smoothing: float) -> float:
        known = [p.at_equal(beta, smoothing) for p in parts if p.at_equal]
        return sum(w * value for w, value in zip(weights, known, strict=True))

    return Loss(
        weighted_sum,
        needs_reference=any(p.needs_reference for p in parts),
        margin_only=all(p.margin_only for p in parts),
        batch_coupled=max((p.batch_coupled for p in parts), key=["", "tokens", "order"].index),
        smoothing=any(p.smoothing for p in parts),
        at_equal=at_equal if all(p.at_equal for p in parts) else None,
        per_token=any(p.per_token for p in parts),
    )


def pair_losses(loss: Loss, x: PairLogp, options: LossOptions) -> Tensor:  # (P,)
    """The loss of every pair, weighted where `use_weighting` or `balance` weights pairs."""
    losses = loss.fn(x, options)
    return losses if x.weighting is None else losses * x.weighting


def rewards(x: PairLogp, beta: float, per_token: bool) -> tuple[Tensor, Tensor]:
    """(P,) each, chosen and rejected: beta x log-ratio (x log-prob without a reference).

    TRL's convention: whatever the loss, the sum over the tokens. Only losses that compare log-probs
    per token (simpo, orpo) have them per token, as TRL's trainers of them do.
    """
    chosen, rejected = beta * x.chosen_ratio, beta * x.rejected_ratio
    return (chosen / x.chosen_len, rejected / x.rejected_len) if per_token else (chosen, rejected)


def sequence_sums(
    segments: Tensor,  # (S,) values per segment
    num_pairs: int,
    tail_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (P,) each
    """Sums of the chosen and the rejected sequences, from a pair's 3 segments or its 5.

    A pair's shared segment belongs to both (design 2.4). With 5, `PairBatch.with_tails`, what lies
    beyond the shorter completion's length counts ``tail_weight`` times.
    """
    parts = segments.view(num_pairs, -1).unbind(dim=1)
    if len(parts) == 3:
        shared, chosen, rejected = parts
        return shared + chosen, shared + rejected
    shared, chosen, chosen_tail, rejected, rejected_tail = parts
    return shared + chosen + tail_weight * chosen_tail, (
        shared + rejected + tail_weight * rejected_tail
    )


def wpo_weight(
    logp: tuple[Tensor, Tensor],  # (P,) chosen, rejected, every token counted once
    log_sum_sq: tuple[Tensor, Tensor],  # (P,) sums over the tokens of log sum_v pi(v)^2
    lengths: tuple[Tensor, Tensor],  # (P,) scored tokens
) -> Tensor:  # (P,) detached
    """How likely the policy is to write the pair itself, per token and relative to its usual.

        w = w(y_c) w(y_r),   w(y) = exp( (1/|y|) sum_t [log pi(y_t) - log sum_v pi(v)^2] )

    Zhou et al. 2024 (WPO, arXiv 2406.11827), eq. 2.
    """
    log_weight = [
        (own.detach() - usual) / length
        for own, usual, length in zip(logp, log_sum_sq, lengths, strict=True)
    ]
    return (log_weight[0] + log_weight[1]).exp()


def concatenate_pairs(parts: Sequence[PairLogp]) -> PairLogp:
    """One `PairLogp` of the pairs of all ``parts``, which have the same fields."""
    if len(parts) == 1:
        return parts[0]
    columns = {
        f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(PairLogp)
    }
    joined = {
        name: None if values[0] is None else torch.cat(values)
        for name, values in columns.items()
        if name != "step_len"
    }
    return PairLogp(**joined, step_len=parts[0].step_len)  # type: ignore[arg-type]


@torch.no_grad()
def pair_norms(gram: Tensor, tail_weight: float = 1.0) -> dict[str, Tensor]:
    """Norms of a pair's gradients from the Gram matrix of its segments.

    ``gram[p, a, b] = <grad logp_a, grad logp_b>`` (P, 3, 3) for shared, chosen rest, rejected rest;
    (P, 5, 5) with tails, which count ``tail_weight`` times. With g_c = g_0 + g_1, g_r = g_0 + g_2
    and grad m = g_1 - g_2 (design 2.5) returns (P,) each: ``gnorm_m = ||grad m||``,
    ``gnorm_chosen``, ``gnorm_rejected`` and ``dot_chosen_rejected = <g_c, g_r>``.
    """
    if gram.shape[-1] == 5:
        w = tail_weight
        fold = gram.new_tensor([[1, 0, 0, 0, 0], [0, 1, w, 0, 0], [0, 0, 0, 1, w]])
        gram = fold @ gram @ fold.T

    g00, g01, g02, _, g11, g12, _, _, g22 = gram.flatten(1).unbind(dim=1)
    margin, chosen, rejected = g11 - 2 * g12 + g22, g00 + 2 * g01 + g11, g00 + 2 * g02 + g22
    # Rounding can push a square that is zero in exact arithmetic below it.
    norms = torch.stack((margin, chosen, rejected)).clamp(min=0).sqrt().unbind()
    names = ("gnorm_m", "gnorm_chosen", "gnorm_rejected")
    return {**dict(zip(names, norms, strict=True)), "dot_chosen_rejected": g00 + g01 + g02 + g12}


def dpo_loss(
    policy_chosen_logps: Tensor,  # (P,) summed log-probs in nats
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen_rewards, rejected_rewards), (P,) each: the signature of the original DPO code
    and of most trainers since, for a loop that has its log-probs already.

    ``ipo``: the squared loss on the sums (the loss `ipo` of the registry is per token);
    ``reference_free``: the margin without the reference's. Rewards are detached, beta x log-ratio.
    """
    x = PairLogp(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        torch.ones_like(policy_chosen_logps),
        torch.ones_like(policy_rejected_logps),
    )
    chosen, rejected = rewards(x, beta, per_token=False)
    if reference_free:
        x = dataclasses.replace(x, ref_chosen=None, ref_rejected=None)
    options = LossOptions(beta=beta, label_smoothing=label_smoothing)
    losses = LOSSES["ipo" if ipo else "sigmoid"].fn(x, options)
    return losses, chosen.detach(), rejected.detach()
