"""Rates measured around real steps, against whole gradients and against what happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.config import Config
from fastpref.data.dataset import Dataset, load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.taps import attach
from fastpref.loading import load_model
from fastpref.losses import LOSSES
from fastpref.model import PairModel
from fastpref.optim import build_optimizer
from fastpref.refcache import with_reference
from fastpref.schedule import Schedule
from fastpref.step import train_step
from fastpref.track import RateTracker, StepRates

LOSS = LOSSES["sigmoid"]


@pytest.fixture(scope="module")
def setup(tiny_model_dir: Path, personas: Path, tmp_path_factory: Any) -> Any:
    """Three behaviors in float64, policy = reference."""
    cache = str(tmp_path_factory.mktemp("reference"))
    config = Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(personas),),
        ref_cache_dir=cache,
        dtype="float64",
        max_length=128,
        beta=0.3,
        learning_rate=2e-5,
        max_grad_norm=0.05,
        weight_decay=0.1,
        warmup_steps=3,
        rate_pairs=6,
        rate_every=2,
        max_tokens_per_microbatch=220,
    )
    model = load_model(config)
    dataset = load_dataset(config, model.tokenizer)
    train = with_reference(model, dataset.train, cache_dir=cache)
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    return config, model, dataclasses.replace(dataset, train=train), state


@dataclasses.dataclass
class Course:
    """Steps of a run, every one measured."""

    config: Config
    model: PairModel
    dataset: Dataset
    tracker: RateTracker
    taps: Any
    optimizer: torch.optim.Optimizer
    scheduler: Schedule
    rates: list[float] = dataclasses.field(default_factory=list)

    def step(self, pairs: list[Any], measured: bool = True) -> StepRates | None:
        if measured:
            self.tracker.before()
        rate = self.scheduler.learning_rate
        batches = [pack_pairs(pairs[:5]), pack_pairs(pairs[5:])]
        result = train_step(
            self.model, batches, LOSS, self.config, len(pairs), self.optimizer, None,
            taps=self.taps,
        )  # fmt: skip
        found = self.tracker.after(result, len(pairs), rate) if measured else None
        self.scheduler.step()
        self.rates.append(rate)
        return found


def course(setup: Any, mode: str, **changes: Any) -> Course:
    config, model, dataset, state = setup
    config = dataclasses.replace(config, **changes)
    model.module.load_state_dict(state)
    taps = attach(model.module, mode, sketch_dim=config.sketch_dim, seed=config.seed)
    optimizer = build_optimizer(model.module.named_parameters(), config)
    tracker = RateTracker(config, dataset, model, LOSS, taps)
    return Course(config, model, dataset, tracker, taps, optimizer, Schedule(optimizer, config, 40))


def column(found: StepRates, name: str) -> np.ndarray:
    values = [row[name] for row in found.behaviors]
    return np.array([np.nan if v is None else v for v in values])


def test_optimizer_true_rates_are_the_observed_ones(setup: Any) -> None:
    """AdamW, weight decay, clipping at work and a schedule: 5 % of what the margins did."""
    run = course(setup, "exact")
    train, clipped = run.dataset.train, 0
    for number in range(8):
        found = run.step(train[9 * number % 40 :][:9])
        assert found
        observed, predicted = column(found, "rate_obs"), column(found, "rate_pred_opt")
        assert (column(found, "rate_pred_opt_error") == 0).all()
        if run.rates[-1] == 0:
            assert (observed == 0).all() and (predicted == 0).all()
            continue
        scale = np.abs(observed).max()
        assert scale > 1e-5
        np.testing.assert_allclose(predicted, observed, rtol=0.05, atol=0.005 * scale)
        for pairs, _, expected in found.pairs:
            assert expected.shape == pairs.loss.shape
        clipped += 1
    assert clipped >= 6


@pytest.fixture(scope="module")
def one_step(setup: Any) -> dict[str, Any]:
    """A step of plain SGD without clipping, all its quantities from whole gradients."""
    run = course(setup, "exact", **SGD)
    # Of one answer, so that their gradients have something in common.
    pairs = [p for p in run.dataset.train if p.label == run.dataset.train[0].label][::3]
    run.step(run.dataset.train[:9], measured=False)  # policy and reference part
    before = [p.detach().clone() for p in run.model.trained]
    full = {pair.pair_id: gradient(run.model, [pair]) for pair in sample_of(run) + pairs}
    margin = {pair.pair_id: margins(run.model, [pair])[0] for pair in sample_of(run) + pairs}
    found = run.step(pairs)
    update = torch.cat(
        [(p.detach() - old).flatten() for p, old in zip(run.model.trained, before, strict=True)]
    ).numpy()
    behaviors = range(len(run.dataset.behaviors))
    own = [
        np.stack([full[p.pair_id] for p in sample_of(run) if p.behavior == k]) for k in behaviors
    ]
    weight = {
        p.pair_id: run.config.beta / (1 + np.exp(run.config.beta * margin[p.pair_id]))
        for p in pairs
    }
    losses = np.stack([-weight[p.pair_id] * full[p.pair_id] for p in pairs])
    parts = np.stack(
        [
            -sum(
                (g for g, p in zip(losses, pairs, strict=True) if p.behavior == k),
                np.zeros(len(update)),
            )
            / len(pairs)
            for k in behaviors
        ]
    )
    means = np.stack([g.mean(axis=0) for g in own])
    squares = np.array([(g**2).sum(axis=1).mean() for g in own])
    true = np.array(
        [
            (means[k] ** 2).sum()
            - excess([full[p.pair_id] for p in sample_of(run) if p.behavior == k],
                     [p.label for p in sample_of(run) if p.behavior == k])
            for k in behaviors
        ]
    )  # fmt: skip
    whole = parts.sum(axis=0)
    noise = losses.var(axis=0, ddof=1).sum()
    lengths = np.linalg.norm(means, axis=1)[:, None] * np.linalg.norm(parts, axis=1)
    after = {p.pair_id: margins(run.model, [p])[0] for p in sample_of(run)}
    return {
        "found": found,
        "dot": means @ parts.T,
        "cos": means @ parts.T / lengths,
        "share": parts @ whole / (whole @ whole),
        "coherence": true / squares,
        "gnorm_m_sq": squares,
        "group_gnorm": np.linalg.norm(means, axis=1),
        "rate_pred_sgd": means @ (run.rates[-1] * whole),
        "rate_pred_opt": means @ update,
        "rate_obs": np.array(
            [
                np.mean([after[i] - margin[i] for i in ids])
                for ids in (
                    [p.pair_id for p in sample_of(run) if p.behavior == k] for k in behaviors
                )
            ]
        ),
        "noise": noise / ((whole**2).sum() - noise / len(pairs)),
        "pairs": pairs,
    }


SGD = {
    "optim": "sgd",
    "learning_rate": 1e-4,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
}
OF_BEHAVIORS = (
    *("share", "coherence", "gnorm_m_sq", "group_gnorm", "rate_pred_sgd", "rate_pred_opt"),
)


def excess(gradients: list[np.ndarray], labels: list[str]) -> float:
    """What the squared length of their mean is too long by, drawn label by label in proportion."""
    total = 0.0
    for label in set(labels):
        own = np.stack([g for g, at in zip(gradients, labels, strict=True) if at == label])
        trace = own.var(axis=0, ddof=1).sum()
        total += (len(own) / len(labels)) ** 2 * trace / len(own)
    return total


def sample_of(run: Course) -> list[Any]:
    return [pair for own in run.tracker.batches for pair in own]


def margins(model: PairModel, pairs: list[Any]) -> np.ndarray:
    with torch.no_grad():
        logp = model.logp(pack_pairs(pairs)).logp.view(-1, 3)
    reference = np.array([p.ref_chosen - p.ref_rejected for p in pairs])
    return (logp[:, 1] - logp[:, 2]).numpy() - reference


def gradient(model: PairModel, pairs: list[Any]) -> np.ndarray:
    logp = model.logp(pack_pairs(pairs)).logp
    grads = torch.autograd.grad(logp[1] - logp[2], model.trained)
    return torch.cat([g.flatten() for g in grads]).numpy()


def gram(found: StepRates, name: str) -> np.ndarray:
    size = len(found.behaviors)
    assert len(found.gram) == size**2
    return np.array([row[name] for row in found.gram]).reshape(size, size)


def test_exact_mode_is_exact_where_it_says_so(one_step: dict[str, Any]) -> None:
    found = one_step["found"]
    for name in ("rate_pred_opt", "gnorm_m_sq", "rate_obs"):
        np.testing.assert_allclose(column(found, name), one_step[name], rtol=1e-5, atol=1e-12)
    for name in ("rate_pred_opt_error", "gnorm_m_sq_error"):
        assert (column(found, name) == 0).all()
    # Norms of the pairs and of the step's gradient are known, so this is: no sketch is in it.
    assert found.step["gradient_noise_scale"] == pytest.approx(one_step["noise"], rel=1e-4)
    assert found.step["gradient_noise_scale_error"] == pytest.approx(0, abs=1e-9)


def test_gradients_predict_what_sgd_does(one_step: dict[str, Any]) -> None:
    """The first order of plain gradient descent: lr sum_l Gamma_kl is what the margins did."""
    rate = one_step["rate_obs"]
    np.testing.assert_allclose(one_step["rate_pred_sgd"], rate, rtol=0.05)
    found = one_step["found"]
    error = column(found, "rate_pred_sgd_error")
    assert (error > 0).all()
    assert (np.abs(column(found, "rate_pred_sgd") - rate) < 4 * error).all()
    lr_gamma = SGD["learning_rate"] * gram(found, "dot").sum(axis=1)
    np.testing.assert_allclose(lr_gamma, column(found, "rate_pred_sgd"), rtol=1e-9)


def test_shares_sum_to_one(one_step: dict[str, Any]) -> None:
    found = one_step["found"]
    assert column(found, "share").sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_error_bars_cover(setup: Any, one_step: dict[str, Any], mode: str) -> None:
    """Over several sets of projections the truth, from whole gradients, lies within the bars."""
    scores: dict[str, list[np.ndarray]] = {name: [] for name in (*OF_BEHAVIORS, "dot", "cos")}
    for seed in range(20):
        run = course(setup, mode, **SGD)
        run.step(run.dataset.train[:9], measured=False)
        run.taps = attach(run.model.module, mode, sketch_dim=16, seed=seed)
        run.tracker.taps = run.taps
        found = run.step(one_step["pairs"])
        assert found
        for name in scores:
            read = gram if name in ("dot", "cos") else column
            value, error = read(found, name), read(found, f"{name}_error")
            apart = np.abs(value - one_step[name])
            assert ((error > 0) | (apart <= 1e-5 * np.abs(one_step[name]))).all(), name
            scores[name].append((apart / np.where(error > 0, error, 1.0)).ravel())
    for name, own in scores.items():
        together = np.concatenate(own)
        assert (together < 2).mean() > 0.85, (name, (together < 2).mean())
        assert np.median(together) < 1.0, (name, np.median(together))
