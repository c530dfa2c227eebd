"""Update rates of behaviors, measured around an optimizer step on a fixed sample of pairs.

Before the step: log-probs and gradients of the sample's margins at theta_t. In the step: the
gradients of its pairs' losses, which the taps see. After it: log-probs at theta_t+1, and what
became of the weights. Out of these come, for every behavior, the rate that was observed and those
that were to be expected, its share of the step, its coherence, and who taught whom
(`fastpref.dynamics.rates`). No weight, gradient or random number of the run changes by it.

The sample is of *training* pairs, `rate_pairs` of each behavior: every behavior has some, the
theory (docs/theory.md) speaks of them, and held-out pairs have a rate in every evaluation. It is
chosen as the evaluations' train sample is, by a hash of seed and pair_id: the smaller of the two is
a part of the other, and it is the same at every step, on every number of ranks, in a resumed run.

`track: sketch` takes gradients from sketches, and what happened to the weights from the difference
of two sketches of them. `track: exact` keeps a copy of the trained weights during the step and
passes over the sample at theta_t after it, where every pair's gradient meets the whole change.

Memory    sketch: G k^2 float32 numbers for every pair of this rank's sample; exact: these and the
          trained weights once more. Both: 2 (K + strata) G k^2 float64 numbers.
Shapes    P pairs, K behaviors, G layer groups, k sketch size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpref import dist
from fastpref.config import Config
from fastpref.data.dataset import Dataset, sample_pairs
from fastpref.data.loader import StepPlan
from fastpref.data.pack import plan_microbatches
from fastpref.dynamics.changes import Standing, change_rows
from fastpref.dynamics.groups import behavior_rows
from fastpref.dynamics.rate_rows import (
    Measured,
    Totals,
    behavior_columns,
    gram_rows,
    inequality_columns,
    known,
    moved_columns,
    noise_columns,
)
from fastpref.dynamics.rates import mean_change
from fastpref.dynamics.recorder import Recorder
from fastpref.dynamics.schema import RATE_SAMPLE
from fastpref.dynamics.taps import Taps
from fastpref.gradients import PairGradients, pair_gradients
from fastpref.journal import Journal
from fastpref.losses import Loss
from fastpref.model import PairModel
from fastpref.observe import pair_columns
from fastpref.slopes import tail_weight
from fastpref.step import PairResult, StepResult, evaluate
from fastpref.transfer import to_host

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRates:
    """What was measured around one step. All but ``pairs`` is the same on all ranks."""

    behaviors: list[dict[str, Any]]  # rows of `behaviors`
    gram: list[dict[str, Any]]  # rows of `gram`
    step: dict[str, Any]  # columns of the step's row of `steps`
    # The sample's pairs of this rank after the step; gradients of their margins before it, and
    # (P,) what the step was to change in each by its gradient.
    pairs: list[tuple[PairResult, PairGradients, Tensor]]
    # (P,) for every micro-batch of this rank: what the step was to change in the margins of its
    # own pairs, by sketches; None where the loss does not tell grad m.
    trained: list[Tensor | None]


class GradientSums:
    """`Totals` of K groups of pairs, while they are summed up on the device."""

    def __init__(self, groups: int, size: int, k: int, device: torch.device) -> None:
        shapes = [(size,), *[(groups, size, k, k)] * 2, *[(groups, size)] * 2, (size,)]
        self._sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def add(self, gradients: PairGradients, index: Tensor) -> None:
        """index (P,) group of every pair."""
        count, sketch, square, norm_sq, norm_error, change = self._sums
        own = gradients.sketch.double()
        count.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        sketch.index_add_(1, index, own)
        square.index_add_(1, index, own.square())
        norm_sq.index_add_(1, index, gradients.norm_sq.double())
        norm_error.index_add_(1, index, gradients.norm_sq_error.double())
        if gradients.change is not None:
            change.index_add_(0, index, gradients.change.double().sum(0))

    def over_ranks(self) -> Totals:
        """Of all ranks' pairs, on the host; every rank calls it."""
        flat = dist.all_reduce_sum(torch.cat([own.flatten() for own in self._sums]))
        parts = np.split(flat.cpu().numpy(), np.cumsum([own.numel() for own in self._sums])[:-1])
        return Totals(*(a.reshape(own.shape) for a, own in zip(parts, self._sums, strict=True)))


