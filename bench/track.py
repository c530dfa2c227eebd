"""`python -m bench track --check`: what recording every pair's gradients costs a training step.

A step with `track` none, head, sketch (k = 16) and exact in turn, over and over, in one run on one
thread; a share is the median over turns of a track's time over `none`'s of the same turn, less 1.
Processor time of this process, which a machine that others use disturbs less. Passes over the rate
sample (`rate_every`) are counted apart, per measured step. Correctness first: taps against plain
gradients, and the step's gradients the same bits whatever is tracked, or nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench import measure, results
from bench.measure import Quantiles

if TYPE_CHECKING:
    import torch

    from bench.track_cases import Subject

HELP = "cost of recording every pair's gradients: track none, head, sketch, exact"
MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--sizes", nargs="+", choices=("5m", "100m", "dry"), default=["5m", "100m"])
    add("--lengths", nargs="+", choices=("persona", "hh"), default=["persona", "hh"])
    add("--pairs_per_step", type=int, default=32)
    add("--repeats", type=int, default=10, help="turns of every track")
    add("--no_opacus", action="store_true", help="leave out Opacus")
    add("--no_record", action="store_true", help="append nothing to bench/results")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where `--check` finds a target missed."""
    if min(arguments.pairs_per_step, arguments.repeats) < 1:
        raise SystemExit("bench track: --pairs_per_step and --repeats are at least 1")
    import torch

    from bench import track_opacus
    from bench.track_cases import DRY, HH, MIDDLE, PERSONA, TINY, Subject

    torch.set_num_threads(1)
    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    where["versions"]["opacus"] = measure.version_of("opacus")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    shown: dict[str, Any] = {}
    values: dict[str, dict[str, float] | None] = {}
    device = torch.device("cpu")
    for size in (s for s in (TINY, MIDDLE, DRY) if s.name in arguments.sizes):
        for lengths in (x for x in (PERSONA, HH) if x.name in arguments.lengths):
            subject = Subject(size, lengths, arguments.pairs_per_step, device)
            facts, own = measure_subject(subject, arguments.repeats, processor_seconds)
            shown[subject.name] = facts
            values |= own
            del subject
    missing: list[str] = []
    if not arguments.no_opacus:
        facts, own, reason = track_opacus.run(min(arguments.repeats, 5), processor_seconds)
        if reason:
            print(f"opacus is not timed: {reason}")
            missing.append("opacus")
        shown["opacus"] = facts
        values |= own
    checks = results.verdicts("track", {k: v["value"] if v else None for k, v in values.items()})
    setting = {k: vars(arguments)[k] for k in ("sizes", "lengths", "pairs_per_step", "repeats")}
    setting |= {"dtype": "float32", "threads": 1}
    record = results.record_of("track", where, setting, shown, values, checks)
    print("\n".join(results.ratio_lines(values, checks)))
    return results.close(arguments, record, checks, warning=warning, missing=missing)


def measure_subject(
    subject: Subject, repeats: int, clock: Callable[[Callable[[], object], torch.device], float]
) -> tuple[dict[str, Any], dict[str, dict[str, float] | None]]:
    """Facts of a model and its pairs, and the values that targets are stated for. SystemExit where
    something is wrong."""
    from bench.track_cases import MODES, stated_bytes

    wrong = subject.wrong()
    if wrong:
        raise SystemExit(f"bench track: {subject.name}: {wrong}; not timed.")
    seconds = subject.times(repeats, clock)
    rates = subject.rate_times(max(repeats // 3, 1), clock)
    peaks = {track: subject.peak_bytes(track) for track in MODES}
    values: dict[str, dict[str, float] | None] = {}
    memory = {}
    for track in MODES[1:]:
        share = Quantiles.of(
            [a / b - 1 for a, b in zip(seconds[track], seconds["none"], strict=True)]
        )
        key = f"{track}_share_{subject.name}"
        values[key] = {"value": share.q50, "q20": share.q20, "q80": share.q80}
        extra, stated = peaks[track] - peaks["none"], stated_bytes(subject, track, 0, peaks["none"])
        memory[track] = {"peak": peaks[track], "extra": extra, "stated": stated}
        beyond = max(extra - stated, 0) / subject.weight_bytes
        values[f"memory_{track}_{subject.name}"] = {"value": beyond}
    plain = Quantiles.of(seconds["none"]).q50
    for track, own in rates.items():
        of = Quantiles.of([second / plain for second in own])
        key = f"rates_share_{track}_{subject.name}"
        values[key] = {"value": of.q50, "q20": of.q20, "q80": of.q80}
    facts = {
        "error": subject.error,
        "tokens": subject.tokens,
        "pairs": len(subject.steps[0]),
        "weight_bytes": subject.weight_bytes,
        "rate_pairs": subject.rate_sample,
        "seconds": {track: asdict(Quantiles.of(own)) for track, own in seconds.items()},
        "rate_seconds": {track: asdict(Quantiles.of(own)) for track, own in rates.items()},
        "memory": memory,
    }
    print(table_of(subject.name, facts))
    return facts, values


def table_of(name: str, facts: Mapping[str, Any]) -> str:
    """A model and its pairs for people."""
    lines = [
        f"{name}: {facts['pairs']} pairs, {facts['tokens']} tokens a step, weights "
        f"{facts['weight_bytes'] / MEGABYTE:.0f} MB; gradients to {facts['error']:.0e}, same bits"
    ]
    for track, spread in facts["seconds"].items():
        own = facts["memory"].get(track)
        shown = ""
        if own:
            beside = spread["q50"] / facts["seconds"]["none"]["q50"] - 1
            shown = (
                f"{beside:+8.1%}  memory {own['extra'] / MEGABYTE:+.1f} MB "
                f"(stated {own['stated'] / MEGABYTE:.1f})"
            )
        lines.append(
            f"  {track:7}{1e3 * spread['q50']:10.1f} ms ({1e3 * spread['q20']:.1f} to "
            f"{1e3 * spread['q80']:.1f}) {shown}"
        )
    for track, spread in facts["rate_seconds"].items():
        lines.append(
            f"  rates, {track}: {1e3 * spread['q50']:.1f} ms beside a measured step, "
            f"{facts['rate_pairs']} pairs"
        )
    return "\n".join(lines)


def processor_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of all threads of this process on the processor."""
    began = time.process_time()
    call()
    return time.process_time() - began


def run_on(session: Any) -> dict[str, dict[str, float] | None]:
    """The `track` part of `bench gpu`: a Llama of 8B weights in bfloat16, pairs of 512 tokens, by
    the device's own clock; None where time was up."""
    import torch

    from bench.gpu_op import seconds_of
    from bench.track_cases import DRY, LLAMA_8B, LONG, PERSONA, Subject

    size, lengths = (DRY, PERSONA) if session.dry else (LLAMA_8B, LONG)
    names = [f"{track}_share" for track in ("sketch", "exact")]
    values: dict[str, dict[str, float] | None] = {f"track_{name}": None for name in names}
    label = f"track, Llama {size.name}"
    if not session.has_time(label):
        return values
    dtype = torch.float32 if session.dry else torch.bfloat16
    subject = Subject(size, lengths, 8, session.device, dtype)
    facts, own = measure_subject(subject, session.repeats, seconds_of)
    session.write({"case": label, **facts})
    return {f"track_{name}": own[f"{name}_{subject.name}"] for name in names}
