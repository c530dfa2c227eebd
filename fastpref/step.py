"""One optimizer step: the page to read first.

    packed batch -> body -> head on scored rows -> one log-prob per segment -> loss per pair

The loss sees log-probs only, and its gradient reaches the model through one number per segment, so
the step cuts the graph there: `pair_slopes` gives those numbers, `logp.backward(numbers)` takes
them through head and body. What the recorder wants is on the way and costs nothing more.

Three losses tie the pairs of a step together. `sft` and `cpo` divide by its tokens, which are
counted beforehand; `aot` sorts its pairs, which takes a forward over all of them first, where the
step has several micro-batches or ranks (fastpref/slopes.py). So does the load-balancing loss of a
mixture of experts (fastpref/router.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastpref_kernels import LinearLogprob
from torch import Tensor

from fastpref import dist
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.diagnosis import out_of_memory
from fastpref.dynamics.taps import Taps
from fastpref.errors import NonFiniteError, OutOfMemory
from fastpref.gradients import PairGradients, head_norms, put_together
from fastpref.losses import Loss, PairLogp, pair_norms, rewards, sequence_sums
from fastpref.model import HeadNorms, PairModel
from fastpref.optim import clip_gradients
from fastpref.reference import with_live_reference
from fastpref.router import Balance
from fastpref.slopes import (
    PairSlopes,
    coupled_slopes,
    mean_chosen_len,
    pair_slopes,
    tail_weight,
    wanted_stats,
)
from fastpref.tracing import named


@dataclass(frozen=True)
class PairResult:
    """What a step or an evaluation knows of the P pairs of a batch, detached, on its device."""

    batch: PairBatch
    x: PairLogp
    loss: Tensor  # (P,)
    # (P,) -d loss / d margin, beta sigma(-beta m) for the sigmoid loss; -d loss / d logp_chosen for
    # losses of more than the margin
    weight: Tensor
    reward_chosen: Tensor  # (P,) beta x log-ratio, see losses.rewards
    reward_rejected: Tensor  # (P,)
    norms: dict[str, Tensor]  # head-gradient norms (P,) each, see losses.pair_norms; or empty
    # of the head, by name: sums (P,) over the scored tokens of the chosen and the rejected sequence
    stats: dict[str, tuple[Tensor, Tensor]]
    load: Tensor | None = None  # of routers whose balance is part of the loss, `Load.packed`
    features: Tensor | None = None  # (P, D) of an evaluation, see `PairModel.logp_and_features`
    gradients: PairGradients | None = None  # of `loss`, not divided by a number of pairs
    margin_only: bool = False  # the loss reaches the model through the margin alone


@dataclass(frozen=True)
class StepResult:
    """An optimizer step's pairs and gradient, still on the device."""

    pairs: list[PairResult]
    loss: Tensor  # () mean over the step's pairs on all ranks, and what balance adds
    grad_norm: Tensor  # () before clipping
    clip_coef: Tensor  # () what the gradient was multiplied by
    aux_loss: Tensor | None = None  # () load-balancing loss of routers, without its coefficient

    @functools.cached_property
    def health(self) -> Tensor:
        """() float64: not finite where a loss, a margin or the gradient is not.

        An infinite margin can give a finite loss of zero, so margins are looked at too.
        """
        total = self.loss.double() + self.grad_norm.double()
        for pairs in self.pairs:
            total = total + pairs.x.margin.sum()
        return total


