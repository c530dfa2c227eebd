"""`python -m bench head --check`: pairs per second of `trainable: head` and of `trainable: all`.

The same loop with the same records, norms of every pair among them, on the same pairs: once all
weights learn, once the head alone over hidden states computed before. Two settings: completions as
TRL reads them (EOS appended), and one-token answers without EOS, the last-layer setting of Im & Li
(arXiv 2403.18742). Correctness first: a frozen body that computes its states in every step must
show the same losses and log-probs, or nothing is timed. Then slices of a few steps in turn, over
and over; a ratio is formed within a repeat, and the median over repeats counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import measure, results
from bench.measure import Quantiles
from bench.train import find_job, quiet
from bench.train_cases import OWN

HELP = "time of a training step, the head alone against all weights"
WITHIN = 1e-5  # how far losses and log-probs of the contenders may be apart
GATE_STEPS = 3
SETTINGS = {"head_vs_all": "auto", "head_vs_all_one_token": "false"}  # value -> append_eos


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--dataset_name", nargs="+", help="files or folders of pairs; default: persona data")
    add("--model_name_or_path", default="fastpref-tiny", help="folder of a Llama")
    add("--max_length", type=int, default=1024)
    add("--pairs_per_step", type=int, default=32)
    add("--repeats", type=int, default=8, help="turns of every contender")
    add("--steps", type=int, default=3, help="timed steps in a turn of all weights")
    add("--head_steps", type=int, default=40, help="timed steps in a turn of the head")
    add("--seed", type=int, default=0, help="of the order of the pairs")
    add("--no_record", action="store_true", help="append nothing to bench/results")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where contenders disagree or `--check` finds a target missed."""
    counts = (arguments.pairs_per_step, arguments.repeats, arguments.steps, arguments.head_steps)
    if min(counts) < 1:
        raise SystemExit(
            "bench head: --pairs_per_step, --repeats, --steps and --head_steps are at least 1"
        )
    with quiet(), tempfile.TemporaryDirectory(prefix="fastpref-bench-") as scratch:
        return _compare(arguments, Path(scratch))


def _compare(arguments: argparse.Namespace, scratch: Path) -> int:
    from bench.contenders import Fastpref, disagreement

    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    # Enough for the longest turn twice; further turns begin at other pairs of them.
    batches = 2 * (max(arguments.steps, arguments.head_steps) + 1)
    case = dataclasses.replace(OWN, data="persona", pairs=arguments.pairs_per_step)
    job, dataset = find_job(arguments, case, scratch, batches, least=GATE_STEPS)
    shown: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, float] | None] = {}
    for value, append_eos in SETTINGS.items():
        own = dataclasses.replace(job, append_eos=append_eos)
        frozen = Fastpref(own, name="frozen", trainable="head", body=True)
        head = Fastpref(own, name="head", trainable="head")
        wrong = disagreement([frozen, head], GATE_STEPS, WITHIN)
        if wrong:
            print(f"bench head: the contenders disagree, so nothing is timed: {wrong}")
            return 1
        print(f"{GATE_STEPS} steps agree to {WITHIN:g}, append_eos: {append_eos}; {dataset}")
        seconds = _times(arguments, {"all": Fastpref(own, name="all"), "head": head})
        for name, turns in seconds.items():
            shown[f"{name}, append_eos {append_eos}"] = _facts(turns, arguments.pairs_per_step)
        pairs = zip(seconds["all"], seconds["head"], strict=True)
        ratios = Quantiles.of([fmean(full) / fmean(fast) for full, fast in pairs])
        values[value] = {"value": ratios.q50, "q20": ratios.q20, "q80": ratios.q80}
    checks = results.verdicts("head", {k: v["value"] if v else None for k, v in values.items()})
    names = ("max_length", "pairs_per_step", "repeats", "steps", "head_steps", "seed")
    setting = {
        "model": arguments.model_name_or_path,
        "dtype": "float32",
        "dataset": dataset,
        **{name: vars(arguments)[name] for name in names},
    }
    record = results.record_of("head", where, setting, shown, values, checks)
    print(_table(shown, values, checks))
    return results.close(arguments, record, checks, warning=warning)


def _times(arguments: argparse.Namespace, contenders: Mapping[str, Any]) -> dict[str, Any]:
    """name -> repeat -> seconds of every timed step."""
    steps = {"all": arguments.steps, "head": arguments.head_steps}
    seconds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for repeat, name in measure.interleaved(list(contenders), arguments.repeats):
        first = GATE_STEPS + repeat * (arguments.steps + 1)
        seconds[name].append(contenders[name].run(first, steps[name] + 1).seconds)
    return seconds


def _facts(turns: Sequence[Sequence[float]], pairs: int) -> dict[str, Any]:
    spread = Quantiles.of([second for turn in turns for second in turn])
    return {"seconds": asdict(spread), "pairs_per_second": pairs / spread.q50}


def _table(
    shown: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Mapping[str, float] | None],
    checks: Sequence[results.Verdict],
) -> str:
    lines = ["", f"{'':28}{'ms/step 20% 50% 80%':>24}{'pairs/s':>10}"]
    for name, facts in shown.items():
        times = "".join(f"{1e3 * facts['seconds'][q]:8.2f}" for q in ("q20", "q50", "q80"))
        lines.append(f"{name:28}{times}{facts['pairs_per_second']:10.0f}")
    return "\n".join([*lines, "", *results.ratio_lines(values, checks)])
