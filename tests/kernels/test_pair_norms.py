"""Norms of single layers against autograd, one backward per segment, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastpref_kernels import (
    bias_norms,
    embedding_norms,
    embeddings,
    layernorm_norms,
    linear_norms,
    lora_norms,
    pair_gram,
    reference,
    rmsnorm_norms,
    row_counts,
)
from torch import Tensor, nn

F64 = torch.float64


def ids(counts: list[int]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).int()


def rows(counts: list[int], *shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    # A common part, as real activations and gradients have one: norms then do not just add up.
    noise = torch.randn(sum(counts), *shape, generator=g, dtype=F64)
    return (noise + torch.randn(*shape, generator=g, dtype=F64)).to(dtype)


def autograd_gram(
    parameter: Tensor,
    output: Tensor,
    dy: Tensor,
    segment_id: Tensor,
    segments: int,
    group_size: int | None,
) -> Tensor:
    """From one backward of <output, dy> per segment."""
    found = []
    for s in range(segments):
        value = (output[segment_id == s] * dy[segment_id == s]).sum()
        (grad,) = torch.autograd.grad(value, parameter, retain_graph=True, materialize_grads=True)
        found.append(grad)
    return reference.gradient_gram(found, group_size)


# Lengths that need every way: merged small groups, several tiles, gradients; empty, one token.
LENGTHS = [
    [1, 1, 1, 1],
    [0, 3, 17, 0, 0, 40],
    [5, 70, 64, 1, 0, 2],
    [130, 3, 257, 129],
    [0, 0],
]
GROUPS = [None, 1, 2]


@pytest.mark.parametrize("counts", LENGTHS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape,tile", [((150, 300), 128), ((150, 300), 16), ((1, 200), 128)])
def test_linear(
    counts: list[int],
    group_size: int | None,
    shape: tuple[int, int],
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair_gram, "TILE", tile)
    d, p = shape
    segment_id, segments = ids(counts), len(counts)
    x, dy = rows(counts, d), rows(counts, p, seed=1)
    layer = nn.Linear(d, p, bias=True).double()
    y = layer(x)
    options: dict[str, Any] = {"num_segments": segments, "group_size": group_size}
    weight = linear_norms(x, dy, segment_id, **options)
    bias = bias_norms(dy, segment_id, **options)
    for ours, parameter in ((weight, layer.weight), (bias, layer.bias)):
        truth = autograd_gram(parameter, y, dy, segment_id, segments, group_size)
        assert ours.shape == truth.shape and ours.dtype == F64
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12 * float(truth.abs().max()))


def test_every_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """T <= d p / (d + p) goes by Gram matrices, longer by gradients: seen, not trusted."""
    d, p, counts = 150, 300, [99, 100, 101, 3]
    products: list[tuple[int, ...]] = []
    real = pair_gram.pair_product_gram

    def seen(x: Tensor, dy: Any, bounds: Any) -> Tensor:
        products.append(tuple(bounds))
        return real(x, dy, bounds)

    monkeypatch.setattr(pair_gram, "pair_product_gram", seen)
    x, dy = rows(counts, d), rows(counts, p, seed=1)
    assert pair_gram.longest_pair_gram(d, p) == 100
    norms = linear_norms(x, dy, ids(counts), num_segments=4)
    assert products == [(199, 300)]
    truth = reference.linear_norms(x, dy, ids(counts), num_segments=4)
    torch.testing.assert_close(norms, truth, rtol=1e-12, atol=0)
    products.clear()  # a group's length counts, not a segment's
    linear_norms(x, dy, ids(counts), num_segments=4, group_size=2)
    assert products == [(0, 99, 199), (199, 300, 303)]


def test_shapes_of_known_layers() -> None:
    """At Llama-3-8B's shapes the rule says what dynamics.md tabulates."""
    assert pair_gram.longest_pair_gram(4096, 4096) == 2048
    assert pair_gram.longest_pair_gram(4096, 14336) == 3185


