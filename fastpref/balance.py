"""Per-behavior weights of the loss, set every N steps from what the run itself shows (`balance`).

    (K,) measured, with standard errors -> ShareController -> (K,) weights -> PairBatch.loss_weight

`margins` measures mean margins of the steps' pairs, `rates` how fast the mean margins of
`RateTracker`'s fixed sample have grown since the last update.

The weight of a pair's behavior multiplies its loss before the slopes, so that everything after it,
gradients and what the taps see of them, is of the weighted loss. Every rank holds the same weights:
they follow from sums over all ranks. An experiment, off by default; docs/balance.md says what the
rule does to first order and what it cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastpref import dist
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.data.badrows import nearest
from fastpref.data.dataset import Dataset
from fastpref.data.loader import Loader
from fastpref.dynamics.balancing import ShareController
from fastpref.step import PairResult, StepResult
from fastpref.transfer import numbers

# Margins add up rates, so that weights alone change them late: see `ShareController`.
LEAD = {"margins": 1.0, "rates": 0.0}
SAMPLE_STATE = ("margin_then", "margin_now", "rate_error")  # JSON has no nan: null


class Balancer:
    """Measures the behaviors of a run, and weighs the losses of their pairs.

    ``behaviors`` are the run's K names, ``fraction`` (K,) is the part of the training pairs that
    each has. Raises ValueError for names of `target_share` that are not among the behaviors that
    are trained, for shares that are none, and where there is a single behavior.
    """

    def __init__(
        self,
        config: Config,
        behaviors: Sequence[str],
        fraction: np.ndarray,
        device: torch.device,
    ) -> None:
        assert config.balance != "none"
        self.kind, self.every = config.balance, config.balance_every
        self.behaviors, self.device = list(behaviors), device
        self.trained = np.flatnonzero(fraction)  # what is only held out has no weight to set
        names = [self.behaviors[k] for k in self.trained]
        self.controller = ShareController(
            fraction[self.trained],
            target_shares(dict(config.target_share), names),
            gain=config.balance_gain,
            lead=LEAD[self.kind],
            limit=config.balance_limit,
        )
        # (K, 3) pairs since the last update, of all ranks: number, sum and sum of squares of m.
        # On the device, where they are added up without anyone waiting.
        size = (len(self.behaviors), 3)
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        # (K,) of the rate sample: mean margins after the last update and now, and the standard
        # error of what the last measured step changed in them.
        self.margin_then, self.margin_now, self.rate_error = np.full(
            (3, len(self.behaviors)), np.nan
        )
        self._to_device()

    def weigh(self, batch: PairBatch) -> PairBatch:
        """``batch`` with the weights of its pairs' losses."""
        return replace(batch, loss_weight=self._weights[batch.behavior])

    def observe(self, result: StepResult) -> None:
        """Count the pairs of a step; every rank calls it."""
        if self.kind != "margins":
            return
        own = torch.zeros_like(self.sums)
        for pairs in result.pairs:
            own += _sums(pairs, len(self.behaviors))
        self.sums += dist.all_reduce_sum(own)

    def observe_rates(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in what was measured around a step: rows of `behaviors` of split "rate_sample",
        those of all ranks on every rank."""
        if self.kind != "rates":
            return
        for row in rows:
            k = self.behaviors.index(row["behavior"])
            self.margin_now[k], self.rate_error[k] = row["margin"], row["rate_obs_error"]
            if math.isnan(self.margin_then[k]):  # the first step of the run
                self.margin_then[k] = row["margin"] - row["rate_obs"]

    def update(self, step: int) -> None:
        """After ``step``: set the weights of the next ones, where that is due."""
        if step % self.every:
            return
        if self.kind == "margins":
            value, error = window_means(self.sums.cpu().numpy())
        else:
            value, error = (self.margin_now - self.margin_then) / self.every, self.rate_error
        self.controller.update(value[self.trained], error[self.trained])
        self.sums.zero_()
        self.margin_then = self.margin_now.copy()
        self._to_device()

    def weights(self) -> dict[str, float]:
        """Behavior -> weight of its pairs' losses in the next step, of those that are trained."""
        names = (self.behaviors[k] for k in self.trained)
        return dict(zip(names, self.controller.weights.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, exact as JSON."""
        sample = {
            name: [None if math.isnan(v) else v for v in getattr(self, name).tolist()]
            for name in SAMPLE_STATE
        }
        state = {"sums": self.sums.tolist(), "controller": self.controller.state_dict()}
        return {**state, **sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.sums = torch.tensor(state["sums"], dtype=torch.float64, device=self.device)
        for name in SAMPLE_STATE:
            setattr(self, name, np.array(state[name], np.float64))
        self.controller.load_state_dict(state["controller"])
        self._to_device()

    def _to_device(self) -> None:
        all_weights = np.ones(len(self.behaviors))
        all_weights[self.trained] = self.controller.weights
        self._weights = numbers(all_weights.tolist(), self.device, torch.float64)


def target_shares(given: Mapping[str, Any], behaviors: Sequence[str]) -> np.ndarray:
    """(K,) shares of ``behaviors``, which sum to 1: as ``given``, the rest dealt out evenly.

    Raises ValueError for a name that is no behavior, for shares that do not sum to 1 or leave
    nothing to the others, and for a single behavior. `fastpref.config_loss` has checked each.
    """
    if len(behaviors) < 2:
        raise ValueError(
            f"balance weighs behaviors against each other, and {behaviors[0]!r} is the only one "
            "that is trained; remove it, or train on the data of several."
        )
    for name in given:
        if name not in behaviors:
            hint = nearest(name, behaviors) or f" There are: {', '.join(behaviors)}."
            raise ValueError(f"target_share: no training pair has the behavior {name!r}.{hint}")
    total, others = sum(given.values()), len(behaviors) - len(given)
    if others and total >= 1:
        raise ValueError(
            f"target_share: the {len(given)} shares sum to {total:g}, which leaves nothing to the "
            f"{others} other behaviors; give less, or all {len(behaviors)}."
        )
    if not others and abs(total - 1) > 1e-6:
        raise ValueError(f"target_share: the shares of all behaviors sum to {total:g}, not to 1.")
    rest = (1 - total) / others if others else 0.0
    share = np.array([float(given.get(name, rest)) for name in behaviors])
    return share / share.sum()


def demand_shares(config: Config, dataset: Dataset) -> None:
    """Raise ValueError, before a model is loaded, for shares that a `Balancer` would refuse."""
    if config.balance != "none":
        trained = {pair.behavior for pair in dataset.train}
        target_shares(dict(config.target_share), [dataset.behaviors[k] for k in sorted(trained)])


def find_balancer(
    config: Config, dataset: Dataset, loader: Loader, device: torch.device
) -> Balancer | None:
    """The `Balancer` of a run on ``dataset``, None without `balance`. Raises as it does."""
    if config.balance == "none":
        return None
    behavior = [pair.behavior for pair in dataset.train]
    times = np.bincount(behavior, loader.times(), len(dataset.behaviors))
    return Balancer(config, dataset.behaviors, times / times.sum(), device)


def window_means(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) means and their standard errors from (K, 3) numbers, sums and sums of squares; nan where
    fewer than two pairs were seen."""
    count, total, squares = sums.T
    enough = count > 1
    n = np.where(enough, count, np.nan)
    mean = total / n
    variance = np.maximum(squares / n - mean**2, 0) * n / (n - 1)
    return mean, np.sqrt(variance / n)


def _sums(pairs: PairResult, behaviors: int) -> torch.Tensor:
    """(K, 3) of one batch. A product with zeros and ones, whose order of additions is fixed, where
    a scatter's on a GPU is not."""
    margin = pairs.x.margin.double()
    member = torch.nn.functional.one_hot(pairs.batch.behavior, behaviors).double()
    return member.T @ torch.stack([torch.ones_like(margin), margin, margin**2], dim=1)
