"""The step: its scalars against closed forms, its norms against one backward per pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastpref_kernels import linear_logprob

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.errors import NonFiniteError
from fastpref.loading import load_model
from fastpref.losses import LOSSES, PairLogp, get_loss
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


COUPLED: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": (name,)} for name in ("sft", "cpo", "aot", "aot_unpaired", "simpo")},
    "list": {"loss_type": ("aot_unpaired", "sft", "ipo"), "loss_weights": (1.0, 0.3, 0.2)},
    "list-ld": {"loss_type": ("aot", "sft"), "ld_alpha": 0.3},
    "ld": {"loss_type": ("bco_pair",), "ld_alpha": 0.3},
    "wpo": {"loss_type": ("nca_pair",), "use_weighting": True, "ld_alpha": 0.3},
}


@pytest.mark.parametrize("name", COUPLED)
def test_micro_batches_are_invisible_to_every_loss(setup: Any, name: str) -> None:
    """Also to those that tie the pairs of a step together: values, slopes and the gradient."""
    config, model, pairs = setup
    config = dataclasses.replace(config, max_grad_norm=0.0, **COUPLED[name])
    loss = get_loss(config.loss_type, config.loss_weights)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.0)
    seen = []
    for parts in ([pairs], [pairs[:3], pairs[3:4], pairs[4:9], pairs[9:]]):
        batches = (pack_pairs(part) for part in parts)
        result = train_step(model, batches, loss, config, len(pairs), optimizer, "exact")
        columns = {k: torch.cat([getattr(r, k) for r in result.pairs]) for k in ("loss", "weight")}
        columns["gnorm"] = torch.cat([r.norms["gnorm_m"] for r in result.pairs])
        grads = [torch.zeros(1) if p.grad is None else p.grad for p in model.module.parameters()]
        seen.append((result.loss, columns, [g.clone() for g in grads]))
    (value, columns, grads), (other, other_columns, other_grads) = seen
    torch.testing.assert_close(other, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(columns["loss"].mean(), value)
    for key, own in columns.items():
        torch.testing.assert_close(other_columns[key], own, rtol=1e-5, atol=1e-9)
    size = sum(float(g.norm()) ** 2 for g in grads) ** 0.5
    error = sum(float((a - b).norm()) ** 2 for a, b in zip(grads, other_grads, strict=True)) ** 0.5
    assert size > 0 and error <= 1e-6 * size

    batches = [pack_pairs(pairs[:5]), pack_pairs(pairs[5:])]
    if config.ld_alpha is None:
        results = evaluate(model, batches, loss, config)
        torch.testing.assert_close(torch.cat([r.loss for r in results]), columns["loss"])
        torch.testing.assert_close(torch.cat([r.weight for r in results]), columns["weight"])


def test_weighted_sums_have_the_norms_of_one_backward_per_pair(setup: Any) -> None:
    """Under ld_alpha: log-probs of `with_tails` and their norms against sums row by row."""
    config, model, pairs = setup
    config = dataclasses.replace(config, ld_alpha=0.3)
    batch = pack_pairs(pairs).with_tails()
    batch.check()
    result = backward(model, batch, LOSSES["sigmoid"], config, len(pairs), norms="exact")
    weight = model.head.weight
    tails = 0
    for n, pair in enumerate(pairs):
        alone = pack_pairs([pair])
        hidden = model.hidden(alone).index_select(0, alone.rows)
        rows = linear_logprob(hidden, weight, alone.target).logp
        shorter = min(len(pair.chosen), len(pair.rejected))
        logp = []
        for own in (1, 2):
            mine = rows[(alone.segment_id == 0) | (alone.segment_id == own)]
            logp.append(mine[:shorter].sum() + 0.3 * mine[shorter:].sum())
            tails += len(mine) > shorter
        assert result.x.chosen[n].item() == pytest.approx(logp[0].item(), rel=1e-6)
        assert result.x.rejected[n].item() == pytest.approx(logp[1].item(), rel=1e-6)
        (grad,) = torch.autograd.grad(logp[0] - logp[1], weight)
        assert result.norms["gnorm_m"][n].item() == pytest.approx(grad.norm().item(), rel=1e-6)
    assert tails >= 3


def test_a_batch_without_tails_is_not_taken_for_one_with_them(setup: Any) -> None:
    config, model, pairs = setup
    config = dataclasses.replace(config, ld_alpha=0.3)
    with pytest.raises(AssertionError, match="with_tails"):
        backward(model, pack_pairs(pairs), LOSSES["sigmoid"], config, len(pairs))


def test_without_a_reference_none_is_read(setup: Any) -> None:
    config, model, pairs = setup
    bare = [dataclasses.replace(p, ref_chosen=None, ref_rejected=None) for p in pairs]
    result = backward(model, pack_pairs(bare), LOSSES["cpo"], config, len(pairs))
    assert result.x.ref_chosen is None and bool(torch.isfinite(result.loss).all())
    torch.testing.assert_close(result.reward_chosen, config.beta * result.x.chosen)
    torch.testing.assert_close(result.x.margin, result.x.chosen - result.x.rejected)
    result = backward(model, pack_pairs(bare), LOSSES["simpo"], config, len(pairs))
    expected = config.beta * result.x.chosen / result.x.chosen_len
    torch.testing.assert_close(result.reward_chosen, expected)


def test_head_statistics_are_those_of_the_plain_model(setup: Any) -> None:
    config, model, pairs = setup
    (result,) = evaluate(model, [pack_pairs(pairs)], LOSSES["sigmoid"], config)
    with torch.no_grad(), model.plain_attention():
        for n, pair in enumerate(pairs):
            for side, completion in enumerate((pair.chosen, pair.rejected)):
                ids = torch.from_numpy(np.concatenate([pair.prompt, completion])).long()
                logits = model.module(input_ids=ids[None]).logits[0, len(pair.prompt) - 1 : -1]
                logp = logits.log_softmax(-1)
                expected = {
                    "entropy": -(logp.exp() * logp).sum(),
                    "top1": (logits.argmax(-1) == ids[len(pair.prompt) :]).sum(),
                    "mean_logit": logits.mean(-1).sum(),
                }
                for name, value in expected.items():
                    got = result.stats[name][side][n].item()
                    assert got == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


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