@pytest.mark.parametrize("group_size", GROUPS)
def test_several_outputs_of_one_input(group_size: int | None) -> None:
    counts = [40, 7, 90, 3]
    x = rows(counts, 150)
    dy = [rows(counts, p, seed=p) for p in (140, 30, 20, 10)]
    options: dict[str, Any] = {"num_segments": 4, "group_size": group_size}
    together = linear_norms(x, dy, ids(counts), **options)
    apart = sum(linear_norms(x, y, ids(counts), **options) for y in dy)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("heads", [None, 4])
def test_norm_layers(group_size: int | None, heads: int | None) -> None:
    counts = [5, 1, 0, 33]
    segment_id = ids(counts)
    shape = (heads, 10) if heads else (10,)
    x, dy = rows(counts, *shape), rows(counts, *shape, seed=1)
    options: dict[str, Any] = {"num_segments": 4, "group_size": group_size}
    weight = torch.randn(10, dtype=F64, requires_grad=True)
    eps = 1e-3
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for scale in (weight, 1.0 + weight):  # Llama's, Gemma's
        truth = autograd_gram(weight, normal * scale, dy, segment_id, 4, group_size)
        ours = rmsnorm_norms(x, dy, segment_id, eps=eps, **options)
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    layer = nn.LayerNorm(10, eps=eps).double()
    both = layernorm_norms(x, dy, segment_id, eps=eps, **options)
    for ours, parameter in ((both.weight, layer.weight), (both.bias, layer.bias)):
        truth = autograd_gram(parameter, layer(x), dy, segment_id, 4, group_size)
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding(
    group_size: int | None, padding_idx: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated ids, in one segment and in several; learned positions; Gemma's scale."""
    monkeypatch.setattr(embeddings, "COLUMNS", 37 * 5)  # several tiles of columns
    counts = [6, 1, 0, 30]
    segment_id = ids(counts)
    token_id = torch.randint(0, 5, (37,), generator=torch.Generator().manual_seed(0))
    dy = rows(counts, 12)
    layer = nn.Embedding(9, 12, padding_idx=padding_idx).double()
    scale = 12**0.5
    options: dict[str, Any] = {"num_segments": 4, "group_size": group_size}
    truth = autograd_gram(layer.weight, layer(token_id) * scale, dy, segment_id, 4, group_size)
    ours = embedding_norms(
        token_id, dy, segment_id, scale=scale, padding_idx=padding_idx, **options
    )
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("longest", [200, 3])
def test_adapters(group_size: int | None, zero: bool, longest: int) -> None:
    """B zero, as at the start, where A's gradient is zero; B not zero; dropout on A's input."""
    counts = [longest, 4, 0, 17]
    segment_id = ids(counts)
    x, dy = rows(counts, 40), rows(counts, 30, seed=1)
    x = x * (torch.rand_like(x) > 0.3) / 0.7
    a = torch.randn(3, 40, dtype=F64, requires_grad=True)
    b = torch.zeros(30, 3, dtype=F64) if zero else torch.randn(30, 3, dtype=F64)
    b.requires_grad_()
    y = 1.7 * (x @ a.t()) @ b.t()
    options: dict[str, Any] = {"num_segments": 4, "group_size": group_size}
    ours = lora_norms(x, dy, a, b, segment_id, scale=1.7, **options)
    for norms, parameter in ((ours.a, a), (ours.b, b)):
        truth = autograd_gram(parameter, y, dy, segment_id, 4, group_size)
        scale = float(truth.abs().max())
        torch.testing.assert_close(norms, truth, rtol=1e-12, atol=1e-13 * scale)
    assert zero == (not bool(ours.a.any()))


def test_expert_of_a_mixture() -> None:
    """Its rows are a part of the tokens, out of order; sorted by pair they are a linear layer's."""
    counts, segments = [9, 14, 6], 3
    pair, x, dy = ids(counts), rows(counts, 150), rows(counts, 140, seed=1)
    picked = torch.randperm(29)[:20]
    order = picked[pair[picked].argsort(stable=True)]
    ours = linear_norms(x[order], dy[order], pair[order], num_segments=segments)
    truth = reference.linear_norms(x[picked], dy[picked], pair[picked], num_segments=segments)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="segment_id.argsort"):
        linear_norms(x[picked], dy[picked], pair[picked], num_segments=segments)


