"""The steps of a run: each one, what it showed, what is kept of it."""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch

from fastpref import dist, runfolder
from fastpref.batch import PairBatch
from fastpref.checkpoint import load_weights, remove_checkpoints_after, save_checkpoint
from fastpref.config import Config
from fastpref.data.dataset import Dataset
from fastpref.data.loader import Loader, StepPlan
from fastpref.dynamics.recorder import Recorder
from fastpref.dynamics.schema import TRAIN
from fastpref.errors import NonFiniteError, Preempted
from fastpref.evaluate import Evaluator
from fastpref.flops import Shape
from fastpref.generators import own_generators, set_generators
from fastpref.journal import Journal
from fastpref.losses import Loss
from fastpref.observe import StepView, Trail, record_step
from fastpref.perf import Perf, device_peak, warm_up_steps
from fastpref.progress import Bar, Clock
from fastpref.reference import sync_reference
from fastpref.retry import TokenBudget
from fastpref.state import State
from fastpref.step import StepResult, train_step
from fastpref.tracing import FOLDER, Tracer
from fastpref.track import record_rates

log = logging.getLogger(__name__)


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
    run, model, best = Path(config.output_dir), state.model, state.best
    state.budget = state.budget or TokenBudget(loader, model.device)
    main = dist.is_main()
    recorder = None
    if config.record:
        recorder = Recorder(run, dist.rank(), dataset.behaviors, config.part_steps, state.step)
        recorder.index(dataset.index)
        if state.probing:
            recorder.index(state.probing.index_rows(model.tokenizer), "probe_index")
    journal = Journal(config, state.step)
    if main:  # nothing can refuse the resumption any more; the run is about to contradict these
        remove_checkpoints_after(run, state.step)
    evaluator = None
    if config.eval_steps and main:
        evaluator = Evaluator(config, dataset, state.boundaries, state.step)
    truncated = frozenset(p.pair_id for p in dataset.train if p.truncated)
    if evaluator and state.step == 0 and config.eval_on_start:
        evaluator.run(model, loss, 0, 0.0, journal, recorder, loss_weights=state.loss_weights())
    if state.probing and state.step == 0:
        state.probing.run(model, 0, 0.0, journal, recorder)
    journal.flush()
    if best.stop:  # it ended early already
        last_step = state.step

    bar, clock = Bar(last_step, state.step, progress), Clock()
    warm_up, traced = warm_up_steps(last_step - state.step, config.profile)
    perf = Perf(
        model.device,
        Shape.of(model.module),
        device_peak(model.device, model.dtype, config.peak_tflops),
        warm_up + traced,
    )
    tracer = Tracer(run / FOLDER, warm_up, traced if main else 0)

    def take_in(view: StepView) -> None:
        """What a step showed, once it is on the host."""
        try:
            view.demand_finite()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {view.plan.step}: {error}") from None
        state.observe(view)
        bar.show(view)
        if recorder:
            record_step(recorder, view, truncated, config.beta)

    trail = Trail(take_in)
    kept = recorder or nullcontext()  # what was recorded is written however the loop ends
    with (
        journal,
        closing(bar),
        closing(tracer),
        kept,
        closing(trail),
        _asked_to_end() as asked,
    ):
        for plan in loader.plan(state.step + 1, last_step):
            tracer.begin(clock.steps, plan.step)
            perf.begin()
            # The step itself.
            tracker = state.tracker if state.tracker and state.tracker.due(plan.step) else None
            probing = state.probing if state.probing and state.probing.measures(plan.step) else None
            if tracker or probing:
                trail.settle()  # what the device still does is no part of the measuring
            for measures in (tracker, probing):
                if measures:
                    with perf.paused():
                        measures.before()
            rate, rates = state.scheduler.learning_rate, None
            wait = bool(tracker or probing or state.balancer)  # who read what it gives at once
            result = _step(config, loss, dataset, state, plan, perf, wait)

            # What it showed. The step before it is known by now, this one is on its way.
            with perf.recording():
                trail.settle()
                if recorder:
                    recorder.flush(plan.step - 1)
            if tracker:
                with perf.paused():
                    live = state.live_reference(config)
                    rates = tracker.after(result, plan.num_pairs, rate, live)
                if state.balancer:
                    state.balancer.observe_rates(rates.behaviors)
            if state.reference and plan.step % config.ref_model_sync_steps == 0:
                # Not before rates are measured: they are of margins over the step's own reference.
                sync_reference(state.reference, model, config.ref_model_mixup_alpha)
            at_logging = plan.step % config.logging_steps == 0
            with perf.recording():
                view = StepView(
                    plan,
                    result,
                    rate,
                    columns=recorder is not None,
                    head_is_all=model.head_is_all,
                    others=state.updates() if recorder and at_logging else None,
                    more=rates.step if rates else None,
                    expected=rates.trained if rates else None,
                )
                trail.add(view)
            if state.balancer:
                state.balancer.observe(result)
            clock.count(plan)
            last = plan.step == last_step
            logged = last or at_logging or (plan.step == 1 and config.logging_first_step)
            evaluated = config.eval_steps and (last or plan.step % config.eval_steps == 0)
            if logged or evaluated or rates or perf.ends_warm_up:
                trail.settle()
            perf.step(plan)
            bar.step(perf.live())
            tracer.end(clock.steps, plan.step)
            if recorder and rates:
                record_rates(recorder, journal, plan, rates, state.loss_weights())
            if logged:
                _write_window(journal, perf, state, plan, rate)
            better = False
            if evaluated:
                found = {}
                if evaluator:
                    live = state.live_reference(config)
                    with perf.paused():
                        found = evaluator.run(
                            model,
                            loss,
                            plan.step,
                            plan.epoch,
                            journal,
                            recorder,
                            live,
                            state.loss_weights(),
                        )
                better = best.update(plan.step, found, model.device)
            if best.stop and not last:
                last = True
                log.info("no better %s since step %s: the run ends early", best.metric, best.step)
                if not logged:
                    _write_window(journal, perf, state, plan, rate)

            if state.balancer:  # the weights of the steps to come; those of this one are written
                state.balancer.update(plan.step)
            if state.probing and (last or state.probing.due(plan.step)):
                with perf.paused():
                    state.probing.after(plan.step, result, plan.num_pairs)
                    state.probing.run(model, plan.step, plan.epoch, journal, recorder)

            # What is kept of it. Records first: a checkpoint never is ahead of them.
            ending = _any_rank(asked.is_set(), model.device)
            save = last or ending or plan.step % config.save_steps == 0
            save = save or (better and config.load_best_model_at_end)
            if save:
                trail.settle()
                if recorder:
                    recorder.close(plan.step)
            if save or logged or evaluated or rates:  # `fastpref watch` reads what is on the disk
                journal.flush()
            if save:
                keep = best.step if config.load_best_model_at_end else None
                saved = state.saved(journal.log_history())
                save_checkpoint(run, state.step, saved, config.save_total_limit, keep)
            if ending and not last:
                without = " without overwrite_output_dir" if config.overwrite_output_dir else ""
                raise Preempted(
                    f"stopped after step {plan.step}; the same command{without} goes on there."
                )
            if last:
                journal.finish(clock.line(state.step, state.loss_sum) | perf.summary())
                log.info("%s", perf.sentence())
                break
    if main:
        if config.load_best_model_at_end:
            _load_best(run, state)
        runfolder.save_final(run, model, config.save_merged)
    return run


