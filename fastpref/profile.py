"""The gradients of a model on preference pairs, and how behaviors act on one another, without
training: a run's rates at one point of it, of whatever model is at hand.

Behavior by behavior a fixed sample of pairs goes through `pair_gradients`; sums over pairs are what
is kept, and the columns of the pairs. With G_l = q_l x mean over l's sample of -grad L, q_l being
the behavior's part of the whole data, the quantities are those of full-batch gradient descent on
the data, whatever the size of the samples (`fastpref.dynamics.rates`).

Without a reference of its own the model is its own reference: every margin is 0, as at the start of
a run. Memory: the model, one micro-batch, 6 K J G k^2 float64 numbers for J folds of each sample
(`fastpref.dynamics.sampling`), and the rows of `pairs`.
Shapes: P pairs, K behaviors, G layer groups, k sketch size.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastpref_kernels import sketch_dot
from torch import Tensor
from tqdm import tqdm

from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.data.dataset import Dataset, sample_pairs
from fastpref.data.pack import demand_budget, demand_vocabulary, plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics import rates
from fastpref.dynamics.groups import behavior_rows, feature_rows
from fastpref.dynamics.rate_rows import Measured, behavior_columns, gram_rows, known
from fastpref.dynamics.sampling import (
    FOLDS,
    data_noise_scale,
    estimated,
    fold_sums,
    of_the_whole,
    over_folds,
)
from fastpref.dynamics.taps import Taps, attach
from fastpref.evaluate import measured_columns, side_columns
from fastpref.frozen import first_tokens
from fastpref.gradients import PairGradients, combine_head, pair_gradients, segment_slopes
from fastpref.losses import Loss, get_loss, pair_losses, sequence_sums
from fastpref.model import HeadNorms, PairModel
from fastpref.observe import Columns, concatenate, pair_columns
from fastpref.refmodel import find_reference
from fastpref.slopes import loss_options, tail_weight
from fastpref.step import PairResult, evaluate
from fastpref.tapcheck import check_taps
from fastpref.track import GradientSums
from fastpref.transfer import to_host

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Profile:
    """What was found. ``pairs``, ``rows`` and ``gram`` are of the records' tables."""

    behaviors: list[str]  # (K,) in the order of ``rows``
    groups: tuple[str, ...]  # (G,)
    pairs: Columns  # of the sampled pairs; "behavior" indexes `Dataset.behaviors`
    rows: list[dict[str, Any]]
    gram: list[dict[str, Any]]
    group_norm: np.ndarray  # (K, G) root of the mean squared norm of grad m
    group_norm_error: np.ndarray  # (K, G) standard error by the sketch; 0 where it is exact
    # `fastpref.dynamics.sampling.ESTIMATED` by name, for all pairs of the data: dot (Gamma) and cos
    # (K, K); share (K,); rate of the mean margin and chosen_rate, of the mean log-prob of chosen,
    # (K,) per unit of learning rate. chosen_rate with ``displacement`` only.
    estimates: dict[str, rates.Estimate]
    noise: rates.Estimate  # () gradient noise scale of the losses of all pairs of the data
    displaced: np.ndarray | None  # (K,) part of the pairs with d > n_c^2
    method: str  # the column `norm_method`
    whole: np.ndarray  # (K,) pairs of the behavior in the data
    reference: str  # what the weights of the losses were taken against
    at_start: bool  # the model itself is the reference


def profile(
    config: Config,
    model: PairModel,
    dataset: Dataset,
    *,
    track: str = "sketch",
    sample: int = 64,
    displacement: bool = False,
    learning_rate: float | None = None,
    progress: bool = False,
) -> Profile:
    """Profile ``model`` on ``sample`` pairs of each behavior of ``dataset.train``; 0: on all.

    ``track`` is head (the head's part alone, without a backward), sketch or exact. With
    ``displacement`` also gradients of the completions' log-probs: a second and, for exact norms, a
    third pass. ``learning_rate`` of the rates of plain SGD in ``rows``; without it they stand in
    `Profile.rate` alone, per unit of it. Raises ValueError for a loss that ties pairs of a step
    together, for layers that taps do not know, and where a gradient is not finite.
    """
    loss = _demand_loss(config)
    taps = None
    if track != "head":
        taps = attach(model.module, track, sketch_dim=config.sketch_dim, seed=config.seed)
        check_taps(model, taps, dataset.train)
    pairs = sample_pairs(dataset.train, sample or len(dataset.train), config.seed)
    demand_vocabulary(pairs, len(model.head.weight))
    demand_budget(dataset.sizes(pairs), config.max_tokens_per_microbatch)
    pairs, reference, at_start = _with_reference(config, model, loss, dataset, pairs, progress)
    work = _Work(config, model, dataset, loss, taps, displacement, at_start)
    with tqdm(total=len(pairs), unit="pair", desc="gradients", disable=not progress) as bar:
        for k in work.present(pairs):
            work.behavior(k, [pair for pair in pairs if pair.behavior == k], bar)
    return work.done(reference, learning_rate)


