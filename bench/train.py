"""`python -m bench train --against trl --check`: a training step of fastpref against TRL's DPOTrainer.

Same pairs, model and precision (float32, CPU) for all. Correctness first: on the first batches all must
show the same losses and log-probs, or nothing is timed. Then slices of a few steps in turn, over and
over, each repeat on other pairs; a ratio is formed within a repeat, and the median over repeats
counts. Peak memory is measured for each contender in a process of its own.

- against TRL's defaults: TRL's step over (fastpref's step + its reference pass for the same pairs);
- against TRL tuned (reference precomputed, no checkpointing): step over step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import measure, results
from bench.flops import Work
from bench.measure import Quantiles

HELP = "time and memory of a training step, fastpref against TRL"
WITHIN = 1e-5  # how far losses and log-probs of the contenders may be apart
GATE_STEPS = 3
PEAK_STEPS = 4
TRL = {"trl_default": False, "trl_tuned": True}  # name -> tuned
LABELS = {
    "fastpref": "fastpref, records and norms on",
    "reference": "fastpref's reference pass",
    "trl_default": "TRL, its defaults",
    "trl_tuned": "TRL, precomputed, no checkpointing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--against", choices=("trl", "nothing"), default="trl", help="whom to compare with")
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--dataset_name", nargs="+", help="files or folders of pairs; default: persona data")
    add("--model_name_or_path", default="fastpref-tiny", help="folder of a Llama")
    add("--pairs_per_step", type=int, default=32)
    add("--repeats", type=int, default=8, help="turns of every contender")
    add("--steps", type=int, default=3, help="timed steps in a turn; one more warms up")
    add("--seed", type=int, default=0, help="of the order of the pairs")
    add("--no_memory", action="store_true", help="leave out peak memory")
    add("--no_record", action="store_true", help="append nothing to bench/results")
    add("--peak_of", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where the contenders disagree, or `--check` finds a target missed."""
    if min(arguments.pairs_per_step, arguments.repeats, arguments.steps) < 1:
        raise SystemExit("bench train: --pairs_per_step, --repeats and --steps are at least 1")
    with _quiet(), tempfile.TemporaryDirectory(prefix="fastpref-bench-") as scratch:
        if arguments.peak_of:
            print(json.dumps(_own_peak(arguments, Path(scratch))))
            return 0
        return _compare(arguments, Path(scratch))


def _compare(arguments: argparse.Namespace, scratch: Path) -> int:
    from bench.contenders import Fastpref, Trl, disagreement

    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    job, dataset = _job(arguments, scratch)
    ours = Fastpref(job)
    missing = [] if measure.version_of("trl") or arguments.against != "trl" else ["trl"]
    theirs = []
    if arguments.against == "trl" and not missing:
        theirs = [Trl(job, tuned=tuned) for tuned in TRL.values()]
    contenders = [ours, *theirs]
    wrong = disagreement(contenders, GATE_STEPS, WITHIN)
    if wrong:
        print(f"bench train: the contenders disagree, so nothing is timed: {wrong}")
        return 1
    print(f"{GATE_STEPS} steps of all contenders agree to {WITHIN:g}; {dataset}")

    seconds, work = _times(arguments, contenders)
    flops = {
        name: sum(w.flops(ours.shape) for w in done) / len(done) for name, done in work.items()
    }
    memory = {} if arguments.no_memory else {c.name: _peak_of(c.name) for c in contenders}
    values = _values(seconds, flops, memory, arguments.steps)
    checks = results.verdicts("train", {k: v["value"] if v else None for k, v in values.items()})
    shown = {
        name: _facts(name, seconds[name], flops[name], work[name], memory.get(name))
        for name in seconds
    }
    for name, facts in shown.items():
        facts["useful"] = shown["fastpref"]["tokens"] * facts["passes"] / facts["tokens_computed"]
    setting = {
        "model": arguments.model_name_or_path,
        "parameters": sum(p.numel() for p in ours.model.module.parameters()),
        "dtype": "float32",
        "dataset": dataset,
        **{k: vars(arguments)[k] for k in ("pairs_per_step", "repeats", "steps", "seed")},
    }
    record = results.record_of("train", where, setting, shown, values, checks)
    _print(shown, values, checks, missing)
    if not arguments.no_record:
        print(f"appended to {results.keep(record).relative_to(measure.ROOT)}")
    if warning:
        print(f"warning: {warning}")
    failed = bool(missing) or not all(check.met for check in checks)
    print(json.dumps({**record, "missing": missing, "ok": not failed}))
    return int(arguments.check and failed)