def train_step(
    model: PairModel,
    batches: Iterable[PairBatch],
    loss: Loss,
    config: Config,
    num_pairs: int,  # over all ranks and micro-batches: the divisor of the step's loss
    optimizer: torch.optim.Optimizer,
    norms: HeadNorms | str | None,
    reference: PairModel | None = None,  # one that moves; None: the log-probs of the batches
    taps: Taps | None = None,  # what is to be seen of every pair's gradient
    *,
    wait: bool = True,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then the optimizer.

    ``norms``: of the head's gradients, as `linear_logprob` calls them; with ``taps``, theirs.
    Raises NonFiniteError, before the weights are touched, where a loss or the gradient is not
    finite. To know that, the device is waited for; without ``wait`` it is not, and the caller
    must ask `demand_finite` later: a fused optimizer then leaves the weights as they are, by the
    device's own decision, and others make them as bad as the gradient is.
    Raises OutOfMemory, with weights and optimizer as they were, where forward or backward did not
    fit (with losses that tie several ranks together, what torch raises).
    """
    for parameter in model.trained:
        parameter.grad = None
    with model.dropout():
        try:
            results = _accumulate(model, batches, loss, config, num_pairs, norms, reference, taps)
            lack = None
        except Exception as error:
            # Where losses tie ranks together the others wait for this one within `_accumulate`.
            if not out_of_memory(error) or (_ties_ranks(model, loss) and dist.world_size() > 1):
                raise
            results, lack = [], str(error)
    # Behind the handler, with whose error the frames that held activations have gone.
    if lack is not None:
        _let_go(model)
        if dist.world_size() == 1:
            raise OutOfMemory(lack)
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    if results:
        sums[0] = torch.stack([r.loss.double().sum() for r in results]).sum()
    sums[1] = float(lack is not None)
    mean, lacking = dist.all_reduce_sum(sums).unbind()
    dist.all_reduce_gradients(model.trained)
    if dist.world_size() > 1 and lacking.item():
        _let_go(model)
        raise OutOfMemory(lack or f"on {lacking.item():.0f} other of {dist.world_size()} ranks.")
    grad_norm, clip_coef = clip_gradients(model.trained, config.max_grad_norm)
    mean /= num_pairs
    aux_loss = None
    if model.router:
        aux_loss = _balance(model, [r.load for r in results if r.load is not None]).value
        mean += model.router.coef * aux_loss
    result = StepResult(results, mean, grad_norm, clip_coef, aux_loss)
    with named("optimizer"):
        if wait or model.device.type == "cpu":  # reading is free there
            demand_finite(result)
            optimizer.step()
        else:
            _step_if_finite(optimizer, result)
    return result


def _step_if_finite(optimizer: torch.optim.Optimizer, result: StepResult) -> None:
    """The step of ``optimizer``; of a fused one only where ``result`` is finite.

    By what torch's GradScaler tells fused optimizers: their kernels read it on the device.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.step()
        return
    held: Any = optimizer
    held.found_inf = (~torch.isfinite(result.health)).float()
    try:
        optimizer.step()
    finally:
        del held.found_inf


def _ties_ranks(model: PairModel, loss: Loss) -> bool:
    """Whether ranks speak with each other between forward and backward."""
    return bool(loss.batch_coupled or model.router)


def _let_go(model: PairModel) -> None:
    """Of gradients, and of what the allocator keeps for later."""
    for parameter in model.trained:
        parameter.grad = None
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _accumulate(
    model: PairModel,
    batches: Iterable[PairBatch],
    loss: Loss,
    config: Config,
    num_pairs: int,
    norms: HeadNorms | str | None,
    reference: PairModel | None,
    taps: Taps | None,
) -> list[PairResult]:
    """`backward` of every batch, with what the loss needs to know of the whole step."""
    ready = _ready(batches, config, reference)
    one = functools.partial(
        backward, model, loss=loss, config=config, num_pairs=num_pairs, norms=norms, taps=taps
    )
    if not loss.batch_coupled and not model.router:
        return [one(batch) for batch in ready]
    whole = list(ready)
    alone = len(whole) == dist.world_size() == 1
    if model.router and not alone:
        one = functools.partial(one, balance=_balance(model, [model.load(b) for b in whole]))
    if loss.batch_coupled == "tokens":
        length = mean_chosen_len(whole, num_pairs, model.device)
        return [one(batch, step_len=length) for batch in whole]
    if loss.batch_coupled != "order" or alone:
        return [one(batch) for batch in whole]
    slopes = coupled_slopes(model, whole, loss, config)
    return [one(batch, asked=asked) for batch, asked in zip(whole, slopes, strict=True)]


def _balance(model: PairModel, loads: Iterable[Tensor]) -> Balance:
    """How the tokens of the step are routed, from this rank's loads; every rank calls it."""
    assert model.router
    total = torch.zeros(2 * model.router.experts + 1, dtype=torch.float64, device=model.device)
    for load in loads:
        total += load
    return model.router.balance(dist.all_reduce_sum(total))


def _ready(
    batches: Iterable[PairBatch], config: Config, reference: PairModel | None
) -> Iterator[PairBatch]:
    """The batches with the segments and the reference log-probs that the loss reads."""
    for batch in batches:
        if reference is not None:
            batch = with_live_reference(batch, reference, config.ld_alpha)
        yield batch if config.ld_alpha is None else batch.with_tails()


def backward(
    model: PairModel,
    batch: PairBatch,
    loss: Loss,
    config: Config,
    num_pairs: int,
    norms: HeadNorms | str | None = None,
    *,
    taps: Taps | None = None,
    step_len: Tensor | None = None,  # of a step that is more than this batch, see PairLogp
    asked: PairSlopes | None = None,  # where the loss has been taken of the whole step already
    balance: Balance | None = None,  # of routers, in a step that is more than this batch
) -> PairResult:
    """Adds the gradient of (sum of the batch's losses) / ``num_pairs`` to the parameters."""
    if taps:
        assert model.router is None, "a balance of routers is no sum over pairs"
        norms = head_norms(taps)
    with taps.watching(batch, scale=num_pairs) if taps else nullcontext():
        head, load = model.routed_logp(batch, norms, wanted_stats(config))
        if asked is None:
            (asked,) = pair_slopes([(batch, head)], loss, config, step_len)
        slope = asked.slope / num_pairs
        if load is None or model.router is None:
            with named("backward"):
                head.logp.backward(slope)
            own = None
        else:
            own = load.packed()
            uneven = model.router.loss(load, balance or model.router.balance(own))
            with named("backward"):
                torch.autograd.backward((head.logp, uneven), (slope, None))
    result = _result(batch, head, asked, loss, config, own)
    if taps is None:
        return result
    seen = put_together(model, taps, batch, head, asked.slope, "loss")
    return replace(result, gradients=seen)


@torch.no_grad()
def evaluate(
    model: PairModel,
    batches: Iterable[PairBatch],
    loss: Loss,
    config: Config,
    norms: HeadNorms | str | None = None,
    reference: PairModel | None = None,
) -> list[PairResult]:
    """The same quantities without a gradient reaching the model; all batches are one step."""
    ready = _ready(batches, config, reference)
    # All batches of an evaluation are kept, their hidden states, where they bring any, are not.
    forwards, features = [], []
    for batch in ready:
        head, feature = model.logp_and_features(batch, norms, wanted_stats(config))
        forwards.append((replace(batch, hidden=None), head))
        features.append(feature)
    slopes = pair_slopes(forwards, loss, config)
    return [
        replace(_result(batch, head, asked, loss, config), features=feature)
        for (batch, head), asked, feature in zip(forwards, slopes, features, strict=True)
    ]


def _result(
    batch: PairBatch,
    head: LinearLogprob,
    asked: PairSlopes,
    loss: Loss,
    config: Config,
    load: Tensor | None = None,
) -> PairResult:
    stats = {
        name: sequence_sums(getattr(head, name), batch.num_pairs) for name in wanted_stats(config)
    }
    return PairResult(
        batch,
        asked.x,
        asked.loss,
        # The chosen rest is in the chosen sequence alone: its slope is d loss / d logp_chosen.
        -asked.slope.view(batch.num_pairs, -1)[:, 1],
        *rewards(asked.x, config.beta, loss.per_token),
        norms={} if head.gram is None else pair_norms(head.gram, tail_weight(config)),
        stats=stats,
        load=load,
        margin_only=loss.margin_only and config.f_divergence_type == "reverse_kl",
    )


def demand_finite(result: StepResult) -> None:
    """Raise NonFiniteError naming the pairs whose loss is not finite, or the gradient."""
    if math.isfinite(result.health):
        return
    for pairs in result.pairs:
        odd = ~torch.isfinite(pairs.loss + pairs.x.margin)
        if bool(odd.any()):
            x = pairs.x
            columns = [pairs.batch.pair_id, x.chosen, x.rejected]
            if x.ref_chosen is not None and x.ref_rejected is not None:
                columns += [x.ref_chosen, x.ref_rejected]
            named = [
                f"pair_id {i} (logp chosen {c:g}, rejected {r:g}"
                + (f"; reference {ref[0]:g}, {ref[1]:g})" if ref else ")")
                for i, c, r, *ref in zip(*(v[odd].tolist() for v in columns), strict=True)
            ]
            raise NonFiniteError(f"loss or margin is not finite for {'; '.join(named[:8])}")
    raise NonFiniteError(
        f"loss {result.loss.item():g}, gradient norm {result.grad_norm.item():g}: not finite, "
        "though every pair's loss on this rank is."
    )
