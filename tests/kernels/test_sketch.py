"""Sketches: their projections, that they add up, mean and spread over seeds, what they tell."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from fastpref_kernels import (
    column_sketch,
    embedding_sketch,
    linear_norms,
    linear_sketch,
    lora_sketch,
    relative_spread,
    sketch,
    sketch_cosine,
    sketch_dot,
    weight_sketch,
)
from fastpref_kernels.projection import Projection, project
from torch import Tensor

from tests.kernels.test_op import large_allocations
from tests.kernels.test_pair_norms import ids, rows

F64 = torch.float64
COUNTS = [3, 1, 0, 20, 9]
S = len(COUNTS)


def stir(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


@pytest.mark.parametrize(("k", "size"), [(70, 128), (16, 16), (256, 256), (1, 1)])
def test_signs_are_bits_of_the_documented_hash(k: int, size: int) -> None:
    digest = hashlib.blake2b(b"5\0layer\0in", digest_size=8).digest()
    low, high = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))

    def word(i: int, w: int) -> int:
        return stir(stir((i + low) % 2**32) ^ stir((w + high) % 2**32))

    numbers = [0, 1, 77, 128_255, 2**32 - 1]
    signs = Projection.of(5, "layer", "in").signs(torch.tensor(numbers), k, F64)
    assert signs.shape == (5, k) and signs.dtype == F64
    for i, row in enumerate(numbers):
        own, place = 2 * (word(row, 0) & 1) - 1, (row ^ word(row // size, 1)) % size
        for a in {0, k // 3, k - 1}:
            assert signs[i, a] == own * (-1) ** (place & a).bit_count()


def test_signs_look_independent() -> None:
    """Means, and inner products of sides and keys, are as of fair coins; columns are orthogonal,
    and rows too, but for those that share a bucket: one in k of another block's."""
    n, k = 4096, 64
    sides = [("a", "in"), ("a", "out"), ("b", "in")]
    found = [Projection.of(0, *side).signs(torch.arange(n), k, F64) for side in sides]
    block = torch.arange(n) // k
    others = block.unsqueeze(0) != block.unsqueeze(1)
    for i, one in enumerate(found):
        assert float(one.mean(0).abs().max()) < 4 / math.sqrt(n)
        assert torch.equal(one.t() @ one, n * torch.eye(k, dtype=F64))
        dots = one @ one.t() / k
        assert set(dots.unique().tolist()) == {-1.0, 0.0, 1.0}
        assert torch.equal(dots[~others], torch.eye(n, dtype=F64)[~others])
        pairs = int(others.sum())
        shared, balance = dots[others].abs().mean(), dots[others].mean()
        assert float(shared) == 1 / k  # of every block one row a bucket
        assert abs(float(balance)) < 5 * math.sqrt(2 / pairs / k)
        for other in found[:i]:
            cross = one.t() @ other / math.sqrt(n)
            assert float(cross.abs().max()) < 5 and 0.9 < float(cross.std()) < 1.1
    assert not torch.equal(found[0], Projection.of(1, "a", "in").signs(torch.arange(n), k, F64))


def test_projection_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, side = rows([7], 90), Projection.of(0, "a", "in")
    whole = project(x, side, 40)
    monkeypatch.setattr("fastpref_kernels.projection.SIGNS_AT_ONCE", 40 * 13)
    torch.testing.assert_close(project(x, side, 40), whole, rtol=1e-13, atol=1e-12)
    parts = project(x[:, :33], side, 40) + project(x[:, 33:], side, 40, first_row=33)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-12)


