"""All weights, or LoRA, on each behavior by itself: does the rate follow distinguishability?

Frozen features predict what the head alone would do. What the run does beyond that is the moving
features' part; `delta` of curves.csv is what becomes of the distinguishability meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpref.config import Config
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.training_plots import distance, draw_behaviors
from fastpref.reproduce.behaviors import choose, find_files
from fastpref.reproduce.head_only import EVERYONE
from fastpref.reproduce.names import STATEMENTS
from fastpref.reproduce.outcome import Outcome, Verdict, ratio
from fastpref.reproduce.runs import RUNS, described, drop_weights, run, run_config
from fastpref.reproduce.settings import Official, Settings
from fastpref.reproduce.small import adapted, compared, eval_steps, rarer
from fastpref.reproduce.start import (
    LORA,
    Curve,
    Start,
    head_notes,
    load_ended,
    load_start,
    look,
    lora_fields,
    observed,
)
from fastpref.theory.distinguish import behavior_statistics, directions
from fastpref.theory.guarantee import initial_guarantee
from fastpref.theory.mixture import order_agreement
from fastpref.theory.rates import initial_rates, pair_rates

log = logging.getLogger(__name__)

ORDERED = 0.8  # of the pairs of behaviors, decided before anything was run
# Every run of an experiment whose features move.
FIELDS: dict[str, Any] = {
    "append_eos": "false",
    "stratify": True,
    "eval_sample_size": EVERYONE,
}
CORRECTED = (
    "Defects of the official code that are corrected here: answers are one token each (it appends "
    "EOS to both, so that margins hold a second token); prompts of prediction and training are the "
    "same texts; the final norm is applied once; batches hold both answers in the data's "
    "proportion (a random batch of 128 is off balance, which adds the mean of the features to "
    "every step); one run logs every behavior's training and held-out curves (it runs once per "
    "evaluated set)."
)


@dataclass(frozen=True)
class Prepared:
    """Behaviors that are trained one by one, as they are before training."""

    taken: Official
    configs: dict[str, Config]  # by behavior, in order
    starts: dict[str, Start]
    head: torch.Tensor  # (V, D) the model's
    caveats: list[str]


def prepare(settings: Settings, official: Official) -> Prepared:
    """Choose the behaviors and look at them; the model is gone again afterwards.

    Raises ValueError for behaviors that are not there, one class empty, a model without a head.
    """
    files = find_files(settings.data, STATEMENTS)
    taken, caveats = adapted(settings, official)
    configs = {
        name: run_config(settings, taken, [file], name, **FIELDS) for name, file in files.items()
    }
    model = load_start(next(iter(configs.values())))
    caveats += head_notes(model)
    if official.trainable == "lora":
        extra, notes = lora_fields(model)
        configs = {n: dataclasses.replace(own, **extra) for n, own in configs.items()}
        caveats += notes
    starts: dict[str, Start] = {}

    def delta(names: list[str]) -> np.ndarray:
        for name in names:
            if name not in starts:
                starts[name] = look(model, configs[name])
        return np.array([behavior_statistics(starts[name].train.pairs)[0].delta for name in names])

    names, notes = choose(files, official.behaviors, settings.behaviors, delta)
    delta(names)
    return Prepared(
        taken,
        {name: configs[name] for name in names},
        {name: starts[name] for name in names},
        model.head.weight.detach().cpu(),
        caveats + notes,
    )


def compare(settings: Settings, experiment: str, official: Official) -> Outcome:
    """Train each behavior by itself as ``official`` says; the outcome with its figure.

    Raises ValueError as `prepare`.
    """
    before = prepare(settings, official)
    rows: list[Curve] = []
    numbers: dict[str, Any] = {}
    for name, config in before.configs.items():
        log.info("%s: %s", experiment, name)
        pairs = len(before.starts[name].train.ids)
        every = eval_steps(settings, before.taken, pairs)
        config = dataclasses.replace(config, eval_steps=every)
        folder = run(config, keep_weights=True)
        curve = observed(folder, before.starts[name], config, run=name)
        numbers[name] = behavior_numbers(before.starts[name], curve, config)
        ended = at_the_end(folder, config, before.head, before.starts[name])
        numbers[name] |= {"at_the_end": ended}
        drop_weights(folder)
        rows += curve
    summary = order_numbers(numbers)
    figures = draw_behaviors(settings.folder, experiment, rows, numbers)
    return Outcome(
        experiment=experiment,
        settings=described(settings, before.taken, list(numbers))
        | {"official": compared(official, before.taken), "run": FIELDS}
        | ({"lora": LORA} if official.trainable == "lora" else {}),
        numbers={"behaviors": numbers, "order": summary},
        verdicts=_verdicts(summary),
        caveats=[
            *before.caveats,
            *rarer(settings),
            *_departures(official.trainable, numbers),
            CORRECTED,
        ],
        curves=rows,
        runs=[f"{RUNS}/{name}" for name in numbers],
        figures=[path.name for path in figures],
    )


def series(rows: list[Curve], behavior: str, split: str, column: str) -> np.ndarray:
    """(E,) values of ``column`` at the evaluations of one run, in order; nan where unknown."""
    own = [r[column] for r in rows if r["behavior"] == behavior and r["split"] == split]
    return np.array([np.nan if value is None else value for value in own], np.float64)


def behavior_numbers(start: Start, rows: list[Curve], config: Config) -> dict[str, Any]:
    """Predicted and observed, of a run on one behavior alone."""
    pairs = start.train.pairs
    (stats,) = behavior_statistics(pairs)
    (name,) = pairs.behaviors
    rate = initial_rates(directions(pairs), (1,), config.beta)
    linear = 1.0 if start.linear else np.nan
    margin = series(rows, name, TRAIN_SAMPLE, "margin")
    alone = series(rows, name, TRAIN_SAMPLE, "predicted_margin")
    deltas = series(rows, name, TRAIN_SAMPLE, "delta")
    step = series(rows, name, TRAIN_SAMPLE, "step")
    concentration = (stats.concentration_plus, stats.concentration_minus)
    guaranteed = (
        np.nan
        if np.isnan(stats.delta)
        else initial_guarantee(
            stats.delta, stats.mu_dot_d, concentration, stats.n_plus / max(stats.n, 1)
        )
    )
    predicted = {
        "delta": stats.delta,
        "effective_delta": stats.effective_delta,
        "concentration": stats.concentration,
        "trace": stats.trace,
        "mu_dot_d": stats.mu_dot_d,
        "sgd_margin_per_step": float(rate.margin[0]) * config.learning_rate * linear,
        "sgd_head_per_step": rate.head * config.learning_rate * linear,
        "first_step_accuracy": float((pair_rates(pairs, config.beta) > 0).mean()) * linear,
        "first_step_accuracy_guaranteed": guaranteed * linear,
        "head_alone_margin_first": alone[1],
        "head_alone_margin_last": alone[-1],
    }
    seen: dict[str, Any] = {
        "steps": step[-1],
        "first_evaluation": step[1],
        "margin_first": margin[1],
        "margin_last": margin[-1],
        "margin_per_step": margin[-1] / step[-1],
        "times_head_alone_first": ratio(margin[1], alone[1]),
        "times_head_alone_last": ratio(margin[-1], alone[-1]),
        "delta_last": deltas[-1],
        "times_delta_last": ratio(deltas[-1], deltas[0]),
        "reward_accuracy_first": series(rows, name, TRAIN_SAMPLE, "reward_accuracy")[1],
    }
    for split in (TRAIN_SAMPLE, HELD_OUT):
        for column in ("loss", "output_accuracy", "reward_accuracy", "margin"):
            values = series(rows, name, split, column)
            if values.size:
                seen[f"{split}_{column}"] = {"start": values[0], "last": values[-1]}
    return {"predicted": predicted, "observed": seen}


def at_the_end(folder: Path, config: Config, head: torch.Tensor, start: Start) -> dict[str, Any]:
    """||W - W0|| of the head that the run left, whole and in the rows of the answers alone."""
    model = load_ended(config, folder)
    change = (model.head.weight.detach().cpu() - head).double()
    return {
        "head_change": float(change.norm()),
        "head_change_answer_rows": float(change[start.train.pairs.tokens].norm()),
    }


def order_numbers(numbers: dict[str, Any]) -> dict[str, float]:
    """Share of the pairs of behaviors that observations put in the order of delta; nan for a
    single behavior, and where all deltas are 0."""
    each = list(numbers.values())
    delta = np.array([distance(own) for own in each])
    observed: dict[str, list[float]] = {
        "margin_first": [n["observed"]["margin_first"] for n in each],
        "margin_last": [n["observed"]["margin_last"] for n in each],
    }
    for split in (TRAIN_SAMPLE, HELD_OUT):
        if all(f"{split}_loss" in n["observed"] for n in each):
            observed[f"{split}_loss_fall"] = [
                n["observed"][f"{split}_loss"]["start"] - n["observed"][f"{split}_loss"]["last"]
                for n in each
            ]
    observed["head_alone_first"] = [n["predicted"]["head_alone_margin_first"] for n in each]
    if not delta.any():  # nothing is predicted to move: what moves is rounding
        return dict.fromkeys(observed, np.nan)
    return {name: order_agreement(delta, np.array(own)) for name, own in observed.items()}


def _verdicts(order: dict[str, float]) -> list[Verdict]:
    what = {
        "margin_first": "the margins at the first evaluation",
        "train_sample_loss_fall": "the falls of the training loss over the run",
        "eval_loss_fall": "the falls of the held-out loss over the run",
    }
    return [
        Verdict(
            f"share of the pairs of behaviors that {words} put in the order of distinguishability, "
            f"at least {ORDERED:g}",
            order[name],
            ORDERED,
            at_least=True,
        )
        for name, words in what.items()
        if name in order
    ]


def _departures(trainable: str, numbers: dict[str, Any]) -> list[str]:
    """How far the run is from frozen features, in numbers."""

    def span(values: list[float]) -> str:
        known = [v for v in values if np.isfinite(v)]
        return f"{min(known):.2g} to {max(known):.2g}" if known else "undefined"

    seen = [own["observed"] for own in numbers.values()]
    first, last = (
        span([o[f"times_head_alone_{when}"] for o in seen]) for when in ("first", "last")
    )
    grown = span([o["times_delta_last"] for o in seen])
    who = (
        "All weights learn"
        if trainable == "all"
        else "Adapters in the body learn, and the head does not"
    )
    return [
        f"Frozen-feature theory speaks of the head alone. {who}: the mean margin of the training "
        f"pairs is {first} times what AdamW on the head alone gives at the first evaluation, and "
        f"{last} times at the end. Distinguishability of the features went to {grown} times its "
        "start.",
        "Under AdamW the first step moves every weight by the learning rate, so that rates of the "
        "head alone go with the sum of the absolute values of mu+ - mu-, not with the square of "
        "its length; sgd_margin_per_step is the theory's rate for plain SGD at the same rate.",
    ]
