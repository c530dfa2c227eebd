"""One optimizer step: the page to read first.

    packed batch -> body -> head on scored rows -> one log-prob per segment -> loss per pair

The loss sees log-probs only, and its gradient reaches the model through one number per segment, so
the step cuts the graph there: `loss.backward()` gives those numbers, `logp.backward(numbers)` takes
them through head and body. What the recorder wants is on the way and costs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref import dist
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.errors import NonFiniteError
from fastpref.losses import Loss, PairLogp, pair_logp, pair_norms
from fastpref.model import PairModel
from fastpref.optim import clip_gradients


@dataclass(frozen=True)
class PairResult:
    """What a step or an evaluation knows of the P pairs of a batch, detached, on its device."""

    batch: PairBatch
    x: PairLogp
    loss: Tensor  # (P,)
    weight: Tensor  # (P,) -d loss / d margin; beta sigma(-beta m) for the sigmoid loss
    norms: dict[str, Tensor]  # head-gradient norms (P,) each, see losses.pair_norms; or empty


@dataclass(frozen=True)
class StepResult:
    """An optimizer step's pairs and gradient, still on the device."""

    pairs: list[PairResult]
    loss: Tensor  # () mean over the step's pairs on all ranks
    grad_norm: Tensor  # () before clipping
    clip_coef: Tensor  # () what the gradient was multiplied by


def train_step(
    model: PairModel,
    batches: Iterable[PairBatch],
    loss: Loss,
    config: Config,
    num_pairs: int,  # over all ranks and micro-batches: the divisor of the step's loss
    optimizer: torch.optim.Optimizer,
    norms: str | None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then the optimizer.

    Raises NonFiniteError, before the weights are touched, where a loss or the gradient is not
    finite.
    """
    optimizer.zero_grad(set_to_none=True)
    results = [backward(model, batch, loss, config, num_pairs, norms) for batch in batches]
    total = torch.stack([r.loss.double().sum() for r in results]).sum() if results else None
    mean = dist.all_reduce_sum(
        torch.zeros((), dtype=torch.float64, device=model.device) if total is None else total
    )
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    dist.all_reduce_gradients(parameters)
    grad_norm, clip_coef = clip_gradients(parameters, config.max_grad_norm)
    result = StepResult(results, mean / num_pairs, grad_norm, clip_coef)
    demand_finite(result)
    optimizer.step()
    return result


def backward(
    model: PairModel,
    batch: PairBatch,
    loss: Loss,
    config: Config,
    num_pairs: int,
    norms: str | None = None,
) -> PairResult:
    """Adds the gradient of (sum of the batch's losses) / ``num_pairs`` to the parameters."""
    head = model.logp(batch, norms)
    logp = head.logp.detach().requires_grad_()
    x = _pair_logp(logp, batch)
    losses = loss.fn(x, config.beta, config.label_smoothing)
    (losses.sum() / num_pairs).backward()
    assert logp.grad is not None
    head.logp.backward(logp.grad)
    # The chosen rest is in the chosen sequence alone, so its gradient is d loss / d logp_chosen.
    weight = -num_pairs * logp.grad.view(-1, 3)[:, 1]
    return _result(batch, x, losses, weight, _norms(head.gram))


@torch.no_grad()
def evaluate(
    model: PairModel, batch: PairBatch, loss: Loss, config: Config, norms: str | None = None
) -> PairResult:
    """The same quantities without a gradient reaching the model."""
    head = model.logp(batch, norms)
    with torch.enable_grad():
        logp = head.logp.detach().requires_grad_()
        x = _pair_logp(logp, batch)
        losses = loss.fn(x, config.beta, config.label_smoothing)
        (slope,) = torch.autograd.grad(losses.sum(), logp)
    return _result(batch, x, losses, -slope.view(-1, 3)[:, 1], _norms(head.gram))


def _pair_logp(logp: Tensor, batch: PairBatch) -> PairLogp:
    return pair_logp(
        logp, batch.ref_chosen, batch.ref_rejected, batch.chosen_scored, batch.rejected_scored
    )


def _norms(gram: Tensor | None) -> dict[str, Tensor]:
    return {} if gram is None else pair_norms(gram)


def _result(
    batch: PairBatch, x: PairLogp, losses: Tensor, weight: Tensor, norms: dict[str, Tensor]
) -> PairResult:
    detached: dict[str, Any] = {k: v.detach() for k, v in vars(x).items()}
    return PairResult(batch, PairLogp(**detached), losses.detach(), weight.detach(), norms)


def demand_finite(result: StepResult) -> None:
    """Raise NonFiniteError naming the pairs whose loss is not finite, or the gradient."""
    # An infinite margin can give a finite loss of zero, so margins are looked at too.
    sums = [result.loss, result.grad_norm, *(r.x.margin.sum() for r in result.pairs)]
    if bool(torch.isfinite(torch.stack([s.double() for s in sums])).all()):
        return
    for pairs in result.pairs:
        odd = ~torch.isfinite(pairs.loss + pairs.x.margin)
        if bool(odd.any()):
            named = [
                f"pair_id {i} (logp chosen {c:g}, rejected {r:g}; reference {rc:g}, {rr:g})"
                for i, c, r, rc, rr in zip(
                    *(
                        v[odd].tolist()
                        for v in (
                            pairs.batch.pair_id,
                            pairs.x.chosen,
                            pairs.x.rejected,
                            pairs.x.ref_chosen,
                            pairs.x.ref_rejected,
                        )
                    ),
                    strict=True,
                )
            ]
            raise NonFiniteError(f"loss or margin is not finite for {'; '.join(named[:8])}")
    raise NonFiniteError(
        f"loss {result.loss.item():g}, gradient norm {result.grad_norm.item():g}: not finite, "
        "though every pair's loss on this rank is."
    )
