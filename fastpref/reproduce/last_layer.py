"""`last-layer`: the output head alone, each behavior by itself, beside the exact recursion.

Two runs per behavior: random batches, the official way, in the order of an epoch; and all pairs in
every step, which is what the straight line beta delta t / (2 sqrt 2) and the accuracy guarantees
speak of. Predicted is every training pair's margin at every step, every held-out pair's at every
evaluation, and ||W - W0||, by `fastpref.theory.dual` from the states before training and the
batches that the run took.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.last_layer_plot import BehaviorCurves, write_last_layer
from fastpref.reproduce import runs
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
from fastpref.theory.bounds import max_learning_rate
from fastpref.theory.distinguish import (
    ROUNDING,
    BehaviorStatistics,
    behavior_statistics,
    class_moments,
)
from fastpref.theory.dual import Trajectory, dpo_loss, dual_recursion
from fastpref.theory.guarantee import accuracy_guarantee, certified
from fastpref.theory.mixture import order_agreement
from fastpref.theory.pairs import FrozenPairs, output_gap

log = logging.getLogger(__name__)

OFFICIAL = replace(LAST_LAYER, behaviors=(108, 84, 88, 54, 100))
BATCHES, FULL = "batches", "full"  # the two runs of a behavior
EVALUATIONS = {BATCHES: 20, FULL: 2}  # besides the one before training; a full step sees all pairs
LIMIT = {"float64": 1e-6, "float32": 1e-2}  # of relative differences from the recursion
# Nats: a margin this near to 0 has its sign from rounding, and no guarantee speaks of that.
SIGNLESS = {"float64": 1e-9, "float32": 1e-4}
CORRECTED = [
    "Features have passed the final norm once; the official code applies it twice.",
    "The answers' token ids are the tokenizer's; the official code has Llama-2's written in.",
    "Margins, losses and ||W - W0|| of one moment stand side by side; the official code logs the "
    "change after a step and the loss before it, of the step's batch alone.",
    "Batches go through the data in epochs, each with the labels in their proportion; the official "
    "code draws 100 batches anew, whose uneven labels move the head along the mean of the features "
    "(`rates` shows by how much).",
]


@dataclass(frozen=True)
class Compared:
    """One run beside its prediction."""

    folder: Path
    kind: str  # BATCHES or FULL
    dtype: str
    head_norm: np.ndarray  # (T + 1,) observed ||W - W0|| after step 0, 1, ...
    predicted: Trajectory
    margin_error: float  # largest over steps of |observed - predicted margins| / |predicted|
    norm_error: float  # largest over steps of |observed / predicted - 1| of ||W - W0||
    held_out_error: float  # as margin_error, over the evaluations' means; nan without held-out
    curves: list[dict[str, Any]]  # every evaluation, observed and predicted


@dataclass(frozen=True)
class Case:
    """One behavior: what was known before, and its two runs."""

    name: str
    statistics: BehaviorStatistics
    batches: Compared
    full: Compared
    guaranteed: np.ndarray  # (T + 1,) accuracy at least, from the classes' moments; nan: undefined
    certain: np.ndarray  # (T + 1,) the same from each pair
    accuracy: np.ndarray  # (T + 1,) reward accuracy that came, in the full run; last one nan
    excess: float  # largest lead of a guarantee over it, signless margins as right; nan: undefined


def run(settings: Settings) -> Outcome:
    """Train, predict, compare; the figure last-layer.png and .svg."""
    plan = settings.over(OFFICIAL)
    files, notes = behavior_files(settings, plan)
    cases = [_case(settings, plan, name, file) for name, file in files.items()]
    cases.sort(key=lambda case: -case.statistics.delta)
    drawn = [_drawn(case, plan) for case in cases]
    figures = write_last_layer(settings.folder, drawn, plan.train_batch_size)
    return Outcome(
        "last-layer",
        runs.described(settings, plan, list(files)),
        {
            "behaviors": {case.name: _numbers(case, plan) for case in cases},
            "head_order_by_delta": _order(cases),
        },
        _verdicts(cases),
        [*notes, *CORRECTED, *_caveats(cases)],
        [row for own in _runs(cases) for row in own.curves],
        [
            str(own.folder.relative_to(settings.folder))
            for c in cases
            for own in (c.batches, c.full)
        ],
        [file.name for file in figures],
    )


def _case(settings: Settings, plan: Official, name: str, file: str) -> Case:
    log.info("last-layer: %s", name)
    batches = _compared(settings, plan, name, file, BATCHES)[0]
    full, known = _compared(settings, plan, name, file, FULL)
    pairs = known.pairs(known.dataset.train)
    promised = _guarantees(pairs, plan)
    margin = runs.trained_pairs(full.folder)["margin"].reshape(-1, len(pairs.features))
    at_most = (margin > -SIGNLESS[full.dtype]).mean(axis=1)
    return Case(
        name,
        behavior_statistics(pairs)[0],
        batches,
        full,
        *promised,
        accuracy=np.append((margin > 0).mean(axis=1), np.nan),
        excess=float(np.max(np.maximum(*promised)[:-1] - at_most)),
    )


def _compared(
    settings: Settings, plan: Official, name: str, file: str, kind: str
) -> tuple[Compared, HeadOnly]:
    """One run and its prediction; the states come first, so that the run finds them made."""
    dtype = precision(plan, settings.dtype, settings.device, fine=kind == BATCHES)
    config = runs.run_config(
        replace(settings, dtype=dtype),
        replace(plan, train_batch_size=plan.train_batch_size if kind == BATCHES else EVERYONE),
        [file],
        f"{name}-{kind}",
        **PLAIN,
        stratify=True,
        track="none",
        eval_steps=max(1, plan.steps // EVALUATIONS[kind]),
        eval_sample_size=EVERYONE,
    )
    known = head_only(config)
    folder = runs.run(config)
    return _compare(folder, kind, known), known


def _compare(folder: Path, kind: str, known: HeadOnly) -> Compared:
    """What the run recorded beside the recursion over the batches that it took."""
    config, dataset = known.config, known.dataset
    pairs = known.pairs(dataset.train)
    probes = known.pairs(dataset.held_out) if dataset.held_out else None
    trained = runs.trained_pairs(folder)
    steps = runs.step_columns(folder, ("lr", "head_update_norm"))
    number = {pair.pair_id: i for i, pair in enumerate(dataset.train)}
    index = np.array([number[i] for i in trained["pair_id"].tolist()])
    batches = np.split(index, np.flatnonzero(np.diff(trained["step"])) + 1)
    predicted = dual_recursion(pairs, batches, steps["lr"], config.beta, probes=probes)
    expected = predicted.margin[trained["step"] - 1, index]
    # A gradient is at most (beta/2) sqrt 2 ||h||; far below that, what moves is rounding.
    reach = config.beta * predicted.time[-1] * float(np.linalg.norm(pairs.features, axis=1).max())
    still = bool(predicted.head_norm[-1] <= ROUNDING * reach)
    norm = np.concatenate([[0.0], steps["head_update_norm"]])
    head = known.model.head.weight.detach().double().cpu().numpy() * known.model.head.logit_scale
    gaps = {TRAIN_SAMPLE: (output_gap(pairs, head), predicted.margin)}
    if probes is not None and predicted.probe_margin is not None:
        gaps[HELD_OUT] = (output_gap(probes, head), predicted.probe_margin)
    curves = [
        _beside(row, *gaps[row["split"]], norm, predicted, config.beta)
        for row in runs.curves(folder, run=kind)
    ]
    held = [(r["margin"], r["predicted_margin"]) for r in curves if r["split"] == HELD_OUT]
    return Compared(
        folder,
        kind,
        config.dtype,
        norm,
        predicted,
        math.nan if still else _margin_error(trained["step"], trained["margin"], expected),
        math.nan if still else _worst(map(relative, norm[1:], predicted.head_norm[1:])),
        relative(*np.array(held).T) if held else math.nan,
        curves,
    )


def _margin_error(step: np.ndarray, observed: np.ndarray, predicted: np.ndarray) -> float:
    """The largest `relative` of a step. The first one's margins are 0 but for rounding, which
    counts relative to the second's; nan for a run of one step."""
    moved = [np.linalg.norm(predicted[step == n]) for n in range(1, step[-1] + 1)]
    size = np.array([moved[1], *moved[1:]]) if len(moved) > 1 else np.zeros(1)
    off = [np.linalg.norm((observed - predicted)[step == n]) for n in range(1, step[-1] + 1)]
    return float((np.array(off) / size).max()) if size.all() else math.nan


