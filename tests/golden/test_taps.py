"""Taps against one naive backward for every pair, on whole models: norms, sketches, inner products
with a change of the weights.

The naive gradients are those of transformers' own forward, one sequence at a time
(tests/kernels/test_norms_models.py).
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch
from fastpref_kernels import sketch_dot, weight_sketch
from torch import Tensor

from fastpref import loading
from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.taps import Taps, attach
from fastpref.gradients import PairGradients, pair_gradients
from fastpref.losses import LOSSES, sequence_sums
from fastpref.model import PairModel
from fastpref.step import backward
from tests.kernels.captures import _clean_norm
from tests.kernels.test_norms_models import NAMES, PAIRS, P, build, logp

K, SEED = 4, 3
CONFIG = Config(model_name_or_path="x", dataset_name=("x",), beta=0.3)
Gradients = list[dict[str, Tensor]]  # of every pair, parameter by parameter


def clean_norms(module: Any) -> Any:
    """RMSNorms in float64: transformers' own compute in float32, which would hide 1e-12."""
    for layer in module.modules():
        if type(layer).__name__.endswith("RMSNorm"):
            layer.forward = types.MethodType(_clean_norm, layer)
    return module


def pairs_model(module: Any, dtype: torch.dtype = torch.float64) -> PairModel:
    loading.prepare(module)
    return PairModel(module, None, torch.device("cpu"), dtype, "")


def naive(module: Any) -> dict[str, Gradients]:
    """of -> one backward a pair through transformers' plain forward."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found: dict[str, Gradients] = {"margin": [], "chosen": [], "rejected": []}
    for pair in PAIRS:
        chosen, rejected = (logp(module, pair, x) for x in (pair.chosen, pair.rejected))
        for of, value in (
            ("chosen", chosen),
            ("rejected", rejected),
            ("margin", chosen - rejected),
        ):
            grads = torch.autograd.grad(
                value, list(trained.values()), retain_graph=True, materialize_grads=True
            )
            found[of].append(dict(zip(trained, grads, strict=True)))
    return found


def squares(taps: Taps, grads: Gradients) -> Tensor:
    """(G, P) squared norms by layer group."""
    out = torch.zeros(len(taps.groups), len(grads), dtype=torch.float64)
    for place in taps.places():
        for i, own in enumerate(grads):
            out[place.group, i] += own[place.name].square().sum()
    return out


def sketches(taps: Taps, grads: Gradients) -> Tensor:
    """(G, P, k, k) of the gradients themselves, as those of weights."""
    k = taps.sketch_dim
    out = torch.zeros(len(taps.groups), len(grads), k, k, dtype=torch.float64)
    for place in taps.places():
        for i, own in enumerate(grads):
            out[place.group, i] += weight_sketch(
                own[place.name],
                None,
                k,
                seed=taps.seed,
                key=place.key,
                transposed=place.transposed,
                first_output=place.first_output,
                buckets=place.buckets,
            )
    return out


def held_against(ours: PairGradients, taps: Taps, grads: Gradients, tolerance: float) -> None:
    """Norms of every group and of all weights, and sketches."""
    assert sum(len(own) for own in grads) == len(grads) * sum(1 for _ in taps.places())
    truth = squares(taps, grads)
    total = truth.sum(0)
    # A group that is nearly 0 beside the others has the rounding of the others.
    scale = truth.sqrt() + 1e-2 * total.sqrt()
    error = ((ours.gnorm_groups().t() - truth.sqrt()).abs() / scale).max()
    assert error <= tolerance, f"groups: {error:.1e}"
    error = ((ours.gnorm() - total.sqrt()) / total.sqrt()).abs().max()
    assert error <= tolerance, f"norm: {error:.1e}"
    assert torch.equal(ours.norm_sq_error, torch.zeros_like(truth))
    expected = sketches(taps, grads)
    error = (ours.sketch - expected).abs().max() / expected.abs().max()
    assert error <= 10 * tolerance, f"sketches: {error:.1e}"


def test_taps_follow_the_weights() -> None:
    """Between two batches an optimizer changes them."""
    module, changed = (clean_norms(build("llama")) for _ in range(2))
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    pair_gradients(model, taps, pack_pairs(PAIRS))
    with torch.no_grad():
        for own in (module, changed):
            for name, parameter in own.named_parameters():
                if "norm" in name:
                    parameter.mul_(1.7)
    ours = pair_gradients(model, taps, pack_pairs(PAIRS))
    held_against(ours, taps, naive(changed)["margin"], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_exact_equals_one_backward_per_pair(name: str) -> None:
    """Packed, prefix-shared; margins, and the log-probs of either completion."""
    module = clean_norms(build(name))
    truth = naive(module)
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    for of, grads in truth.items():
        ours = pair_gradients(model, taps, pack_pairs(PAIRS), of=of)
        held_against(ours, taps, grads, 1e-12)
    assert all(p.grad is None for p in module.parameters())
    assert not any(
        "forward" in tap.module.__dict__ and tap.module.forward == tap.forward
        for tap in taps.layers
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_models_as_they_are(name: str) -> None:
    """With transformers' own norms, which compute in float32."""
    module = build(name)
    grads = naive(module)["margin"]
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    held_against(pair_gradients(model, taps, pack_pairs(PAIRS)), taps, grads, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_inner_products_with_a_change(name: str) -> None:
    """<grad m, change> of every pair and group, the tied head's part included."""
    module = clean_norms(build(name))
    grads = naive(module)["margin"]
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    torch.manual_seed(1)
    change = {p: torch.randn_like(p) for p in module.parameters()}
    ours = pair_gradients(model, taps, pack_pairs(PAIRS), change=change)
    truth = torch.zeros(len(taps.groups), P, dtype=torch.float64)
    for place in taps.places():
        for i, own in enumerate(grads):
            truth[place.group, i] += (own[place.name] * change[place.parameter]).sum()
    assert ours.change is not None
    scale = squares(taps, grads).sqrt() * sum(x.square().sum() for x in change.values()) ** 0.5
    assert float(((ours.change - truth).abs() / scale).max()) <= 1e-12


def adapter(module: Any, zero: bool) -> Any:
    """LoRA on attention and MLP, with biases, B as it begins or not."""
    import peft

    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        bias="lora_only" if not zero else "none",
        modules_to_save=["input_layernorm"],
    )
    torch.manual_seed(2)
    peft.get_peft_model(module, settings)
    if not zero:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.double().eval()


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_adapters(name: str, zero: bool) -> None:
    """LoRA's A and B, and the norms that are trained whole beside them; the rest is frozen."""
    module = clean_norms(adapter(build(name), zero))
    truth = naive(module)
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    assert taps.groups[0] == "block.0.attention" and taps.groups[-1] == "norms"
    for of in ("margin", "chosen"):
        held_against(pair_gradients(model, taps, pack_pairs(PAIRS), of=of), taps, truth[of], 1e-12)


