"""What a loss asks of the model: from the head's log-probs to losses and their slopes.

A *slope* is d loss / d logp of one segment. The loss reaches the model through these numbers alone
(design 2.1), so they are computed apart from it: of one batch, or of all the batches of a step at
once where the loss ties its pairs together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from fastpref_kernels import LinearLogprob
from torch import Tensor

from fastpref import dist
from fastpref.batch import GROUP, PairBatch
from fastpref.config import Config
from fastpref.losses import (
    Loss,
    LossOptions,
    PairLogp,
    concatenate_pairs,
    pair_losses,
    sequence_sums,
    wpo_weight,
)
from fastpref.model import PairModel

# What the head adds up beside log-probs, for TRL's metrics: 1-3 % of a step (docs/lab-log.md).
METRIC_STATS = ("entropy", "top1", "mean_logit")
WPO_STAT = "log_sum_sq_prob"

Forward = tuple[PairBatch, LinearLogprob]  # a batch and what the head gave for it


@dataclass(frozen=True)
class PairSlopes:
    """Log-probs of a batch, losses of its pairs and what they ask of every segment, detached."""

    x: PairLogp
    loss: Tensor  # (P,)
    slope: Tensor  # (S,) d(sum of the step's losses) / d logp


def loss_options(config: Config) -> LossOptions:
    """The numbers that losses read, out of ``config``; an unset one has its own default."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(LossOptions)}
    return LossOptions(**{name: value for name, value in given.items() if value is not None})


def wanted_stats(config: Config) -> tuple[str, ...]:
    """Statistics of the head that a step or an evaluation needs."""
    return (*METRIC_STATS, WPO_STAT) if config.use_weighting else METRIC_STATS


def tail_weight(config: Config) -> float:
    """What a token beyond the shorter completion's length counts."""
    return 1.0 if config.ld_alpha is None else config.ld_alpha


def pair_slopes(
    forwards: Sequence[Forward],
    loss: Loss,
    config: Config,
    step_len: Tensor | None = None,  # () mean chosen length of the step, where that is larger
) -> list[PairSlopes]:
    """Losses and slopes of the pairs of all ``forwards`` together, as those of one step."""
    leaves = [head.logp.detach().requires_grad_() for _, head in forwards]
    with torch.enable_grad():
        own = [
            _pair_logp(leaf, forward, loss, config, step_len)
            for leaf, forward in zip(leaves, forwards, strict=True)
        ]
        losses = pair_losses(loss, concatenate_pairs(own), loss_options(config))
    return _slopes(losses, 0, own, leaves)


def coupled_slopes(
    model: PairModel, batches: Sequence[PairBatch], loss: Loss, config: Config
) -> list[PairSlopes]:
    """Losses and slopes of this rank's ``batches`` among all pairs of the step on all ranks.

    A forward without gradient over all of them: a loss that sorts the step's pairs needs every
    log-prob before it can ask anything of one. The backward then takes a second forward, batch by
    batch, and the gradient is that of the whole step in one batch. Every rank calls this.
    """
    with torch.no_grad():
        forwards = [(batch, model.logp(batch)) for batch in batches]
    leaves = [head.logp.detach().requires_grad_() for _, head in forwards]
    with torch.enable_grad():
        own = [
            _pair_logp(leaf, forward, loss, config)
            for leaf, forward in zip(leaves, forwards, strict=True)
        ]
        x = concatenate_pairs(own) if own else _no_pairs(model, loss, config)
        x, first = _with_other_ranks(x)
        losses = pair_losses(loss, x, loss_options(config))
    return _slopes(losses, first, own, leaves)


@torch.enable_grad()
def _slopes(
    losses: Tensor,  # of all pairs of the step, in their graph
    first: int,  # where this rank's begin
    own: Sequence[PairLogp],  # this rank's, by batch
    leaves: Sequence[Tensor],
) -> list[PairSlopes]:
    if not leaves:
        return []
    slopes = torch.autograd.grad(losses.sum(), leaves)
    sizes = [len(x.chosen) for x in own]
    values = losses.detach()[first : first + sum(sizes)].split(sizes)
    return [
        PairSlopes(_detached(x), value, slope)
        for x, value, slope in zip(own, values, slopes, strict=True)
    ]


@torch.no_grad()
def mean_chosen_len(batches: Iterable[PairBatch], num_pairs: int, device: torch.device) -> Tensor:
    """() mean scored length of the chosen completions of a step's ``num_pairs`` on all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        total += batch.chosen_scored.sum()
    return dist.all_reduce_sum(total) / num_pairs


def _pair_logp(
    logp: Tensor,  # (S,) leaf of the loss's graph
    forward: Forward,
    loss: Loss,
    config: Config,
    step_len: Tensor | None = None,
) -> PairLogp:
    batch, head = forward
    assert (batch.group == GROUP) == (config.ld_alpha is None), "ld_alpha needs batch.with_tails()"
    chosen, rejected = sequence_sums(logp, batch.num_pairs, tail_weight(config))
    plain = (chosen, rejected)
    if config.ld_alpha is not None:
        plain = sequence_sums(logp, batch.num_pairs)
    lengths = (batch.chosen_scored, batch.rejected_scored)
    weighting = None
    if config.use_weighting:
        assert head.log_sum_sq_prob is not None
        usual = sequence_sums(head.log_sum_sq_prob, batch.num_pairs)
        weighting = wpo_weight(plain, usual, lengths)
    if batch.loss_weight is not None:
        own = batch.loss_weight.to(logp.dtype)
        weighting = own if weighting is None else weighting * own
    return PairLogp(
        chosen,
        rejected,
        batch.ref_chosen.to(logp.dtype) if loss.needs_reference else None,
        batch.ref_rejected.to(logp.dtype) if loss.needs_reference else None,
        *lengths,
        chosen_full=None if config.ld_alpha is None else plain[0],
        step_len=step_len,
        weighting=weighting,
    )


def _no_pairs(model: PairModel, loss: Loss, config: Config) -> PairLogp:
    """What a rank without pairs has to show the others."""
    dtype = torch.float64 if model.dtype is torch.float64 else torch.float32
    none = torch.zeros(0, dtype=dtype, device=model.device)
    reference = none if loss.needs_reference else None
    full = None if config.ld_alpha is None else none
    return PairLogp(none, none, reference, reference, none, none, chosen_full=full)


def _with_other_ranks(own: PairLogp) -> tuple[PairLogp, int]:
    """All ranks' pairs in rank order, this rank's differentiable; and where its own begin."""
    columns = {name: values for name, values in vars(own).items() if isinstance(values, Tensor)}
    matrix = torch.stack([values.detach().double() for values in columns.values()], dim=1)
    parts = []
    for part in dist.all_gather_rows(matrix):
        values = (v.to(own.chosen.dtype) for v in part.unbind(dim=1))
        parts.append(dataclasses.replace(own, **dict(zip(columns, values, strict=True))))
    first = sum(len(part.chosen) for part in parts[: dist.rank()])
    parts[dist.rank()] = own
    return concatenate_pairs(parts), first


def _detached(x: PairLogp) -> PairLogp:
    values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(x).items()}
    return PairLogp(**values)
