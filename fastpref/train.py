"""A training run, top to bottom: data, model, reference, then the loop."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastpref import dist, require_matching_kernels, runfolder
from fastpref.checkpoint import (
    TrainState,
    load_checkpoint,
    remove_checkpoints_after,
    save_checkpoint,
)
from fastpref.config import Config
from fastpref.data.dataset import Dataset, load_dataset
from fastpref.data.loader import Loader
from fastpref.data.pack import demand_budget, demand_vocabulary, fed_tokens, pack_pairs
from fastpref.dynamics.recorder import MetricsLog, Recorder
from fastpref.dynamics.schema import TRAIN
from fastpref.errors import NonFiniteError, Preempted
from fastpref.evaluate import Evaluator
from fastpref.losses import Loss, get_loss
from fastpref.model import (
    PairModel,
    load_model,
    load_tokenizer,
    resolve_attention,
    resolve_device,
    resolve_dtype,
)
from fastpref.observe import Window, pair_columns, record_step
from fastpref.optim import Schedule, build_optimizer, build_scheduler
from fastpref.progress import Bar
from fastpref.refcache import cache_key, demand_no_given, with_reference
from fastpref.reference import copy_reference, is_live, sync_reference
from fastpref.selfcheck import check_model
from fastpref.step import train_step

log = logging.getLogger(__name__)


@dataclass
class State:
    """What changes while a run runs; a checkpoint holds all of it."""

    model: PairModel
    optimizer: torch.optim.Optimizer
    scheduler: Schedule
    window: Window  # sums since the last line of metrics.jsonl
    key: str  # digest of the initial weights and the data: what a resumed run must share
    reference: PairModel | None = None  # the one that follows the policy (sync_ref_model)
    step: int = 0  # finished optimizer steps
    num_tokens: int = 0  # of both sequences of every pair so far, as TRL counts

    def saved(self) -> TrainState:
        """The form in which checkpoints hold it."""
        counters = {
            "step": self.step,
            "key": self.key,
            "num_tokens": self.num_tokens,
            "window": self.window.sums,
        }
        module, tokenizer = self.model.module, self.model.tokenizer
        reference = self.reference.module if self.reference else None
        return TrainState(module, tokenizer, self.optimizer, self.scheduler, counters, reference)

    def live_reference(self, config: Config) -> PairModel | None:
        """The reference that scores the coming pairs; None: the one whose log-probs are cached."""
        return self.reference if is_live(config, self.step) else None

    def restore(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``, bit for bit; ValueError if data or base model changed."""
        counters = load_checkpoint(checkpoint, self.saved(), verify=False)
        if counters["key"] != self.key:
            raise ValueError(
                f"{checkpoint}: the data, the tokenizer or the model that training began from "
                "changed since this run began. Restore them, or choose another output_dir."
            )
        self.step, self.num_tokens = counters["step"], counters["num_tokens"]
        self.window.sums = counters["window"]


def train(config: Config, progress: bool = True) -> Path:
    """Train on preference pairs as ``config`` says; returns the run folder.

    Raises ValueError for bad input, before any training; NonFiniteError at a loss that is not
    finite; Preempted after SIGTERM, once the step under way is done and saved.
    """
    require_matching_kernels()
    loss = get_loss(config.loss_type, config.loss_weights)
    dist.start(resolve_device(config.device).type)
    try:
        return _train(config, loss, progress and dist.is_main())
    finally:
        dist.stop()


def _train(config: Config, loss: Loss, progress: bool) -> Path:
    # Where the pieces come from. All that can be wrong with the input is found here, the cheap
    # things first: data before weights.
    config = _resolved(config)
    runfolder.check(config)
    tokenizer = load_tokenizer(config)
    dataset = load_dataset(config, tokenizer)
    torch.manual_seed(config.seed)
    model = load_model(config, tokenizer)
    key = cache_key(model, dataset.train + dataset.held_out)
    dist.check_same("data", key, model.device)
    demand_vocabulary(dataset.train + dataset.held_out, len(model.head.weight))
    loader = _loader(config, dataset)
    demand_budget(fed_tokens(dataset.held_out), config.max_tokens_per_microbatch)
    last_step = total_steps(config, loader.steps_per_epoch)
    worst = check_model(model, dataset.train)
    log.info("self-check: packed equals separate sequences to %.1e", worst)
    if loss.needs_reference:
        dataset = _with_reference(config, model, dataset, progress)
    reference = copy_reference(model) if config.sync_ref_model else None

    torch.manual_seed(config.seed + dist.rank())  # dropout: every rank draws its own
    checkpoint = runfolder.open_run(config, model.device)
    optimizer = build_optimizer(model.module.named_parameters(), config)
    scheduler = build_scheduler(optimizer, config, last_step)
    state = State(model, optimizer, scheduler, Window(model.device), key, reference)
    if checkpoint:
        state.restore(checkpoint)
        log.info("resumed from %s", checkpoint)
    return run_loop(config, loss, dataset, loader, state, last_step, progress)


