"""From what a step computed to what is written: columns of the records, metrics under TRL's names.

Nothing here calls the model or changes it: recorded or not, the weights are the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from fastpref import dist
from fastpref.batch import GROUP
from fastpref.data.loader import StepPlan
from fastpref.dynamics.recorder import Recorder
from fastpref.dynamics.schema import TRAIN
from fastpref.step import PairResult, StepResult

Columns = dict[str, np.ndarray]


def pair_columns(result: PairResult) -> Columns:
    """Columns of the `pairs` table, (P,) each, by two copies from the device."""
    batch, x = result.batch, result.x
    shared = torch.bincount(batch.segment_id, minlength=batch.num_segments)[::GROUP]
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
        "ref_logp_chosen": x.ref_chosen,
        "ref_logp_rejected": x.ref_rejected,
        "margin": x.margin,
        "weight": result.weight,
        "loss": result.loss,
        **{f"head_{name}": value for name, value in result.norms.items()},
    }
    return _to_host(integers) | _to_host({k: v.float() for k, v in numbers.items()})


def concatenate(parts: Iterable[Columns]) -> Columns:
    """One set of columns from several batches' of the same names."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def record_step(
    recorder: Recorder,
    plan: StepPlan,
    result: StepResult,
    columns: Sequence[Columns],  # one per micro-batch of this rank
    truncated: np.ndarray,  # pair_ids whose completions max_length cut
    learning_rate: float,
    beta: float,
) -> None:
    """Rows of `pairs` for every micro-batch, and the step's row of `steps`."""
    for micro, own in enumerate(columns):
        cut = np.isin(own["pair_id"], truncated)
        recorder.pairs(plan.step, TRAIN, plan.epoch, micro=micro, truncated=cut, **own)
    own_sizes = [(r.batch.num_tokens, r.batch.rows.numel(), 1) for r in result.pairs]
    sizes = torch.tensor(own_sizes or [(0, 0, 0)], device=result.loss.device).sum(dim=0)
    tokens, rows, micro_batches = dist.all_reduce_sum(sizes).tolist()
    recorder.step(
        plan.step,
        epoch=plan.epoch,
        loss=float(result.loss),
        lr=learning_rate,
        beta=beta,
        grad_norm=float(result.grad_norm),
        clip_coef=float(result.clip_coef),
        pairs=plan.num_pairs,
        tokens=tokens,
        rows=rows,
        micro_batches=micro_batches,
    )


def pair_metrics(sums: Mapping[str, float], pairs: float, beta: float) -> dict[str, float]:
    """TRL's metric names from sums over ``pairs`` pairs; rewards are beta x log-ratio."""
    mean = {name: total / pairs for name, total in sums.items()}
    chosen = beta * (mean["logp_chosen"] - mean["ref_logp_chosen"])
    rejected = beta * (mean["logp_rejected"] - mean["ref_logp_rejected"])
    return {
        "loss": mean["loss"],
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": beta * mean["margin"],
        "rewards/accuracies": mean["correct"],
        "logps/chosen": mean["logp_chosen"],
        "logps/rejected": mean["logp_rejected"],
    }


SUMMED = ("loss", "margin", "logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected")


class Window:
    """Sums of pair quantities since the last line of metrics.jsonl, over all ranks.

    Its state goes into checkpoints, so that a line whose steps lie on both sides of one is the same
    line in a resumed run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums = self._empty()

    @staticmethod
    def _empty() -> dict[str, float]:
        return dict.fromkeys((*SUMMED, "correct", "pairs", "grad_norm", "steps"), 0.0)

    def add(self, columns: Columns | None, grad_norm: float) -> None:
        """Add this rank's pairs of one step; ``columns`` is None where it had none."""
        own = np.zeros(len(SUMMED) + 2)
        if columns is not None:
            own[:-2] = [columns[name].sum(dtype=np.float64) for name in SUMMED]
            own[-2:] = (columns["margin"] > 0).sum(), len(columns["margin"])
        total = dist.all_reduce_sum(torch.from_numpy(own).to(self.device)).tolist()
        for name, value in zip((*SUMMED, "correct", "pairs"), total, strict=True):
            self.sums[name] += value
        self.sums["grad_norm"] += grad_norm
        self.sums["steps"] += 1

    def metrics(self, beta: float) -> dict[str, float]:
        """The means under TRL's names; empties the window."""
        line = pair_metrics(self._pair_sums(), self.sums["pairs"], beta)
        line["grad_norm"] = self.sums["grad_norm"] / self.sums["steps"]
        self.sums = self._empty()
        return line

    def _pair_sums(self) -> dict[str, float]:
        return {name: self.sums[name] for name in (*SUMMED, "correct")}


def column_metrics(columns: Columns, beta: float) -> dict[str, float]:
    """`pair_metrics` of columns that hold all pairs already."""
    sums = {name: float(columns[name].sum(dtype=np.float64)) for name in SUMMED}
    sums["correct"] = float((columns["margin"] > 0).sum())
    return pair_metrics(sums, len(columns["margin"]), beta)


def _to_host(columns: Mapping[str, torch.Tensor]) -> Columns:
    stacked = torch.stack(list(columns.values())).cpu().numpy()
    return dict(zip(columns, stacked, strict=True))
