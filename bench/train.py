"""`python -m bench train --check`: a training step of fastpref and one of TRL.

Two models (`--model 5m 30m`) and two kinds of pairs (`--data persona hh`); every combination is a
case with targets of its own (bench/train_cases.py, bench/targets.toml). Same pairs, order, step,
model and precision (float32, CPU) for all. Correctness first: on the first batches all must show
the same losses and log-probs, or nothing is timed. Then slices of a few steps in turn, over and
over, each repeat on other pairs; a ratio is formed within a repeat, and the median over repeats
counts. Peak memory is measured for each contender in a process of its own.

- against TRL's defaults: TRL's step over (fastpref's step + its reference pass for the same pairs);
- against TRL tuned (reference precomputed, no checkpointing): step over step.

For both, TRL forwards all pairs of a step at once. That pads more than it must: `trl_micro` is TRL
tuned with 8 pairs in a forward (its own default) and accumulation, shown beside them.

Beside each ratio stand two bounds: that of the arithmetic both really do, and that of a perfect
step, which pads, masks and records nothing and makes no reference pass.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import measure, results
from bench.flops import Shape, Work
from bench.measure import Quantiles
from bench.train_cases import (
    CASES,
    DATA,
    MODELS,
    OWN,
    Case,
    find_pairs,
    fitting,
    model_dir,
    shuffled,
)

HELP = "time and memory of a training step, fastpref against TRL"
WITHIN = 1e-5  # how far losses and log-probs of the contenders may be apart
TRL = {"trl_default": False, "trl_tuned": True, "trl_micro": True}  # name -> tuned
LABELS = {
    "fastpref": "fastpref, records and norms on",
    "reference": "fastpref's reference pass",
    "trl_default": "TRL, its defaults",
    "trl_tuned": "TRL, precomputed, no checkpointing",
    "trl_micro": "the same in micro-batches",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--against", choices=("trl", "nothing"), default="trl", help="whom to compare with")
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--model", nargs="+", choices=MODELS, default=list(MODELS))
    add("--data", nargs="+", choices=DATA, default=list(DATA))
    add("--dataset_name", nargs="+", help="files or folders of pairs instead of --data")
    add("--model_name_or_path", help="folder of a Llama instead of --model")
    add("--max_length", type=int, default=1024)
    chosen = "default: as the case has it (bench/train_cases.py)"
    add("--pairs_per_step", type=int, help=chosen)
    add("--repeats", type=int, help=f"turns of every contender; {chosen}")
    add("--steps", type=int, help=f"timed steps in a turn, one more warms up; {chosen}")
    add("--trl_micro", type=int, default=8, help="pairs in a forward of TRL with accumulation")
    add("--seed", type=int, default=0, help="of the order of the pairs")
    add("--no_memory", action="store_true", help="leave out peak memory")
    add("--no_record", action="store_true", help="append nothing to bench/results")
    add("--peak_of", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where contenders disagree or `--check` finds a target missed."""
    sizes = (arguments.pairs_per_step, arguments.repeats, arguments.steps, arguments.trl_micro)
    if any(size is not None and size < 1 for size in sizes):
        raise SystemExit(
            "bench train: --pairs_per_step, --repeats, --steps and --trl_micro are at least 1"
        )
    failed = 0
    for case in chosen_cases(arguments):
        with quiet(), tempfile.TemporaryDirectory(prefix="fastpref-bench-") as scratch:
            if arguments.peak_of:
                print(json.dumps(_own_peak(arguments, case, Path(scratch))))
                continue
            failed |= _compare(arguments, case, Path(scratch))
    return failed


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """What is measured, with what the command line says instead of a case's own numbers."""
    own = arguments.dataset_name or arguments.model_name_or_path
    cases = [OWN] if own else [
        case for case in CASES if case.model in arguments.model and case.data in arguments.data
    ]  # fmt: skip
    asked = {"pairs": arguments.pairs_per_step, "repeats": arguments.repeats}
    asked |= {"steps": arguments.steps}
    changed = {name: value for name, value in asked.items() if value is not None}
    return [replace(case, **changed) for case in cases]


