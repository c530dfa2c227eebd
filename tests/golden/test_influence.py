"""What a step's pairs do to probes: sketched estimates against whole gradients of plain forwards,
and against what a real step did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.branches import Probe
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.taps import attach
from fastpref.influence import Influence
from fastpref.losses import get_loss
from fastpref.model import PairModel
from fastpref.optim import build_optimizer
from fastpref.step import train_step
from tests.architectures import PAIRS, V, packed, tiny_model

BEHAVIORS = ["a", "b"]
BETA = 0.5


def pairs() -> list[TokenPair]:
    return [
        dataclasses.replace(pair, behavior=i % 2, ref_chosen=-9.0 - i, ref_rejected=-8.0)
        for i, pair in enumerate(PAIRS)
    ]


def probes() -> list[Probe]:
    rng = np.random.default_rng(7)
    found = []
    for i, pair in enumerate(PAIRS):
        other = rng.integers(0, V, 4).astype(np.int32)
        sides = {"chosen": pair.chosen, "rejected": pair.rejected, "irr_train": other}
        for kind, response in sides.items():
            found.append(Probe(len(found), i, i % 2, kind, pair.prompt, response))
    found.append(Probe(len(found), 99, -1, "chosen", PAIRS[0].prompt, other))
    return found


def plain_logp(model: PairModel, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    ids = torch.from_numpy(np.r_[prompt, response].astype(np.int64))
    with model.plain_attention():
        logits = model.module(input_ids=ids[None], use_cache=False).logits[0]  # type: ignore[operator]
    logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(1, ids[len(prompt) :, None]).sum()


def flat_gradient(model: PairModel, scalar: Tensor) -> Tensor:
    grads = torch.autograd.grad(scalar, model.trained)
    return torch.cat([grad.flatten() for grad in grads])


def weights(model: PairModel) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.trained])


def mean_gradients(model: PairModel, influence: Influence) -> tuple[Tensor, Tensor]:
    """(C, n) whole gradients of the cells' mean log-probs, and (C,) these, by plain forwards."""
    gradients, values = [], []
    for place in influence.cells:
        own = [p for p in probes() if (p.behavior, p.response_type) == place]
        mean = torch.stack([plain_logp(model, p.prompt, p.response) for p in own]).mean()
        gradients.append(flat_gradient(model, mean))
        values.append(mean.detach())
    return torch.stack(gradients), torch.stack(values)


def part_of_step(model: PairModel, behavior: int) -> Tensor:
    """(n,) G_l = -(1/N) sum of grad loss."""
    total: Tensor | float = 0.0
    for pair in pairs():
        if pair.behavior == behavior:
            margin = plain_logp(model, pair.prompt, pair.chosen) - pair.ref_chosen  # type: ignore[operator]
            margin = margin - plain_logp(model, pair.prompt, pair.rejected) + pair.ref_rejected
            total = total - torch.nn.functional.logsigmoid(BETA * margin)
    assert isinstance(total, Tensor)
    return -flat_gradient(model, total) / len(PAIRS)