class RateTracker:
    """Measures rates at the steps that are due. Every rank makes one, and calls it alike.

    Make it before training: `module_update_norm` is counted from what the weights are then.
    """

    def __init__(
        self, config: Config, dataset: Dataset, model: PairModel, loss: Loss, taps: Taps
    ) -> None:
        self.config, self.model, self.loss, self.taps = config, model, loss, taps
        self.pack, self.behaviors = dataset.pack, dataset.behaviors
        sample = sample_pairs(dataset.train, config.rate_pairs, config.seed)
        sizes = dataset.sizes(sample)
        # `sample_pairs` draws from the labels of a behavior in their proportion: strata.
        labels = sorted({(pair.behavior, pair.label) for pair in sample})
        place = {label: i for i, label in enumerate(labels)}
        self._stratum_of = np.array([behavior for behavior, _ in labels])
        self.size, self.fed = len(sample), int(sizes.sum())  # pairs and tokens, over all ranks
        budget = config.max_tokens_per_microbatch
        plan = plan_microbatches(sizes, np.arange(len(sample)), budget)
        own = plan[dist.rank() :: dist.world_size()]
        self.batches = [[sample[i] for i in batch] for batch in own]
        self._strata = [
            torch.tensor([place[p.behavior, p.label] for p in batch], device=model.device)
            for batch in self.batches
        ]
        self._start = self._sketch = taps.weight_sketch()
        self._gradients: list[PairGradients] = []
        self._old: list[Tensor] = []  # exact: the trained weights before the step

    def due(self, step: int) -> bool:
        """Whether the rates of ``step`` are measured: of the first one, and every `rate_every`."""
        return step == 1 or step % self.config.rate_every == 0

    def before(self) -> None:
        """Just before the step."""
        if self.taps.exact:
            self._old = [parameter.detach().clone() for parameter in self.model.trained]
        else:
            self._sketch = self.taps.weight_sketch()
            self._gradients = self._pass()

    def after(
        self,
        result: StepResult,
        num_pairs: int,
        learning_rate: float,
        reference: PairModel | None = None,  # as in `train_step`
    ) -> StepRates:
        """Just after the step, before anything else changes the weights or the reference."""
        now = self.taps.weight_sketch()
        if self.taps.exact:
            with weights_of(self.model.trained, self._old) as new:
                self._sketch = self.taps.weight_sketch()
                self._gradients = self._pass(Change(self.model.trained, self._old, new))
        update = now - self._sketch
        gradients, self._gradients, self._old = self._gradients, [], []
        batches = (self.pack(own).to(self.model.device) for own in self.batches)
        scored: list[PairResult] = []
        if self.batches:
            scored = evaluate(self.model, batches, self.loss, self.config, reference=reference)
        measured = Measured(
            self._sum(zip(gradients, self._strata, strict=True), len(self._stratum_of)),
            self._stratum_of,
            self._sum(((r.gradients, r.batch.behavior) for r in result.pairs), len(self.behaviors)),
            num_pairs,
            learning_rate,
            update.cpu().numpy(),
            self.taps.exact,
        )
        rows = self._rows(measured, self._gather(gradients, scored))
        rate = np.array([row["rate_obs"] for row in rows])
        margin = np.array([row["margin"] for row in rows])
        return StepRates(
            rows,
            gram_rows(measured, self.behaviors),
            noise_columns(measured, float(result.grad_norm))
            | moved_columns((now - self._start).cpu().numpy())
            | inequality_columns(rate, margin),
            [(r, g, expected_change(g, update)) for r, g in zip(scored, gradients, strict=True)],
            [_expected_of_loss(r, update) for r in result.pairs],
        )

    def _pass(self, change: Mapping[nn.Parameter, Tensor] | None = None) -> list[PairGradients]:
        weight, found = tail_weight(self.config), []
        for own in self.batches:
            batch = self.pack(own).to(self.model.device)
            batch = batch if self.config.ld_alpha is None else batch.with_tails()
            found.append(
                pair_gradients(self.model, self.taps, batch, change=change, tail_weight=weight)
            )
        return found

    def _sum(self, parts: Iterable[tuple[PairGradients | None, Tensor]], size: int) -> Totals:
        taps = self.taps
        sums = GradientSums(len(taps.groups), size, taps.sketch_dim, self.model.device)
        for gradients, index in parts:
            assert gradients is not None, "the step ran without taps"
            sums.add(gradients, index)
        return sums.over_ranks()

    def _gather(
        self, gradients: Sequence[PairGradients], scored: Sequence[PairResult]
    ) -> dict[str, np.ndarray]:
        """(P,) columns of the sample's pairs of all ranks."""
        names: list[str] = []
        parts = []
        for before, after in zip(gradients, scored, strict=True):
            columns = self._columns(before, after)
            names = list(columns)
            parts.append(torch.stack([column.double() for column in columns.values()], dim=1))
        # A rank without a batch knows no names: all ranks have those of rank 0, which has one.
        names = dist.broadcast_text(" ".join(names), self.model.device).split()
        own = torch.cat(parts) if parts else torch.zeros(0, len(names), dtype=torch.float64)
        rows = torch.cat(dist.all_gather_rows(own.to(self.model.device))).cpu().numpy()
        return dict(zip(names, rows.T, strict=True))

    def _columns(self, before: PairGradients, after: PairResult) -> dict[str, Tensor]:
        x = after.x
        assert before.logp_chosen is not None and before.logp_rejected is not None
        columns = {
            "pair_id": after.batch.pair_id,  # only compared: rounding to float64 does no harm
            "behavior": after.batch.behavior,
            "margin": x.margin,
            "logp_chosen": x.chosen,
            "logp_rejected": x.rejected,
            "reward_accuracy": after.reward_chosen > after.reward_rejected,
            "gnorm_m": before.gnorm(),
            "chosen_before": before.logp_chosen,
            "rejected_before": before.logp_rejected,
        }
        if x.ref_chosen is not None:
            columns["ref_logp_chosen"] = x.ref_chosen
        if not self.loss.batch_coupled:  # else a pair's loss depends on what else is in the sample
            columns |= {"loss": after.loss, "weight": after.weight}
        return columns

    def _rows(self, of: Measured, sample: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        behavior, pair_id = sample.pop("behavior").astype(np.int64), sample.pop("pair_id")
        chosen, rejected = sample.pop("chosen_before"), sample.pop("rejected_before")
        preferred = sample["logp_chosen"] - sample["logp_rejected"]
        rate = mean_change(chosen - rejected, preferred, behavior, len(self.behaviors))
        margin_before = sample["margin"] - (preferred - (chosen - rejected))
        changed = change_rows(
            Standing(pair_id, margin_before > 0, chosen > rejected),
            Standing(pair_id, sample["margin"] > 0, preferred > 0),
            behavior,
        )
        columns = behavior_columns(of)
        rows = behavior_rows(self.behaviors, behavior, **sample)
        for i, (k, row) in enumerate(zip(of.present.tolist(), rows, strict=True)):
            row |= {name: known(values[i]) for name, values in columns.items()}
            row |= {"rate_obs": known(rate.value[k]), "rate_obs_error": known(rate.error[k])}
            row |= changed[k]
        return rows


def find_tracker(
    config: Config, dataset: Dataset, model: PairModel, loss: Loss, taps: Taps | None
) -> RateTracker | None:
    """What measures rates, where the configuration asks for it. Call it before training."""
    if taps is None or not config.rate_every:
        return None
    tracker = RateTracker(config, dataset, model, loss, taps)
    log.info(
        "update rates: %d pairs of %d behaviors, %d tokens a pass, every %d steps",
        tracker.size, len(tracker.behaviors), tracker.fed, config.rate_every,
    )  # fmt: skip
    return tracker


def record_rates(
    recorder: Recorder,
    journal: Journal,
    plan: StepPlan,
    rates: StepRates,
    loss_weights: Mapping[str, float],
) -> None:
    """Rows of `pairs`, `behaviors` and `gram`, and a line of metrics, of a measured step."""
    sets = []
    for result, gradients, expected in rates.pairs:
        more = {"margin_change_predicted": expected, "gnorm_m": gradients.gnorm()}
        more["gnorm_groups"] = gradients.gnorm_groups()
        if gradients.method == "sketch":
            more["gnorm_error"] = gradients.error() / more["gnorm_m"]
        sets.append(pair_columns(result) | {name: value.float() for name, value in more.items()})
    for own in to_host(sets):
        method = "sketch" if "gnorm_error" in own else "gram"
        recorder.pairs(plan.step, RATE_SAMPLE, plan.epoch, norm_method=method, **own)
    rows = [row | {"loss_weight": loss_weights.get(row["behavior"])} for row in rates.behaviors]
    recorder.behaviors(plan.step, RATE_SAMPLE, rows)
    recorder.rows("gram", plan.step, rates.gram)
    line = {"step": plan.step, "epoch": plan.epoch, "split": RATE_SAMPLE}
    line |= {name: rates.step[name] for name in STEP_METRICS}
    for row in rates.behaviors:
        name = f"behavior/{row['behavior']}"
        line |= {f"{name}/{metric}": row[column] for metric, column in RATE_METRICS.items()}
    journal.metrics(line)


STEP_METRICS = ("gradient_noise_scale", "rate_gini")
RATE_METRICS = {  # name in metrics.jsonl -> column of `behaviors`
    "update_rate": "rate_obs",
    "update_rate_predicted": "rate_pred_opt",
    "share": "share",
    "coherence": "coherence",
}


class Change(Mapping[nn.Parameter, Tensor]):
    """Parameter -> new - old, formed when it is asked for: the change is never whole in memory."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], old: Sequence[Tensor], new: Sequence[Tensor]
    ) -> None:
        self._parameters = list(parameters)
        self._sides = {id(p): sides for p, *sides in zip(parameters, old, new, strict=True)}

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        old, new = self._sides[id(parameter)]
        wide = torch.promote_types(old.dtype, torch.float32)  # half precision would round it
        return new.to(wide) - old.to(wide)

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._sides

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@contextmanager
def weights_of(
    parameters: Sequence[nn.Parameter], values: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """Inside, the parameters are ``values``; gives what they were, and puts that back, as it was.

    No number is copied: the parameters point elsewhere for a while.
    """
    kept = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    try:
        yield kept
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data = value


def _expected_of_loss(result: PairResult, update: Tensor) -> Tensor | None:
    """`expected_change` of a trained pair's margin, from the gradient of its loss."""
    if not result.margin_only or result.gradients is None:
        return None
    return expected_change(result.gradients.as_margin(result.weight), update)


def expected_change(gradients: PairGradients, update: Tensor) -> Tensor:
    """(P,) float64 <grad m, change of the weights>: exact where it is known, else by sketches.

    update: (G, k, k).
    """
    if gradients.change is not None:
        return gradients.change.double().sum(0)
    return torch.einsum("gpab,gab->p", gradients.sketch.double(), update)
