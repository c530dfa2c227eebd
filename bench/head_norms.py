"""`python -m bench norms --part head`: what norms of head gradients cost on the CPU.

Forward and backward of `linear_logprob` with norms over the same without, in one run, one thread.
Time is the process's own on the processor, so that a machine that others use disturbs it less; and
a share is the median over turns of a contender's time over the plain one's of the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench import measure, results
from bench.measure import Quantiles

ROWS, DIM, VOCAB, SEGMENT = 512, 1024, 32000, 16
WITHIN = 1e-4  # of a norm, before anything is timed
# name -> norms, group_size
CONTENDERS: dict[str, tuple[str | None, int]] = {
    "plain": (None, 1),
    "exact_1": ("exact", 1),
    "exact_3": ("exact", 3),
    "sketch_1": ("sketch", 1),
    "sketch_3": ("sketch", 3),
}


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where `--check` finds a target missed."""
    import torch

    torch.set_num_threads(1)
    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    steps = {name: _step(*asked) for name, asked in CONTENDERS.items()}
    error = _error()
    if not error <= WITHIN:
        raise SystemExit(f"bench norms: a norm is off by {error:.1e}; not timed.")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat, name in measure.interleaved(list(steps), arguments.repeats + 1):
        began = time.process_time()
        steps[name]()
        if repeat:
            seconds[name].append(time.process_time() - began)
    values = {}
    print(f"R={ROWS} D={DIM} V={VOCAB}, segments of {SEGMENT} rows; norms to {error:.0e}")
    for name, own in seconds.items():
        share = Quantiles.of([a / b for a, b in zip(own, seconds["plain"], strict=True)])
        spread = Quantiles.of(own)
        print(
            f"  {name:10}{1e3 * spread.q50:9.1f} ms ({1e3 * spread.q20:.1f} to "
            f"{1e3 * spread.q80:.1f})  {share.q50:.3f} of plain "
            f"({share.q20:.3f} to {share.q80:.3f})"
        )
        if name != "plain":
            values[name] = {"value": share.q50, "q20": share.q20, "q80": share.q80}
    checks = results.verdicts("head_norms", {name: own["value"] for name, own in values.items()})
    setting = {"rows": ROWS, "dim": DIM, "vocab": VOCAB, "segment": SEGMENT, "threads": 1}
    setting["repeats"] = arguments.repeats
    shown = {
        "error": error,
        "seconds": {name: asdict(Quantiles.of(own)) for name, own in seconds.items()},
    }
    record = results.record_of("head_norms", where, setting, shown, dict(values), checks)
    for line in results.ratio_lines(values, checks):
        print(line)
    if not arguments.no_record:
        print(f"appended to {results.keep(record).relative_to(measure.ROOT)}")
    if warning:
        print(f"warning: {warning}")
    failed = not all(check.met for check in checks)
    print(json.dumps({**record, "ok": not failed}))
    return int(arguments.check and failed)


def _inputs() -> dict[str, Any]:
    import torch

    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(ROWS, DIM, generator=g) / 2,
        "weight": torch.randn(VOCAB, DIM, generator=g) / 8,
        "target": torch.randint(0, VOCAB, (ROWS,), generator=g),
        "segment_id": torch.arange(ROWS, dtype=torch.int32) // SEGMENT,
    }


def _step(norms: str | None, group_size: int) -> Callable[[], object]:
    """Forward and backward of hidden and weight."""
    from fastpref_kernels import linear_logprob

    inputs = _inputs()
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    segments = -(-ROWS // SEGMENT // group_size) * group_size

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        out = linear_logprob(**inputs, num_segments=segments, group_size=group_size, norms=norms)
        out.logp.sum().backward()

    return step


def _error() -> float:
    """Largest relative error of the norms of two segments, against explicit gradients."""
    from fastpref_kernels import linear_logprob, reference

    inputs = _inputs()
    few = {
        name: value if name == "weight" else value[: 2 * SEGMENT] for name, value in inputs.items()
    }
    wide = {
        name: value.double() if value.is_floating_point() else value for name, value in few.items()
    }
    ours = linear_logprob(**few, num_segments=2, norms="exact").gram
    truth = reference.linear_logprob(**wide, num_segments=2, norms="exact").gram
    assert ours is not None and truth is not None
    return float(((ours.double() - truth) / truth).abs().max())