def _job(arguments: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """What to train, and in words where the pairs are from. Shuffled: files hold one behavior each."""
    from bench.contenders import Job
    from fastpref import base
    from fastpref.data.formats import read_pairs

    names, source = _dataset(arguments, scratch)
    pairs, _ = read_pairs(names, on_bad_rows="drop")
    random.Random(arguments.seed).shuffle(pairs)
    wanted = arguments.pairs_per_step * max(
        GATE_STEPS + (arguments.steps + 1) * arguments.repeats, PEAK_STEPS
    )
    least = arguments.pairs_per_step * max(GATE_STEPS, arguments.steps + 1, PEAK_STEPS)
    if len(pairs) < least:
        raise SystemExit(f"bench train: {source} holds {len(pairs)} pairs; {least} are needed")
    name = arguments.model_name_or_path
    model = str(base.base_dir()) if base.is_base_name(name) else name
    return Job(pairs[:wanted], arguments.pairs_per_step, model, scratch), source


def _dataset(arguments: argparse.Namespace, scratch: Path) -> tuple[list[str], str]:
    if arguments.dataset_name:
        return arguments.dataset_name, " ".join(Path(n).name for n in arguments.dataset_name)
    root = Path(os.environ.get("FASTPREF_DATA", measure.ROOT.parent / "shared" / "data"))
    if (root / "persona").is_dir():
        return [str(root / "persona")], "Anthropic persona files"
    from fastpref.data.generate import generate, write_dataset

    print("no persona data (FASTPREF_DATA names the folder above it): generated pairs instead")
    write_dataset(scratch / "data", generate("demo", 400, arguments.seed))
    return [str(scratch / "data")], "generated pairs (preset demo)"


def _times(
    arguments: argparse.Namespace, contenders: Sequence[Any]
) -> tuple[dict[str, list[list[float]]], dict[str, list[Work]]]:
    """Seconds of every timed step, name -> repeat -> step, and the arithmetic of those steps."""
    from tqdm import tqdm

    seconds: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
    seconds["reference"] = []
    work: dict[str, list[Work]] = {name: [] for name in seconds}
    turns = measure.interleaved(contenders, arguments.repeats)
    bar = tqdm(turns, total=arguments.repeats * len(contenders), unit="turn", disable=None)
    for repeat, contender in bar:
        first, steps = GATE_STEPS + repeat * (arguments.steps + 1), arguments.steps + 1
        seconds[contender.name].append(contender.run(first, steps).seconds)
        work[contender.name] += contender.work(first, steps)[1:]
        if contender is contenders[0]:
            seconds["reference"].append([contender.reference_seconds(first, steps)])
            whole = contender.reference_work(first, steps)
            work["reference"].append(whole)
    return seconds, work


def _values(
    seconds: Mapping[str, Sequence[Sequence[float]]],
    flops: Mapping[str, float],
    memory: Mapping[str, Mapping[str, int] | None],
    steps: int,
) -> dict[str, dict[str, float] | None]:
    """Ratios: TRL's over fastpref's for times, fastpref's over TRL's for memory. ``bound``: what
    counting operations gives."""
    found: dict[str, dict[str, float] | None] = {}
    for name, tuned in TRL.items():
        found[f"train_vs_{name}"] = found[f"memory_vs_{name}"] = None
        if name not in seconds:
            continue
        reference = 0.0 if tuned else flops["reference"]
        ratios = []
        for repeat, step_times in enumerate(seconds[name]):
            own = sum(seconds["fastpref"][repeat])
            if not tuned:
                own += steps * seconds["reference"][repeat][0]
            ratios.append(sum(step_times) / own)
        spread = Quantiles.of(ratios)
        found[f"train_vs_{name}"] = {
            "value": spread.q50,
            "q20": spread.q20,
            "q80": spread.q80,
            "bound": flops[name] / (flops["fastpref"] + reference),
        }
        ours, theirs = memory.get("fastpref"), memory.get(name)
        if ours and theirs:
            found[f"memory_vs_{name}"] = {"value": ours["used"] / theirs["used"]}
    return found
