"""What a run is made of, before its first step: resolved options, order of pairs, reference."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import torch

from fastpref import dist, runfolder
from fastpref.attention_backends import demand_backend, find_backend
from fastpref.config import Config, load_config
from fastpref.data.dataset import Dataset
from fastpref.data.loader import Loader
from fastpref.loading import resolve_device, resolve_dtype
from fastpref.masters import Masters
from fastpref.model import PairModel
from fastpref.optim import build_optimizer
from fastpref.refcache import cache_key
from fastpref.refmodel import find_reference
from fastpref.schedule import WARMUP_RATIO


def resolved(config: Config) -> Config:
    """With what is chosen automatically in the place of `auto`: what config.yaml keeps.

    All but the attention backend, which depends on what the model asks for (`with_attention`), and
    what is left to the planner (`fastpref.planner`), unless the run to go on with has it.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    demand_backend(config.attn_implementation, device, dtype)
    no_warmup = config.warmup_ratio is None and config.warmup_steps is None
    config = dataclasses.replace(config, output_dir=str(Path(config.output_dir).expanduser()))
    before = _before(config)
    tokens = config.max_tokens_per_microbatch
    return dataclasses.replace(
        config,
        max_tokens_per_microbatch=tokens or (before.max_tokens_per_microbatch if before else 0),
        template_date=runfolder.template_date(config),
        device=device.type if config.device == "auto" else config.device,
        dtype=str(dtype).removeprefix("torch."),
        attn_implementation=_attention_before(config, device, dtype),
        warmup_ratio=WARMUP_RATIO if no_warmup else config.warmup_ratio,
    )


def _before(config: Config) -> Config | None:
    """Of the run to go on with, if there is one."""
    file = Path(config.output_dir) / "config.yaml"
    return load_config(file) if file.exists() and not config.overwrite_output_dir else None


def _attention_before(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """As configured; `auto` is what the run to go on with had, where that is to be had here."""
    before = _before(config)
    if config.attn_implementation == "auto" and before:
        name = before.attn_implementation
        if not isinstance(find_backend(name, device, dtype), str):
            return name
    return config.attn_implementation


def with_attention(config: Config, model: PairModel) -> Config:
    """With the attention backend that the model got."""
    return dataclasses.replace(config, attn_implementation=model.attention.name)


def make_optimizer(
    config: Config, model: PairModel
) -> tuple[torch.optim.Optimizer, Masters | None]:
    """Over the weights that learn, or their masters."""
    if config.weights_dtype == "float32" or not config.master_weights:
        return build_optimizer(model.module.named_parameters(), config), None
    masters = Masters(model.module.named_parameters())
    if not masters.tensors:  # adapters, which are float32 beside weights of any precision
        return build_optimizer(model.module.named_parameters(), config), None
    optimizer = build_optimizer(masters.named_parameters(), config)
    masters.follow(optimizer)
    return optimizer, masters


def make_loader(config: Config, dataset: Dataset) -> Loader:
    """The order in which the training pairs come, on this rank."""
    return Loader(
        dataset.train,
        seed=config.seed,
        batch_size=config.train_batch_size,
        max_tokens=config.max_tokens_per_microbatch,
        sizes=dataset.sizes(dataset.train),
        shuffle=config.shuffle,
        stratify=config.stratify,
        weights=config.dataset_weights,
        rank=dist.rank(),
        world=dist.world_size(),
    )


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def data_key(model: PairModel, dataset: Dataset) -> str:
    """Digest of the initial weights and of the pairs: their tokens, and what else steers a step,
    their order (which the plan counts in), strata and the reference log-probs they bring."""
    digest = hashlib.sha256(cache_key(model, dataset.train + dataset.held_out).encode())
    for side in (dataset.train, dataset.held_out):
        digest.update(f"{len(side)}\n".encode())
        for p in side:
            own = (p.pair_id, p.behavior, p.label, p.ref_chosen, p.ref_rejected)
            digest.update(f"{own}\n".encode())
    return digest.hexdigest()[:16]


def with_reference(
    config: Config, model: PairModel, dataset: Dataset, progress: bool
) -> tuple[Dataset, str]:
    """``dataset`` with reference log-probs, and what names their model."""
    pairs = dataset.train + dataset.held_out
    found, named = find_reference(
        config, model, model.tokenizer, pairs, progress, pack=dataset.pack
    )
    count = len(dataset.train)
    return dataclasses.replace(
        dataset, train=found.pairs[:count], held_out=found.pairs[count:]
    ), named