def layer(d: int = 30, p: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return rows(COUNTS, d, seed=seed), rows(COUNTS, p, seed=seed + 1), ids(COUNTS)


OPTIONS: dict[str, Any] = {"seed": 3, "key": "w", "num_segments": S}


def gradients(x: Tensor, dy: Tensor) -> list[Tensor]:
    return [dy[ids(COUNTS) == s].t() @ x[ids(COUNTS) == s] for s in range(S)]


def test_parts_of_a_sum_add_up() -> None:
    """Micro-batches or ranks with a part of the tokens each; tensor-parallel shares of features."""
    x, dy, segment_id = layer()
    whole = linear_sketch(x, dy, segment_id, 5, **OPTIONS)
    some = torch.arange(len(x)) % 3 == 0
    parts = sum(
        linear_sketch(x[pick], dy[pick], segment_id[pick], 5, **OPTIONS) for pick in (some, ~some)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    columns = linear_sketch(x[:, :13], dy, segment_id, 5, **OPTIONS)
    columns = columns + linear_sketch(x[:, 13:], dy, segment_id, 5, first_input=13, **OPTIONS)
    torch.testing.assert_close(columns, whole, rtol=1e-12, atol=1e-12)
    shares = linear_sketch(x, dy[:, :7], segment_id, 5, **OPTIONS)
    shares = shares + linear_sketch(x, dy[:, 7:], segment_id, 5, first_output=7, **OPTIONS)
    torch.testing.assert_close(shares, whole, rtol=1e-12, atol=1e-12)


def test_change_of_a_weight_meets_the_gradients() -> None:
    """Equal to the sketch of the difference; from shards; transposed; of a vector."""
    x, dy, segment_id = layer()
    sketches = linear_sketch(x, dy, segment_id, 5, **OPTIONS)
    same = {"seed": 3, "key": "w"}
    for s, gradient in enumerate(gradients(x, dy)):
        old = torch.randn(20, 30, dtype=F64)
        delta = weight_sketch(old + gradient, old, 5, **same)
        torch.testing.assert_close(delta, sketches[s], rtol=1e-10, atol=1e-10)
        shards = weight_sketch(gradient[:8], None, 5, **same)
        shards = shards + weight_sketch(gradient[8:, :9], None, 5, first_output=8, **same)
        shards = shards + weight_sketch(
            gradient[8:, 9:], None, 5, first_output=8, first_input=9, **same
        )
        torch.testing.assert_close(shards, sketches[s], rtol=1e-10, atol=1e-10)
        turned = weight_sketch(gradient.t().contiguous(), None, 5, transposed=True, **same)
        torch.testing.assert_close(turned, sketches[s], rtol=1e-10, atol=1e-10)
    bias = column_sketch(dy, segment_id, 5, **OPTIONS)
    own = [dy[segment_id == s].sum(0) for s in range(S)]
    changes = torch.stack([weight_sketch(b, torch.zeros_like(b), 5, **same) for b in own])
    torch.testing.assert_close(bias, changes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_change_of_a_weight_keeps_its_digits_and_copies_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update of an ulp here and there, and others that no half type holds; the largest
    allocation is a tile's."""
    monkeypatch.setattr(sketch, "WEIGHT_ENTRIES", 64 * 256)
    old = torch.randn(512, 256).to(dtype)
    new = old.clone()
    new[::3] *= 1 + 2 * torch.finfo(dtype).eps
    new[1::3] = torch.randn(new[1::3].shape).to(dtype)
    same: dict[str, Any] = {"seed": 3, "key": "w"}
    delta = weight_sketch(new, old, 4, **same)
    assert delta.dtype == F64
    exact = weight_sketch(new.double() - old.double(), None, 4, **same)
    torch.testing.assert_close(delta, exact, rtol=1e-12, atol=1e-18)
    tile = 64 * 256 * 8
    found, _ = large_allocations(tile + 1, lambda: weight_sketch(new, old, 4, **same))
    assert found == 0


def test_tied_embedding_and_head_share_their_key() -> None:
    """The common term comes by itself: S(E) + S(H) = S(E + H)."""
    token_id = torch.randint(0, 6, (sum(COUNTS),), generator=torch.Generator().manual_seed(0))
    dy, hidden, dz, segment_id = rows(COUNTS, 11), rows(COUNTS, 11, seed=1), rows(COUNTS, 6), None
    segment_id = ids(COUNTS)
    ours = embedding_sketch(token_id, dy, segment_id, 4, scale=1.5, **OPTIONS)
    ours = ours + linear_sketch(hidden, dz, segment_id, 4, **OPTIONS)
    for s in range(S):
        pick = segment_id == s
        whole = dz[pick].t() @ hidden[pick]
        whole.index_add_(0, token_id[pick], 1.5 * dy[pick])
        truth = weight_sketch(whole, None, 4, seed=3, key="w")
        torch.testing.assert_close(ours[s], truth, rtol=1e-10, atol=1e-10)


def test_adapter() -> None:
    x, dy, segment_id = layer()
    a = torch.randn(3, 30, dtype=F64, requires_grad=True)
    b = torch.randn(20, 3, dtype=F64, requires_grad=True)
    ours = lora_sketch(x, dy, a, b, segment_id, 4, scale=0.7, **OPTIONS)
    y = 0.7 * (x @ a.t()) @ b.t()
    for s in range(S):
        pick = segment_id == s
        value = (y[pick] * dy[pick]).sum()
        grads = torch.autograd.grad(value, (a, b), retain_graph=True)
        truth = sum(
            weight_sketch(grad, None, 4, seed=3, key=f"w.{side}")
            for grad, side in zip(grads, ("lora_A", "lora_B"), strict=True)
        )
        torch.testing.assert_close(ours[s], truth, rtol=1e-10, atol=1e-10)


def sign_variance(gradient: Tensor, k: int) -> float:
    """Exact variance of ||S||^2 over seeds, k a power of two, as kernels/README.md derives it."""

    def sharing(n: int) -> Tensor:
        block = torch.arange(n) // k
        return (block.unsqueeze(0) != block.unsqueeze(1)) / k

    p, d = gradient.shape
    out, inside = sharing(p), sharing(d)
    one = 2 * (out * (gradient @ gradient.t()).square()).sum()
    one = one + 2 * (inside * (gradient.t() @ gradient).square()).sum()
    both = torch.einsum("ij,kl->ijkl", gradient, gradient)  # i j k l: G_ij G_kl
    both = (both + both.transpose(0, 2)).square()
    return float(one + torch.einsum("ijkl,ik,jl->", both, out.double(), inside.double()))


def over_seeds(
    x: Tensor, dy: Tensor, segment_id: Tensor, k: int, seeds: int
) -> tuple[Tensor, Tensor]:
    """Squared norms (seeds, S), and the mean (S,) of their variances as estimated."""
    found = [
        sketch_dot(linear_sketch(x, dy, segment_id, k, **{**OPTIONS, "seed": seed}))
        for seed in range(seeds)
    ]
    errors = torch.stack([own.error for own in found])
    return torch.stack([own.value for own in found]), errors.square().mean(0)


@pytest.mark.parametrize("k", [4, 8])
def test_squared_norm_over_seeds(k: int) -> None:
    """Mean within its error of the truth, spread as derived, own error estimate no smaller."""
    x, dy, segment_id = layer()
    truth, seeds = linear_norms(x, dy, segment_id, num_segments=S), 2000
    value, variance = over_seeds(x, dy, segment_id, k, seeds)
    for s, gradient in enumerate(gradients(x, dy)):
        if not COUNTS[s]:
            assert not value[:, s].any()
            continue
        spread = math.sqrt(sign_variance(gradient, k))
        assert abs(float(value[:, s].mean() - truth[s])) < 4 * spread / math.sqrt(seeds)
        assert float(value[:, s].std()) == pytest.approx(spread, rel=0.12)
        assert float(variance[s].sqrt()) > 0.9 * spread
        energy = gradient @ gradient.t()
        participation = float(energy.trace() ** 2 / energy.square().sum())
        assert spread <= relative_spread(k, participation) * float(truth[s]) * (1 + 1e-9)


def test_own_error_of_a_wide_layer() -> None:
    """Where a side has many times k features the estimated error is the spread."""
    x, dy, segment_id = layer(d=200, p=160)
    value, variance = over_seeds(x, dy, segment_id, 8, 600)
    for s, count in enumerate(COUNTS):
        if count:
            assert float(variance[s].sqrt()) == pytest.approx(float(value[:, s].std()), rel=0.12)


def test_a_side_of_few_features_loses_nothing() -> None:
    """As of an adapter of rank k, or a bias of at most k^2: its sketch is the thing itself."""
    x, dy, segment_id = layer(d=16, p=9)
    exact = linear_norms(x, dy, segment_id, num_segments=S)
    found = sketch_dot(linear_sketch(x, dy, segment_id, 16, **OPTIONS)).value
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    bias = rows(COUNTS, 256)
    found = sketch_dot(column_sketch(bias, segment_id, 16, **OPTIONS)).value
    sums = torch.stack([bias[segment_id == s].sum(0) for s in range(S)])
    torch.testing.assert_close(found, sums.square().sum(1), rtol=1e-12, atol=1e-12)


def test_inner_products_and_cosines_of_a_sum_over_layers() -> None:
    """Two weights and a bias in one sketch: what pairs have in common, over all of them."""
    k, seeds, segment_id = 16, 600, ids(COUNTS)
    layers = [layer(200, 150, seed) for seed in (0, 2)]
    bias = rows(COUNTS, 3000, seed=9)
    flat = [
        torch.cat([g.flatten() for g in parts])
        for parts in zip(
            *[gradients(x, dy) for x, dy, _ in layers],
            [bias[segment_id == s].sum(0) for s in range(S)],
            strict=True,
        )
    ]
    one, other = flat[0], flat[3]
    truth = float(one @ other)
    cosine = truth / float(one.norm() * other.norm())
    dots, cosines = [], []
    for seed in range(seeds):
        options = {"seed": seed, "num_segments": S}
        total = column_sketch(bias, segment_id, k, key="bias", **options)  # type: ignore[arg-type]
        for i, (x, dy, _) in enumerate(layers):
            total = total + linear_sketch(x, dy, segment_id, k, key=f"{i}", **options)  # type: ignore[arg-type]
        dots.append(torch.stack(sketch_dot(total[0], total[3])))
        cosines.append(torch.stack(sketch_cosine(total[0], total[3])))
    for found, expected, bias_allowed in ((dots, truth, 0.0), (cosines, cosine, 0.02)):
        value, error = torch.stack(found).unbind(1)
        spread = float(value.std())
        assert abs(float(value.mean()) - expected) < 4 * spread / math.sqrt(seeds) + bias_allowed
        assert float(error.square().mean().sqrt()) == pytest.approx(spread, rel=0.15)


def test_sum_over_layers_spreads_less() -> None:
    """k = 1 tells no error; more weights, each with a part of the energy, a smaller one."""
    assert relative_spread(32) == pytest.approx(math.sqrt(4 / 32 + 4 / 32**2))
    assert relative_spread(32, 100) < 0.06
    found = sketch_dot(torch.ones(2, 1, 1))
    assert found.value.tolist() == [1.0, 1.0] and bool(found.error.isnan().all())


def test_same_sketch_whatever_the_dtype_and_order_of_calls() -> None:
    x, dy, segment_id = layer()
    exact = linear_sketch(x, dy, segment_id, 6, **OPTIONS)
    torch.manual_seed(12345)  # no generator's state matters
    single = linear_sketch(x.float(), dy.float(), segment_id, 6, **OPTIONS)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(single, linear_sketch(x.float(), dy.float(), segment_id, 6, **OPTIONS))
    half = linear_sketch(x.bfloat16(), dy.bfloat16(), segment_id, 6, **OPTIONS)
    assert half.dtype == torch.float32
    error = (half.double() - exact).norm() / exact.norm()
    assert float(error) < 0.01


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: sketch_dot(torch.ones(3, 4)), r"expected a \(\.\.\., k, k\) .* got \(3, 4\)"),
        (lambda: sketch_dot(torch.ones(0, 0)), "k >= 1"),
        (lambda: sketch_dot(torch.ones(2, 2), torch.ones(3, 3)), "different k, 2 and 3"),
        (lambda: sketch_cosine(torch.ones(2, 2), torch.ones(5)), r"expected b .* got \(5,\)"),
        (lambda: relative_spread(0), "at least 1, got 0"),
        (lambda: relative_spread(4, 0.5), "got 4 and 0.5"),
    ],
)
def test_estimates_refuse_what_is_no_sketch(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
