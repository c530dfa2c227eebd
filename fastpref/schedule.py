"""The learning rate of every step: transformers' schedules, by their names, as pure functions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch

from fastpref.config import Config

log = logging.getLogger(__name__)

WARMUP_RATIO = 0.1  # where neither warmup_ratio nor warmup_steps is set


def warmup_steps(config: Config, total_steps: int) -> int:
    """Optimizer steps in which the rate rises: of ``warmup_steps``, which below 1 is a part of all
    steps (as in transformers), else of ``warmup_ratio``."""
    if config.warmup_steps is not None and config.warmup_steps >= 1:
        return int(config.warmup_steps)
    part = config.warmup_steps if config.warmup_steps is not None else config.warmup_ratio
    return math.ceil((WARMUP_RATIO if part is None else part) * total_steps)


def rate_factor(config: Config, total_steps: int) -> Callable[[int], float]:
    """Finished optimizer steps -> what ``learning_rate`` is multiplied by in the step after them.

    A function of its argument alone, which is all that a resumed run needs. Raises ValueError where
    the schedule does not fit into ``total_steps``.
    """
    if total_steps < 1:
        raise ValueError(f"rate_factor: expected at least 1 step, got {total_steps}")
    kind, kwargs = config.lr_scheduler_type, dict(config.lr_scheduler_kwargs)
    warmup = warmup_steps(config, total_steps)
    _demand_room(kind, kwargs, warmup, total_steps)
    if kind == "linear":
        return lambda steps_done: _linear(steps_done, warmup, total_steps)

    from transformers import get_scheduler

    # transformers' "constant" passes the warm-up over in silence; here the warm-up is a setting of
    # its own for every shape.
    name = "constant_with_warmup" if kind == "constant" else kind
    # Its schedules are functions of the step that come wrapped into an optimizer's companion; they
    # read the highest rate from the optimizer.
    carrier = torch.optim.SGD([torch.zeros(())], lr=config.learning_rate)
    # A number of stable steps given beside a total makes transformers warn.
    total = None if "num_stable_steps" in kwargs else total_steps
    scheduler = get_scheduler(name, carrier, warmup, total, scheduler_specific_kwargs=kwargs)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def _linear(steps_done: int, warmup: int, total_steps: int) -> float:
    """Up to 1 and down to 0 in straight lines; 1 - s/n where transformers has (n - s)/n, which
    differs in the last bit."""
    if steps_done < warmup:
        return steps_done / warmup
    return 1.0 - min(1.0, (steps_done - warmup) / max(1, total_steps - warmup))


def _demand_room(kind: str, kwargs: Mapping[str, object], warmup: int, total_steps: int) -> None:
    decay, stable = kwargs.get("num_decay_steps", 0), kwargs.get("num_stable_steps", 0)
    assert isinstance(decay, int) and isinstance(stable, int)
    if warmup + stable + decay > total_steps and kind == "warmup_stable_decay":
        raise ValueError(
            f"lr_scheduler_kwargs: warm-up ({warmup} steps), num_stable_steps ({stable}) and "
            f"num_decay_steps ({decay}) are more than the run's {total_steps} steps; set less"
        )
    if kind == "polynomial" and warmup >= total_steps:
        raise ValueError(
            f"lr_scheduler_type: polynomial needs steps after the warm-up, which takes {warmup} of "
            f"the run's {total_steps}; set warmup_steps to less"
        )


class Schedule:
    """Learning rate as a function of the optimizer steps done, set into the optimizer.

    rate(s) = learning_rate * factor(s), with `rate_factor` of the configuration. The first step of
    a warm-up has rate 0, as in transformers. Call `step` after each optimizer step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, total_steps: int) -> None:
        self.optimizer = optimizer
        self.peak = config.learning_rate
        self.factor = rate_factor(config, total_steps)
        warmup = warmup_steps(config, total_steps)
        if warmup >= total_steps:
            log.warning(
                "the learning rate rises from 0 for %d steps and the run has %d: it never falls",
                warmup,
                total_steps,
            )
        self.steps_done = 0
        self._apply()

    def rate(self, steps_done: int) -> float:
        """Learning rate of the step that follows `steps_done` finished ones."""
        return self.peak * self.factor(steps_done)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the coming step."""
        return self.rate(self.steps_done)

    def step(self) -> None:
        """Count one finished optimizer step and set the rate of the next."""
        self.steps_done += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after as many steps as `state` had done."""
        self.steps_done = state["steps_done"]
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