def _demand_loss(config: Config) -> Loss:
    loss = get_loss(config.loss_type, config.loss_weights)
    if loss.batch_coupled:
        raise ValueError(
            f"loss_type={'+'.join(config.loss_type)}: its loss of a pair depends on the other "
            "pairs of an optimizer step, and a profile has no steps. Give --loss_type sigmoid, or "
            "another loss of single pairs."
        )
    return loss


def _with_reference(
    config: Config,
    model: PairModel,
    loss: Loss,
    dataset: Dataset,
    pairs: list[TokenPair],
    progress: bool,
) -> tuple[list[TokenPair], str, bool]:
    if not loss.needs_reference:
        return pairs, "none: the loss has none", False
    brought = all(pair.ref_chosen is not None for pair in pairs)
    if not (config.ref_model_name_or_path or model.reference_off or brought):
        return pairs, "the model itself: every margin is 0, as at the start of a run", True
    found, _ = find_reference(config, model, model.tokenizer, pairs, progress, pack=dataset.pack)
    if brought:
        return found.pairs, "log-probs that the data bring", False
    base = f"{config.model_name_or_path} without the adapter"
    return found.pairs, config.ref_model_name_or_path or base, False


class _Work:
    """Sums over the pairs of each behavior, and their columns."""

    def __init__(
        self,
        config: Config,
        model: PairModel,
        dataset: Dataset,
        loss: Loss,
        taps: Taps | None,
        displacement: bool,
        at_start: bool,
    ) -> None:
        self.config, self.model, self.dataset = config, model, dataset
        self.loss, self.taps, self.at_start = loss, taps, at_start
        # From the head's log-probs the completions' gradients come with the margin's.
        self.sides = displacement or not loss.margin_only or taps is None
        self.groups = ("head",) if taps is None else taps.groups
        self.features: dict[int, dict[str, float | None]] = {}
        self.columns: list[Columns] = []

    def present(self, pairs: Sequence[TokenPair]) -> list[int]:
        """The behaviors of ``pairs``, for whose strata sums are made."""
        self.own = sorted({pair.behavior for pair in pairs})
        number = [pair.behavior for pair in self.dataset.train]
        self.whole = np.bincount(number, minlength=max(self.own) + 1)[self.own]
        # `sample_pairs` draws from the labels of a behavior in their proportion: strata.
        strata = sorted({(pair.behavior, pair.label) for pair in pairs})
        self.stratum = {stratum: i for i, stratum in enumerate(strata)}
        self.of = np.searchsorted(self.own, [behavior for behavior, _ in strata])
        folds = len(strata) * FOLDS
        shape = (len(self.groups), folds, self.config.sketch_dim, self.model.device)
        self.margin, self.losses, self.chosen = (GradientSums(*shape) for _ in range(3))
        return self.own

    def behavior(self, k: int, pairs: Sequence[TokenPair], bar: Any) -> None:
        """Take in the sample of behavior ``k``."""
        sizes = self.dataset.sizes(pairs)
        budget = self.config.max_tokens_per_microbatch
        features, keep = [], _two_answers(pairs)
        folds = _folds(pairs)
        for chosen in plan_microbatches(sizes, np.arange(len(pairs)), budget):
            batch = self.dataset.pack([pairs[i] for i in chosen]).to(self.model.device)
            own = [self.stratum[k, pairs[i].label] * FOLDS + folds[i] for i in chosen]
            assert batch.pair_id.tolist() == [pairs[i].pair_id for i in chosen]
            at = torch.tensor(own, device=self.model.device)
            columns, beside = self._batch(batch, at)
            self.columns.append(columns)
            if keep:
                features.append((beside["features"], *beside["first_tokens"]))
            bar.update(len(chosen))
        if keep:
            same = np.full(len(pairs), k)
            parts = (np.concatenate(own) for own in zip(*features, strict=True))
            self.features |= feature_rows(same, *parts)

    def _batch(self, batch: PairBatch, at: Tensor) -> tuple[Columns, Columns]:
        found = self._gradients(batch)
        margin = found["margin"]
        if self.at_start:
            assert margin.logp_chosen is not None and margin.logp_rejected is not None
            batch = dataclasses.replace(
                batch, ref_chosen=margin.logp_chosen, ref_rejected=margin.logp_rejected
            )
        (result,) = evaluate(self.model, [batch], self.loss, self.config, "exact")
        self.margin.add(margin, at)
        self.losses.add(self._of_losses(found, result), at)
        if self.sides:
            self.chosen.add(found["chosen"], at)
        own = pair_columns(result, self.model.head_is_all) | self._columns(found)
        columns, beside = to_host([own, side_columns(result)])
        bad = np.flatnonzero(~np.isfinite(columns["gnorm_m" if self.taps else "head_gnorm_m"]))
        if bad.size:
            raise ValueError(
                f"pair_id {columns['pair_id'][bad[0]]} of behavior "
                f"{self.dataset.behaviors[columns['behavior'][bad[0]]]!r}: its gradient is not "
                "finite. The weights are damaged, or the precision is too low (--dtype float32)."
            )
        return columns, beside

    def _gradients(self, batch: PairBatch) -> dict[str, PairGradients]:
        weight = tail_weight(self.config)
        own = batch if self.config.ld_alpha is None else batch.with_tails()
        if self.taps is None:
            return head_gradients(self.model, own, self.config.sketch_dim, self.config.seed, weight)
        taps = self.taps

        def of(what: str) -> PairGradients:
            return pair_gradients(self.model, taps, own, of=what, tail_weight=weight)

        found = {"margin": of("margin")}
        if self.sides:
            found["chosen"] = of("chosen")
            if taps.exact:
                found["rejected"] = of("rejected")
            else:  # sketches are linear: grad logp_r = grad logp_c - grad m
                sketch = found["chosen"].sketch - found["margin"].sketch
                found["rejected"] = from_sketch(found["chosen"], sketch, "rejected")
        return found

    def _of_losses(self, found: dict[str, PairGradients], result: PairResult) -> PairGradients:
        """Gradients of the pairs' losses, by their slopes in the completions' log-probs."""
        if self.loss.margin_only:
            return found["margin"].scaled(-result.weight, "loss")
        a, b = loss_slopes(result, self.loss, self.config)
        c, r, m = (found[side] for side in (*SIDES, "margin"))
        sketch = a[:, None, None] * c.sketch + b[:, None, None] * r.sketch
        if m.method != "gram":
            return from_sketch(m, sketch, "loss")
        dot = (c.norm_sq + r.norm_sq - m.norm_sq) / 2
        norm_sq = a.square() * c.norm_sq + 2 * a * b * dot + b.square() * r.norm_sq
        return dataclasses.replace(m, norm_sq=norm_sq.clamp(min=0), sketch=sketch, of="loss")

    def _columns(self, found: dict[str, PairGradients]) -> dict[str, Tensor]:
        """Of the `pairs` table, on the device: what `pair_columns` does not have."""
        if self.taps is None:
            return {}
        margin = found["margin"]
        numbers = {"gnorm_m": margin.gnorm()}
        if self.sides:
            c, r = found["chosen"], found["rejected"]
            square = [side.norm_sq.sum(0) for side in (c, r, margin)]
            dot = (square[0] + square[1] - square[2]) / 2
            if not self.taps.exact:
                dot = sketch_dot(c.sketch, r.sketch).value.sum(0)
            numbers |= {"gnorm_chosen": c.gnorm(), "gnorm_rejected": r.gnorm()}
            numbers["dot_chosen_rejected"] = dot
        if not self.taps.exact:
            numbers["gnorm_error"] = margin.error() / numbers["gnorm_m"]
        numbers["gnorm_groups"] = margin.gnorm_groups()
        return {name: x.float() for name, x in numbers.items()}

    def done(self, reference: str, learning_rate: float | None) -> Profile:
        """The quantities, from the sums."""
        size, of = len(self.own), self.of
        of_folds, lost_of_folds = self.margin.over_ranks(), self.losses.over_ranks()
        margin, lost = (fold_sums(sums, of, size) for sums in (of_folds, lost_of_folds))
        strata, lost_strata = over_folds(of_folds), over_folds(lost_of_folds)
        losses = of_the_whole(lost_strata.merged(of, size), self.whole)
        k = self.config.sketch_dim
        nothing = np.zeros((len(self.groups), k, k))
        total = int(self.whole.sum())
        rate = learning_rate or 1.0
        measured = Measured(strata, of, losses, total, rate, nothing, exact=False)
        taken = measured.sample
        names = [self.dataset.behaviors[b] for b in self.own]
        columns = concatenate(self.columns)
        found = behavior_columns(measured)
        unknown = ["rate_pred_opt"] + ["rate_pred_sgd"] * (learning_rate is None)
        for name in unknown:  # there is no optimizer
            del found[name], found[f"{name}_error"]
        place = np.searchsorted(self.own, columns["behavior"])
        rows = behavior_rows(names, place, **measured_columns(columns))
        for i, row in enumerate(rows):
            row |= {name: known(values[i]) for name, values in found.items()}
            row |= self.features.get(self.own[i], {})
            row["fraction"] = float(self.whole[i] / total)
        means, parts = measured.means(), measured.parts()
        step = parts.sum(axis=1)
        sketch_error = {"dot": np.empty((len(names),) * 2), "cos": np.empty((len(names),) * 2)}
        for i in range(len(names)):  # one by one: all terms at once would be K^2 k^2 G numbers
            own = means[:, i : i + 1]
            sketch_error["dot"][i] = rates.interactions(own, parts).error[0]
            sketch_error["cos"][i] = rates.cosines(own, parts).error[0]
        sketch_error["share"] = rates.shares(parts).error
        sketch_error["rate"] = rates.first_order(means, step).error
        chosen = None
        if self.sides:
            chosen = fold_sums(self.chosen.over_ranks(), of, size)
            mean = chosen.sketch.sum(axis=2) / taken.count[:, None, None]
            sketch_error["chosen_rate"] = rates.first_order(mean, step).error
        length = rates.length_of(taken.squares() / taken.count[:, None, None])
        exact = (taken.norm_error == 0).T
        return Profile(
            names,
            self.groups,
            columns,
            rows,
            gram_rows(measured, names),
            length.value.T,
            np.where(exact, 0.0, length.error.T),
            estimated(margin, lost, chosen, self.whole, sketch_error),
            data_noise_scale(lost_strata, of, self.whole),
            _displaced(columns, place, len(names)),
            "gram" if self.taps is None or self.taps.exact else "sketch",
            self.whole,
            reference,
            self.at_start,
        )


