"""The progress bar of a run, and the clock of its last line."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from fastpref.data.loader import StepPlan
from fastpref.observe import StepView


class Bar:
    """Steps done, time left, loss, margin, accuracy, and the figures of `Perf`.

    What does not fit into the terminal's width is left out, the last figures first; 80 columns hold
    all up to MFU.
    """

    def __init__(self, last_step: int, first_step: int, show: bool) -> None:
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            disable=not show,
            bar_format="{desc}",  # no picture of a bar: the figures need the place
        )
        self._first, self._last = first_step, last_step
        self._shown: list[str] = []

    def step(self, rates: Mapping[str, float | None]) -> None:
        """Count one optimizer step; ``rates`` as `Perf.rates` gives them."""
        if self.bar.disable:
            return
        self.bar.n += 1
        figures = [*self._shown, *_speeds(rates)]
        width = _width(self.bar.fp)
        left = self._left(width >= 100)
        while figures and len(" ".join([left, *figures])) > width:
            figures.pop()
        self.bar.set_description_str(" ".join([left, *figures]), refresh=False)
        self.bar.update(0)

    def show(self, view: StepView) -> None:
        """What a step gave, for the line of the next `step`: it may be known one step late."""
        margins = [m for own in view.columns for m in own["margin"].tolist()]
        count = max(len(margins), 1)
        self._shown = [
            f"loss {view.scalar('loss'):.4f}",
            f"margin {sum(margins) / count:+.3g}",
            f"acc {sum(m > 0 for m in margins) / count:.0%}",
        ]

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()

    def _left(self, elapsed: bool) -> str:
        """Steps done of all, time spent if asked for, time left."""
        bar = self.bar
        spent, done = bar.format_dict["elapsed"], bar.n - self._first
        to_go = bar.format_interval(spent / done * (self._last - bar.n))
        before = f" {bar.format_interval(spent)}" if elapsed else ""
        return f"{bar.n}/{self._last}{before}<{to_go}"


def _width(file: Any) -> int:
    """Columns of the terminal behind a file; more than any line has where there is none."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"])
    try:
        return os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 10**6


def _speeds(rates: Mapping[str, float | None]) -> list[str]:
    tokens, pairs = rates["tokens_per_second"], rates["pairs_per_second"]
    parts = (("MFU", "mfu"), ("data", "data_wait"), ("rec", "record_overhead"))
    found = [(name, rates[key]) for name, key in parts]
    return [
        *([f"{_short(tokens)} tok/s"] if tokens else []),  # none where the states are there already
        f"{_short(pairs or 0.0)} pair/s",
        *[f"{name} {100 * value:.0f}%" for name, value in found if value is not None],
    ]


def _short(n: float) -> str:
    """Two or three digits: 0.12, 8.2, 812, 8.2k, 81k."""
    for unit, size in (("M", 1e6), ("k", 1e3), ("", 1.0)):
        if n >= size or not unit:
            digits = 0 if n / size >= 10 else 1 if n >= 1 else 2
            return f"{n / size:.{digits}f}{unit}"
    raise AssertionError(n)


class Clock:
    """Time and work of this process's part of a run, from the first step to the last."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps = self.pairs = 0

    def count(self, plan: StepPlan) -> None:
        """One more step is done."""
        self.steps += 1
        self.pairs += plan.num_pairs

    def line(self, step: int, loss_sum: float) -> dict[str, float]:
        """TRL's names for the end of a run: evaluations and checkpoints are in the time, samples
        are pairs, train_loss is the mean over all steps of the run, resumed or not."""
        seconds = time.perf_counter() - self.began
        return {
            "step": step,
            "train_runtime": seconds,
            "train_samples_per_second": self.pairs / seconds,
            "train_steps_per_second": self.steps / seconds,
            "train_loss": loss_sum / step,
        }
