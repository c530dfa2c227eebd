"""Several behaviors in one run: does the more distinguishable one come first, as its priority says?

Two runs over the same pairs, the head alone by SGD and all weights by AdamW. Each logs every
behavior's train and held-out curves, where the official code runs once per evaluated set.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.mixture_plots import draw_mixture
from fastpref.reproduce import runs
from fastpref.reproduce.finetune import CORRECTED, FIELDS, ORDERED, series
from fastpref.reproduce.head_only import PLAIN, HeadOnly, behavior_files, head_only, precision
from fastpref.reproduce.outcome import Outcome, Verdict, ratio
from fastpref.reproduce.runs import RUNS, described, run_config
from fastpref.reproduce.settings import DPO_TRAINING, LAST_LAYER, Official, Settings
from fastpref.reproduce.small import adapted, compared, eval_steps, rarer
from fastpref.reproduce.start import (
    Curve,
    Start,
    load_start,
    look,
    observed,
    predicted,
    run_batches,
)
from fastpref.theory.distinguish import directions
from fastpref.theory.dual import dual_recursion
from fastpref.theory.mixture import order_agreement
from fastpref.theory.overview import overview

log = logging.getLogger(__name__)

# DPO_training.py on Mistral-7B, plotted by multi_plot_log_data.py.
OFFICIAL = dataclasses.replace(DPO_TRAINING, behaviors=(123, 45), learning_rate=1e-6)
# multi_last_layer_training.py, with the steps and the learning rate of last_layer_training.py.
OFFICIAL_HEAD = dataclasses.replace(LAST_LAYER, behaviors=OFFICIAL.behaviors)
FULL, HEAD = "full", "last-layer"
EVALUATIONS = 20  # of the head's run; a step of all weights each has its own
EXACT = 0.01  # of the largest margin: what float32 may cost


def run(settings: Settings) -> Outcome:
    """Raises ValueError for a single behavior, one class empty, a model without a head."""
    files, caveats = _behaviors(settings)
    taken, notes = adapted(settings, OFFICIAL)
    head = dataclasses.replace(settings, learning_rate=None).over(OFFICIAL_HEAD)
    full_config = run_config(settings, taken, list(files.values()), FULL, **FIELDS)
    start = look(load_start(full_config), full_config)
    every = eval_steps(settings, taken, len(start.train.ids))
    full_config = dataclasses.replace(full_config, eval_steps=every)
    dtype = precision(head, settings.dtype, settings.device, fine=False)
    own = FIELDS | PLAIN | {"eval_steps": max(1, head.steps // EVALUATIONS)}
    plain = dataclasses.replace(settings, dtype=dtype)
    head_config = run_config(plain, head, list(files.values()), HEAD, **own)
    known = head_only(head_config)

    log.info("two-behaviors: %s", HEAD)
    rows = exact_curves(runs.run(head_config), known, run=HEAD)
    log.info("two-behaviors: %s", FULL)
    folder = runs.run(full_config)
    rows += observed(folder, start, full_config, run=FULL)

    numbers = _numbers(start, rows, taken)
    figures = draw_mixture(settings.folder, "two-behaviors", rows, numbers["behaviors"])
    return Outcome(
        experiment="two-behaviors",
        settings=described(settings, taken, list(files))
        | {
            "official": compared(OFFICIAL, taken),
            "run": FIELDS,
            "last_layer": dataclasses.asdict(head) | {"official": compared(OFFICIAL_HEAD, head)},
        },
        numbers=numbers,
        verdicts=_verdicts(numbers),
        caveats=[*caveats, *rarer(settings), *notes, *_departures(numbers), CORRECTED],
        curves=rows,
        runs=[f"{RUNS}/{HEAD}", f"{RUNS}/{FULL}"],
        figures=[path.name for path in figures],
    )


def _behaviors(settings: Settings) -> tuple[dict[str, str], list[str]]:
    """Name -> file of the behaviors, two or more, and notes on what was missing."""
    files, notes = behavior_files(settings, OFFICIAL)
    if len(files) == 1:
        raise ValueError(
            f"two-behaviors: a priority compares behaviors, and there is one alone, {[*files][0]}. "
            "Name two or more with --behaviors, or give the files of more with --data."
        )
    return files, notes


def exact_curves(folder: Path, known: HeadOnly, **labels: Any) -> list[Curve]:
    """Rows for curves.csv of a head-only SGD run, beside the dual recursion of its batches."""
    beta, dataset = known.config.beta, known.dataset
    sides = {TRAIN_SAMPLE: dataset.train, HELD_OUT: dataset.held_out}
    ids = {split: np.array([p.pair_id for p in own]) for split, own in sides.items()}
    pairs = {split: known.pairs(own) for split, own in sides.items() if own}
    trajectory = dual_recursion(
        pairs[TRAIN_SAMPLE],
        run_batches(folder, ids[TRAIN_SAMPLE]),
        runs.step_columns(folder, ["lr"])["lr"],
        beta,
        probes=pairs.get(HELD_OUT),
    )
    margins = {TRAIN_SAMPLE: trajectory.margin, HELD_OUT: trajectory.probe_margin}
    found: dict[tuple[int, str, str], tuple[float, float]] = {}
    for split, own in pairs.items():
        margin = margins[split]
        assert margin is not None
        found |= predicted(folder, split, ids[split], own, margin, beta)
    rows = runs.curves(folder, **labels)
    for row in rows:
        margin_loss = found[row["step"], row["split"], row["behavior"]]
        row["predicted_margin"], row["predicted_loss"] = margin_loss
    return rows


def _numbers(start: Start, rows: list[Curve], taken: Official) -> dict[str, Any]:
    pairs = start.train.pairs
    view = overview(pairs, taken.beta)
    behaviors: dict[str, Any] = {}
    for own in view.behaviors:
        stats, name = own.statistics, own.statistics.behavior
        behaviors[name] = {
            "predicted": {
                "delta": stats.delta,
                "effective_delta": stats.effective_delta,
                "fraction": own.fraction,
                "priority_level": own.level,
                "share_of_update": own.share,
                "margin_rate": own.mixture_rate,  # nats per unit of time, SGD
                "order": own.order,
            },
            "observed": {kind: _seen(rows, name, kind) for kind in (HEAD, FULL)},
        }
    rate = np.array([own["predicted"]["margin_rate"] for own in behaviors.values()])
    order = {}
    for kind in (HEAD, FULL):
        for what in ("margin_first", "margin_last", "eval_margin_last"):
            seen = np.array([own["observed"][kind].get(what) for own in behaviors.values()], float)
            order[f"{kind} {what}"] = order_agreement(rate, seen) if rate.any() else np.nan
    heads = [r for r in rows if r["run"] == HEAD]
    error = [abs(r["margin"] - r["predicted_margin"]) for r in heads]
    largest = max(abs(r["predicted_margin"]) for r in heads)
    pull = directions(pairs)
    return {
        "behaviors": behaviors,
        "priority": {
            "behaviors": list(behaviors),
            "matrix": view.priority,
            "cosine": _cosines(pull),
        },
        "order": order,
        "last_layer_error": ratio(max(error), largest) if rate.any() else np.nan,
    }


def _seen(rows: list[Curve], name: str, kind: str) -> dict[str, Any]:
    own = [row for row in rows if row["run"] == kind]
    margin = series(own, name, TRAIN_SAMPLE, "margin")
    alone = series(own, name, TRAIN_SAMPLE, "predicted_margin")
    step = series(own, name, TRAIN_SAMPLE, "step")
    found: dict[str, Any] = {
        "first_evaluation": step[1],
        "margin_first": margin[1],
        "margin_last": margin[-1],
        "predicted_first": alone[1],
        "predicted_last": alone[-1],
    }
    for split in (TRAIN_SAMPLE, HELD_OUT):
        for column in ("loss", "output_accuracy"):
            values = series(own, name, split, column)
            if values.size:
                found[f"{split}_{column}"] = {"start": values[0], "last": values[-1]}
    held_out = series(own, name, HELD_OUT, "margin")
    delta = series(own, name, TRAIN_SAMPLE, "delta")
    found |= {"delta_last": delta[-1], "times_delta_last": ratio(delta[-1], delta[0])}
    return found | ({"eval_margin_last": held_out[-1]} if held_out.size else {})


def _cosines(pull: np.ndarray) -> np.ndarray:
    """(K, K) cosines of the behaviors' directions; nan where one has no length."""
    length = np.linalg.norm(pull, axis=1, keepdims=True)
    unit = pull / np.where(length > 0, length, np.nan)
    return unit @ unit.T


