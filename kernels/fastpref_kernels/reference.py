"""Every op in plain torch, any dtype and device: the oracles of the tests, slow and large.

Shapes: R rows, D hidden, V vocab, S segments, P pairs, g group_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear_logprob import LinearLogprob
from .pair_loss import PairLoss


def transformed_logits(
    raw: Tensor,  # (R, V) hidden @ weight.T
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:  # (R, V)
    """softcap(logit_scale (raw + bias)) / temperature, softcap(x) = c tanh(x / c)."""
    logits = raw if bias is None else raw + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,) int64
    segment_id: Tensor | None = None,  # (R,)
    *,
    num_segments: int | None = None,
    group_size: int = 1,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    stats: Sequence[str] = (),
    norms: str | None = None,
) -> LinearLogprob:
    """What `fastpref_kernels.linear_logprob` computes, by log_softmax of the (R, V) logits.

    Half inputs are multiplied in their own dtype and reduced in float32, as common trainers do.
    """
    raw = hidden @ weight.t()
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    logits = transformed_logits(
        wide, bias=bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature
    )
    logp_RV = torch.log_softmax(logits, dim=-1)
    if segment_id is None:
        segment_id = torch.arange(hidden.shape[0], device=hidden.device)
    if num_segments is None:
        num_segments = int(segment_id[-1]) + 1 if len(segment_id) else 0
    index, segments = segment_id.long(), num_segments

    def sums(rows: Tensor) -> Tensor:
        return rows.new_zeros(segments).index_add(0, index, rows)

    prob = logp_RV.exp()
    argmax = logits.detach().argmax(-1)
    per_row = {
        "entropy": lambda: torch.special.entr(prob).sum(-1),
        "sum_sq_prob": lambda: prob.square().sum(-1),
        "log_sum_sq_prob": lambda: torch.logsumexp(2 * logp_RV, -1),
        "residual_sq": lambda: (
            prob.scatter_add(-1, target.unsqueeze(-1), -torch.ones_like(prob[:, :1]))
            .square()
            .sum(-1)
        ),
        "top1": lambda: (argmax == target).to(prob.dtype),
        "argmax_logp": lambda: logp_RV.amax(-1),
        "mean_logit": lambda: logits.mean(-1),
    }
    fields = {name: sums(per_row[name]()).detach() for name in stats if name in per_row}
    if "argmax" in stats:
        fields["argmax"] = argmax
    if "log1m_pmax" in stats:
        others = logp_RV.scatter(-1, argmax.unsqueeze(-1), -torch.inf)
        fields["log1m_pmax"] = torch.logsumexp(others, -1).detach()
    if "row_logp" in stats:
        fields["row_logp"] = logp_RV.gather(-1, target.unsqueeze(-1)).squeeze(-1).detach()
    if "row_norm_sq" in stats:
        slopes = logit_gradients(
            raw.detach(),
            target,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
        )
        fields["row_norm_sq"] = slopes.square().sum(-1)
    if norms is not None:
        fields["gram"] = head_gram(
            hidden,
            weight,
            target,
            index,
            num_segments=segments,
            group_size=group_size,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
        )
    return LinearLogprob(logp=sums(logp_RV.gather(-1, target.unsqueeze(-1)).squeeze(-1)), **fields)


def logit_gradients(
    raw: Tensor,  # (R, V) hidden @ weight.T
    target: Tensor,  # (R,)
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:  # (R, V)
    """d logp_t / d raw logits of every row."""
    with torch.enable_grad():
        raw = raw.clone().requires_grad_()
        logits = transformed_logits(
            raw, bias=bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature
        )
        logp = torch.log_softmax(logits, -1).gather(-1, target.unsqueeze(-1))
        (grad_RV,) = torch.autograd.grad(logp.sum(), raw)
    return grad_RV


def head_gram(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,)
    segment_id: Tensor,  # (R,)
    *,
    num_segments: int,
    group_size: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:  # (S / g, g, g)
    """Gram matrices of the segments' gradients in weight, each formed as (V, D) outer products.

    A_s = sum over t in s of  (d logp_t / d (weight @ h_t)) h_t^T,    gram[a, b] = <A_a, A_b>
    """
    grad_RV = logit_gradients(
        (hidden @ weight.t()).detach(),
        target,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
    )
    gradients = torch.stack(
        [
            (grad_RV[segment_id == s].t() @ hidden.detach()[segment_id == s]).flatten()
            for s in range(num_segments)
        ]
        or [grad_RV.new_zeros(weight.numel())]
    )[:num_segments]
    grouped = gradients.view(-1, group_size, weight.numel())
    return grouped @ grouped.transpose(1, 2)


def linear_norms(
    x: Tensor,  # (T, d)
    dy: Tensor,  # (T, p)
    segment_id: Tensor,  # (T,)
    *,
    num_segments: int,
    group_size: int | None = None,
) -> Tensor:  # (S,) | (S / g, g, g)
    """What `fastpref_kernels.linear_norms` computes, by every segment's gradient, (p, d)."""
    gradients = [dy[segment_id == s].t() @ x[segment_id == s] for s in range(num_segments)]
    return gradient_gram(gradients, group_size)


