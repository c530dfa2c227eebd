"""The reference's log-probs from a model: of a batch, and of a reference that follows the policy.

TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656): every `ref_model_sync_steps` steps

    reference = a policy + (1 - a) reference,   a = ref_model_mixup_alpha

Until the first of them the reference is the one that `refcache` keeps, so nothing is computed
twice; from then on every step scores its pairs with the copy of the model that stands here.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.losses import sequence_sums
from fastpref.model import PairModel
from fastpref.recompute import decoder_layers


@torch.no_grad()
def sequence_logp(
    model: PairModel, batch: PairBatch, ld_alpha: float | None
) -> tuple[Tensor, Tensor]:  # (P,) each
    """Log-probs of the chosen and the rejected sequences; under ``ld_alpha`` its weighted sums."""
    if ld_alpha is not None:
        batch = batch.with_tails()
    weight = 1.0 if ld_alpha is None else ld_alpha
    return sequence_sums(model.logp(batch).logp, batch.num_pairs, weight)


def copy_reference(model: PairModel) -> PairModel:
    """A frozen copy of ``model``: the reference as it stands before the first step."""
    module = copy.deepcopy(model.module).requires_grad_(False)
    # What checkpointing and torch.compile wrapped around a layer's forward is bound to the layer of
    # ``model``: a copy of a function is the function itself.
    for layer in decoder_layers(module):
        layer.__dict__.pop("forward", None)
    return dataclasses.replace(model, module=module)


def is_live(config: Config, steps_done: int) -> bool:
    """Whether the reference has moved after ``steps_done`` optimizer steps."""
    return config.sync_ref_model and steps_done >= config.ref_model_sync_steps


@torch.no_grad()
def sync_reference(reference: PairModel, policy: PairModel, mixup_alpha: float) -> None:
    """Move every weight of the reference towards the policy's, in place."""
    both = zip(reference.module.parameters(), policy.module.parameters(), strict=True)
    for own, new in both:
        own.mul_(1.0 - mixup_alpha).add_(new, alpha=mixup_alpha)


def with_live_reference(
    batch: PairBatch, reference: PairModel, ld_alpha: float | None
) -> PairBatch:
    """``batch`` with the log-probs that ``reference`` gives now."""
    chosen, rejected = sequence_logp(reference, batch, ld_alpha)
    return dataclasses.replace(batch, ref_chosen=chosen, ref_rejected=rejected)