def test_rows_that_sequences_share() -> None:
    """Segments of a pair: shared rows, rest of chosen, rest of rejected: any margin's norm."""
    counts = [4, 3, 5, 2, 1, 1]
    segment_id = ids(counts)
    x, dy = rows(counts, 150), rows(counts, 160, seed=1)
    gram = linear_norms(x, dy, segment_id, num_segments=6, group_size=3)
    factor = torch.tensor([0.4, 0.9, -0.5], dtype=F64)  # a loss of both sequences: c + r, c, r
    weighted = dy * factor[segment_id.long() % 3].unsqueeze(1)
    truth = reference.linear_norms(x, weighted, segment_id // 3, num_segments=2)
    ours = torch.einsum("a,pab,b->p", factor, gram, factor)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[20, 30, 2], [300, 60, 3]])
def test_half_types_accumulate_in_float32(dtype: torch.dtype, counts: list[int]) -> None:
    """A pair that cancels, 18 times as long in its parts: what half accumulation would lose."""
    x = rows(counts, 150, dtype=dtype)
    dy = rows(counts, 160, seed=1, dtype=dtype)
    last = counts[0] // 2
    x[last : 2 * last] = x[:last]
    dy[last : 2 * last] = -dy[:last]
    dy[0] *= 1.2
    ours = linear_norms(x, dy, ids(counts), num_segments=3)
    truth = reference.linear_norms(x.double(), dy.double(), ids(counts), num_segments=3)
    part = reference.linear_norms(
        x[:last].double(), dy[:last].double(), ids([last]), num_segments=1
    )
    assert float((part / truth[0]).sqrt()) > 18
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=0)


def test_counts_and_transposed_views_change_nothing() -> None:
    counts = [40, 7, 90, 3]
    x, dy, segment_id = rows(counts, 150), rows(counts, 160, seed=1), ids(counts)
    plain = linear_norms(x, dy, segment_id, num_segments=4)
    counted = row_counts(segment_id, 4)
    assert counted == counts
    other = linear_norms(
        x.t().contiguous().t(), dy, segment_id.long(), num_segments=4, counts=tuple(counted)
    )
    torch.testing.assert_close(plain, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("group_size", [None, 2])
def test_a_pair_that_is_not_finite_spoils_no_other(group_size: int | None) -> None:
    counts = [4, 3, 5, 2]
    x, dy = rows(counts, 150), rows(counts, 160, seed=1)
    good = linear_norms(x, dy, ids(counts), num_segments=4, group_size=group_size)
    dy[0, 0] = torch.inf
    bad = linear_norms(x, dy, ids(counts), num_segments=4, group_size=group_size)
    assert not bool(bad[0].isfinite().all())
    torch.testing.assert_close(bad[1:], good[1:], rtol=1e-14, atol=0)


def test_same_bits_again_and_under_autocast() -> None:
    counts = [40, 7, 90, 3]
    x, dy = rows(counts, 150, dtype=torch.float32), rows(counts, 160, dtype=torch.float32)
    calls: list[Callable[[], Tensor]] = [
        lambda: linear_norms(x, dy, ids(counts), num_segments=4),
        lambda: rmsnorm_norms(x, x, ids(counts), eps=1e-5, num_segments=4),
        lambda: lora_norms(x, dy, x[:4], dy[:4].t(), ids(counts), scale=2.0, num_segments=4).a,
    ]
    for call in calls:
        first = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second = call()
        assert torch.equal(first, second)
