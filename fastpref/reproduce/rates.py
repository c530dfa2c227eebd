"""`rates`: how fast training begins, against distinguishability.

Alone: each behavior's first step on all its pairs against the line beta delta / (2 sqrt 2), and the
official single random batch beside it, whose excess (E13) explains. In mixtures: all behaviors
together, equally often and not, and what the features alone said of every behavior's update rate.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.rates_plot import RatesFigure, write_rates
from fastpref.reproduce import runs
from fastpref.reproduce.first_steps import first_step
from fastpref.reproduce.head_only import (
    EVERYONE,
    PLAIN,
    HeadOnly,
    behavior_files,
    head_only,
    precision,
    relative,
)
from fastpref.reproduce.outcome import Outcome, Verdict, ratio
from fastpref.reproduce.settings import LAST_LAYER, Official, Settings
from fastpref.theory.distinguish import BehaviorStatistics, behavior_statistics, directions
from fastpref.theory.mixture import order_agreement
from fastpref.theory.rates import batch_head_rate, initial_rates

log = logging.getLogger(__name__)

OFFICIAL = LAST_LAYER  # on all behaviors
DRAWS = 16  # random batches of a behavior; the first one is the official single batch
LINE_LIMIT = 0.01
RANKED = 0.95  # of the pairs of behaviors
NEAR = 0.01  # rates closer than this, relative to the larger one, are called near ties
EQUAL, UNEQUAL, COURSE = "equal", "unequal", "course"  # the runs of the mixture
UNEQUAL_WEIGHTS = (1.0, 2.0, 4.0)  # of the behaviors in turn, in the order of their names
NOTES = [
    "Alone, the head's change is measured by the trainer's own step over states in memory, one "
    "step per behavior and batch, without run folders; the mixture's first step, measured both "
    "ways, is compared above.",
    "Predicted rates are those of the first moment. In mixtures they are exact for a first step on "
    "all pairs; the course over random batches departs from them as margins grow and batches vary.",
    "The official code takes a single random batch per behavior; its labels do not balance, and "
    "what is left over moves the head along the mean of the features (E13).",
]


@dataclass(frozen=True)
class Alone:
    """The first step of one behavior by itself; rates of ||W - W0|| per unit of learning rate."""

    statistics: BehaviorStatistics  # of its training pairs
    line: float  # beta delta / (2 sqrt 2)
    full: float  # observed, all pairs in the step
    stratified: float  # observed, one batch with the labels in their proportion
    random: np.ndarray  # (DRAWS,) observed, random batches
    batch_rate: float  # predicted root mean square of random batches (E13)


@dataclass(frozen=True)
class Mixed:
    """A run on all behaviors beside the prediction; (K,) rates of the mean margins, nats per unit
    of learning rate."""

    name: str
    folder: Path
    steps: int
    predicted: np.ndarray
    observed: np.ndarray
    held_out: np.ndarray  # observed on held-out pairs; nan where there are none
    first_norm: float  # ||W - W0|| after the first step
    share: np.ndarray  # predicted share of the first update


def run(settings: Settings) -> Outcome:
    """Measure, predict, compare; the figure rates.png and .svg."""
    plan = settings.over(OFFICIAL)
    files, notes = behavior_files(settings, plan)
    names = sorted(files)
    dtype = precision(plan, settings.dtype, settings.device, fine=False)
    settings = replace(settings, dtype=dtype)
    config = runs.run_config(
        settings, plan, [files[name] for name in names], "alone", **PLAIN, track="none"
    )
    log.info("rates: states of %d behaviors", len(names))
    known = head_only(config)
    alone = [_alone(known, name) for name in known.dataset.behaviors]
    mixtures: list[Mixed] = []
    if len(alone) > 1:
        paths = [files[name] for name in names]
        mixtures = [_mixture(settings, plan, paths, known, kind) for kind in MIXTURES]
    else:
        notes.append("With a single behavior there is no mixture: its rankings are undefined.")
    whole = first_step(known, known.dataset.train, EVERYONE, plan.seed, False)
    figure = RatesFigure(
        names=known.dataset.behaviors,
        delta=np.array([own.statistics.delta for own in alone]),
        beta=plan.beta,
        full=np.array([own.full for own in alone]),
        stratified=np.array([own.stratified for own in alone]),
        random=np.stack([own.random for own in alone]),
        batch_rate=np.array([own.batch_rate for own in alone]),
        batch_size=plan.train_batch_size,
        mixtures={m.name: (m.predicted, m.observed) for m in mixtures},
        course_steps=plan.steps,
    )
    figures = write_rates(settings.folder, figure)
    return Outcome(
        "rates",
        runs.described(settings, plan, names),
        _numbers(alone, mixtures),
        _verdicts(alone, mixtures, whole),
        [*notes, *NOTES],
        _curves(known.dataset.behaviors, alone, mixtures),
        [str(own.folder.relative_to(settings.folder)) for own in mixtures],
        [file.name for file in figures],
    )


def _alone(known: HeadOnly, name: str) -> Alone:
    config, index = known.config, known.dataset.behaviors.index(name)
    own = [pair for pair in known.dataset.train if pair.behavior == index]
    pairs = known.pairs(own)
    statistics = behavior_statistics(pairs)[0]
    if math.isnan(statistics.delta):
        raise ValueError(
            f"behavior {name!r} has more than two answers, so that its distinguishability is "
            "undefined; this experiment needs behaviors of two answers such as Yes and No."
        )
    size, seed, rate = min(config.train_batch_size, len(own)), config.seed, config.learning_rate

    def moved(batch_size: int, seed: int, stratify: bool) -> float:
        return first_step(known, own, batch_size, seed, stratify) / rate

    # The order of an epoch depends on the seed and the number of pairs: no two behaviors share one.
    others = range(seed + 1 + DRAWS * index, seed + DRAWS * (index + 1))
    return Alone(
        statistics,
        line=config.beta * statistics.delta / math.sqrt(8),
        full=moved(EVERYONE, seed, False),
        stratified=moved(size, seed, True),
        random=np.array([moved(size, draw, False) for draw in (seed, *others)]),
        batch_rate=batch_head_rate(pairs, size, config.beta),
    )


# Fields of `Config` in which the runs of the mixture differ.
MIXTURES: dict[str, dict[str, Any]] = {
    EQUAL: {"train_batch_size": EVERYONE, "max_steps": 1, "eval_steps": 1},
    UNEQUAL: {"train_batch_size": EVERYONE, "max_steps": 1, "eval_steps": 1},
    COURSE: {"stratify": True},
}


def _mixture(
    settings: Settings, plan: Official, files: list[str], known: HeadOnly, kind: str
) -> Mixed:
    """A run on all behaviors. It finds the states that ``known`` has made."""
    log.info("rates: mixture, %s", kind)
    weight = np.ones(len(files))
    if kind == UNEQUAL:
        weight = np.resize(UNEQUAL_WEIGHTS, len(files))
    changes = {**PLAIN, "track": "none", "eval_sample_size": EVERYONE, "eval_steps": plan.steps}
    changes |= MIXTURES[kind] | {"dataset_weights": tuple(weight) if kind == UNEQUAL else ()}
    config = runs.run_config(settings, plan, files, kind, **changes)
    pairs = known.pairs(known.dataset.train)
    counts = np.bincount(pairs.behavior, weight[_origin(known.dataset.train)])
    rates = initial_rates(directions(pairs), counts, config.beta)
    folder = runs.run(config)
    found = runs.margin_rates(folder, known.dataset.behaviors)
    steps = runs.step_columns(folder, ("lr", "head_update_norm"))
    time = steps["lr"].sum()
    none = np.full(len(counts), math.nan)
    return Mixed(
        kind,
        folder,
        len(steps["lr"]),
        predicted=rates.margin,
        observed=found[TRAIN_SAMPLE] / time,
        held_out=found.get(HELD_OUT, none) / time,
        first_norm=steps["head_update_norm"][0],
        share=rates.share,
    )


def _origin(pairs: list[TokenPair]) -> np.ndarray:
    return np.array([pair.origin for pair in pairs])


def _ranked(mixed: Mixed, observed: np.ndarray) -> dict[str, float]:
    """How many pairs of behaviors the prediction puts in the observed order, ties as half, and how
    many without the near ties of the prediction."""
    first, second = np.triu_indices(len(observed), 1)
    a, b = mixed.predicted[first], mixed.predicted[second]
    near = np.abs(a - b) < NEAR * np.maximum(np.abs(a), np.abs(b))
    right = (1 + np.sign(a - b) * np.sign(observed[first] - observed[second])) / 2
    return {
        "pairs": len(right),
        "right": order_agreement(mixed.predicted, observed),
        "near_ties": int(near.sum()),
        "right_of_near_ties": float(right[near].mean()) if near.any() else math.nan,
        "right_without_near_ties": float(right[~near].mean()) if (~near).any() else math.nan,
    }


def _excess(alone: list[Alone]) -> tuple[float, float]:
    """Mean over behaviors and draws of (observed / predicted)^2 of random batches, expected 1, and
    its standard error; the draws of a behavior of one batch are all the same, and it has none."""
    found = [(own.random / own.batch_rate) ** 2 for own in alone if own.batch_rate]
    ratio = np.concatenate(found or [np.zeros(0)])
    if ratio.size < 2:
        return math.nan, math.nan
    return float(ratio.mean()), float(ratio.std(ddof=1) / math.sqrt(ratio.size))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _order(alone: list[Alone]) -> dict[str, float]:
    """Share of the pairs of behaviors whose first steps are in the order of their delta."""
    delta = np.array([own.statistics.delta for own in alone])
    random = np.stack([own.random for own in alone], axis=1)
    return {
        "all_pairs": order_agreement(delta, np.array([own.full for own in alone])),
        "stratified_batch": order_agreement(delta, np.array([own.stratified for own in alone])),
        "random_batch": order_agreement(delta, random[0]),
        "random_batches_mean": float(np.mean([order_agreement(delta, own) for own in random])),
    }


def _numbers(alone: list[Alone], mixtures: list[Mixed]) -> dict[str, Any]:
    mean, error = _excess(alone)
    behaviors = {
        own.statistics.behavior: {
            "pairs": [own.statistics.n_plus, own.statistics.n_minus],
            "delta": own.statistics.delta,
            "effective_delta": own.statistics.effective_delta,
            "line": own.line,
            "all_pairs": own.full,
            "all_pairs_over_line": ratio(own.full, own.line),
            "stratified_batch": own.stratified,
            "random_batch": own.random[0],
            "random_batches_rms": float(np.sqrt((own.random**2).mean())),
            "random_batches_predicted_rms": own.batch_rate,
        }
        for own in alone
    }
    return {
        "behaviors": behaviors,
        "head_order_by_delta": _order(alone),
        "random_batch_over_line": {
            "mean": _mean([own.random[0] / own.line for own in alone if own.line]),
            "stratified_mean": _mean([own.stratified / own.line for own in alone if own.line]),
        },
        "random_batches_observed_over_predicted_squared": {"mean": mean, "standard_error": error},
        "mixtures": {
            own.name: {
                "steps": own.steps,
                "ranked": _ranked(own, own.observed),
                "ranked_held_out": _ranked(own, own.held_out),
                "rate_error": relative(own.observed, own.predicted),
                "predicted_share": own.share,
            }
            for own in mixtures
        },
    }


def _verdicts(alone: list[Alone], mixtures: list[Mixed], whole: float) -> list[Verdict]:
    off = [abs(ratio(own.full, own.line) - 1) for own in alone]
    mean, error = _excess(alone)
    by_name = {own.name: own for own in mixtures}
    verdicts = [
        Verdict(
            f"initial rate over all pairs on the line beta delta / (2 sqrt 2), {len(alone)} "
            "behaviors (largest relative distance, 0.01)",
            max((o for o in off if not math.isnan(o)), default=math.nan),
            LINE_LIMIT,
        ),
        Verdict(
            f"{DRAWS} random batches of each behavior move the head as far as (E13) says (standard "
            f"errors between the mean square and the predicted one, 3; the ratio is {mean:.3f})",
            abs(mean - 1) / error if error else math.nan,
            3,
        ),
    ]
    for kind, words in ((EQUAL, "equally often"), (UNEQUAL, "1, 2 and 4 times as often")):
        own = by_name.get(kind)
        verdicts.append(
            Verdict(
                f"mixture, {words}: pairs of behaviors whose observed initial rates are in the "
                "predicted order (share, at least 0.95)",
                order_agreement(own.predicted, own.observed) if own else math.nan,
                RANKED,
                at_least=True,
            )
        )
    verdicts.append(
        Verdict(
            "the first step taken in memory moves the head as far as the run's (relative, 1e-4)",
            abs(whole / by_name[EQUAL].first_norm - 1) if mixtures else math.nan,
            1e-4,
        )
    )
    return verdicts


def _curves(names: list[str], alone: list[Alone], mixtures: list[Mixed]) -> list[dict[str, Any]]:
    """One row per number that was predicted and observed."""
    rows = []
    for own in alone:
        name, delta = own.statistics.behavior, own.statistics.delta
        measured = [("all pairs", own.full, own.line), ("stratified", own.stratified, own.line)]
        measured += [(f"random {k}", seen, own.batch_rate) for k, seen in enumerate(own.random)]
        for batch, seen, predicted in measured:
            rows.append(_row("alone", name, delta, batch, TRAIN_SAMPLE, predicted, seen))
    for mixed in mixtures:
        for k, name in enumerate(names):
            for split, rates in ((TRAIN_SAMPLE, mixed.observed), (HELD_OUT, mixed.held_out)):
                about = (mixed.name, name, alone[k].statistics.delta, f"{mixed.steps} steps")
                rows.append(_row(*about, split, mixed.predicted[k], rates[k]))
    return rows


def _row(
    run: str, behavior: str, delta: float, batch: str, split: str, predicted: float, seen: float
) -> dict[str, Any]:
    quantity = "rate of ||W - W0||" if run == "alone" else "rate of the mean margin, nats"
    return {
        "run": run,
        "behavior": behavior,
        "delta": delta,
        "batch": batch,
        "split": split,
        "quantity": f"{quantity} per unit of learning rate",
        "predicted": float(predicted),
        "observed": float(seen),
    }
