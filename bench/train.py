"""`python -m bench train --against trl --check`: a training step of fastpref and one of TRL.

Same pairs, model and precision (float32, CPU) for all. Correctness first: on the first batches all
must show the same losses and log-probs, or nothing is timed. Then slices of a few steps in turn,
over and over, each repeat on other pairs; a ratio is formed within a repeat, and the median over
repeats counts. Peak memory is measured for each contender in a process of its own.

- against TRL's defaults: TRL's step over (fastpref's step + its reference pass for the same pairs);
- against TRL tuned (reference precomputed, no checkpointing): step over step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import measure, results
from bench.flops import Shape, Work
from bench.measure import Quantiles

HELP = "time and memory of a training step, fastpref against TRL"
WITHIN = 1e-5  # how far losses and log-probs of the contenders may be apart
GATE_STEPS = 3
WARM_STEPS, PEAK_STEPS = 2, 4  # before and while peak memory is measured
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
    add("--max_length", type=int, default=1024)
    add("--pairs_per_step", type=int, default=32)
    add("--repeats", type=int, default=8, help="turns of every contender")
    add("--steps", type=int, default=3, help="timed steps in a turn; one more warms up")
    add("--seed", type=int, default=0, help="of the order of the pairs")
    add("--no_memory", action="store_true", help="leave out peak memory")
    add("--no_record", action="store_true", help="append nothing to bench/results")
    add("--peak_of", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where contenders disagree or `--check` finds a target missed."""
    if min(arguments.pairs_per_step, arguments.repeats, arguments.steps) < 1:
        raise SystemExit("bench train: --pairs_per_step, --repeats and --steps are at least 1")
    with quiet(), tempfile.TemporaryDirectory(prefix="fastpref-bench-") as scratch:
        if arguments.peak_of:
            print(json.dumps(_own_peak(arguments, Path(scratch))))
            return 0
        return _compare(arguments, Path(scratch))


def _compare(arguments: argparse.Namespace, scratch: Path) -> int:
    from bench.contenders import Contender, Fastpref, Trl, disagreement

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
    contenders: list[Contender] = [ours, *theirs]
    wrong = disagreement(contenders, GATE_STEPS, WITHIN)
    if wrong:
        print(f"bench train: the contenders disagree, so nothing is timed: {wrong}")
        return 1
    print(f"{GATE_STEPS} steps of all contenders agree to {WITHIN:g}; {dataset}")

    timings = _times(arguments, contenders)
    memory = (
        {} if arguments.no_memory else {c.name: _peak_of(c.name, arguments) for c in contenders}
    )
    values = _values(timings, memory)
    checks = results.verdicts("train", {k: v["value"] if v else None for k, v in values.items()})
    useful = timings["fastpref"].tokens  # packed: every token that is needed, once
    shown = {
        name: timing.facts(timing.tokens if name == "reference" else useful)
        | (memory.get(name) or {})
        for name, timing in timings.items()
    }
    setting = {
        "model": arguments.model_name_or_path,
        "parameters": sum(p.numel() for p in ours.model.module.parameters()),
        "dtype": "float32",
        "dataset": dataset,
        **{
            k: vars(arguments)[k]
            for k in ("max_length", "pairs_per_step", "repeats", "steps", "seed")
        },
    }
    record = results.record_of("train", where, setting, shown, values, checks)
    print(_table(shown, values, checks))
    for name in missing:
        print(f"{name} is not installed: nothing to compare with (pip install 'fastpref[{name}]')")
    return results.close(arguments, record, checks, warning=warning, missing=missing)


