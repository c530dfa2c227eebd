"""`python -m bench kernels --check`: the head op on the CPU beside every other way to the same.

float32, forward and backward from given gradients per row. Correctness first: a contender whose
log-probs or gradients are off float64 is not timed, and ours stops the run. Then one after the
other, over and over, each repeat beginning with another one; a ratio is formed within a repeat, and
the median over repeats counts. Peak memory beyond the inputs is measured for each contender in a
process of its own, the least of two calls. Shapes: R rows, D hidden, V vocab.

Wall time on all threads, or, where other work keeps a machine busy, `--cpu_time`: that of one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench import measure, results
from bench.measure import Quantiles

HELP = "time and memory of the head op on the CPU, ours and other packages'"
# Prefix of a value -> R, D, V. The last has no target for a frozen head: eager's products are two
# there as well, and what an op costs before it computes anything is 9 % of the whole.
SHAPES = {"": (512, 1024, 32000), "middle_": (256, 512, 16000), "small_": (128, 256, 4096)}
PAIRS = 4
TIMED = ("ours", "eager", "compile", "linear_ce", "trl")
CHUNKED = "linear_ce_chunked"  # the leanest, and 6 times slower
MEMORY = ("ours", "ours_cache0", "eager", "compile", "linear_ce", CHUNKED, "trl")
WITHIN = {"rows": 1e-4, "hidden": 1e-4, "weight": 1e-4}
SLOW, FEW = 2.0, 3  # whoever takes twice as long as ours has but three turns
Clock = Callable[[], float]
TURN = 0.08  # seconds that a turn lasts at least, by as many calls as it takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--repeats", type=int, default=7, help="turns of every contender at the large shape")
    add("--small_repeats", type=int, default=15, help="turns at the smaller shapes")
    add("--cpu_time", action="store_true", help="CPU time of one thread, not wall time of all")
    add("--seed", type=int, default=0)
    add("--no_memory", action="store_true", help="leave out peak memory")
    add("--no_record", action="store_true", help="append nothing to bench/results")
    add("--peak_of", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where ours is wrong or `--check` finds a target missed."""
    if min(arguments.repeats, arguments.small_repeats) < 1:
        raise SystemExit("bench kernels: --repeats and --small_repeats are at least 1")
    if arguments.peak_of:
        print(json.dumps(_own_peaks(arguments.peak_of, arguments.seed)))
        return 0
    return _compare(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    import torch

    from bench import head_ops

    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    ops, missing = head_ops.load((*TIMED, CHUNKED, "ours_cache0"))
    shown: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, float] | None] = {}
    for prefix in SHAPES:
        for mode in ("full", "frozen"):
            correct = _correct(ops, prefix, mode, arguments.seed, shown)
            if correct is None:
                return 1
            repeats = arguments.small_repeats if prefix else arguments.repeats
            seconds = _times(correct, prefix, mode, repeats, arguments.seed, clock)
            for name, turns in seconds.items():
                shown[f"{prefix}{mode} {name}"]["seconds"] = asdict(Quantiles.of(turns))
            found = _speed(seconds, f"{prefix}{mode}")
            print("\n".join(results.ratio_lines(found, [])), flush=True)
            values |= found
    peaks = {} if arguments.no_memory else _peaks(missing, arguments.seed, shown)
    values |= _memory(peaks)
    checks = results.verdicts("kernels", {k: v["value"] if v else None for k, v in values.items()})
    setting = {
        "shapes": {prefix + "RDV": shape for prefix, shape in SHAPES.items()},
        "dtype": "float32",
        "clock": "CPU time of one thread" if arguments.cpu_time else "wall",
        **{name: vars(arguments)[name] for name in ("repeats", "small_repeats", "seed")},
    }
    record = results.record_of("kernels", where, setting, shown, values, checks)
    print(_table(shown, values, checks))
    for name, reason in missing.items():
        print(f"{name} is missing: {reason}")
    return results.close(arguments, record, checks, warning=warning, missing=missing)


def _problem(prefix: str, seed: int) -> Any:
    import torch

    from bench.head_ops import make_problem

    rows, dim, vocab = SHAPES[prefix]
    cpu = torch.device("cpu")
    return make_problem(rows, dim, vocab, PAIRS, dtype=torch.float32, device=cpu, seed=seed)


def _correct(
    ops: Sequence[Any], prefix: str, mode: str, seed: int, shown: dict[str, dict[str, Any]]
) -> list[Any] | None:
    """The contenders that are right; None where ours is not. Warms all of them up."""
    from bench import head_ops

    problem = _problem(prefix, seed)
    truth = head_ops.truth_of(problem, mode, block=128)
    correct = []
    for op in ops:
        errors = head_ops.errors_of(op, problem, truth, mode)
        shown[f"{prefix}{mode} {op.name}"] = {**head_ops.facts(op), "errors": errors}
        reason = head_ops.wrong(errors, WITHIN)
        if reason is None:
            correct.append(op)
            continue
        print(f"bench kernels: {op.label} is not timed, {mode} at {prefix or 'large'}: {reason}")
        if op.name.startswith("ours"):
            return None
    return correct


