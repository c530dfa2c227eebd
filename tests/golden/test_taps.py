"""Taps against one naive backward for every pair, on whole models: norms, sketches, inner products
with a change of the weights.

The naive gradients are those of transformers' own forward, one sequence at a time
(tests/kernels/test_norms_models.py).
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from fastpref_kernels import weight_sketch
from torch import Tensor

from fastpref import model as pair_model
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.taps import Taps, attach
from fastpref.gradients import PairGradients, pair_gradients
from fastpref.model import PairModel
from tests.kernels.captures import _clean_norm
from tests.kernels.test_norms_models import NAMES, PAIRS, P, build, logp

K, SEED = 4, 3
Gradients = list[dict[str, Tensor]]  # of every pair, parameter by parameter


def clean_norms(module: Any) -> Any:
    """RMSNorms in float64: transformers' own compute in float32, which would hide 1e-12."""
    for layer in module.modules():
        if type(layer).__name__.endswith("RMSNorm"):
            layer.forward = types.MethodType(_clean_norm, layer)
    return module


def pairs_model(module: Any, dtype: torch.dtype = torch.float64) -> PairModel:
    pair_model.prepare(module)
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