def _verdicts(numbers: dict[str, Any]) -> list[Verdict]:
    order = numbers["order"]
    found = [
        Verdict(
            f"last layer: largest difference of a behavior's mean margin from the exact recursion, "
            f"as a fraction of the largest margin, at most {EXACT:g}",
            numbers["last_layer_error"],
            EXACT,
        )
    ]
    for kind in (HEAD, FULL):
        for what, words in (("margin_last", "training"), ("eval_margin_last", "held-out")):
            found.append(
                Verdict(
                    f"{kind}: share of the pairs of behaviors whose {words} margins stand in the "
                    f"order of predicted priority at the end, at least {ORDERED:g}",
                    order[f"{kind} {what}"],
                    ORDERED,
                    at_least=True,
                )
            )
    return found


def _departures(numbers: dict[str, Any]) -> list[str]:
    full = [own["observed"][FULL] for own in numbers["behaviors"].values()]
    grown = [own["times_delta_last"] for own in full]
    times = [ratio(own["margin_last"], own["predicted_last"]) for own in full]
    return [
        "Priority is a statement on the head alone, on frozen features. In the run of all weights "
        f"distinguishability went to {min(grown):.2g} to {max(grown):.2g} times its start and mean "
        f"margins to {min(times):.2g} to {max(times):.2g} times those of AdamW on the head alone.",
        "The last-layer run takes the learning rate of the official last-layer script; "
        "--learning_rate is that of the run of all weights.",
    ]
