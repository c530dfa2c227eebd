"""Clocks of a run: throughput, MFU, and what waiting for data and recording cost.

Nothing here waits for the device but `Perf.window`, which is called where a line is written. A
step's time is the host's: it is never more than a step ahead, and even with the device where a line
is written. What data and recording cost is measured on the device itself: on CUDA by events before
and after, so that work of the host which the device does not wait for counts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastpref.batch import PairBatch
from fastpref.data.loader import StepPlan
from fastpref.flops import Shape
from fastpref.peaks import peak_tflops
from fastpref.tracing import named

PARTS = ("data_wait", "record_overhead")
WARM_UP = 5  # steps: kernels are compiled and tuned, memory is got from the system


class Stretches:
    """Seconds that pass on a device between the two ends of stretches of work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A stretch."""
        if not self._cuda:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ends[0].record()
        yield
        ends[1].record()
        self._events.append(ends)

    def take(self) -> float:
        """Seconds of all stretches since the last call; waits for the end of the last one."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(a.elapsed_time(b) for a, b in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass
class Sums:
    """Of some steps."""

    steps: int = 0
    pairs: int = 0  # of all ranks
    tokens: int = 0  # fed, of this rank
    flops: float = 0.0  # useful, of this rank
    seconds: float = 0.0
    data: float = 0.0
    recording: float = 0.0
    evaluation: float = 0.0

    def add(self, other: Sums) -> None:
        """Add those of other steps."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Perf:
    """What perf.jsonl says of the steps.

    ``shape``: of the model, None where its arithmetic is not known; ``peak``: of the device in
    TFLOP/s, None where that is not known. MFU is None where either is. ``warm_up``: steps at the
    start of this process that the summary leaves out.
    """

    def __init__(
        self,
        device: torch.device,
        shape: Shape | None = None,
        peak: float | None = None,
        warm_up: int = WARM_UP,
    ) -> None:
        self.device, self.shape, self.peak, self.warm_up = device, shape, peak, warm_up
        self.now = Sums()  # since clocks of the device were read last
        self.line = Sums()  # before that, since the last line
        self.warm, self.steady = Sums(), Sums()  # before that, in the warm-up and after it
        self._counted = (0, 0.0)  # tokens and arithmetic before the batches of a step
        self._parts: dict[str, float | None] = {}  # of the last line, what the device's clocks say
        self._data, self._recording = Stretches(device), Stretches(device)
        self._began = self._paused = 0.0

    def batches(self, batches: Iterable[PairBatch], reference: bool) -> Iterator[PairBatch]:
        """``batches``, whose making is timed and whose arithmetic is counted. ``reference``: a
        moving one scores them too."""
        source = iter(batches)
        self._counted = self.now.tokens, self.now.flops
        while True:
            with named("data"), self._data():
                batch = next(source, None)
            if batch is None:
                return
            self.now.tokens += batch.num_tokens
            if self.shape:
                self.now.flops += self.shape.step(
                    batch.lengths,
                    batch.rows.numel(),
                    batch.unread,
                    states=batch.hidden is not None,
                    reference=reference,
                )
            yield batch

    def undo(self) -> None:
        """The batches of the last `batches` were no step's: that is tried again."""
        self.now.tokens, self.now.flops = self._counted

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around what is done for metrics and records alone."""
        with named("record"), self._recording():
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time an evaluation apart from training."""
        began = time.perf_counter()
        yield
        self.now.evaluation += time.perf_counter() - began

    def begin(self) -> None:
        """A step begins."""
        self._began, self._paused = time.perf_counter(), self.now.evaluation

    @property
    def ends_warm_up(self) -> bool:
        """Whether the step that began is the last of the warm-up, so that it is to be waited for
        before it is counted."""
        return self.warm.steps + self.steady.steps + self.now.steps + 1 == self.warm_up

    def step(self, plan: StepPlan) -> None:
        """Count the step that began."""
        warm = self.ends_warm_up
        seconds = time.perf_counter() - self._began - (self.now.evaluation - self._paused)
        self.now.steps += 1
        self.now.pairs += plan.num_pairs
        self.now.seconds += seconds
        if warm:
            self.read()

    def sentence(self) -> str:
        """`summary` for people; after it."""
        sums = self.steady if self.steady.steps else self.warm
        if not sums.steps:
            return "no step was made"
        rates = self.rates(sums)
        parts = [f"{sums.seconds / sums.steps:.3g} s a step"]
        if sums.tokens:
            parts.append(f"{rates['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{rates['pairs_per_second']:,.3g} pairs/s")
        if rates["tflops_per_second"]:
            parts.append(f"{rates['tflops_per_second']:.3g} useful TFLOP/s")
        mfu = rates["mfu"]
        parts.append("MFU not known (peak_tflops)" if mfu is None else f"MFU {100 * mfu:.1f} %")
        parts.append(f"data wait {100 * (rates['data_wait'] or 0):.2f} %")
        parts.append(f"recording {100 * (rates['record_overhead'] or 0):.2f} %")
        if self.steady.steps:
            parts.append(f"without the first {self.warm.steps} steps, {self.warm.seconds:.3g} s")
        return "; ".join(parts)

    def read(self) -> None:
        """Read the clocks of the device, which is waited for."""
        now, self.now = self.now, Sums()
        now.data, now.recording = self._data.take(), self._recording.take()
        (self.warm if self.warm.steps < self.warm_up else self.steady).add(now)
        self.line.add(now)

    def window(self) -> dict[str, float | None]:
        """The line of the steps since the last call."""
        self.read()
        line, self.line = self.line, Sums()
        rates = self.rates(line)
        self._parts = {name: rates[name] for name in PARTS}
        return {
            "steps": line.steps,
            "seconds": line.seconds,
            "evaluation_seconds": line.evaluation,
            **rates,
        }

    def live(self) -> dict[str, float | None]:
        """Throughput since the last line, as far as the host knows it without waiting; what is
        measured on the device is that of the line before."""
        sums = Sums()
        sums.add(self.line)
        sums.add(self.now)
        return self.rates(sums) | (self._parts or dict.fromkeys(PARTS))

    def rates(self, sums: Sums) -> dict[str, float | None]:
        """Throughput over steps; a rank's own, pairs apart."""
        tflops = sums.flops / sums.seconds / 1e12 if self.shape else None
        return {
            "pairs_per_second": sums.pairs / sums.seconds,
            "tokens_per_second": sums.tokens / sums.seconds,
            "tflops_per_second": tflops,
            "mfu": tflops / self.peak if tflops is not None and self.peak else None,
            "data_wait": sums.data / sums.seconds,
            "record_overhead": sums.recording / sums.seconds,
        }

    def summary(self) -> dict[str, float | None]:
        """Of the run's steady state, for its last line; of all steps where there were no others."""
        self.read()
        sums = self.steady if self.steady.steps else self.warm
        if not sums.steps:
            return {}
        return {
            "warm_up_steps": self.warm.steps,
            "warm_up_seconds": self.warm.seconds,
            "steady_steps": self.steady.steps,
            "seconds_per_step": sums.seconds / sums.steps,
            **self.rates(sums),
        }


def warm_up_steps(steps: int, traced: int) -> tuple[int, int]:
    """Of a process that makes ``steps`` steps: those of its warm-up, and how many of the ``traced``
    ones asked for come after it, before the steady state."""
    traced = min(traced, steps)
    return min(WARM_UP, (steps - traced) // 2), traced


def device_peak(device: torch.device, dtype: torch.dtype, asked: float | None) -> float | None:
    """TFLOP/s that MFU is measured against: ``asked``, else what is known of a CUDA device."""
    if asked is not None:
        return asked
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
