"""Evaluation: every behavior's training sample and held-out pairs, in the same run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.data.dataset import Dataset, sample_pairs
from fastpref.data.pack import fed_tokens, pack_pairs, plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.groups import behavior_rows
from fastpref.dynamics.recorder import MetricsLog, Recorder
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.losses import Loss
from fastpref.model import PairModel
from fastpref.observe import Columns, concatenate, pair_columns, result_metrics
from fastpref.step import PairResult, evaluate

log = logging.getLogger(__name__)


class Evaluator:
    """Scores the same pairs at every call; packed once, in batches that the data alone decides."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config, self.behaviors = config, dataset.behaviors
        sides = {TRAIN_SAMPLE: dataset.train, HELD_OUT: dataset.held_out}
        self.batches: dict[str, list[PairBatch]] = {
            split: self._pack(sample_pairs(pairs, config.eval_sample_size, config.seed))
            for split, pairs in sides.items()
        }

    def _pack(self, pairs: Sequence[TokenPair]) -> list[PairBatch]:
        budget = self.config.max_tokens_per_microbatch
        plan = plan_microbatches(fed_tokens(pairs), np.arange(len(pairs)), budget)
        return [pack_pairs([pairs[i] for i in own]) for own in plan]

    def results(
        self, model: PairModel, loss: Loss, split: str, reference: PairModel | None = None
    ) -> list[PairResult]:
        """Every pair of ``split``, all together as one step; ``reference`` as in `train_step`."""
        batches = (batch.to(model.device) for batch in self.batches[split])
        return evaluate(model, batches, loss, self.config, reference=reference)

    def run(
        self,
        model: PairModel,
        loss: Loss,
        step: int,
        epoch: float,
        metrics: MetricsLog,
        recorder: Recorder | None,
        reference: PairModel | None = None,
    ) -> dict[str, dict[str, float]]:
        """Evaluate both splits after ``step``; a metrics line and records each.

        Returns split -> metrics under TRL's names, a behavior's as ``behavior/<name>/...``.
        """
        if step == 0:
            count = sum(b.num_pairs for own in self.batches.values() for b in own)
            log.info("evaluating %d pairs, as before training", count)
        found = {}
        for split, batches in self.batches.items():
            if not batches:
                continue
            results = self.results(model, loss, split, reference)
            columns = concatenate(pair_columns(result) for result in results)
            rows = behavior_rows(self.behaviors, columns["behavior"], **_measured(columns))
            if recorder:
                recorder.pairs(step, split, epoch, **columns)
                rows = recorder.behaviors(step, split, rows)
            line = result_metrics(results)
            margins = _reward_margins(results, len(self.behaviors))
            for row in rows:
                line |= _behavior_metrics(row, margins[self.behaviors.index(str(row["behavior"]))])
            metrics.append({"step": step, "epoch": epoch, "split": split, **line})
            found[split] = line
        return found


def _measured(columns: Columns) -> Columns:
    names = (
        "margin",
        "weight",
        "loss",
        "logp_chosen",
        "logp_rejected",
        "ref_logp_chosen",
        "reward_accuracy",
    )
    return {name: columns[name] for name in names if name in columns}


def _reward_margins(results: Sequence[PairResult], behaviors: int) -> np.ndarray:
    """(K,) mean reward margin of every behavior; 0 where a behavior has no pair."""
    index = torch.cat([r.batch.behavior for r in results]).cpu().numpy()
    margin = torch.cat([(r.reward_chosen - r.reward_rejected).double() for r in results])
    total = np.bincount(index, margin.cpu().numpy(), behaviors)
    return total / np.maximum(np.bincount(index, minlength=behaviors), 1)


def _behavior_metrics(row: Mapping[str, object], reward_margin: float) -> dict[str, float]:
    name = f"behavior/{row['behavior']}"
    return {
        f"{name}/rewards/margins": float(reward_margin),
        f"{name}/rewards/accuracies": row["reward_accuracy"],  # type: ignore[dict-item]
        f"{name}/update_rate": row.get("rate_obs"),  # type: ignore[dict-item]
    }