def run_loop(
    config: Config,
    loss: Loss,
    dataset: Dataset,
    loader: Loader,
    state: State,
    last_step: int,
    progress: bool,
) -> Path:
    """The steps after ``state.step`` up to ``last_step``; returns the run folder."""
    run, model = Path(config.output_dir), state.model
    main = dist.is_main()
    metrics = MetricsLog(run / "metrics.jsonl", state.step) if main else None
    perf = MetricsLog(run / "perf.jsonl", state.step, truncate=False) if main else None
    recorder = None
    if config.record:
        recorder = Recorder(run, dist.rank(), dataset.behaviors, config.part_steps, state.step)
        recorder.index(dataset.index)
    if main:  # nothing can refuse the resumption any more; the run is about to contradict these
        remove_checkpoints_after(run, state.step)
    evaluator = Evaluator(config, dataset) if config.eval_steps and main else None
    truncated = np.array([p.pair_id for p in dataset.train if p.truncated], np.int64)
    if evaluator and metrics and state.step == 0:
        evaluator.run(model, loss, 0, 0.0, metrics, recorder)

    bar = Bar(last_step, state.step, progress)
    with closing(bar), _asked_to_end() as asked:
        for plan in loader.plan(state.step + 1, last_step):
            # The step itself.
            began, rate = time.perf_counter(), state.scheduler.learning_rate
            tracked = (
                config.record and config.track == "head" and plan.step % config.track_every == 0
            )
            batches = (
                pack_pairs([dataset.train[i] for i in own]).to(model.device)
                for own in plan.micro_batches
            )
            try:
                result = train_step(
                    model,
                    batches,
                    loss,
                    config,
                    plan.num_pairs,
                    state.optimizer,
                    "exact" if tracked else None,
                    state.live_reference(config),
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"step {plan.step}: {error}") from None
            state.scheduler.step()
            state.step = plan.step
            if state.reference and plan.step % config.ref_model_sync_steps == 0:
                sync_reference(state.reference, model, config.ref_model_mixup_alpha)

            # What it showed.
            parts = [pair_columns(pairs) for pairs in result.pairs]
            state.window.add(result.pairs, float(result.grad_norm))
            state.num_tokens += plan.num_tokens
            if recorder:
                record_step(recorder, plan, result, parts, truncated, rate, config.beta)
            bar.step(plan, result, parts, time.perf_counter() - began)
            last = plan.step == last_step
            if last or plan.step % config.logging_steps == 0:
                line: dict[str, float | str]
                line = {"learning_rate": rate, "num_tokens": state.num_tokens}
                line |= state.window.metrics()
                if metrics and perf:
                    line = {"step": plan.step, "epoch": plan.epoch, "split": TRAIN, **line}
                    metrics.append(line)
                    perf.append({"step": plan.step, **bar.window()})
            if evaluator and metrics and (last or plan.step % config.eval_steps == 0):
                with bar.paused():
                    live = state.live_reference(config)
                    evaluator.run(model, loss, plan.step, plan.epoch, metrics, recorder, live)

            # What is kept of it. Records first: a checkpoint never is ahead of them.
            ending = _any_rank(asked.is_set(), model.device)
            save = last or ending or plan.step % config.save_steps == 0
            if recorder:
                recorder.flush(plan.step)
                if save:
                    recorder.close(plan.step)
            if metrics and perf and (save or plan.step % config.logging_steps == 0):
                metrics.flush()
                perf.flush()
            if save:
                save_checkpoint(run, state.step, state.saved(), config.save_total_limit)
            if ending and not last:
                without = " without overwrite_output_dir" if config.overwrite_output_dir else ""
                raise Preempted(
                    f"stopped after step {plan.step}; the same command{without} goes on there."
                )
    if main:
        runfolder.save_final(run, model, config.save_merged)
    return run


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def _resolved(config: Config) -> Config:
    """With what is chosen automatically in the place of `auto`: what config.yaml keeps."""
    device = resolve_device(config.device)
    return dataclasses.replace(
        config,
        output_dir=str(Path(config.output_dir).expanduser()),
        device=device.type if config.device == "auto" else config.device,
        dtype=str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        attn_implementation=resolve_attention(config.attn_implementation),
    )


def _loader(config: Config, dataset: Dataset) -> Loader:
    return Loader(
        dataset.train,
        seed=config.seed,
        batch_size=config.train_batch_size,
        max_tokens=config.max_tokens_per_microbatch,
        shuffle=config.shuffle,
        stratify=config.stratify,
        rank=dist.rank(),
        world=dist.world_size(),
    )


def _with_reference(config: Config, model: PairModel, dataset: Dataset, progress: bool) -> Dataset:
    pairs = dataset.train + dataset.held_out
    if config.sync_ref_model:
        demand_no_given(pairs, "sync_ref_model moves the reference, which must be a model")
    both = with_reference(
        model,
        pairs,
        cache_dir=config.ref_cache_dir,
        check_pairs=config.ref_check_pairs,
        seed=config.seed,
        ld_alpha=config.ld_alpha,
        progress=progress,
    )
    count = len(dataset.train)
    return dataclasses.replace(dataset, train=both[:count], held_out=both[count:])


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so: a signal may reach one only, and all must stop at the same step."""
    if dist.world_size() == 1:
        return flag
    return bool(dist.all_reduce_sum(torch.tensor(int(flag), device=device)))


@contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Set by SIGTERM: the loop then ends at a whole step instead of losing it."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