def _beside(
    row: dict[str, Any],
    gap: np.ndarray,
    margin: np.ndarray,
    norm: np.ndarray,
    predicted: Trajectory,
    beta: float,
) -> dict[str, Any]:
    """An evaluation's row with what was predicted of it."""
    step = row["step"]
    own = margin[step]
    return row | {
        "head_norm": float(norm[step]),
        "predicted_loss": float(dpo_loss(own, beta).mean()),
        "predicted_output_accuracy": float((gap + own > 0).mean()),
        "predicted_reward_accuracy": float((own > 0).mean()),
        "predicted_margin": float(own.mean()),
        "predicted_head_norm": float(predicted.head_norm[step]),
    }


def _guarantees(pairs: FrozenPairs, plan: Official) -> tuple[np.ndarray, np.ndarray]:
    """(T + 1,) twice: (E29) from moments alone, (E30) from each pair; nan where neither holds."""
    moments = class_moments(pairs)
    if plan.learning_rate > max_learning_rate(moments.second_moment, plan.beta):
        undefined = np.full(plan.steps + 1, np.nan)
        return undefined, undefined
    run = (plan.steps, plan.learning_rate, plan.beta)
    return (
        accuracy_guarantee(moments, *run).accuracy,
        certified(pairs, moments, *run).accuracy,
    )


