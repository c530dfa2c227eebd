"""What changes while a run runs, and how a checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import lora
from fastpref.balance import Balancer
from fastpref.best import Best
from fastpref.checkpoint import TrainState, load_checkpoint
from fastpref.config import Config
from fastpref.drift import Boundaries
from fastpref.dynamics.taps import Taps
from fastpref.masters import Masters
from fastpref.model import PairModel
from fastpref.observe import StepView, Window
from fastpref.probes import Probing
from fastpref.reference import is_live
from fastpref.retry import TokenBudget
from fastpref.schedule import Schedule
from fastpref.track import RateTracker


@dataclass
class State:
    """What changes while a run runs; a checkpoint holds all of it."""

    model: PairModel
    optimizer: torch.optim.Optimizer
    scheduler: Schedule
    window: Window  # sums since the last line of metrics.jsonl
    best: Best  # what the evaluations said so far
    key: str  # names the initial weights, the data and the reference: a resumed run shares them
    reference: PairModel | None = None  # the one that follows the policy (sync_ref_model)
    taps: Taps | None = None  # what sees every pair's gradient (track)
    balancer: Balancer | None = None  # what weighs the behaviors' losses (balance)
    masters: Masters | None = None  # float32 copies of bfloat16 weights, which the optimizer moves
    budget: TokenBudget | None = None  # tokens of a micro-batch, which memory may have halved
    head_start: Tensor | None = None  # (V, D) initial head weight, where the head alone learns
    probing: Probing | None = None  # what scores fixed responses (probe_every)
    tracker: RateTracker | None = None  # what measures update rates (rate_every)
    boundaries: Boundaries = field(default_factory=Boundaries)  # as the run began
    step: int = 0  # finished optimizer steps
    num_tokens: int = 0  # of both sequences of every pair so far, as TRL counts
    loss_sum: float = 0.0  # of every step's loss so far

    def observe(self, view: StepView) -> None:
        """Count a finished step."""
        self.window.add(view, self.model.router)
        self.num_tokens += view.plan.num_tokens
        self.loss_sum += view.scalar("loss")

    def updates(self) -> dict[str, Tensor]:
        """Columns of `steps`: where the head alone learns the Frobenius norm () of its weight minus
        its start, with LoRA those (A,) of what the A adapters add; empty elsewhere."""
        found: dict[str, Tensor] = {}
        if self.head_start is not None:
            moved = torch.dist(self.model.head.weight.detach(), self.head_start)
            found["head_update_norm"] = moved
        if lora.is_adapted(self.model.module):
            norms = list(lora.update_norms(self.model.module).values())
            if norms:
                found["lora_update_norm"] = torch.stack(norms)
        return found

    def saved(self, log_history: list[dict[str, Any]]) -> TrainState:
        """The form in which checkpoints hold it."""
        counters = {
            "step": self.step,
            "key": self.key,
            "num_tokens": self.num_tokens,
            "loss_sum": self.loss_sum,
            "window": self.window.sums,
            "best": self.best.state_dict(),
        }
        if self.balancer:
            counters["balance"] = self.balancer.state_dict()
        if self.probing:
            counters["probes"] = self.probing.state_dict()
        if self.budget and (halved := self.budget.state_dict()):
            counters["budget"] = halved
        module, tokenizer = self.model.module, self.model.tokenizer
        reference = self.reference.module if self.reference else None
        return TrainState(
            module,
            tokenizer,
            self.optimizer,
            self.scheduler,
            counters,
            reference,
            self.masters,
            log_history,
        )

    def loss_weights(self) -> dict[str, float]:
        """Behavior -> weight of its pairs' losses; empty without `balance`."""
        return self.balancer.weights() if self.balancer else {}

    def live_reference(self, config: Config) -> PairModel | None:
        """The reference that scores the coming pairs; None: the one whose log-probs are cached."""
        return self.reference if is_live(config, self.step) else None

    def restore(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``, bit for bit; ValueError if data or models changed."""
        counters = load_checkpoint(checkpoint, self.saved([]), verify=False)
        if counters["key"] != self.key:
            raise ValueError(
                f"{checkpoint}: the data, the tokenizer, the reference or the model that training "
                "began from changed since this run began. Restore them, or choose another "
                "output_dir."
            )
        self.step, self.num_tokens = counters["step"], counters["num_tokens"]
        self.loss_sum, self.window.sums = counters["loss_sum"], counters["window"]
        self.best.load_state_dict(counters["best"])
        if self.balancer:
            self.balancer.load_state_dict(counters["balance"])
        if self.probing:
            self.probing.load_state_dict(counters["probes"])
        if self.budget:
            self.budget.load_state_dict(counters.get("budget", {}))
