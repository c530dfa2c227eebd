"""Evaluation: every behavior's training sample and held-out pairs, in the same run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpref.config import Config
from fastpref.data.dataset import Dataset, sample_pairs
from fastpref.data.pack import plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.drift import Boundaries
from fastpref.dynamics.changes import Standing, change_rows, recorded_standings
from fastpref.dynamics.groups import behavior_rows, feature_rows
from fastpref.dynamics.recorder import Recorder
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.journal import Journal
from fastpref.losses import Loss
from fastpref.model import PairModel
from fastpref.observe import (
    Columns,
    concatenate,
    metric_names,
    metric_sums,
    metrics_of,
    norm_method,
    pair_columns,
)
from fastpref.step import PairResult, evaluate
from fastpref.transfer import to_host

log = logging.getLogger(__name__)


class Evaluator:
    """Scores the same pairs at every call, in batches that the data alone decides.

    Held-out pairs of several named sets are sampled set by set. Split "eval" is all of them, and
    each set has a line of metrics of its own besides.
    """

    def __init__(
        self, config: Config, dataset: Dataset, boundaries: Boundaries, step: int = 0
    ) -> None:
        """``step``: that from which a run goes on whose records know the evaluations before."""
        self.config, self.behaviors, self.boundaries = config, dataset.behaviors, boundaries
        self.sizes, self.pack = dataset.sizes, dataset.pack
        self.batches: dict[str, list[list[TokenPair]]] = {TRAIN_SAMPLE: self._plan(dataset.train)}
        self.batches[HELD_OUT] = []
        self.sets: dict[str, slice] = {}  # of a named set, its batches among the held-out ones
        for name, pairs in dataset.held_out_sets().items():
            first = len(self.batches[HELD_OUT])
            self.batches[HELD_OUT] += self._plan(pairs)
            if name:
                self.sets[name] = slice(first, len(self.batches[HELD_OUT]))
        self._standings: dict[str, Standing] = {}  # how the pairs of a split stood last
        if step and config.record:
            self._standings = recorded_standings(Path(config.output_dir), self.batches, step)

    def _plan(self, pairs: Sequence[TokenPair]) -> list[list[TokenPair]]:
        sample = sample_pairs(pairs, self.config.eval_sample_size, self.config.seed)
        budget = self.config.max_tokens_per_microbatch
        plan = plan_microbatches(self.sizes(sample), np.arange(len(sample)), budget)
        return [[sample[i] for i in own] for own in plan]

    def results(
        self, model: PairModel, loss: Loss, split: str, reference: PairModel | None = None
    ) -> list[PairResult]:
        """Every pair of ``split``, all together as one step; ``reference`` as in `train_step`."""
        batches = (self.pack(own).to(model.device) for own in self.batches[split])
        norms = "exact" if self.config.track != "none" else None
        return evaluate(model, batches, loss, self.config, norms, reference)

    def run(
        self,
        model: PairModel,
        loss: Loss,
        step: int,
        epoch: float,
        journal: Journal,
        recorder: Recorder | None,
        reference: PairModel | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> dict[str, dict[str, float | None]]:
        """Evaluate both splits after ``step``; a line of metrics, one of clocks, and records each.

        Returns split -> metrics under TRL's names, a behavior's as ``behavior/<name>/...``; of
        named sets of held-out pairs, `eval_<name>` -> metrics, which are no records of their own.
        ``loss_weights`` of behaviors in the step's loss are recorded, and weigh nothing here.
        """
        if step == 0:
            count = sum(len(pairs) for own in self.batches.values() for pairs in own)
            log.info("evaluating %d pairs, as before training", count)
        found: dict[str, dict[str, float | None]] = {}
        for split, batches in self.batches.items():
            if not batches:
                continue
            began = time.perf_counter()
            results = self.results(model, loss, split, reference)
            of_sets = [results[own] for own in self.sets.values()] if split == HELD_OUT else []
            columns, more, metrics = _to_host(results, of_sets, model.head_is_all)
            journal.perf(_clocks(step, split, batches, time.perf_counter() - began))
            rows = behavior_rows(self.behaviors, columns["behavior"], **measured_columns(columns))
            if loss_weights:
                rows = [row | {"loss_weight": loss_weights.get(row["behavior"])} for row in rows]
            if recorder:
                spread = feature_rows(columns["behavior"], more["features"], *more["first_tokens"])
                beside = self._of_behaviors(model, split, columns, spread)
                rows = [row | beside[self.behaviors.index(row["behavior"])] for row in rows]
                recorder.pairs(step, split, epoch, norm_method=norm_method(columns), **columns)
                rows = recorder.behaviors(step, split, rows)
            line: dict[str, float | None] = {**metrics[0]}
            margins = _means(more["reward_margin"], columns["behavior"], len(self.behaviors))
            for row in rows:
                line |= _behavior_metrics(row, margins[self.behaviors.index(row["behavior"])])
            found[split] = line
            for name, own in zip(self.sets, metrics[1:], strict=False):
                found[f"{split}_{name}"] = {**own}
        for split, line in found.items():
            journal.metrics({"step": step, "epoch": epoch, "split": split, **line})
        return found

    def _of_behaviors(
        self,
        model: PairModel,
        split: str,
        columns: Columns,
        found: Mapping[int, Mapping[str, Any]],  # of `feature_rows`
    ) -> dict[int, dict[str, Any]]:
        """Columns of the `behaviors` table that are no means over pairs, by behavior."""
        now, before = Standing.of(columns), self._standings.get(split)
        self._standings[split] = now
        changed = change_rows(before, now, columns["behavior"])
        turned = self.boundaries.rotation(model)
        return {
            k: {**row, **changed[k], "boundary_rotation": turned.get(k)} for k, row in found.items()
        }


def evaluation_names(config: Config, dataset: Dataset) -> list[str]:
    """``<split>_<metric>`` of everything that an evaluation of ``dataset`` gives a number for."""
    measured = {"grad_norm": config.track != "none", "update_rate": config.record}
    metrics = [m for m in BEHAVIOR_METRICS if measured.get(m, True)]
    names = []
    for split, pairs in _sides(dataset).items():
        present = [dataset.behaviors[k] for k in sorted({pair.behavior for pair in pairs})]
        of_behaviors = [f"behavior/{name}/{m}" for name in present for m in metrics]
        names += [f"{split}_{name}" for name in (*metric_names(), *of_behaviors) if pairs]
    for own in filter(None, dataset.held_out_sets()):
        names += [f"{HELD_OUT}_{own}_{name}" for name in metric_names()]
    return names


def _sides(dataset: Dataset) -> dict[str, list[TokenPair]]:
    return {TRAIN_SAMPLE: dataset.train, HELD_OUT: dataset.held_out}


def _clocks(
    step: int, split: str, batches: Sequence[Sequence[TokenPair]], seconds: float
) -> dict[str, object]:
    """TRL's names: samples are pairs, steps are batches."""
    return {
        "step": step,
        "split": split,
        f"{split}_runtime": seconds,
        f"{split}_samples_per_second": sum(map(len, batches)) / seconds,
        f"{split}_steps_per_second": len(batches) / seconds,
    }