def _line(case: Case, plan: Official) -> float:
    """||W - W0|| per step on the straight line of (E19)."""
    return plan.learning_rate * plan.beta * case.statistics.delta / math.sqrt(8)


def _numbers(case: Case, plan: Official) -> dict[str, Any]:
    known, line = case.statistics, _line(case, plan)
    last = len(case.full.head_norm) - 2  # accuracies are those before a step
    return {
        "delta": known.delta,
        "effective_delta": known.effective_delta,
        "concentration": known.concentration,
        "pairs": [known.n_plus, known.n_minus],
        "line_per_step": line,
        **{
            own.kind: {
                "dtype": own.dtype,
                "margin_error": own.margin_error,
                "norm_error": own.norm_error,
                "held_out_margin_error": own.held_out_error,
                "head_norm": own.head_norm[-1],
                "predicted_head_norm": own.predicted.head_norm[-1],
                "head_norm_over_line": ratio(own.head_norm[-1], line * (len(own.head_norm) - 1)),
                "first_step_over_line": ratio(own.head_norm[1], line),
                "last": {
                    row["split"]: {k: row[k] for k in runs.CURVES}
                    for row in own.curves[-2:]
                    if row["step"] == own.curves[-1]["step"]
                },
            }
            for own in (case.batches, case.full)
        },
        "accuracy": {
            "step": last,
            "observed": case.accuracy[last],
            "guaranteed_from_moments": case.guaranteed[last],
            "guaranteed_from_pairs": case.certain[last],
        },
    }


def _runs(cases: list[Case]) -> list[Compared]:
    return [own for case in cases for own in (case.batches, case.full)]


def _verdicts(cases: list[Case]) -> list[Verdict]:
    verdicts = []
    for dtype, limit in LIMIT.items():
        mine = [own for own in _runs(cases) if own.dtype == dtype]
        if mine:
            end = f" equal the recursion's in {dtype} ({len(mine)} runs, relative, {limit:g})"
            verdicts += [
                Verdict(
                    "margins of every training pair at every step" + end,
                    _worst([own.margin_error for own in mine]),
                    limit,
                ),
                Verdict(
                    "||W - W0|| after every step" + end,
                    _worst([own.norm_error for own in mine]),
                    limit,
                ),
            ]
    claim = "no guaranteed accuracy is above the one that came (largest excess)"
    verdicts.append(Verdict(claim, _worst([case.excess for case in cases]), 1e-12))
    return verdicts


def _order(cases: list[Case]) -> dict[str, float]:
    """Share of the pairs of behaviors whose heads have moved in the order of their delta."""
    delta = np.array([case.statistics.delta for case in cases])
    return {
        kind: order_agreement(delta, np.array([getattr(c, kind).head_norm[-1] for c in cases]))
        for kind in (BATCHES, FULL)
    }


def _worst(values: Iterable[float]) -> float:
    """The largest of those that are defined, so that an undefined one hides no failure; nan where
    none is."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _caveats(cases: list[Case]) -> list[str]:
    found = [
        "The straight line and the guarantees are statements on steps over all pairs; the recursion"
        " takes any batches."
    ]
    if not all(np.isfinite(case.guaranteed).all() for case in cases):
        found.append(
            "The learning rate is above 2/c for some behavior (theory.md, section 5): there the "
            "accuracy guarantee is undefined."
        )
    if any(case.statistics.delta == 0 for case in cases):
        found.append("delta is 0 for some behavior: ratios to its line are undefined.")
    return found


def _drawn(case: Case, plan: Official) -> BehaviorCurves:
    """What the figure needs of a behavior."""
    return BehaviorCurves(
        name=case.name,
        delta=case.statistics.delta,
        batches=case.batches.curves,
        batches_norm=(case.batches.head_norm, case.batches.predicted.head_norm),
        full_norm=(case.full.head_norm, case.full.predicted.head_norm),
        line=_line(case, plan) * np.arange(len(case.full.head_norm)),
        accuracy=case.accuracy,
        guaranteed=case.guaranteed,
        certain=case.certain,
    )
