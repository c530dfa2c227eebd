"""A training run, top to bottom: data, model, reference; then the loop (loop.py)."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path

import torch

from fastpref import dist, lora, quantised, require_matching_kernels, runfolder
from fastpref.answers import initial_probes
from fastpref.balance import demand_shares, find_balancer
from fastpref.best import Best
from fastpref.compile import compile_blocks, demand_compiler
from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import demand_budget, demand_vocabulary, fed_tokens, pack_pairs
from fastpref.data.probes import build_probes
from fastpref.drift import Boundaries
from fastpref.dynamics.parts import write_layer_groups, write_lora_layers
from fastpref.evaluate import evaluation_names
from fastpref.features import with_states
from fastpref.head import freeze_body
from fastpref.loading import load_model, load_tokenizer, resolve_device, routes
from fastpref.loggers import demand_packages
from fastpref.loop import run_loop
from fastpref.losses import Loss, get_loss
from fastpref.observe import Window
from fastpref.optim import demand_optimizer
from fastpref.planner import plan_run
from fastpref.prepare import (
    data_key,
    make_loader,
    make_optimizer,
    resolved,
    total_steps,
    with_attention,
    with_reference,
)
from fastpref.probes import Probing
from fastpref.reference import copy_reference
from fastpref.retry import TokenBudget
from fastpref.schedule import Schedule, rate_factor
from fastpref.selfcheck import check_model, check_probes
from fastpref.state import State
from fastpref.tapcheck import find_taps
from fastpref.track import find_tracker

log = logging.getLogger(__name__)


def train(config: Config, progress: bool = True) -> Path:
    """Train on preference pairs as ``config`` says; returns the run folder.

    Raises ValueError for bad input, before any training; NonFiniteError at a loss that is not
    finite; Preempted after SIGTERM, once the step under way is done and saved.
    """
    require_matching_kernels()
    loss = get_loss(config.loss_type, config.loss_weights)
    dist.start(resolve_device(config.device).type)
    try:
        return _train(config, loss, progress and not config.disable_tqdm and dist.is_main())
    finally:
        dist.stop()


def _train(config: Config, loss: Loss, progress: bool) -> Path:
    # Where the pieces come from. All that can be wrong with the input is found here, the cheap
    # things first: data before weights.
    config = resolved(config)
    runfolder.check(config)
    demand_packages(config)
    demand_optimizer(config)
    if config.torch_compile:
        demand_compiler(resolve_device(config.device))
    if config.trainable == "lora":
        lora.check_available()
    if config.load_in_4bit:
        quantised.demand_packages()
    tokenizer = load_tokenizer(config)
    dataset = load_dataset(config, tokenizer, progress)
    demand_shares(config, dataset)
    probes = build_probes(config, tokenizer, dataset) if config.probe_every else []
    if routes(config):
        dataset = dataclasses.replace(dataset, sizes=functools.partial(fed_tokens, whole=True))
    config = plan_run(config, dataset)
    torch.manual_seed(config.seed)
    model = load_model(config, tokenizer)
    config = with_attention(config, model)
    key = data_key(model, dataset)
    dist.check_same("data", key, model.device)
    demand_vocabulary(dataset.train + dataset.held_out, len(model.head.weight))
    loader = make_loader(config, dataset)
    demand_budget(dataset.sizes(dataset.held_out), config.max_tokens_per_microbatch)
    last_step = total_steps(config, loader.steps_per_epoch)
    rate_factor(config, last_step)
    best = Best(config)
    best.demand_known(evaluation_names(config, dataset))
    balancer = find_balancer(config, dataset, loader, model.device)
    if config.trainable == "head":
        model = freeze_body(model)
    worst = check_model(model, dataset.train, config.max_tokens_per_microbatch)
    log.info("self-check: packed equals separate sequences to %.1e", worst)
    taps = find_taps(model, config, dataset.train)
    probing = None
    if config.probe_every:
        probes += initial_probes(config, model, dataset)
        probing = Probing(config, probes, dataset.behaviors, len(model.head.weight))
        if config.probe_influence and taps:
            probing.watch(model, taps)
        check_probes(model, probes, config.max_tokens_per_microbatch)
    if config.torch_compile:  # after the checks, which call the blocks in other ways
        compile_blocks(model.module)
    if model.frozen_body:
        dataset = with_states(config, model, dataset, progress)
    if loss.needs_reference:
        dataset, named = with_reference(config, model, dataset, progress)
        key = f"{key} {named}"
    if model.router:  # every token is routed, and so every one of a step is fed
        dataset = dataclasses.replace(dataset, pack=functools.partial(pack_pairs, whole=True))
    reference = copy_reference(model) if config.sync_ref_model else None

    torch.manual_seed(config.seed + dist.rank())  # dropout: every rank draws its own
    checkpoint = runfolder.open_run(config, model.device)
    if taps and dist.is_main():
        write_layer_groups(Path(config.output_dir), taps.groups)
    if config.trainable == "lora" and config.record and dist.is_main():
        write_lora_layers(Path(config.output_dir), list(lora.update_norms(model.module)))
    optimizer, masters = make_optimizer(config, model)
    scheduler = Schedule(optimizer, config, last_step)
    state = State(model, optimizer, scheduler, Window(), best, key, reference)
    state.taps, state.balancer, state.probing = taps, balancer, probing
    state.masters, state.budget = masters, TokenBudget(loader, model.device)
    if model.frozen_body:
        state.head_start = model.head.weight.detach().clone()
    if probing:
        probing.begin(model)
    state.tracker = find_tracker(config, dataset, model, loss, taps)
    state.boundaries = Boundaries.of(model, dataset.train)
    if checkpoint:
        state.restore(checkpoint)
        log.info("resumed from %s", checkpoint)
        if best.stop or state.step > last_step:
            why = "early_stopping_patience" if best.stop else f"{last_step} steps are asked for"
            log.warning("the run ended at step %d already (%s); it stays as it is", state.step, why)
    return run_loop(config, loss, dataset, loader, state, last_step, progress)