def head_gradients(
    model: PairModel, batch: PairBatch, sketch_dim: int, seed: int, tail_weight: float = 1.0
) -> dict[str, PairGradients]:
    """Gradients in the head's weight alone of margins and completions' log-probs: one forward."""
    with torch.no_grad():
        scored = model.logp(batch, HeadNorms("both", sketch_dim, seed))
        sums = sequence_sums(scored.logp, batch.num_pairs, tail_weight)
        found = {}
        for of in ("margin", *SIDES):
            slope = segment_slopes(batch, of, tail_weight).to(scored.logp.dtype)
            norm_sq, sketch = (x[None] for x in combine_head(batch, scored, slope))
            no_error = torch.zeros_like(norm_sq)
            found[of] = PairGradients(("head",), norm_sq, no_error, sketch, of, "gram", None, *sums)
    return found


def from_sketch(like: PairGradients, sketch: Tensor, of: str) -> PairGradients:
    """Gradients of another quantity, of which the sketches (G, P, k, k) are what is known."""
    norm_sq, error = (x.to(sketch.dtype) for x in sketch_dot(sketch))
    return dataclasses.replace(like, norm_sq=norm_sq, norm_sq_error=error, sketch=sketch, of=of)


def loss_slopes(result: PairResult, loss: Loss, config: Config) -> tuple[Tensor, Tensor]:
    """(P,) each: derivatives of the pair's loss in the log-probs of chosen and rejected."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (result.x.chosen, result.x.rejected)]
        x = dataclasses.replace(result.x, chosen=leaves[0], rejected=leaves[1])
        total = pair_losses(loss, x, loss_options(config)).sum()
        chosen, rejected = torch.autograd.grad(total, leaves, allow_unused=True)
    zero = torch.zeros_like(leaves[0])
    return (
        zero if chosen is None else chosen,
        zero if rejected is None else rejected,
    )


def _displaced(columns: Columns, place: np.ndarray, count: int) -> np.ndarray | None:
    """(K,) part of the pairs whose own DPO step lowers the chosen log-prob: d > n_c^2."""
    prefix = "head_" if "gnorm_m" not in columns else ""
    if f"{prefix}gnorm_chosen" not in columns:
        return None
    dot = columns[f"{prefix}dot_chosen_rejected"].astype(np.float64)
    falls = dot > columns[f"{prefix}gnorm_chosen"].astype(np.float64) ** 2
    return np.bincount(place, falls, count) / np.bincount(place, minlength=count)


def _folds(pairs: Sequence[TokenPair]) -> list[int]:
    """The fold of each pair: labels are dealt out one by one, so that each fold has its part."""
    dealt: Counter[str] = Counter()
    folds = []
    for pair in pairs:
        folds.append(dealt[pair.label] % FOLDS)
        dealt[pair.label] += 1
    return folds


def _two_answers(pairs: Sequence[TokenPair]) -> bool:
    """Whether there are two answers, one or the other of which is chosen: else no delta exists, and
    the features need not be kept."""
    cut = first_tokens(pairs)
    answers = {(int(p.chosen[0]), int(p.rejected[0])) for p in cut.pairs}
    return len(answers) == 2 and not cut.without and len({frozenset(a) for a in answers}) == 1