def gradient_gram(gradients: Sequence[Tensor], group_size: int | None = None) -> Tensor:
    """Squared norms of S gradients, or their inner products within groups of `group_size`."""
    flat = torch.stack([gradient.flatten() for gradient in gradients])
    if group_size is None:
        return flat.square().sum(1)
    grouped = flat.view(-1, group_size, flat.shape[1])
    return grouped @ grouped.transpose(1, 2)


def pair_loss(
    logp: Tensor,  # (R,)
    segment_id: Tensor | None = None,  # (R,)
    ref_chosen: Tensor | None = None,  # (P,)
    ref_rejected: Tensor | None = None,  # (P,)
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    group_size: int = 2,
    num_segments: int,
    chosen_len: Tensor | None = None,  # (P,)
    rejected_len: Tensor | None = None,  # (P,)
) -> PairLoss:
    """What `fastpref_kernels.pair_loss` computes, loss by loss as its paper writes it.

    Rafailov et al. 2023 (sigmoid), Mitchell 2023 (its smoothing), Chowdhury et al. 2024 (robust),
    Zhao et al. 2023 (hinge), Azar et al. 2023 (ipo), Lambert et al. 2024 (sigmoid_norm).
    """
    if segment_id is None:
        segment_id = torch.arange(logp.shape[0], device=logp.device)
    every = torch.arange(num_segments, device=logp.device)
    members = (segment_id.unsqueeze(1) == every).to(logp.dtype)  # (R, S)
    segments = (members.t() @ logp).view(-1, group_size)
    counts = members.sum(0).view(-1, group_size)
    if group_size == 3:
        segments = torch.stack((segments[:, 0] + segments[:, 1], segments[:, 0] + segments[:, 2]))
        counts = torch.stack((counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]))
    else:
        segments, counts = segments.t(), counts.t()
    if chosen_len is not None and rejected_len is not None:
        counts = torch.stack((chosen_len, rejected_len))
    leaf = segments.detach().requires_grad_()
    nothing = torch.zeros_like(segments[0])
    ref = [nothing if x is None else x for x in (ref_chosen, ref_rejected)]

    def losses(sums: Tensor) -> Tensor:
        chosen, rejected = sums[0] - ref[0], sums[1] - ref[1]
        if loss_type in ("ipo", "sigmoid_norm"):
            chosen, rejected = chosen / counts[0].clamp(min=1), rejected / counts[1].clamp(min=1)
        z, eps = beta * (chosen - rejected), label_smoothing
        right, wrong = -torch.sigmoid(z).log(), -torch.sigmoid(-z).log()
        return {
            "sigmoid": lambda: (1 - eps) * right + eps * wrong,
            "robust": lambda: ((1 - eps) * right - eps * wrong) / (1 - 2 * eps),
            "hinge": lambda: torch.clamp(1 - z, min=0),
            "ipo": lambda: (chosen - rejected - 1 / (2 * beta)) ** 2,
            "sigmoid_norm": lambda: (1 - eps) * right + eps * wrong,
        }[loss_type]()

    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(losses(leaf).sum(), leaf)
    sums = segments.detach()
    ratios = sums - torch.stack(ref).to(sums.dtype)
    accuracy = (ratios[0] > ratios[1]).to(sums.dtype)
    rows = (*sums, *ratios, ratios[0] - ratios[1], *(beta * ratios), accuracy, *slopes)
    return PairLoss(losses(segments), *rows)