def seen_in_training(model: PairModel, taps: Taps, sizes: tuple[int, ...]) -> PairGradients:
    """Of the loss of every pair, from the backwards of a step in micro-batches of ``sizes``."""
    loss, config, found, first = LOSSES["sigmoid"], CONFIG, [], 0
    for size in sizes:
        batch = pack_pairs(references(PAIRS[first : first + size]))
        result = backward(model, batch, loss, config, P, taps=taps)
        assert result.gradients is not None
        found.append(result.gradients.as_margin(result.weight))
        first += size
    joined = {
        name: torch.cat([getattr(x, name) for x in found], dim=1)
        for name in ("norm_sq", "norm_sq_error", "sketch")
    }
    return dataclasses.replace(found[0], **joined)


def references(pairs: list[Any]) -> list[Any]:
    return [dataclasses.replace(p, ref_chosen=-9.0, ref_rejected=-8.0) for p in pairs]


@pytest.mark.parametrize("sizes", [(5,), (2, 1, 2)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3"])
def test_in_a_step_the_loss_tells_the_margin(name: str, sizes: tuple[int, ...]) -> None:
    """grad L = - weight grad m, whatever the micro-batches; and the parameters' gradients are the
    bits of a step that nobody watches."""
    module = clean_norms(build(name))
    grads = naive(module)["margin"]
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    ours = seen_in_training(model, taps, sizes)
    held_against(ours, taps, grads, 1e-11)
    watched = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    first = 0
    for size in sizes:
        batch = pack_pairs(references(PAIRS[first : first + size]))
        backward(model, batch, LOSSES["sigmoid"], CONFIG, P)
        first += size
    for n, p in module.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, watched[n]), n


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_activation_checkpointing(name: str) -> None:
    """Non-reentrant: the forward runs twice, the taps are told once."""
    module = clean_norms(build(name))
    grads = naive(module)["margin"]
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    module.train()  # transformers checkpoints in training only; dropout is 0 by `prepare`
    held_against(seen_in_training(model, taps, (3, 2)), taps, grads, 1e-11)
    held_against(pair_gradients(model, taps, pack_pairs(PAIRS)), taps, grads, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    """Products in bfloat16 under autocast: below 2 % of the norms in float32, of every pair.

    Also of the one whose completions differ in one late token of 150, whose gradients cancel to an
    eighteenth: two separate forwards in bfloat16 are 1 to 6 % off there, a shared prefix is not.
    """
    module = build(name).float()
    exact, batch = attach(module, "exact", sketch_dim=K, seed=SEED), pack_pairs(PAIRS)
    truth = pair_gradients(pairs_model(module, torch.float32), exact, batch).gnorm()
    ours = pair_gradients(pairs_model(module, torch.bfloat16), exact, batch).gnorm()
    error = float(((ours - truth) / truth).abs().max())
    assert 0 < error < 0.02, error


def test_what_a_step_does_to_both_likelihoods() -> None:
    """A step of SGD on a pair's own margin raises log pi(chosen) by n_c^2 - d and log pi(rejected)
    by d - n_r^2, times the rate: from three passes, against finite differences."""
    module = clean_norms(build("llama"))
    grads = naive(module)["margin"]
    model, taps = pairs_model(module), attach(module, "exact", sketch_dim=K, seed=SEED)
    batch = pack_pairs(PAIRS)
    margin, chosen, rejected = (
        pair_gradients(model, taps, batch, of=of).gnorm().square()
        for of in ("margin", "chosen", "rejected")
    )
    dot = (chosen + rejected - margin) / 2
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    rate = 1e-6
    for i, pair in enumerate(PAIRS):
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                for n, p in module.named_parameters():
                    p.copy_(start[n] + sign * rate * grads[i][n])
                parts = model.logp(pack_pairs([pair])).logp
                moved.append(torch.cat(sequence_sums(parts, 1)))
        seen = (moved[0] - moved[1]) / (2 * rate)
        expected = torch.stack([chosen[i] - dot[i], dot[i] - rejected[i]])
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6 * float(chosen[i]))


def test_a_change_of_the_weights_is_foretold() -> None:
    """<grad m, change> from a pass with a change; its estimate from the sketches of the weights
    before and after; and what the margin really does."""
    module = clean_norms(build("qwen3"))
    model = pairs_model(module)
    taps = attach(module, "exact", sketch_dim=64, seed=SEED)
    batch, before = pack_pairs(PAIRS), taps.weight_sketch()
    torch.manual_seed(5)
    change = {p: 1e-6 * torch.randn_like(p) for p in module.parameters()}
    seen = pair_gradients(model, taps, batch, change=change)
    margins = []
    for sign in (-1.0, 2.0):  # before and behind: what is quadratic in the change cancels
        with torch.no_grad():
            for p, moved in change.items():
                p.add_(moved, alpha=sign)
        there = pair_gradients(model, taps, batch)
        assert there.logp_chosen is not None and there.logp_rejected is not None
        margins.append(there.logp_chosen - there.logp_rejected)
    assert seen.change is not None
    moved_by = (margins[1] - margins[0]) / 2
    torch.testing.assert_close(seen.change.sum(0), moved_by, rtol=1e-6, atol=1e-12)
    estimate = sketch_dot(seen.sketch.sum(0), (taps.weight_sketch() - before).sum(0))
    away = (estimate.value - seen.change.sum(0)) / estimate.error
    assert float(away.abs().max()) < 4


def test_sketches_are_unbiased_and_know_their_error() -> None:
    """Over seeds: the mean of squared norms is the exact one, and their spread what they say."""
    module = build("llama")
    model, batch = pairs_model(module), pack_pairs(PAIRS)
    exact = pair_gradients(model, attach(module, "exact", sketch_dim=2), batch)
    found, said = [], []
    for seed in range(60):
        ours = pair_gradients(model, attach(module, "sketch", sketch_dim=8, seed=seed), batch)
        found.append(ours.norm_sq)
        said.append(ours.norm_sq_error)
    values, errors = torch.stack(found), torch.stack(said)
    for i, group in enumerate(exact.groups):
        if group in ("norms", "head"):
            torch.testing.assert_close(values[0, i], exact.norm_sq[i], rtol=1e-9, atol=0)
            assert not errors[:, i].any()
            continue
        away = ((values[:, i] - exact.norm_sq[i]) / errors[:, i]).abs()
        within = [float((away <= n).double().mean()) for n in (1, 2)]
        assert 0.5 < within[0] < 0.85 and within[1] > 0.8, (group, within)
        spread = values[:, i].std(0)
        bias = (values[:, i].mean(0) - exact.norm_sq[i]) / (spread / 60**0.5)
        assert bias.abs().max() < 4, (group, bias)
        ratio = spread / errors[:, i].square().mean(0).sqrt()
        assert ((ratio > 0.6) & (ratio < 1.5)).all(), (group, ratio)
    total = (values.sum(1).sqrt() - exact.gnorm()) / exact.gnorm()
    assert total.abs().mean() < 0.1
