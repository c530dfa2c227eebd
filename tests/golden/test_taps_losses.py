"""Taps in steps of every kind of loss: without a reference, of lengths, of the step's other pairs,
with tails that count less (`ld_alpha`); and what is refused.

The truth is one backward for every pair through transformers' own forward, one sequence at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.taps import attach
from fastpref.gradients import pair_gradients
from fastpref.losses import PairLogp, get_loss, pair_losses
from fastpref.optim import build_optimizer
from fastpref.slopes import loss_options, tail_weight
from fastpref.step import train_step
from fastpref.tapcheck import find_taps
from tests.golden.test_router import mixture
from tests.golden.test_taps import SEED, Gradients, K, clean_norms, held_against, pairs_model
from tests.kernels.test_norms_models import PAIRS, P, build

REFERENCE = np.linspace(-30.0, -20.0, 2 * P, dtype=np.float32).reshape(2, -1)
GIVEN = [
    dataclasses.replace(pair, ref_chosen=float(c), ref_rejected=float(r))
    for pair, c, r in zip(PAIRS, *REFERENCE, strict=True)
]


def token_logp(module: Any, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """(|y|,) log-probs by transformers' plain forward."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    logits = module(input_ids=ids[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]


def sequences(module: Any, alpha: float) -> tuple[list[Tensor], list[Tensor]]:
    """Weighted sums chosen, rejected of every pair, then the plain ones of the chosen; with their
    graph. Tokens beyond the length of the pair's shorter completion count ``alpha`` times."""
    sums, full = [], []
    for pair in PAIRS:
        shorter = min(len(pair.chosen), len(pair.rejected))
        own = [token_logp(module, pair.prompt, y) for y in (pair.chosen, pair.rejected)]
        sums += [x[:shorter].sum() + alpha * x[shorter:].sum() for x in own]
        full.append(own[0].sum())
    return sums, full


def naive(module: Any, config: Config) -> tuple[Gradients, Gradients]:
    """Of every pair: gradient of its part of the step's sum of losses, and of its margin."""
    loss = get_loss(config.loss_type, config.loss_weights)
    sums, full = sequences(module, tail_weight(config))
    leaves = [x.detach().requires_grad_() for x in (*sums, *full)]
    given = [torch.from_numpy(x).double() if loss.needs_reference else None for x in REFERENCE]
    x = PairLogp(
        torch.stack(leaves[: 2 * P : 2]),
        torch.stack(leaves[1 : 2 * P : 2]),
        *given,
        *(torch.tensor([len(getattr(p, y)) for p in PAIRS]) for y in ("chosen", "rejected")),
        chosen_full=None if config.ld_alpha is None else torch.stack(leaves[2 * P :]),
    )
    total = pair_losses(loss, x, loss_options(config)).sum()
    slopes = torch.autograd.grad(total, leaves, materialize_grads=True)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def of(value: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            value, list(trained.values()), retain_graph=True, materialize_grads=True
        )
        return dict(zip(trained, found, strict=True))

    parts = zip(sums[::2], sums[1::2], full, slopes[: 2 * P : 2], slopes[1 : 2 * P : 2],
                slopes[2 * P :], strict=True)  # fmt: skip
    losses = [of(c * own_c + r * own_r + f * own_f) for c, r, f, own_c, own_r, own_f in parts]
    return losses, [of(c - r) for c, r in zip(sums[::2], sums[1::2], strict=True)]


LOSSES = {
    "ld": {"ld_alpha": 0.3},
    "ld, with an SFT term": {"loss_type": ("rpo",), "ld_alpha": 0.3},
    "ld, per token": {"loss_type": ("sigmoid_norm",), "ld_alpha": 0.0},
    "simpo": {"loss_type": ("simpo",)},
    "orpo": {"loss_type": ("orpo",)},
    "cpo": {"loss_type": ("cpo",)},
    "sft": {"loss_type": ("sft",)},
    "sorted": {"loss_type": ("aot_unpaired",)},
    "list": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "js_divergence": {"f_divergence_type": "js_divergence"},
}


@pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES.keys())
def test_a_step_of_any_loss(changes: dict[str, Any]) -> None:
    """In two micro-batches: norms and sketches of every pair's part, and of the margin where the
    loss is one of the margin; the step's gradient is their sum."""
    config = Config(beta=0.3, learning_rate=0.0, optim="sgd", max_grad_norm=0.0, **changes)
    module = clean_norms(build("llama"))
    losses, margins = naive(module, config)
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    loss = get_loss(config.loss_type, config.loss_weights)
    optimizer = build_optimizer(module.named_parameters(), config)
    batches = (pack_pairs(own) for own in (GIVEN[:3], GIVEN[3:]))
    result = train_step(model, batches, loss, config, P, optimizer, None, taps=taps)
    own = [r.gradients for r in result.pairs if r.gradients is not None]
    for side, grads in (("loss", losses), ("margin", margins)):
        if side == "margin" and not (loss.margin_only and config.f_divergence_type == "reverse_kl"):
            continue
        if side == "margin":
            own = [g.as_margin(r.weight) for g, r in zip(own, result.pairs, strict=True)]
        joined = {
            name: torch.cat([getattr(x, name) for x in own], dim=1)
            for name in ("norm_sq", "norm_sq_error", "sketch")
        }
        held_against(dataclasses.replace(own[0], **joined), taps, grads, 1e-9)
    for name, parameter in module.named_parameters():
        expected = sum(g[name] for g in losses) / P
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_margins_with_tails(name: str) -> None:
    """The rate sample's gradients under `ld_alpha`, of a tied head too, and of a sequence alone."""
    config = Config(ld_alpha=0.3)
    module = clean_norms(build(name))
    margins = naive(module, config)[1]
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    batch = pack_pairs(PAIRS).with_tails()
    held_against(pair_gradients(model, taps, batch, tail_weight=0.3), taps, margins, 1e-12)


@pytest.mark.parametrize("track", ["sketch", "exact"])
def test_routers_whose_balance_is_in_the_loss_are_refused(track: str) -> None:
    """A mixture's balance ties the pairs of a step; without it, its fused experts have no tap."""
    config = Config(track=track)
    with pytest.raises(ValueError, match=rf"track='{track}': the load-balancing loss .*: 0 or tra"):
        find_taps(mixture("mixtral"), config, PAIRS)
    alone = dataclasses.replace(mixture("mixtral"), router=None)
    with pytest.raises(ValueError, match="no tap knows the trained .*experts.*Set track: head"):
        find_taps(alone, config, PAIRS)


def test_tracking_that_nothing_records_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(track="sketch", record=False)
    assert find_taps(pairs_model(build("llama")), config, PAIRS) is None
    assert "track: sketch sees nothing, as record: false" in caplog.text
