"""Sketched head gradients: what they estimate, with what error, and that they add up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import (
    embedding_sketch,
    linear_logprob,
    linear_sketch,
    reference,
    weight_sketch,
)
from fastpref_kernels.count_sketch import Buckets, vocabulary_signs
from torch import Tensor

from tests.kernels.cases import Case, call, make_case, set_width

SEEDS = 300


def sketched(case: Case, group_size: int = 3, **more: Any) -> Any:
    return call(linear_logprob, case, group_size, norms="sketch", **more)


def gradients(case: Case) -> Tensor:  # (S, V, D)
    """d logp[s] / d weight by one backward for each segment."""
    weight = case.weight.detach().clone().requires_grad_()
    logp = call(reference.linear_logprob, replace(case, weight=weight)).logp
    rows = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in logp]
    return torch.stack(rows)


def exact(case: Case, group_size: int = 3) -> Tensor:
    flat = gradients(case).flatten(1).unflatten(0, (-1, group_size))
    return flat @ flat.transpose(1, 2)


@pytest.mark.parametrize("width", [50, 96, 4096])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0, "temperature": 0.8}])
@pytest.mark.parametrize("group_size", [1, 3])
def test_sketch_is_the_one_of_the_gradient(
    width: int, options: dict[str, Any], group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as from the whole (V, D) gradient, wherever tiles and blocks of ids end."""
    set_width(monkeypatch, width)
    case = make_case(20, 6, 300, segments=6, gap=2.0, **options)
    at = {"seed": 7, "key": "w", "buckets": 64}
    ours = sketched(
        case, group_size, sketch_dim=5, sketch_seed=7, sketch_key="w", sketch_buckets=64
    ).sketch
    assert ours.shape == (6, 5, 5)
    for segment, gradient in zip(ours, gradients(case), strict=True):
        whole = weight_sketch(gradient, None, 5, **at)
        torch.testing.assert_close(segment, whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("width", [50, 4096])
def test_both_are_the_exact_gram_and_the_sketch(
    width: int, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each gives alone, the Gram matrices to the bit, beside log-probs of every row."""
    set_width(monkeypatch, width)
    case = make_case(20, 6, 300, segments=6, gap=2.0, softcap=5.0)
    at: dict[str, Any] = {"sketch_dim": 5, "sketch_seed": 7, "sketch_buckets": 64}
    with torch.set_grad_enabled(grad):
        ours = call(linear_logprob, case, 3, norms="both", stats=("row_logp",), **at)
        alone = call(linear_logprob, case, 3, norms="exact")
        sketch = sketched(case, **at).sketch
    assert torch.equal(ours.gram, alone.gram)
    torch.testing.assert_close(ours.sketch, sketch, rtol=1e-13, atol=1e-13)
    assert ours.gram_error is None and torch.equal(ours.logp, alone.logp)
    truth = call(reference.linear_logprob, case, stats=("row_logp",)).row_logp
    torch.testing.assert_close(ours.row_logp, truth, rtol=1e-12, atol=1e-13)


def test_as_the_layer_and_the_embedding_under_one_key() -> None:
    """`linear_sketch` of (R, V) logit gradients; an embedding's gradient added to a tied head's."""
    case = make_case(20, 6, 300, segments=6)
    slopes = reference.logit_gradients(case.hidden @ case.weight.t(), case.target)
    at: dict[str, Any] = {"seed": 3, "key": "tied", "buckets": 128}
    segment_id = case.segment_id
    assert segment_id is not None
    head = sketched(case, sketch_dim=4, sketch_seed=3, sketch_key="tied", sketch_buckets=128).sketch
    layer = linear_sketch(case.hidden, slopes, segment_id, 4, num_segments=6, **at)
    torch.testing.assert_close(head, layer, rtol=1e-11, atol=1e-13)
    dy = torch.randn(20, 6, dtype=torch.float64)
    both = head + embedding_sketch(case.target, dy, segment_id, 4, num_segments=6, **at)
    for s, gradient in enumerate(gradients(case)):
        rows = segment_id == s
        gradient.index_add_(0, case.target[rows], dy[rows])
        torch.testing.assert_close(
            both[s], weight_sketch(gradient, None, 4, **at), rtol=1e-11, atol=1e-13
        )


def test_sketches_add_up_over_batches() -> None:
    case = make_case(24, 6, 500, segments=3)
    assert case.segment_id is not None
    whole = sketched(case).sketch
    halves = [
        sketched(
            replace(
                case,
                hidden=case.hidden[part],
                target=case.target[part],
                segment_id=case.segment_id[part],
            )
        ).sketch
        for part in (slice(0, 9), slice(9, 24))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("spread,gap", [(1.0, 0.0), (2.5, 3.0)])
def test_mean_over_seeds_and_spread(spread: float, gap: float) -> None:
    """Unbiased within four errors of the mean; spread as `gram_error` says, on average over seeds:
    less between segments, where what it says is a bound."""
    case = make_case(30, 8, 1024, segments=6, spread=spread, gap=gap)
    # States with a common direction, as a model has them: rows add up instead of cancelling.
    case = replace(case, hidden=case.hidden + case.hidden.mean(0) * 4)
    truth = exact(case)
    found = [sketched(case, sketch_buckets=64, sketch_seed=seed) for seed in range(SEEDS)]
    grams = torch.stack([x.gram for x in found])
    said = torch.stack([x.gram_error for x in found]).square().mean(0).sqrt()
    spread_seen = grams.std(0)
    assert bool((grams.mean(0) - truth).abs().le(4 * spread_seen / SEEDS**0.5 + 1e-12).all())
    assert bool((spread_seen <= 1.25 * said).all())
    assert float((spread_seen / said).mean()) > 0.5
    # No more than what is promised for any data.
    sizes = truth.diagonal(dim1=1, dim2=2).sqrt()
    bound = (2 / 64) ** 0.5 * sizes.unsqueeze(2) * sizes.unsqueeze(1)
    assert bool((spread_seen <= bound).all())


def test_rows_alone_are_exact() -> None:
    """One row a segment: its norm needs no estimate."""
    case = make_case(9, 5, 600)
    out = sketched(case, 1, sketch_buckets=64)
    torch.testing.assert_close(out.gram, exact(case, 1), rtol=1e-12, atol=0)
    assert not out.gram_error.any()


def test_fewer_ids_than_buckets_is_exact() -> None:
    case = make_case(20, 5, 60, segments=6)
    out = sketched(case, sketch_buckets=64)
    torch.testing.assert_close(out.gram, exact(case), rtol=1e-11, atol=1e-12)
    assert not out.gram_error.any()


def test_inner_products_of_sketches_are_unbiased() -> None:
    """E <S_a, S_b> = <G_a, G_b>, the buckets in between included."""
    case = make_case(12, 6, 400, segments=2)
    first, second = gradients(case)
    products = torch.tensor(
        [
            float((x[0] * x[1]).sum())
            for seed in range(SEEDS)
            for x in [sketched(case, 1, sketch_seed=seed, sketch_dim=8, sketch_buckets=64).sketch]
        ]
    )
    error = float(products.std()) / SEEDS**0.5
    assert abs(float(products.mean()) - float((first * second).sum())) <= 4 * error


@pytest.mark.parametrize("count,vocab", [(64, 1000), (1024, 5000)])
def test_buckets_hold_equal_numbers_and_signs_are_even(count: int, vocab: int) -> None:
    ids = torch.arange(vocab)
    collide = 0
    for seed in range(40):
        buckets = Buckets.of(seed, "lm_head", count)
        place, signs = buckets.place(ids), buckets.signs(ids, torch.float64)
        sizes = torch.bincount(place, minlength=count)
        assert int(sizes.max() - sizes.min()) <= 1 or vocab % count
        assert int(sizes.max()) <= math.ceil(vocab / count)
        assert abs(float(signs.mean())) < 5 / vocab**0.5
        collide += int(place[3] == place[3 + count * 2 // 1 + 8])
    # Different blocks are rotated against each other by what the seed says, not always alike.
    assert collide < 40
    signs = vocabulary_signs(ids, 7, torch.float64, seed=0, key="lm_head", buckets=count)
    assert signs.shape == (vocab, 7) and bool(signs.abs().eq(1).all())


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
def test_precision(dtype: torch.dtype, bound: float) -> None:
    """Against the same buckets in float64: confident rows keep their digits here, too."""
    case = make_case(24, 32, 2000, dtype=dtype, segments=6, spread=0.5, gap=9.0)
    ours, truth = sketched(case), sketched(case.to(torch.float64))
    for name in ("gram", "sketch"):
        a, b = getattr(ours, name).double(), getattr(truth, name)
        sizes = b.flatten(1).abs().amax(1).view(-1, 1, 1)
        assert bool(((a - b).abs() <= bound * sizes).all()), name


def test_no_rows() -> None:
    out = sketched(make_case(0, 3, 9, segments=6))
    assert not out.gram.any() and not out.gram_error.any() and not out.sketch.any()
    assert out.sketch.shape == (6, 16, 16)
