"""From what a step computed to what is written: columns of the records, metrics under TRL's names.

Nothing here calls the model or changes it: recorded or not, the weights are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from fastpref import dist
from fastpref.data.loader import StepPlan
from fastpref.dynamics.recorder import Recorder
from fastpref.dynamics.schema import TRAIN
from fastpref.gradients import PairGradients, margin_factor
from fastpref.router import Router
from fastpref.step import PairResult, StepResult, demand_finite
from fastpref.transfer import HostCopy

Columns = dict[str, np.ndarray]


def pair_columns(result: PairResult, head_is_all: bool = False) -> dict[str, torch.Tensor]:
    """Columns of the `pairs` table, (P,) each, on the device. ``head_is_all``: no weight but the
    head's learns, so that its gradient's norms are those of the whole gradient."""
    batch, x = result.batch, result.x
    shared = batch.shared_scored
    integers = {
        "pair_id": batch.pair_id,
        "behavior": batch.behavior,
        "prompt_len": batch.prefix_len - shared,
        "chosen_len": batch.chosen_scored,
        "rejected_len": batch.rejected_scored,
        "shared_len": shared,
    }
    numbers = {
        "logp_chosen": x.chosen,
        "logp_rejected": x.rejected,
        "margin": x.margin,
        "weight": result.weight,
        "loss": result.loss,
        **{f"head_{name}": value for name, value in result.norms.items()},
    }
    if x.ref_chosen is not None and x.ref_rejected is not None:
        numbers |= {"ref_logp_chosen": x.ref_chosen, "ref_logp_rejected": x.ref_rejected}
    if head_is_all:
        numbers |= result.norms
    if batch.loss_weight is not None:
        numbers["loss_weight"] = batch.loss_weight
    entropy = result.stats["entropy"]
    numbers["entropy_chosen"] = entropy[0] / batch.chosen_scored
    numbers["entropy_rejected"] = entropy[1] / batch.rejected_scored
    if result.gradients is not None:
        # The head's alone are exact, where it is all that learns.
        numbers = _norm_columns(result, result.gradients) | numbers
    correct = result.reward_chosen > result.reward_rejected
    return {
        **integers,
        **{name: value.float() for name, value in numbers.items()},
        "reward_accuracy": correct,
    }


def _norm_columns(result: PairResult, gradients: PairGradients) -> dict[str, torch.Tensor]:
    """Norms over all trained weights, (P,) each, and `gnorm_groups` (P, G) by layer group."""
    norm, groups = gradients.gnorm(), gradients.gnorm_groups()
    found = {"gnorm_loss": norm, "gnorm_groups": groups}
    if gradients.method == "sketch":
        found["gnorm_error"] = gradients.error(norm) / norm
    if result.margin_only:
        factor = margin_factor(result.weight).abs().to(norm.dtype)
        found |= {"gnorm_m": norm * factor, "gnorm_groups": groups * factor.unsqueeze(1)}
    return found


def norm_method(columns: Columns) -> str | None:
    """The column of that name: how `gnorm_m` and its like were computed, where they are there."""
    if "gnorm_error" in columns:
        return "sketch"
    return "gram" if columns.keys() & {"gnorm_m", "gnorm_loss"} else None


def concatenate(parts: Iterable[Columns]) -> Columns:
    """One set of columns from several batches' of the same names."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


SIZES = ("tokens", "rows", "micro_batches")