def measured(
    name: str, optim: str, learning_rate: float, before_step: Callable[[PairModel, Influence], Any]
) -> tuple[Any, list[Any], PairModel, Influence]:
    """What ``before_step`` gives, rows, the model after the step, and who measured it."""
    model = packed(tiny_model(name))
    config = Config(
        output_dir="x", beta=BETA, optim=optim, learning_rate=learning_rate, max_grad_norm=0.0
    )
    taps = attach(model.module, "sketch", sketch_dim=32, seed=3)
    influence = Influence(probes(), BEHAVIORS, model, taps, max_tokens=60)
    assert len(influence.batches) > 2
    truth = before_step(model, influence)
    optimizer = build_optimizer(model.module.named_parameters(), config)
    influence.before()
    # Two micro-batches: the parts add up over them.
    batches = [pack_pairs(pairs()[:3]), pack_pairs(pairs()[3:])]
    loss = get_loss("sigmoid")
    result = train_step(model, batches, loss, config, len(PAIRS), optimizer, None, taps=taps)
    moved = influence.after(result, len(PAIRS))
    with torch.no_grad():
        logp = [float(plain_logp(model, p.prompt, p.response)) for p in probes()]
    return truth, influence.rows(moved, np.array(logp)), model, influence


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_estimates_are_those_of_whole_gradients(name: str) -> None:
    def truth(model: PairModel, influence: Influence) -> tuple[Tensor, Tensor, Tensor]:
        gradients, values = mean_gradients(model, influence)
        return gradients, values, torch.stack([part_of_step(model, k) for k in range(2)])

    (gradients, values, parts), rows, _, influence = measured(name, "sgd", 1e-6, truth)
    assert len(rows) == len(influence.cells) * 3  # the whole step, and two behaviors
    exact = gradients @ torch.cat([parts.sum(0, keepdim=True), parts]).T
    lengths = gradients.norm(dim=1)[:, None] * torch.cat([parts.sum(0, keepdim=True), parts]).norm(
        dim=1
    )
    scores, by_place = [], {}
    for row in rows:
        c = influence.cells.index((BEHAVIORS.index(row["behavior"]) if row["behavior"] else -1,
                                   row["response_type"]))  # fmt: skip
        j = 0 if row["other"] is None else 1 + BEHAVIORS.index(row["other"])
        by_place[c, j] = row["dot"]
        scores.append((row["dot"] - float(exact[c, j])) / row["dot_error"])
        cos = float(exact[c, j] / lengths[c, j])
        assert abs(row["cos"] - cos) < max(5 * row["cos_error"], 0.05)
        members = [p for p in probes() if (p.behavior, p.response_type) == influence.cells[c]]
        assert row["n"] == len(members)
    scores = np.array(scores)
    # Standard errors are what they say: most within 2, none far out, and not far too large.
    assert np.abs(scores).max() < 4.5 and np.mean(np.abs(scores) < 2) > 0.8
    assert np.sqrt(np.mean(scores**2)) > 0.3
    size = float(exact.abs().max())
    errors = [row["dot_error"] for row in rows]
    assert max(errors) < 0.25 * size  # and they say something
    for c in range(len(influence.cells)):
        assert by_place[c, 0] == pytest.approx(by_place[c, 1] + by_place[c, 2], rel=1e-9)


@pytest.mark.parametrize("optim,learning_rate", [("sgd", 3e-5), ("adamw_torch", 1e-6)])
def test_a_real_step_moves_probes_as_predicted(optim: str, learning_rate: float) -> None:
    def truth(model: PairModel, influence: Influence) -> tuple[Tensor, Tensor, Tensor]:
        return *mean_gradients(model, influence), weights(model)

    found = measured("llama", optim, learning_rate, truth)
    (gradients, values, start), rows, model, influence = found
    change = weights(model) - start
    _, after = mean_gradients(model, influence)
    first_order = gradients @ change
    whole = [row for row in rows if row["other"] is None]
    scores = []
    for c, row in enumerate(whole):
        observed = float(after[c] - values[c])
        # What was observed is what happened, and the step is small enough for first order.
        assert row["change_obs"] == pytest.approx(observed, abs=1e-9)
        assert float(first_order[c]) == pytest.approx(observed, rel=0.05, abs=1e-7)
        scores.append((row["change_opt"] - observed) / row["change_opt_error"])
        if optim == "sgd":
            assert row["change_opt"] == pytest.approx(learning_rate * row["dot"], rel=1e-4)
    assert np.abs(scores).max() < 4.5
    errors = np.array([row["change_opt_error"] for row in whole])
    assert errors.max() < 0.4 * max(abs(row["change_obs"]) for row in whole)


def test_nothing_of_the_model_changes() -> None:
    model = packed(tiny_model("llama"))
    taps = attach(model.module, "sketch", sketch_dim=8)
    influence = Influence(probes(), BEHAVIORS, model, taps, max_tokens=60)
    start, random = weights(model), torch.random.get_rng_state()
    influence.before()
    assert torch.equal(weights(model), start)
    assert all(p.grad is None for p in model.trained)
    assert torch.equal(torch.random.get_rng_state(), random)
