"""Which evaluation was the best so far, and whether to stop: transformers' rules, no callback.

Evaluations run on rank 0; every rank holds the same `Best`, since all stop and save together.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastpref import dist
from fastpref.config import Config
from fastpref.dynamics.schema import HELD_OUT


class Best:
    """The best evaluation by ``config.best_metric``; the one before training does not count.

    As in transformers, *best* is any strict improvement, and the patience is counted against it: an
    evaluation that does not beat the best one before it by more than ``early_stopping_threshold``
    costs one, one that does restores it. A metric that is not finite beats nothing.
    """

    def __init__(self, config: Config) -> None:
        self.metric = config.best_metric
        self.greater = config.greater_is_better
        if self.greater is None and self.metric is not None:
            self.greater = not self.metric.endswith("loss")
        self.patience, self.threshold = (
            config.early_stopping_patience,
            config.early_stopping_threshold,
        )
        self.step: int | None = None
        self.value: float | None = None
        self.stale = 0  # evaluations in a row without a better metric

    @property
    def stop(self) -> bool:
        """Whether the patience is used up."""
        return self.patience is not None and self.stale >= self.patience

    def demand_known(self, names: Iterable[str]) -> None:
        """Raise ValueError where no evaluation gives the metric; ``names`` are `split_name`s."""
        known = set(names)
        if self.metric is None or _full_name(self.metric, known) in known:
            return
        held_out = sorted(name for name in known if name.startswith(f"{HELD_OUT}_"))
        if not held_out:
            raise ValueError(
                f"metric_for_best_model={self.metric!r} is taken from held-out pairs, and there "
                "are none; set eval_fraction above 0 or eval_dataset_name"
            )
        short = [name.removeprefix(f"{HELD_OUT}_") for name in held_out]
        near = difflib.get_close_matches(self.metric, short, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(short)}"
        raise ValueError(f"metric_for_best_model: no evaluation gives {self.metric!r}; {hint}")

    def update(
        self, step: int, found: Mapping[str, Mapping[str, float | None]], device: torch.device
    ) -> bool:
        """Take in the evaluation after ``step``; whether it is the best so far.

        ``found``: split -> metrics, looked at on rank 0. Every rank calls it.
        """
        if self.metric is None:
            return False
        value = math.nan
        if dist.is_main():
            values = {
                f"{split}_{key}": v for split, line in found.items() for key, v in line.items()
            }
            seen = values[_full_name(self.metric, values)]
            value = seen if seen is not None and math.isfinite(seen) else math.nan
        value = dist.broadcast_number(value, device)
        sign = 1.0 if self.greater else -1.0
        gain = math.inf if self.value is None else sign * (value - self.value)
        self.stale = 0 if gain > self.threshold else self.stale + 1
        if math.isnan(value) or not gain > 0:
            return False
        self.step, self.value = step, value
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "value": self.value, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with what `state` had seen."""
        self.step, self.value, self.stale = state["step"], state["value"], state["stale"]


def _full_name(metric: str, known: Iterable[str]) -> str:
    """``eval_loss`` of ``eval_loss`` and of ``loss``."""
    return metric if metric in known else f"{HELD_OUT}_{metric}"