def _step(
    config: Config,
    loss: Loss,
    dataset: Dataset,
    state: State,
    plan: StepPlan,
    perf: Perf,
    wait: bool,
) -> StepResult:
    """One optimizer step, and the learning rate of the next."""
    model = state.model
    due = plan.step % config.track_every == 0
    if state.tracker:
        due = due or state.tracker.due(plan.step)
    if state.probing:
        due = due or state.probing.measures(plan.step)
    tracked = config.record and config.track != "none" and due
    attempt = functools.partial(_attempt, config, loss, dataset, state, perf, tracked, wait)
    generators = own_generators(model.device) if config.lora_dropout else {}

    def undo() -> None:
        perf.undo()
        if generators:
            set_generators(generators)

    assert state.budget
    try:
        result = state.budget.run(attempt, plan, undo)
    except NonFiniteError as error:
        raise NonFiniteError(f"step {plan.step}: {error}") from None
    state.scheduler.step()
    state.step = plan.step
    return result


def _attempt(
    config: Config,
    loss: Loss,
    dataset: Dataset,
    state: State,
    perf: Perf,
    tracked: bool,
    wait: bool,
    plan: StepPlan,
) -> StepResult:
    """The step, which may run out of memory before it has changed anything."""
    model = state.model
    batches: Iterator[PairBatch] = (
        dataset.pack([dataset.train[i] for i in own]).to(model.device) for own in plan.micro_batches
    )
    if state.balancer:
        batches = map(state.balancer.weigh, batches)
    norms = "exact" if tracked else None
    reference = state.live_reference(config)
    return train_step(
        model,
        perf.batches(batches, reference is not None),
        loss,
        config,
        plan.num_pairs,
        state.optimizer,
        norms,
        reference,
        state.taps if tracked else None,
        wait=wait,
    )


def _write_window(journal: Journal, perf: Perf, state: State, plan: StepPlan, rate: float) -> None:
    """A line of what the steps since the last one showed."""
    line: dict[str, object] = {"step": plan.step, "epoch": plan.epoch, "split": TRAIN}
    line |= {"learning_rate": rate, "num_tokens": state.num_tokens}
    line |= {f"behavior/{name}/loss_weight": w for name, w in state.loss_weights().items()}
    if state.budget and state.budget.retries:
        line["oom_retries"] = state.budget.retries
    journal.metrics(line | state.window.metrics())
    journal.perf({"step": plan.step, **perf.window()})


def _load_best(run: Path, state: State) -> None:
    """Put the weights of the best evaluation into the model."""
    best, folder = state.best, run / f"checkpoint-{state.best.step}"
    if best.step is None or not folder.is_dir():
        why = f"{folder} is gone" if best.step else "no evaluation gave a number"
        log.warning("load_best_model_at_end: %s; the last weights are the final ones", why)
        return
    if best.step != state.step:
        load_weights(folder, state.model.module)
    log.info("final model: step %d, %s %.6g", best.step, best.metric, best.value)


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