def _job(arguments: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    wanted = GATE_STEPS + (arguments.steps + 1) * arguments.repeats
    least = max(GATE_STEPS, arguments.steps + 1, PEAK_STEPS)
    return find_job(arguments, scratch, max(wanted, WARM_STEPS + PEAK_STEPS), least)


def find_job(
    arguments: argparse.Namespace, scratch: Path, batches: int, least: int
) -> tuple[Any, str]:
    """What to train, and where its pairs are from; shuffled, as a file holds one behavior. At most
    ``batches`` of them; SystemExit where there are not even ``least``."""
    from bench.contenders import Job
    from fastpref import base
    from fastpref.data.formats import read_pairs

    names, source = _dataset(arguments, scratch)
    pairs, _ = read_pairs(names, on_bad_rows="drop")
    random.Random(arguments.seed).shuffle(pairs)
    batch, length = arguments.pairs_per_step, arguments.max_length
    if len(pairs) < batch * least:
        raise SystemExit(f"bench: {source} holds {len(pairs)} pairs; {batch * least} are needed")
    name = arguments.model_name_or_path
    model = str(base.base_dir()) if base.is_base_name(name) else name
    return Job(pairs[: batch * batches], batch, model, scratch, max_length=length), source


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


def _times(arguments: argparse.Namespace, contenders: Sequence[Any]) -> dict[str, Timing]:
    """By name; "reference" is fastpref's reference pass over the pairs of a turn, per step."""
    from tqdm import tqdm

    batches = arguments.steps + 1
    names = [*(c.name for c in contenders), "reference"]
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    work: dict[str, list[Work]] = {name: [] for name in names}
    turns = measure.interleaved(contenders, arguments.repeats)
    for repeat, one in tqdm(turns, total=arguments.repeats * len(contenders), unit="turn"):
        first = GATE_STEPS + repeat * batches
        seconds[one.name].append(one.run(first, batches).seconds)
        work[one.name] += one.work(first, batches)[1:]
        if one is contenders[0]:
            seconds["reference"].append([one.reference_seconds(first, batches)])
            work["reference"].append(one.reference_work(first, batches))
    steps = dict.fromkeys(names, arguments.repeats * arguments.steps)
    steps["reference"] = arguments.repeats * batches
    shape = contenders[0].shape
    return {name: _timing(seconds[name], work[name], steps[name], shape) for name in names}


def _values(
    timings: Mapping[str, Timing], memory: Mapping[str, Mapping[str, int] | None]
) -> dict[str, dict[str, float] | None]:
    """Ratios: TRL's over fastpref's for times, fastpref's over TRL's for memory. ``bound`` is what
    counting operations gives. None: not measured."""
    found: dict[str, dict[str, float] | None] = {}
    ours, reference = timings["fastpref"], timings["reference"]
    for name, tuned in TRL.items():
        found[f"train_vs_{name}"] = found[f"memory_vs_{name}"] = None
        if name in timings:
            counted = 0.0 if tuned else 1.0
            turns = zip(timings[name].seconds, ours.seconds, reference.seconds, strict=True)
            ratios = Quantiles.of(
                [fmean(theirs) / (fmean(own) + counted * fmean(ref)) for theirs, own, ref in turns]
            )
            bound = timings[name].flops / (ours.flops + counted * reference.flops)
            spread = {"value": ratios.q50, "q20": ratios.q20, "q80": ratios.q80}
            found[f"train_vs_{name}"] = {**spread, "bound": bound}
        own_peak, their_peak = memory.get("fastpref"), memory.get(name)
        if own_peak and their_peak:
            found[f"memory_vs_{name}"] = {"value": own_peak["used"] / their_peak["used"]}
    return found


def _peak_of(name: str, arguments: argparse.Namespace) -> dict[str, int] | None:
    """Peak memory of a contender in a process of its own; None where it cannot be measured."""
    command = [sys.executable, "-m", "bench", "train", "--peak_of", name, "--repeats", "1"]
    for key in ("pairs_per_step", "seed", "max_length", "model_name_or_path"):
        command += [f"--{key}", str(getattr(arguments, key))]
    if arguments.dataset_name:
        command += ["--dataset_name", *arguments.dataset_name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"peak memory of {name} not measured: {done.stderr.strip().splitlines()[-1:]}")
        return None
    peak: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peak


def _own_peak(arguments: argparse.Namespace, scratch: Path) -> dict[str, int]:
    """`measure.peak_memory` of a contender's steps, and of fastpref's reference pass too."""
    from bench.contenders import Fastpref, Trl

    for library in ("transformers.models.llama.modeling_llama", "trl", "datasets"):
        with suppress(ImportError):
            importlib.import_module(library)  # code is no contender's memory
    job, _ = _job(arguments, scratch)

    def build() -> Callable[[], object]:
        name = arguments.peak_of
        if name != Fastpref.name:
            trainer = Trl(job, tuned=TRL[name])
            trainer.run(0, WARM_STEPS)
            return lambda: trainer.run(WARM_STEPS, PEAK_STEPS)
        ours = Fastpref(job)
        ours.run(0, WARM_STEPS)

        def measured() -> None:
            ours.reference_seconds(WARM_STEPS, PEAK_STEPS)
            ours.run(WARM_STEPS, PEAK_STEPS)

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
    logging.getLogger("fastpref").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
