"""Optimizer, learning-rate schedule and clipping, numerically those of transformers' Trainer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.config import Config

# transformers.Trainer.get_decay_parameter_names (5.23) leaves these and all LayerNorms undecayed.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: Config
) -> torch.optim.Optimizer:
    """AdamW or plain SGD over the parameters that require gradients, in two groups: decayed, and
    biases and norm weights.

    A LayerNorm cannot be told from a name alone (GPT-2 calls it `ln_1`), so one-dimensional weights
    are never decayed. The fused kernels are used on every device: one pass over the memory, on the
    CPU too. Raises ValueError when nothing is to be trained.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    undecayed: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or _UNDECAYED.search(name)
            (undecayed if plain else decayed).append((name, parameter))
    # Named, so that a checkpoint can tell whether its moments belong to these parameters.
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("build_optimizer: no parameter requires a gradient; nothing would learn")
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def linear(progress: float) -> float:
    """1 to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """1 to 0 along half a cosine wave."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
}


class Schedule:
    """Learning rate as a function of the optimizer steps done, set into the optimizer.

    rate(s) = peak * s / w  for s < w,  peak * shape((s - w) / max(1, total - w))  after, with
    w = ceil(warmup_ratio * total): transformers' linear, cosine and constant_with_warmup. The first
    step of a warm-up therefore has rate 0, as there. Call `step` after each optimizer step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, total_steps: int) -> None:
        self.optimizer = optimizer
        self.peak = config.learning_rate
        self.shape = SHAPES[config.lr_scheduler_type]
        self.total_steps = total_steps
        self.warmup_steps = math.ceil(config.warmup_ratio * total_steps)
        self.steps_done = 0
        self._apply()

    def rate(self, steps_done: int) -> float:
        """Learning rate of the step that follows `steps_done` finished ones."""
        if steps_done < self.warmup_steps:
            return self.peak * (steps_done / self.warmup_steps)
        after = max(1, self.total_steps - self.warmup_steps)
        progress = (steps_done - self.warmup_steps) / after
        return self.peak * max(0.0, self.shape(min(1.0, progress)))

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


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_steps: int) -> Schedule:
    """The schedule of `config` over `total_steps` optimizer steps; sets the first rate."""
    if total_steps < 1:
        raise ValueError(f"build_scheduler: expected at least 1 step, got {total_steps}")
    return Schedule(optimizer, config, total_steps)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`.

    Returns (norm before, factor applied), both 0-d on the parameters' device, without waiting for
    the device: factor = min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.
    `max_norm` 0 scales nothing. A non-finite norm makes a non-finite factor and gradients: test the
    norm before the optimizer's step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("clip_gradients: no parameter has a gradient; call it after backward")
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm == 0:
        return norm, torch.ones_like(norm)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm, factor
