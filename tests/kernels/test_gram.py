"""Exact Gram matrices of head gradients against explicit outer products and against autograd."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _head_checks, _native, gram_products, linear_logprob, reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.kernels.cases import Case, call, make_case, set_width

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "softcap": 5.0, "logit_scale": 1.4, "temperature": 0.8},
]


def gram(function: Any, case: Case, group_size: int, **more: Any) -> Any:
    return call(function, case, group_size, norms="exact", **more).gram


@pytest.mark.parametrize("group_size,segments", [(1, 12), (3, 12), (2, 2), (4, 16)])
@pytest.mark.parametrize("width", [7, 60, 4096])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("gap", [0.0, 6.0])
def test_equal_to_outer_products(
    group_size: int,
    segments: int,
    width: int,
    options: dict[str, Any],
    gap: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Repeated targets, groups of many lengths, empty segments and empty groups."""
    set_width(monkeypatch, width)
    case = make_case(33, 6, 60, segments=segments, gap=gap, **options)
    case = replace(case, target=case.target % 5)
    ours, truth = (
        gram(linear_logprob, case, group_size),
        gram(reference.linear_logprob, case, group_size),
    )
    assert ours.shape == (segments // group_size, group_size, group_size)
    scale = float(truth.abs().max())
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12 * scale)