class StepView:
    """What an optimizer step showed, on its way to the host in one copy.

    ``columns``: whether the records want the pairs' columns; the progress bar makes do with their
    margins. ``others``: more numbers of the step, on the device; ``more``: columns of `steps` that
    others know; ``expected``: for every micro-batch (P,) `margin_change_predicted` of its pairs,
    where rates were measured. Every rank makes one of every step.
    """

    def __init__(
        self,
        plan: StepPlan,
        result: StepResult,
        learning_rate: float,
        *,
        columns: bool = True,
        head_is_all: bool = False,
        others: Mapping[str, torch.Tensor] | None = None,
        more: Mapping[str, object] | None = None,
        expected: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        self.plan, self.learning_rate, self.more = plan, learning_rate, dict(more or {})
        self._result: StepResult | None = result
        device = result.loss.device
        scalars = {
            "health": result.health,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "clip_coef": result.clip_coef,
            **({} if result.aux_loss is None else {"aux_loss": result.aux_loss}),
            **(others or {}),
        }
        # The norm of bfloat16 gradients is one, and NumPy has none.
        scalars = {n: x.float() if x.itemsize < 4 else x for n, x in scalars.items()}
        sizes = [(r.batch.num_tokens, r.batch.rows.numel(), 1) for r in result.pairs]
        own = torch.tensor(sizes or [(0, 0, 0)], dtype=torch.float64).sum(dim=0)
        sums = torch.cat([metric_sums(result.pairs, device), own.to(device, non_blocking=True)])
        pairs = [
            pair_columns(r, head_is_all) if columns else {"margin": r.x.margin.float()}
            for r in result.pairs
        ]
        for own_pairs, change in zip(pairs, expected or (), strict=False):
            if columns and change is not None:
                own_pairs["margin_change_predicted"] = change.float()
        self._copy = HostCopy([{"sums": dist.all_reduce_sum(sums), **scalars}, *pairs])

    @property
    def columns(self) -> list[Columns]:
        """Columns of the `pairs` table, a set for every micro-batch of this rank."""
        return self._copy.get()[1:]

    @property
    def sums(self) -> dict[str, float]:
        """`metric_sums` over all ranks, and SIZES: tokens fed, rows scored, micro-batches."""
        values = self._copy.get()[0]["sums"].tolist()
        return dict(zip((*SUMMED, *SIZES), values, strict=True))

    def demand_finite(self) -> None:
        """As `step.demand_finite`, of a step that nobody waited for; once."""
        result, self._result = self._result, None
        if result is not None and not math.isfinite(self.scalar("health")):
            demand_finite(result)

    def scalar(self, name: str) -> float:
        """A scalar of the step, by its name in `StepResult` or in ``others``."""
        return float(self._copy.get()[0][name])

    def numbers(self, name: str) -> list[float] | None:
        """Several of ``others`` under one name; None where the step has none of it."""
        return self._copy.get()[0][name].tolist() if self.has(name) else None

    def has(self, name: str) -> bool:
        """Whether the step has that scalar, or those numbers."""
        return name in self._copy.get()[0]


class Trail:
    """The step whose view may still be on its way: ``take_in`` gets it once that costs no waiting.

    That is when the next step has been given to the device, so that it has something to do while
    the host waits for the end of this one; or when `settle` asks for it, before something that must
    know it.
    """

    def __init__(self, take_in: Callable[[StepView], None]) -> None:
        self._take_in = take_in
        self._last: StepView | None = None

    def add(self, view: StepView) -> None:
        """The next step's, after the one before has been taken in."""
        self.settle()
        self._last = view

    def settle(self) -> None:
        """Nothing is on its way after this."""
        view, self._last = self._last, None
        if view is not None:
            self._take_in(view)

    close = settle


def record_step(
    recorder: Recorder,
    view: StepView,
    truncated: frozenset[int],  # pair_ids of which max_length cut a part
    beta: float,
) -> None:
    """Rows of `pairs` for every micro-batch, and the step's row of `steps`."""
    plan, sums = view.plan, view.sums
    for micro, own in enumerate(view.columns):
        ids = own["pair_id"].tolist()
        cut = np.array([i in truncated for i in ids], bool) if truncated else False
        extra = {"micro": micro, "truncated": cut, "norm_method": norm_method(own)}
        recorder.pairs(plan.step, TRAIN, plan.epoch, **extra, **own)
    moved = "head_update_norm"
    recorder.step(
        plan.step,
        epoch=plan.epoch,
        loss=view.scalar("loss"),
        lr=view.learning_rate,
        beta=beta,
        grad_norm=view.scalar("grad_norm"),
        clip_coef=view.scalar("clip_coef"),
        pairs=plan.num_pairs,
        head_update_norm=view.scalar(moved) if view.has(moved) else None,
        lora_update_norm=view.numbers("lora_update_norm"),
        **{name: int(sums[name]) for name in SIZES},
        **view.more,
    )


SUMMED = (
    "pairs",
    "chosen_tokens",
    "rejected_tokens",
    "loss",
    "reward_chosen",
    "reward_rejected",
    "correct",
    "logp_chosen",
    "logp_rejected",
    "entropy",
    "top1",
    "logit_chosen",
    "logit_rejected",
)


def metric_sums(results: Iterable[PairResult], device: torch.device) -> torch.Tensor:
    """(len(SUMMED),) float64: what TRL's metrics are made of, summed over the pairs."""
    total = torch.zeros(len(SUMMED), dtype=torch.float64, device=device)
    for result in results:
        terms = _metric_terms(result)
        total += torch.stack([terms[name].double() for name in SUMMED]).sum(dim=1)
    return total


def _metric_terms(result: PairResult) -> dict[str, torch.Tensor]:
    """(P,) each."""
    entropy, top1, logit = (result.stats[name] for name in ("entropy", "top1", "mean_logit"))
    return {
        "pairs": torch.ones_like(result.loss),
        "chosen_tokens": result.batch.chosen_scored,
        "rejected_tokens": result.batch.rejected_scored,
        "loss": result.loss,
        "reward_chosen": result.reward_chosen,
        "reward_rejected": result.reward_rejected,
        "correct": result.reward_chosen > result.reward_rejected,
        "logp_chosen": result.x.chosen,
        "logp_rejected": result.x.rejected,
        "entropy": entropy[0] + entropy[1],
        "top1": top1[0],
        "logit_chosen": logit[0],
        "logit_rejected": logit[1],
    }


def pair_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """TRL's metric names from `metric_sums`: means over pairs, and over tokens of the head's.

    Of the shared tokens of a pair, which stand in both of its sequences, both are counted, as TRL
    does. docs/losses.md says what each is.
    """
    pairs, chosen, rejected = (sums[k] for k in ("pairs", "chosen_tokens", "rejected_tokens"))
    return {
        "loss": sums["loss"] / pairs,
        "rewards/chosen": sums["reward_chosen"] / pairs,
        "rewards/rejected": sums["reward_rejected"] / pairs,
        "rewards/margins": (sums["reward_chosen"] - sums["reward_rejected"]) / pairs,
        "rewards/accuracies": sums["correct"] / pairs,
        "logps/chosen": sums["logp_chosen"] / pairs,
        "logps/rejected": sums["logp_rejected"] / pairs,
        "logits/chosen": sums["logit_chosen"] / chosen,
        "logits/rejected": sums["logit_rejected"] / rejected,
        "entropy": sums["entropy"] / (chosen + rejected),
        "mean_token_accuracy": sums["top1"] / chosen,
    }


def metrics_of(sums: Sequence[float]) -> dict[str, float]:
    """`pair_metrics` of the (len(SUMMED),) numbers that `metric_sums` gives."""
    return pair_metrics(dict(zip(SUMMED, sums, strict=True)))


def metric_names() -> list[str]:
    """Names that `pair_metrics` gives."""
    return list(pair_metrics(dict.fromkeys(SUMMED, 1.0)))


class Window:
    """Sums of pair quantities since the last line of metrics.jsonl, over all ranks.

    Its state goes into checkpoints, so that a line whose steps lie on both sides of one is the same
    line in a resumed run.
    """

    def __init__(self) -> None:
        self.sums = self._empty()

    @staticmethod
    def _empty() -> dict[str, float]:
        return dict.fromkeys((*SUMMED, "grad_norm", "aux_loss", "balance", "steps"), 0.0)

    def add(self, view: StepView, router: Router | None = None) -> None:
        """Add one step."""
        sums = view.sums
        for name in SUMMED:
            self.sums[name] += sums[name]
        self.sums["grad_norm"] += view.scalar("grad_norm")
        if router and view.has("aux_loss"):
            self.sums["aux_loss"] += view.scalar("aux_loss")
            self.sums["balance"] += router.coef * view.scalar("aux_loss")
        self.sums["steps"] += 1

    def metrics(self) -> dict[str, float]:
        """The means under TRL's names; empties the window."""
        line, steps = pair_metrics(self.sums), self.sums["steps"]
        line["grad_norm"] = self.sums["grad_norm"] / steps
        if self.sums["aux_loss"]:  # it is positive, where there are routers
            line["aux_loss"] = self.sums["aux_loss"] / steps
            line["loss"] += self.sums["balance"] / steps
        self.sums = self._empty()
        return line