def _compare(arguments: argparse.Namespace, case: Case, scratch: Path) -> int:
    from bench.contenders import Contender, Fastpref, Trl, disagreement

    began = time.perf_counter()
    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    job, dataset = _job(arguments, case, scratch)
    ours = Fastpref(job)
    missing = [] if measure.version_of("trl") or arguments.against != "trl" else ["trl"]
    theirs = []
    if arguments.against == "trl" and not missing:
        theirs = [Trl(job, tuned=False), Trl(job, tuned=True)]
        if arguments.trl_micro < case.pairs:
            theirs.append(Trl(job, tuned=True, micro=arguments.trl_micro))
    contenders: list[Contender] = [ours, *theirs]
    wrong = disagreement(contenders, case.gate, WITHIN)
    if wrong:
        print(f"bench {case.name}: the contenders disagree, so nothing is timed: {wrong}")
        return 1
    print(f"{case.name}: {case.gate} steps of all contenders agree to {WITHIN:g}; {dataset}")

    timings = _times(case, contenders)
    memory: dict[str, dict[str, int] | None] = {}
    if case.memory and not arguments.no_memory:
        measured = [c.name for c in contenders if c.name != "trl_micro"]
        memory = {name: _peak_of(name, arguments, case) for name in measured}
    values = _values(timings, memory, _ideal(case, ours))
    flat = {k: v["value"] if v else None for k, v in values.items()}
    checks = results.verdicts(case.name, flat)
    useful = timings["fastpref"].tokens  # packed: every token that is needed, once
    shown = {
        name: timing.facts(timing.tokens if name == "reference" else useful)
        | (memory.get(name) or {})
        for name, timing in timings.items()
    }
    setting = {
        "model": arguments.model_name_or_path or case.model,
        "parameters": sum(p.numel() for p in ours.model.module.parameters()),
        "dtype": "float32",
        "dataset": dataset,
        "max_length": arguments.max_length,
        "pairs_per_step": case.pairs,
        "trl_micro": arguments.trl_micro,
        "repeats": case.repeats,
        "steps": case.steps,
        "seed": arguments.seed,
    }
    record = results.record_of(case.name, where, setting, shown, values, checks)
    record["duration"] = round(time.perf_counter() - began, 1)
    print(_table(shown, values, checks), f"{case.name}: {record['duration']:.0f} s", sep="\n")
    for name in missing:
        print(f"{name} is not installed: nothing to compare with (pip install 'fastpref[{name}]')")
    return results.close(arguments, record, checks, warning=warning, missing=missing)


def _job(arguments: argparse.Namespace, case: Case, scratch: Path) -> tuple[Any, str]:
    before, measured = case.memory or (0, 0)
    wanted = max(case.gate + (case.steps + 1) * case.repeats, before + measured)
    return find_job(arguments, case, scratch, wanted, max(case.gate, case.steps + 1, measured))


def find_job(
    arguments: argparse.Namespace, case: Case, scratch: Path, batches: int, least: int
) -> tuple[Any, str]:
    """What to train, and where its pairs are from. At most ``batches`` of them; SystemExit where
    there are not even ``least``."""
    from bench.contenders import Job
    from fastpref.data.formats import read_pairs

    if arguments.dataset_name:
        source = " ".join(Path(name).name for name in arguments.dataset_name)
        pairs = read_pairs(arguments.dataset_name, on_bad_rows="drop")[0]
    else:
        pairs, source = find_pairs(case.data, scratch, arguments.seed)
    model = model_dir(arguments.model_name_or_path or case.model, scratch)
    pairs = fitting(shuffled(pairs, arguments.seed), model, arguments.max_length)
    if len(pairs) < case.pairs * least:
        wanted = case.pairs * least
        raise SystemExit(f"bench: {source} holds {len(pairs)} pairs; {wanted} are needed")
    taken = pairs[: case.pairs * batches]
    return Job(taken, case.pairs, model, scratch, max_length=arguments.max_length), source


@dataclass
class Timing:
    """A contender's seconds by repeat and step; operations and tokens of its mean step."""

    seconds: list[list[float]]
    flops: float
    tokens: float  # in one pass of the body
    passes: int  # of the body; a backward is two

    def facts(self, useful: float) -> dict[str, Any]:
        """For the record and the table; ``useful``: tokens that an exact step cannot do without."""
        spread = Quantiles.of([second for turn in self.seconds for second in turn])
        return {
            "seconds": asdict(spread),
            "gflop": self.flops / 1e9,
            "gflop_per_second": self.flops / 1e9 / spread.q50,
            "tokens_per_pass": self.tokens,
            "passes": self.passes,
            "useful": useful / self.tokens,
        }


def _timing(seconds: list[list[float]], work: Sequence[Work], steps: int, shape: Shape) -> Timing:
    return Timing(
        seconds,
        sum(w.flops(shape) for w in work) / steps,
        sum(w.tokens for w in work) / steps,
        work[0].passes,
    )


def _times(case: Case, contenders: Sequence[Any]) -> dict[str, Timing]:
    """By name; "reference" is fastpref's reference pass over the pairs of a turn, per step."""
    from tqdm import tqdm

    batches = case.steps + 1
    names = [*(c.name for c in contenders), "reference"]
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    work: dict[str, list[Work]] = {name: [] for name in names}
    turns = measure.interleaved(contenders, case.repeats)
    for repeat, one in tqdm(turns, total=case.repeats * len(contenders), unit="turn"):
        first = case.gate + repeat * batches
        seconds[one.name].append(one.run(first, batches).seconds)
        work[one.name] += one.work(first, batches)[1:]
        if one is contenders[0]:
            seconds["reference"].append([one.reference_seconds(first, batches)])
            work["reference"].append(one.reference_work(first, batches))
    steps = dict.fromkeys(names, case.repeats * case.steps)
    steps["reference"] = case.repeats * batches
    shape = contenders[0].shape
    return {name: _timing(seconds[name], work[name], steps[name], shape) for name in names}