def measured_columns(columns: Columns) -> Columns:
    """The columns of pairs that `behavior_rows` makes columns of behaviors of."""
    names = (
        "margin",
        "weight",
        "loss",
        "logp_chosen",
        "logp_rejected",
        "ref_logp_chosen",
        "reward_accuracy",
        "head_gnorm_m",
        "gnorm_m",
    )
    return {name: columns[name] for name in names if name in columns}


def _to_host(
    results: Sequence[PairResult], of_sets: Sequence[Sequence[PairResult]], head_is_all: bool
) -> tuple[Columns, Columns, list[dict[str, float]]]:
    """All that an evaluation showed, by one copy from the device.

    Columns of the `pairs` table (P,); features (P, D), first_tokens (2, P) that chosen and rejected
    have of their own, -1 where there is none, and reward_margin (P,); TRL's metrics of all results,
    then of those of each of ``of_sets``.
    """
    groups = [results, *of_sets]
    sums = torch.stack([metric_sums(own, results[0].loss.device) for own in groups])
    columns = [pair_columns(result, head_is_all) for result in results]
    head, *host = to_host([{"sums": sums}, *columns, *map(side_columns, results)])
    more = host[len(results) :]
    together = {name: np.concatenate([own[name] for own in more], axis=-1) for name in SIDE_BY_SIDE}
    return (
        concatenate(host[: len(results)]),
        {"features": np.concatenate([own["features"] for own in more]), **together},
        [metrics_of(row) for row in head["sums"].tolist()],
    )


SIDE_BY_SIDE = ("first_tokens", "reward_margin")  # pairs are their last dimension


def side_columns(result: PairResult) -> dict[str, torch.Tensor]:
    """On the device: features (P, D), first_tokens (2, P), reward_margin (P,), see `_to_host`."""
    rows = result.batch.first_own_rows()
    assert result.features is not None
    features = result.features  # half precision is NumPy's only as float32
    return {
        "features": features.float() if features.itemsize < 4 else features,
        "first_tokens": torch.where(rows < 0, -1, result.batch.target[rows]),
        "reward_margin": (result.reward_chosen - result.reward_rejected).double(),
    }


def _means(values: np.ndarray, behavior: np.ndarray, behaviors: int) -> np.ndarray:
    """(K,) mean of (P,) values over every behavior's pairs; 0 where a behavior has none."""
    total = np.bincount(behavior, values, behaviors)
    return total / np.maximum(np.bincount(behavior, minlength=behaviors), 1)


BEHAVIOR_METRICS = (
    "margin",
    "rewards/margins",
    "rewards/accuracies",
    "output_accuracy",
    "logps/chosen",
    "grad_norm",
    "update_rate",
)


def _behavior_metrics(row: Mapping[str, Any], reward_margin: float) -> dict[str, float | None]:
    """`BEHAVIOR_METRICS` of a row of the `behaviors` table; None is not known."""
    values = (
        row["margin"],
        float(reward_margin),
        row["reward_accuracy"],
        row["output_accuracy"],
        row["logp_chosen"],
        row.get("head_gnorm_m"),
        row.get("rate_obs"),
    )
    name = f"behavior/{row['behavior']}"
    return {f"{name}/{metric}": v for metric, v in zip(BEHAVIOR_METRICS, values, strict=True)}
