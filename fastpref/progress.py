"""The progress bar of a run, and the clocks that perf.jsonl keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from fastpref.data.loader import StepPlan
from fastpref.observe import StepView
from fastpref.step import StepResult


class Bar:
    """Steps done, time left, loss, margin, accuracy, tokens/s and pairs/s.

    Tokens are the packed ones that this rank's body computed. Time spent in `paused` (evaluations)
    is kept apart, so that throughput is that of training.
    """

    def __init__(self, last_step: int, first_step: int, show: bool) -> None:
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            disable=not show,
            dynamic_ncols=True,
            # No picture of a bar: the figures have to fit into 80 columns.
            bar_format="{n}/{total} {elapsed}<{remaining}{postfix}",
        )
        self._shown = ""
        self._empty()

    def step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """Count one optimizer step that took ``seconds``."""
        self.seconds += seconds
        self.steps += 1
        self.pairs += plan.num_pairs
        self.tokens += sum(r.batch.num_tokens for r in result.pairs)
        speed = f"{self.pairs / self.seconds:.0f} pairs/s"
        if self.tokens:  # none where the body's states are there already
            speed = f"{self.tokens / self.seconds:.0f} tok/s {speed}"
        self.bar.set_postfix_str(f"{self._shown}{speed}", refresh=False)
        self.bar.update()

    def show(self, view: StepView) -> None:
        """What a step gave, for the line of the next `step`: it may be known one step late."""
        margins = [m for own in view.columns for m in own["margin"].tolist()]
        count = max(len(margins), 1)
        self._shown = (
            f"loss {view.scalar('loss'):.4f} margin {sum(margins) / count:+.3g} "
            f"acc {sum(m > 0 for m in margins) / count:.2f} "
        )

    def window(self) -> dict[str, float]:
        """Clocks since the last call, for perf.jsonl; empties them."""
        line = {
            "steps": self.steps,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation,
            "pairs_per_second": self.pairs / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }
        self._empty()
        return line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time an evaluation apart from training."""
        began = time.perf_counter()
        yield
        self.evaluation += time.perf_counter() - began

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()

    def _empty(self) -> None:
        self.seconds = self.evaluation = 0.0
        self.steps = self.pairs = self.tokens = 0


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