def _ideal(case: Case, ours: Any) -> float:
    """Operations of a perfect step, mean over the timed ones."""
    turns = (case.gate + repeat * (case.steps + 1) + 1 for repeat in range(case.repeats))
    return fmean(flops for first in turns for flops in ours.ideal(first, case.steps))


def _values(
    timings: Mapping[str, Timing],
    memory: Mapping[str, Mapping[str, int] | None],
    ideal: float,  # operations
) -> dict[str, dict[str, float] | None]:
    """Ratios: TRL's over fastpref's for times, fastpref's over TRL's for memory. ``bound`` is what
    counting operations gives, ``perfect`` the same of a perfect step. None: not measured."""
    found: dict[str, dict[str, float] | None] = {}
    ours, reference = timings["fastpref"], timings["reference"]
    for name, tuned in TRL.items():
        if name != "trl_micro":
            found[f"train_vs_{name}"] = found[f"memory_vs_{name}"] = None
        if name in timings:
            counted = 0.0 if tuned else 1.0
            turns = zip(timings[name].seconds, ours.seconds, reference.seconds, strict=True)
            ratios = Quantiles.of(
                [fmean(theirs) / (fmean(own) + counted * fmean(ref)) for theirs, own, ref in turns]
            )
            bound = timings[name].flops / (ours.flops + counted * reference.flops)
            spread = {"value": ratios.q50, "q20": ratios.q20, "q80": ratios.q80}
            perfect = timings[name].flops / ideal
            found[f"train_vs_{name}"] = {**spread, "bound": bound, "perfect": perfect}
        own_peak, their_peak = memory.get("fastpref"), memory.get(name)
        if own_peak and their_peak:
            found[f"memory_vs_{name}"] = {"value": own_peak["used"] / their_peak["used"]}
    return found


def _peak_of(name: str, arguments: argparse.Namespace, case: Case) -> dict[str, int] | None:
    """Peak memory of a contender in a process of its own; None where it cannot be measured."""
    command = [sys.executable, "-m", "bench", "train", "--peak_of", name]
    command += ["--repeats", "1", "--steps", "1", "--pairs_per_step", str(case.pairs)]
    for key in ("seed", "max_length"):
        command += [f"--{key}", str(getattr(arguments, key))]
    command += ["--model", case.model, "--data", case.data]
    if arguments.model_name_or_path:
        command += ["--model_name_or_path", arguments.model_name_or_path]
    if arguments.dataset_name:
        command += ["--dataset_name", *arguments.dataset_name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"peak memory of {name} not measured: {done.stderr.strip().splitlines()[-1:]}")
        return None
    peak: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peak


def _own_peak(arguments: argparse.Namespace, case: Case, scratch: Path) -> dict[str, int]:
    """`measure.peak_memory` of a contender's steps, and of fastpref's reference pass too."""
    from bench.contenders import Fastpref, Trl

    for library in ("transformers.models.llama.modeling_llama", "trl", "datasets"):
        with suppress(ImportError):
            importlib.import_module(library)  # code is no contender's memory
    assert case.memory
    warm, measured_steps = case.memory
    job, _ = _job(arguments, case, scratch)

    def build() -> Callable[[], object]:
        name = arguments.peak_of
        if name != Fastpref.name:
            trainer = Trl(job, tuned=TRL[name])
            trainer.run(0, warm)
            return lambda: trainer.run(warm, measured_steps)
        ours = Fastpref(job)
        ours.run(0, warm)

        def measured() -> None:
            ours.reference_seconds(warm, measured_steps)
            ours.run(warm, measured_steps)

        return measured

    return measure.peak_memory(build)


def _table(
    shown: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Mapping[str, float] | None],
    checks: Sequence[results.Verdict],
) -> str:
    head = ("ms/step 20% 50% 80%", "GFLOP", "GFLOP/s", "tok/pass", "passes", "useful", "peak MiB")
    lines = ["", f"{'':36}{head[0]:>24}" + "".join(f"{name:>10}" for name in head[1:])]
    for name, facts in shown.items():
        times = "".join(f"{1e3 * facts['seconds'][q]:8.1f}" for q in ("q20", "q50", "q80"))
        peak = f"{facts['used'] / 2**20:.0f}" if "used" in facts else "-"
        lines.append(
            f"{LABELS[name]:36}{times}{facts['gflop']:10.1f}{facts['gflop_per_second']:10.1f}"
            f"{facts['tokens_per_pass']:10.0f}{facts['passes']:10.0f}{facts['useful']:10.0%}{peak:>10}"
        )
    return "\n".join([*lines, "", *results.ratio_lines(values, checks)])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries print about themselves."""
    import logging
    import warnings

    import tqdm  # noqa: F401  reads the variable below when imported; only TRL's bars are meant
    from transformers.utils import logging as hf_logging

    os.environ["TQDM_DISABLE"] = "1"
    hf_logging.set_verbosity_error()
    own = logging.getLogger("fastpref")
    before = own.level
    own.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        own.setLevel(before)
