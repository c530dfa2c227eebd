"""The first optimizer step of many small runs, without a run folder for each.

A run that only shows how far one step moves the head would load, save and record a whole model.
Here the trainer's own pieces (`Loader`, `train_step`, the optimizer) take that step over states
that are in memory, and the head is put back after it. A test and `rates` itself compare it with
what whole runs record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastpref.data.loader import Loader
from fastpref.data.tokenize import TokenPair
from fastpref.losses import get_loss
from fastpref.optim import build_optimizer
from fastpref.reproduce.head_only import HeadOnly
from fastpref.step import train_step


def first_step(
    known: HeadOnly, pairs: Sequence[TokenPair], batch_size: int, seed: int, stratify: bool
) -> float:
    """||W - W0||_F after the step that a run over ``pairs`` would take first; the head stays W0."""
    config = replace(known.config, train_batch_size=batch_size, seed=seed, stratify=stratify)
    loader = Loader(
        pairs,
        seed=seed,
        batch_size=batch_size,
        max_tokens=config.max_tokens_per_microbatch,
        sizes=known.dataset.sizes(pairs),
        stratify=stratify,
    )
    (plan,) = loader.plan(1, 1)
    model, weight = known.model, known.model.head.weight
    start = weight.detach().clone()
    train_step(
        model,
        (
            known.dataset.pack([pairs[i] for i in own]).to(model.device)
            for own in plan.micro_batches
        ),
        get_loss(config.loss_type, config.loss_weights),
        config,
        plan.num_pairs,
        build_optimizer(model.module.named_parameters(), config),
        norms=None,
    )
    moved = float(torch.dist(weight.detach(), start))
    with torch.no_grad():
        weight.copy_(start)
    return moved