def test_equal_to_one_backward_per_sequence_with_shared_rows() -> None:
    """Segments of a pair: shared rows, the rest of chosen, the rest of rejected."""
    case = make_case(20, 5, 40, segments=6)
    weight = case.weight.requires_grad_()
    out = linear_logprob(
        case.hidden,
        weight,
        case.target,
        case.segment_id,
        num_segments=6,
        group_size=3,
        norms="exact",
    )
    assert out.gram is not None
    for pair in range(2):
        shared, chosen, rejected = out.logp[3 * pair : 3 * pair + 3]
        for a, b in ((chosen, chosen), (rejected, rejected), (chosen, rejected)):
            one = torch.autograd.grad(shared + a, weight, retain_graph=True)[0]
            two = torch.autograd.grad(shared + b, weight, retain_graph=True)[0]
            part = {0: shared, 1: chosen, 2: rejected}
            i = next(k for k, v in part.items() if v is a)
            j = next(k for k, v in part.items() if v is b)
            g = out.gram[pair]
            by_gram = g[0, 0] + g[0, j] + g[i, 0] + g[i, j]
            torch.testing.assert_close(by_gram, (one * two).sum(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("gap", [0.0, 9.0])
def test_precision_of_each_norm(dtype: torch.dtype, bound: float, gap: float) -> None:
    """Relative to each norm: confident sequences have small gradients, and keep their digits."""
    case = make_case(24, 32, 500, dtype=dtype, segments=8, spread=0.5, gap=gap)
    ours = gram(linear_logprob, case, 2).double().diagonal(dim1=1, dim2=2)
    truth = gram(reference.linear_logprob, case.to(torch.float64), 2).diagonal(dim1=1, dim2=2)
    assert bool(((ours - truth).abs() <= bound * (1 + gap) * truth).all())


@pytest.mark.parametrize("norms", ["exact", "sketch"])
@pytest.mark.parametrize("longest", [1000, 0])
def test_same_bits_with_and_without(
    norms: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpref_kernels.head_norms.longest_head_gram", lambda *_: longest)
    case = make_case(48, 16, 700, dtype=torch.float32, segments=12)
    results = []
    for asked in (None, norms):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = linear_logprob(
            hidden,
            weight,
            case.target,
            case.segment_id,
            num_segments=12,
            group_size=3,
            norms=asked,
            stats=_head_checks.SEGMENT_STATS + _head_checks.ROW_STATS if asked else (),
        )
        results.append((out.logp, *torch.autograd.grad(out.logp, (hidden, weight), case.grad)))
    for without, with_norms in zip(*results, strict=True):
        assert torch.equal(without, with_norms)


def test_no_rows_and_one_entry_vocabulary() -> None:
    assert not gram(linear_logprob, make_case(0, 3, 9, segments=4), 2).any()
    assert not gram(linear_logprob, make_case(6, 3, 1, segments=4, dtype=torch.float32), 2).any()


def test_without_segments_every_row_is_one() -> None:
    case = make_case(6, 4, 30)
    ours = gram(linear_logprob, case, 3)
    torch.testing.assert_close(
        ours, gram(reference.linear_logprob, case, 3), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("train", [("hidden", "weight"), ("hidden",), ()])
@pytest.mark.parametrize("cache", [-1, 1])
@pytest.mark.parametrize("width", [13, 4096])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.bfloat16, 1e-4)])
def test_long_groups_by_their_gradients(
    train: tuple[str, ...],
    cache: int,
    width: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some groups this way, some by products of rows; tiles of E kept, and computed again."""
    set_width(monkeypatch, width)
    monkeypatch.setattr("fastpref_kernels.head_norms.longest_head_gram", lambda *_: 5)
    monkeypatch.setattr(gram_products, "HEAD_ENTRIES", 7 * 6)
    case = make_case(33, 6, 60, segments=12, gap=3.0, dtype=dtype, **options)
    case = replace(case, target=case.target % 5)
    case.hidden.requires_grad_("hidden" in train)
    case.weight.requires_grad_("weight" in train)
    ours = gram(linear_logprob, case, 3, cache=cache)
    truth = gram(reference.linear_logprob, case.to(torch.float64), 3)
    scale = float(truth.abs().max())
    torch.testing.assert_close(ours.double(), truth, rtol=bound, atol=bound * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pair_that_differs_little(dtype: torch.dtype) -> None:
    """The margin's gradient is 20 times smaller than either sequence's: the difference of their
    Gram entries keeps what is left of the digits."""
    g = torch.Generator().manual_seed(0)
    length, dim, vocab = 12, 16, 300
    shared = torch.randn(length, dim, generator=g)
    hidden = torch.cat([shared, shared + 0.05 * torch.randn(length, dim, generator=g)])
    target = torch.randint(0, vocab, (length,), generator=g).repeat(2)
    weight = torch.randn(vocab, dim, generator=g) / 4
    segment_id = torch.arange(2).repeat_interleave(length).int()
    case = Case(hidden, weight, target, segment_id, 2, torch.ones(2))
    truth = gram(reference.linear_logprob, case.to(torch.float64), 2)
    ours = gram(linear_logprob, case.to(dtype), 2)
    assert float(truth[0, 0, 0]) > 18**2 * float(_margin(truth))
    error = abs(float(_margin(ours) - _margin(truth)))
    assert error <= 32 * torch.finfo(dtype).eps * float(truth[0, 0, 0])


def _margin(gram: Any) -> Any:
    return (gram[0, 0, 0] + gram[0, 1, 1] - 2 * gram[0, 0, 1]).double()


class Operations(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products, 2 for each pair of entries."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0].rstrip("_")  # in place or not
        counter = flop_registry.get(getattr(torch.ops.aten, name, None))
        if counter is not None:
            self.count += int(counter(*args, **(kwargs or {}), out_val=out))
        return out


def operations(norms: str | None, group_size: int, length: int, **options: Any) -> int:
    """Of matrix products in a forward; R = 96 rows, D = 32, V = 640."""
    case = make_case(96, 32, 640, dtype=torch.float32)
    segments = 96 // length
    module = importlib.import_module("fastpref_kernels.linear_logprob")

    counted = Operations()
    with pytest.MonkeyPatch.context() as patch, counted:
        patch.setattr(module, "is_plain", lambda *_: True)  # no mode sees into a custom op
        patch.setattr(_native, "library", lambda: None)  # nor into C
        linear_logprob(
            case.hidden,
            case.weight.requires_grad_(),
            case.target,
            torch.arange(96).int() // length,
            num_segments=segments,
            group_size=group_size,
            norms=norms,
            **options,
        )
    return counted.count


@pytest.mark.parametrize("group_size,length", [(1, 1), (1, 8), (1, 24), (3, 8), (2, 16)])
def test_operations_of_short_groups(group_size: int, length: int) -> None:
    """At most 2 R L (V + D) for L rows a group: no product with the head beside the forward's."""
    extra = operations("exact", group_size, length) - operations(None, group_size, length)
    bound = 2 * 96 * group_size * length * (640 + 32)
    assert 0.9 * bound < extra <= bound


def test_operations_of_long_groups() -> None:
    """No more than the segments' gradients, 2 R V D, however long they are."""
    extra = operations("exact", 1, 96) - operations(None, 1, 96)
    own_products = 2 * 640 * 32  # the g x g product of one group's gradients
    assert extra == 2 * 96 * 640 * 32 + own_products
    assert extra < 2 * 96 * 96 * (640 + 32)


def test_longest_head_gram_is_where_the_two_ways_cost_the_same() -> None:
    for vocab, dim, size, kept in ((32000, 1024, 3, True), (640, 32, 1, False), (5, 3, 4, True)):
        longest = gram_products.longest_head_gram(vocab, dim, size, kept)
        for length, shorter in ((longest, True), (longest + 1, False)):
            by_rows = 2 * length**2 * (vocab + dim)
            passes = 1 if kept else 2
            by_gradients = 2 * passes * length * vocab * dim + 2 * size**2 * vocab * dim
            assert (by_rows <= by_gradients) == shorter
