"""What norms of the head's gradients cost: `python -m bench norms --part head` on the CPU, and part
of `python -m bench gpu --part op` on a GPU.

Forward and backward of `linear_logprob` with norms over the same without, interleaved in one run; a
share is the median over turns of a contender's time over the plain one's of the same turn.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from fastpref_kernels import linear_logprob, reference
from torch import Tensor

from bench import measure, results
from bench.measure import Quantiles

if TYPE_CHECKING:
    from bench.norm_cases import Clock, Session

# Rows, hidden, vocabulary, rows of a segment.
CPU_SIZES, GPU_SIZES = (512, 1024, 32000, 16), (8192, 4096, 128256, 512)
DRY_SIZES = (64, 16, 300, 8)
# Rows of other segments: on a GPU those that go by plain products, in small blocks, by gradients.
GPU_LENGTHS, DRY_LENGTHS = (2, 16, 8192), (2, 64)
PLAIN = "plain"
# name -> norms, group_size: segments each for itself, and in groups, as pairs have them.
CPU_CONTENDERS: dict[str, tuple[str | None, int]] = {
    PLAIN: (None, 1),
    "exact_1": ("exact", 1),
    "exact_3": ("exact", 3),
    "sketch_1": ("sketch", 1),
    "sketch_3": ("sketch", 3),
}
GPU_CONTENDERS: dict[str, tuple[str | None, int]] = {
    PLAIN: (None, 1),
    "exact": ("exact", 1),
    "exact_pairs": ("exact", 2),
    "sketch": ("sketch", 1),
    "sketch_pairs": ("sketch", 2),
}
OTHER_CONTENDERS: dict[str, tuple[str | None, int]] = {PLAIN: (None, 1), "exact": ("exact", 1)}
# Relative error of a squared norm, by dtype, before anything is timed.
WITHIN = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
WARM_UP = 2


def run(arguments: argparse.Namespace) -> int:
    """Measure on the CPU, print, record; 1 where `--check` finds a target missed.

    One thread, and its own time on the processor, which a machine that others use disturbs less.
    """
    torch.set_num_threads(1)
    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    case = Case(torch.device("cpu"), CPU_SIZES)
    wrong = case.wrong()
    if wrong:
        raise SystemExit(f"bench norms: {wrong}")
    seconds = case.times(CPU_CONTENDERS, arguments.repeats, _processor_time)
    print(f"{case.name}; norms to {case.error:.0e}")
    values = {name: share for name, share in _shown(seconds).items() if name != PLAIN}
    checks = results.verdicts("head_norms", {name: own["value"] for name, own in values.items()})
    setting = dict(zip(("rows", "dim", "vocab", "segment"), CPU_SIZES, strict=True))
    setting |= {"threads": 1, "repeats": arguments.repeats}
    shown = {"error": case.error, "seconds": _spreads(seconds)}
    record = results.record_of("head_norms", where, setting, shown, dict(values), checks)
    for line in results.ratio_lines(values, checks):
        print(line)
    return results.close(arguments, record, checks, warning=warning)


def run_on(session: Session, seconds_of: Clock) -> dict[str, dict[str, float] | None]:
    """The same on a GPU: time with norms over time without, less 1; None where time was up."""
    sizes = DRY_SIZES if session.dry else GPU_SIZES
    values = _run_case(session, seconds_of, "", GPU_CONTENDERS, sizes)
    for length in DRY_LENGTHS if session.dry else GPU_LENGTHS:
        other = (*sizes[:3], length)
        values |= _run_case(session, seconds_of, f"_{length}", OTHER_CONTENDERS, other)
    return values


def _run_case(
    session: Session,
    seconds_of: Clock,
    suffix: str,
    contenders: Mapping[str, tuple[str | None, int]],
    sizes: tuple[int, int, int, int],
) -> dict[str, dict[str, float] | None]:
    values: dict[str, dict[str, float] | None] = {
        f"head_{name}_extra{suffix}": None for name in contenders if name != PLAIN
    }
    label = f"norms of the head, segments of {sizes[3]} rows"
    if not session.has_time(label):
        return values
    case = Case(session.device, sizes)
    wrong = case.wrong()
    if wrong:
        session.failed.append(f"{label}: {wrong}")
        return values
    clock = lambda call: seconds_of(call, session.device)  # noqa: E731
    seconds = case.times(contenders, session.repeats, clock)
    session.write({"case": label, "error": case.error, "seconds": _spreads(seconds)})
    print(f"{label}, {case.name}")
    for name, share in _shown(seconds).items():
        if name != PLAIN:
            values[f"head_{name}_extra{suffix}"] = {q: value - 1 for q, value in share.items()}
    return values


class Case:
    """The tensors of one shape."""

    def __init__(self, device: torch.device, sizes: tuple[int, int, int, int]) -> None:
        rows, dim, vocab, self.length = sizes
        self.name = f"R={rows} D={dim} V={vocab}, segments of {self.length} rows"
        self.segments = -(-rows // self.length)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        g = torch.Generator(device).manual_seed(0)

        def normal(size: int, scale: float) -> Tensor:
            drawn = torch.randn(size, dim, generator=g, device=device) * scale
            return drawn.to(self.dtype).requires_grad_()

        # Logits of standard deviation 2, whatever D is.
        self.hidden, self.weight = normal(rows, 1.0), normal(vocab, 2.0 / dim**0.5)
        self.target = torch.randint(0, vocab, (rows,), generator=g, device=device)
        ids = torch.arange(self.segments, dtype=torch.int32, device=device)
        self.segment_id = ids.repeat_interleave(self.length)[:rows]
        self.counts = [min(self.length, rows - i) for i in range(0, rows, self.length)]

    def step(self, norms: str | None, group_size: int) -> Callable[[], None]:
        """Forward and backward of hidden and weight; empty segments fill up the last group."""
        segments = -(-self.segments // group_size) * group_size
        inputs = (self.hidden, self.weight, self.target, self.segment_id)
        counts = self.counts + [0] * (segments - self.segments)
        same: dict[str, Any] = {"counts": counts, "group_size": group_size}

        def call() -> None:
            self.hidden.grad = self.weight.grad = None
            linear_logprob(*inputs, norms=norms, **same).logp.sum().backward()

        return call

    def times(
        self,
        contenders: Mapping[str, tuple[str | None, int]],
        repeats: int,
        clock: Callable[[Callable[[], object]], float],
    ) -> dict[str, list[float]]:
        """name -> seconds of each turn, contenders in turn."""
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        steps = {name: self.step(*asked) for name, asked in contenders.items()}
        for repeat, name in measure.interleaved(list(steps), repeats + WARM_UP):
            took = clock(steps[name])
            if repeat >= WARM_UP:
                seconds[name].append(took)
        return seconds

    @functools.cached_property
    def error(self) -> float:
        """Relative error of the first segment's squared norm, against its gradient: in float64, or
        in float32 where that is wide."""
        few = slice(0, self.length)
        hidden, weight = self.hidden[few].detach(), self.weight.detach()
        same: dict[str, Any] = {"num_segments": 1, "norms": "exact"}
        rest = (self.target[few], self.segment_id[few])
        ours = linear_logprob(hidden, weight, *rest, **same).gram
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        truth = reference.linear_logprob(hidden.to(wide), weight.to(wide), *rest, **same).gram
        assert ours is not None and truth is not None
        return float((ours / truth - 1).abs().max())

    def wrong(self) -> str | None:
        """Why nothing is timed; None where the norms are right."""
        if self.error <= WITHIN[self.dtype]:
            return None
        return f"a norm is off by {self.error:.1e}; not timed."


def _processor_time(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def _spreads(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    return {name: asdict(Quantiles.of(own)) for name, own in seconds.items()}


def _shown(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """name -> quantiles of its share of the plain step; printed, a line each."""
    shares = {}
    for name, own in seconds.items():
        share = Quantiles.of([a / b for a, b in zip(own, seconds[PLAIN], strict=True)])
        spread = Quantiles.of(own)
        print(
            f"  {name:14}{1e3 * spread.q50:9.2f} ms ({1e3 * spread.q20:.2f} to "
            f"{1e3 * spread.q80:.2f})  {share.q50:.3f} of plain ({share.q20:.3f} to "
            f"{share.q80:.3f})"
        )
        shares[name] = {"value": share.q50, "q20": share.q20, "q80": share.q80}
    return shares