def _times(
    ops: Sequence[Any], prefix: str, mode: str, repeats: int, seed: int, clock: Clock
) -> dict[str, list[float]]:
    """name -> seconds of a call, per repeat. Problems rotate: no repeat finds its data in cache."""
    from tqdm import tqdm

    problems = [_problem(prefix, seed + i) for i in (1, 2)]
    timed = [op for op in ops if op.name != "ours_cache0"]
    took = {op.name: _seconds(op, problems[0], mode, 1, clock) for op in timed}
    calls = {name: max(1, round(TURN / seconds)) for name, seconds in took.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    turns = measure.interleaved(timed, repeats)
    label = f"{prefix}{mode}"
    for repeat, op in tqdm(turns, total=repeats * len(calls), unit="turn", desc=label):
        if repeat < FEW or took[op.name] < SLOW * took["ours"]:
            problem = problems[repeat % len(problems)]
            seconds[op.name].append(_seconds(op, problem, mode, calls[op.name], clock))
    return seconds


def _seconds(op: Any, problem: Any, mode: str, calls: int, clock: Clock) -> float:
    """Of one call, out of as many in a row."""
    leaves = problem.leaves(mode)
    began = clock()
    for _ in range(calls):
        _call(op, problem, *leaves)
    return (clock() - began) / calls


def _call(op: Any, problem: Any, hidden: Any, weight: Any) -> None:
    rows = op.rows(hidden, weight, problem.target, None)
    rows.backward(problem.hidden[:, 0])  # any numbers, in memory already
    hidden.grad = weight.grad = None


def _speed(
    seconds: Mapping[str, Sequence[float]], label: str
) -> dict[str, dict[str, float] | None]:
    """Another's time over ours, each contender and the fastest of them."""
    found: dict[str, dict[str, float] | None] = {}
    for name in TIMED[1:]:
        found[f"{label}_vs_{name}"] = None
        if name in seconds:
            turns = zip(seconds[name], seconds["ours"], strict=False)  # the slow have few
            ratios = Quantiles.of([theirs / ours for theirs, ours in turns])
            spread = {"value": ratios.q50, "q20": ratios.q20, "q80": ratios.q80}
            found[f"{label}_vs_{name}"] = spread
    known = [value for value in found.values() if value]
    fastest = min(known, key=lambda value: value["value"]) if known else None
    return {f"{label}_vs_fastest": fastest, **found}


def _peaks(
    missing: Mapping[str, str], seed: int, shown: dict[str, dict[str, Any]]
) -> dict[str, dict[str, int]]:
    """name -> mode -> bytes beyond the inputs."""
    found = {}
    for name in MEMORY:
        if name in missing:
            continue
        command = [sys.executable, "-m", "bench", "kernels", "--peak_of", name]
        done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True)
        if done.returncode:
            print(f"peak memory of {name} not measured: {done.stderr.strip().splitlines()[-1:]}")
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
        for mode, used in found[name].items():
            shown.setdefault(f"{mode} {name}", {})["used"] = used
    return found


def _own_peaks(name: str, seed: int) -> dict[str, int]:
    """Bytes that a contender takes beyond its inputs at the large shape, by mode."""
    from bench import head_ops

    (op,), _ = head_ops.load([name])
    problem, found = _problem("", seed), {}
    for mode in ("full", "frozen"):
        leaves = problem.leaves(mode)
        _call(op, problem, *leaves)  # code, threads and workspaces are no contender's memory
        gc.collect()
        call = functools.partial(_call, op, problem, *leaves)
        peaks = [measure.peak_memory(functools.partial(_ready, call)) for _ in range(2)]
        found[mode] = min(peak["used"] for peak in peaks)
    return found


def _ready(call: Callable[[], object]) -> Callable[[], object]:
    return call


def _memory(peaks: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float] | None]:
    """Ours over another's: all of E kept against eager; none kept against the leanest."""
    found: dict[str, dict[str, float] | None] = {
        "memory_full_vs_eager": None,
        "memory_cache0_vs_leanest": None,
    }
    others = [name for name in peaks if not name.startswith("ours")]
    if "ours" in peaks and "eager" in peaks:
        found["memory_full_vs_eager"] = {"value": peaks["ours"]["full"] / peaks["eager"]["full"]}
    if "ours_cache0" in peaks and others:
        leanest = min(peaks[name]["full"] for name in others)
        found["memory_cache0_vs_leanest"] = {"value": peaks["ours_cache0"]["full"] / leanest}
    return found


def _table(
    shown: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Mapping[str, float] | None],
    checks: Sequence[results.Verdict],
) -> str:
    lines = ["", f"{'':34}{'ms 20% 50% 80%':>27}{'MiB':>8}{'error of dH':>13}{'of dW':>10}"]
    for name, facts in shown.items():
        if "seconds" in facts:
            spread = facts["seconds"]
            times = "".join(f"{1e3 * spread[q]:9.2f}" for q in ("q20", "q50", "q80"))
        else:
            times = f"{'not timed':>27}"
        used = f"{facts['used'] / 2**20:8.1f}" if "used" in facts else f"{'-':>8}"
        errors = facts.get("errors", {})
        shown_errors = "".join(
            f"{errors[k]:{width}.1e}" if k in errors else f"{'-':>{width}}"
            for k, width in (("hidden", 13), ("weight", 10))
        )
        lines.append(f"{name:34}{times}{used}{shown_errors}")
    return "\n".join([*lines, "", *results.ratio_lines(values, checks)])
