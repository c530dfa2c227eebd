"""Behaviors of very different distinguishability in one run: does `balance` even them out, and what
does it cost?

Plain DPO, `balance: margins` and `balance: rates` at equal steps on the same batches, with several
seeds (of split and batches; the model is one). Not an experiment of the paper: it acts on what the
paper's priority effect does. docs/balance.md says what the rule can do and what it cannot.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from fastpref.dynamics.groups import MARGIN_THRESHOLD, time_to_threshold
from fastpref.dynamics.inequality import atkinson, gini, restricted_times
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.balance_plots import draw_balance
from fastpref.reproduce import runs
from fastpref.reproduce.behaviors import choose, find_files, spread
from fastpref.reproduce.finetune import series
from fastpref.reproduce.names import STATEMENTS
from fastpref.reproduce.outcome import Outcome, Verdict, ratio
from fastpref.reproduce.runs import RUNS, described, run_config
from fastpref.reproduce.settings import Official, Settings
from fastpref.reproduce.start import Curve, load_start, look
from fastpref.theory.distinguish import behavior_statistics

log = logging.getLogger(__name__)

# One and a half epochs of four personas on fastpref-tiny. At the learning rate of
# examples/persona.yaml margins pass the threshold after five updates of the weights, which is too
# early for them to tell (docs/lab-log.md).
OWN = Official(
    behaviors=(),
    trainable="all",
    optim="adamw_torch",
    learning_rate=3e-5,
    beta=0.1,
    train_batch_size=32,
    steps=168,
    seed=1,
)
BEHAVIORS = 4  # unless named: evenly spread over the ranks by delta
SEEDS = 3
UPDATES, EVALUATIONS = 42, 28  # of a run
SAMPLE = 32  # pairs of every behavior and split that an evaluation looks at
PLAIN = "plain"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "margins": {"balance": "margins"},
    "rates": {"balance": "rates", "track": "sketch"},
}
FIELDS: dict[str, Any] = {
    "append_eos": "false",
    "stratify": True,
    "eval_sample_size": SAMPLE,
    "track": "none",
}
KEPT = 0.9  # of the total margin of the plain run; less is called a loss


def run(settings: Settings) -> Outcome:
    """Raises ValueError for a single behavior, for one class empty, for a model without a head."""
    files, delta = _behaviors(settings)
    taken = settings.over(OWN)
    every = max(1, taken.steps // UPDATES)
    fields = FIELDS | {"eval_steps": max(1, taken.steps // EVALUATIONS)}
    rows: list[Curve] = []
    found: dict[str, dict[str, list[Any]]] = {}
    names: list[str] = []
    for arm, own in ARMS.items():
        more = dict(own)
        if own:
            more["balance_every"] = every
        if "rates" in own.values():
            more["rate_every"] = every
        for seed in range(taken.seed, taken.seed + SEEDS):
            name = f"{arm}-{seed}"
            log.info("balance: %s", name)
            official = dataclasses.replace(taken, seed=seed)
            config = run_config(settings, official, list(files.values()), name, **fields | more)
            curve = runs.curves(runs.run(config), ["loss_weight"], run=arm, seed=seed)
            for key, value in _measures(curve, list(files), taken.steps).items():
                found.setdefault(arm, {}).setdefault(key, []).append(value)
            rows += curve
            names.append(f"{RUNS}/{name}")
    compared = _compared(found)
    numbers = {
        "delta": delta,
        "threshold_nats": MARGIN_THRESHOLD,
        "runs": found,
        "compared": compared,
    }
    figures = draw_balance(settings.folder, "balance", rows, found, delta)
    return Outcome(
        experiment="balance",
        settings=described(settings, taken, list(files))
        | {"run": fields, "arms": ARMS, "balance_every": every, "seeds": SEEDS},
        numbers=numbers,
        verdicts=_verdicts(compared),
        caveats=_caveats(found),
        curves=rows,
        runs=names,
        figures=[path.name for path in figures],
    )


def _behaviors(settings: Settings) -> tuple[dict[str, str], dict[str, float]]:
    """Name -> file, and name -> delta, the most distinguishable behavior first."""
    files, taken = find_files(settings.data, STATEMENTS), settings.over(OWN)
    names, _ = choose(files, (), settings.behaviors, lambda _: np.zeros(0))
    if len(names) < 2:
        raise ValueError(
            f"balance: weighs behaviors against each other, and there is one alone, {names[0]}. "
            "Name two or more with --behaviors, or give the files of more with --data."
        )
    # Of all pairs: on a few the noise of the means makes all behaviors look far apart.
    all_pairs = {"eval_steps": 0, "eval_fraction": 0.0}
    chosen = [files[name] for name in names]
    config = run_config(settings, taken, chosen, "delta", **FIELDS | all_pairs)
    found = behavior_statistics(look(load_start(config), config).train.pairs)
    delta = {own.behavior: own.effective_delta for own in found}
    count = len(names) if settings.behaviors else BEHAVIORS
    names = spread(names, np.array([delta[name] for name in names]), count)
    return {name: files[name] for name in names}, {name: delta[name] for name in names}


def _measures(rows: list[Curve], names: list[str], steps: int) -> dict[str, Any]:
    """What one run is judged by, of either split: times, margins, their inequality."""
    found: dict[str, Any] = {}
    for split in (TRAIN_SAMPLE, HELD_OUT):
        margin = {name: series(rows, name, split, "margin") for name in names}
        if not all(len(own) for own in margin.values()):
            continue  # nothing is held out
        at = series(rows, names[0], split, "step")
        times = [time_to_threshold(at, margin[name], MARGIN_THRESHOLD) for name in names]
        known = np.array([np.nan if t is None else t for t in times])
        last = np.array([margin[name][-1] for name in names])
        accuracy = [series(rows, name, split, "output_accuracy")[-1] for name in names]
        found |= {
            f"{split}_times": dict(zip(names, known, strict=True)),
            f"{split}_arrived": int(np.isfinite(known).sum()),
            f"{split}_gini_of_times": gini(restricted_times(known, steps)),
            f"{split}_slowest": float(restricted_times(known, steps).max()),
            f"{split}_margins": dict(zip(names, last, strict=True)),
            f"{split}_total_margin": float(last.sum()),
            f"{split}_gini_of_margins": gini(last),
            f"{split}_atkinson_of_margins": atkinson(last),
            f"{split}_output_accuracy": dict(zip(names, accuracy, strict=True)),
            f"{split}_loss": float(np.mean([series(rows, n, split, "loss")[-1] for n in names])),
        }
    return found


def _compared(found: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> measure -> mean over seeds, and the mean difference from plain with its standard error
    (of pairs of runs of one seed, which have the same batches)."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for arm, measures in found.items():
        for name, values in measures.items():
            if isinstance(values[0], dict):
                continue
            own, plain = np.array(values, float), np.array(found[PLAIN][name], float)
            apart = own - plain
            result.setdefault(arm, {})[name] = {
                "mean": own.mean(),
                "over_plain": ratio(own.mean(), plain.mean()),
                "minus_plain": apart.mean(),
                "error": apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else np.nan,
            }
    return result


def _verdicts(compared: dict[str, dict[str, dict[str, float]]]) -> list[Verdict]:
    verdicts = []
    for arm in [name for name in ARMS if name != PLAIN]:
        for split, words in ((TRAIN_SAMPLE, "training"), (HELD_OUT, "held-out")):
            own = compared[arm]
            if f"{split}_gini_of_times" not in own:
                continue
            verdicts += [
                Verdict(
                    f"{arm}: Gini index of the times to a mean {words} margin of "
                    f"{MARGIN_THRESHOLD:g} nat, over that of plain DPO at equal steps, below 1",
                    own[f"{split}_gini_of_times"]["over_plain"],
                    np.nextafter(1.0, 0.0),
                ),
                Verdict(
                    f"{arm}: sum of the behaviors' {words} margins at the end, over that of plain "
                    f"DPO, at least {KEPT:g}",
                    own[f"{split}_total_margin"]["over_plain"],
                    KEPT,
                    at_least=True,
                ),
            ]
    return verdicts


def _caveats(found: dict[str, dict[str, list[Any]]]) -> list[str]:
    arrived = "; ".join(
        f"{arm}: {', '.join(map(str, own[f'{TRAIN_SAMPLE}_arrived']))}"
        for arm, own in found.items()
    )
    return [
        "Times are the first evaluation above the threshold, not interpolated. A behavior that did "
        "not arrive counts with the run's length. Behaviors that arrived, by seed (training "
        f"pairs): {arrived}.",
        f"{SEEDS} seeds, of split and batches; the model that training begins with is the same. "
        "Differences are of runs with the same seed; errors are standard errors over seeds.",
        "rates looks at a sample of its own before and after measured steps, which costs time and "
        "changes nothing: steps are equal, hours are not.",
    ]
