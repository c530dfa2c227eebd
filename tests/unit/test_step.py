"""The step: its scalars against closed forms, its norms against one backward per pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.errors import NonFiniteError
from fastpref.losses import LOSSES, PairLogp
from fastpref.model import load_model
from fastpref.optim import build_optimizer
from fastpref.refcache import with_reference
from fastpref.step import backward, evaluate, train_step


@pytest.fixture
def setup(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> Any:
    config = Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(tiny_data),),
        ref_cache_dir=str(tmp_path),
        max_length=128,
        dtype="float64",
        beta=0.4,
        learning_rate=1e-2,
    )
    model = load_model(config)
    pairs = with_reference(
        model, load_dataset(config, model.tokenizer).train[::6], cache_dir=str(tmp_path)
    )
    with torch.no_grad():  # a policy that is not the reference any more
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return config, model, pairs


def test_scalars_and_micro_batches(setup: Any) -> None:
    config, model, pairs = setup
    loss = LOSSES["sigmoid"]

    whole = backward(model, pack_pairs(pairs), loss, config, len(pairs))
    weight = config.beta * torch.sigmoid(-config.beta * whole.x.margin)
    torch.testing.assert_close(whole.weight, weight)
    expected = [p.grad.clone() for p in model.module.parameters()]
    model.module.zero_grad()
    for part in (pairs[:3], pairs[3:4], pairs[4:]):
        backward(model, pack_pairs(part), loss, config, len(pairs))
    for p, grad in zip(model.module.parameters(), expected, strict=True):
        assert (p.grad - grad).norm() <= 1e-6 * grad.norm()

    (seen,) = evaluate(model, [pack_pairs(pairs)], loss, config)
    torch.testing.assert_close(seen.loss, whole.loss)
    torch.testing.assert_close(seen.weight, whole.weight)


def test_head_norms_equal_one_backward_per_pair(setup: Any) -> None:
    config, model, pairs = setup
    norms = backward(
        model, pack_pairs(pairs), LOSSES["sigmoid"], config, len(pairs), norms="exact"
    ).norms
    weight = model.head.weight

    def head_gradient(number: int, c_chosen: float, c_rejected: float) -> torch.Tensor:
        logp = model.logp(pack_pairs([pairs[number]])).logp
        chosen, rejected = logp[0] + logp[1], logp[0] + logp[2]
        (grad,) = torch.autograd.grad(c_chosen * chosen + c_rejected * rejected, weight)
        return grad

    for n in range(len(pairs)):
        chosen, rejected = head_gradient(n, 1, 0), head_gradient(n, 0, 1)
        assert norms["gnorm_chosen"][n].item() == pytest.approx(chosen.norm().item(), rel=1e-6)
        assert norms["gnorm_rejected"][n].item() == pytest.approx(rejected.norm().item(), rel=1e-6)
        margin = head_gradient(n, 1, -1).norm().item()
        assert norms["gnorm_m"][n].item() == pytest.approx(margin, rel=1e-6)
        dot = (chosen * rejected).sum().item()
        assert norms["dot_chosen_rejected"][n].item() == pytest.approx(dot, rel=1e-6)


def test_norms_change_no_bit_of_the_gradient(setup: Any) -> None:
    config, model, pairs = setup
    grads = []
    for norms in (None, "exact"):
        model.module.zero_grad()
        backward(model, pack_pairs(pairs), LOSSES["sigmoid"], config, len(pairs), norms)
        grads.append([p.grad.clone() for p in model.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_step_goes_down_the_gradient_of_the_mean(setup: Any) -> None:
    config, model, pairs = setup
    optimizer = build_optimizer(
        model.module.named_parameters(), Config(optim="sgd", learning_rate=1e-5, max_grad_norm=0)
    )
    config = Config(beta=config.beta, max_grad_norm=0)
    loss = LOSSES["sigmoid"]
    result = train_step(model, [pack_pairs(pairs)], loss, config, len(pairs), optimizer, None)
    after = evaluate(model, [pack_pairs(pairs)], loss, config)[0].loss.mean()
    # SGD: the loss falls by rate x squared gradient norm, to first order.
    fallen = (result.loss - after).item() / (1e-5 * result.grad_norm.item() ** 2)
    assert fallen == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_not_finite_leaves_the_weights_and_names_the_pair(setup: Any, sign: int) -> None:
    config, model, pairs = setup
    batch = pack_pairs(pairs)
    reference = batch.ref_chosen.clone()
    reference[2] = sign * torch.inf  # -inf: the margin is infinite, the loss a finite 0
    batch = type(batch)(**{**vars(batch), "ref_chosen": reference})
    optimizer = build_optimizer(model.module.named_parameters(), config)
    before = [p.detach().clone() for p in model.module.parameters()]
    with pytest.raises(NonFiniteError, match=f"pair_id {pairs[2].pair_id} "):
        train_step(model, [batch], LOSSES["sigmoid"], config, len(pairs), optimizer, None)
    now = model.module.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_the_loss_sees_lengths(setup: Any) -> None:
    config, model, pairs = setup
    x = evaluate(model, [pack_pairs(pairs)], LOSSES["ipo"], config)[0].x
    assert isinstance(x, PairLogp)
    assert x.chosen_len.tolist() == [len(p.chosen) for p in pairs]
    assert x.rejected_len.tolist() == [len(p.rejected) for p in pairs]
