"""The lean way of a head of one tile, and what is remembered of a call's shapes and options."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from fastpref_kernels import _prepare, linear_logprob, one_tile
from torch import Tensor

from tests.kernels.cases import Case, Onlooker, make_case

WAYS = [(), ("hidden",), ("weight",), ("hidden", "weight")]


def step(
    case: Case, train: tuple[str, ...], create_graph: bool = False, **more: Any
) -> list[Tensor]:
    leaves = {
        k: x.detach().clone().requires_grad_(k in train)
        for k, x in (("hidden", case.hidden), ("weight", case.weight))
    }
    segments = None if case.segment_id is None else case.num_segments
    head = (leaves["hidden"], leaves["weight"], case.target, case.segment_id)
    logp = linear_logprob(*head, num_segments=segments, **more).logp
    assert logp.requires_grad == bool(train)
    if not train:
        return [logp]
    trained, grad = [leaves[k] for k in train], case.grad.to(logp.dtype)
    return [logp, *torch.autograd.grad(logp, trained, grad, create_graph=create_graph)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments", [None, 6])
@pytest.mark.parametrize("train", WAYS, ids="+".join)
def test_the_same_bits_as_the_op(
    dtype: torch.dtype, segments: int | None, train: tuple[str, ...], monkeypatch: Any
) -> None:
    calls: list[object] = []
    plainly = one_tile.one_tile_logprob

    def seen(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return plainly(*inputs)

    public = importlib.import_module("fastpref_kernels.linear_logprob")
    monkeypatch.setattr(public, "one_tile_logprob", seen)
    case = make_case(20, 8, 1303, dtype=dtype, segments=segments)
    for scales in ({}, {"logit_scale": 0.7, "temperature": 1.9}, {"logit_scale": -2.0}):
        lean = step(case, train, **scales)
        assert len(calls) == 1
        with Onlooker():
            as_op = step(case, train, **scales)
        again = step(case, train, create_graph=True, **scales)
        for one, two, three in zip(lean, as_op, again, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)
        calls.clear()


def test_what_one_tile_does_not_do() -> None:
    """Calls beside it: each with the log-probs that float64 gives, none by the lean way."""
    case = make_case(20, 8, 1303, dtype=torch.float64, segments=6)
    expected = step(case, ("hidden", "weight"))
    for more in ({"cache": 0}, {"stats": ("top1",)}, {"norms": "exact"}, {"softcap": 1e6}):
        for one, two in zip(step(case, ("hidden", "weight"), **more), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_backward_twice_and_no_second_derivative() -> None:
    case = make_case(9, 4, 50, dtype=torch.float32)
    weight = torch.nn.Parameter(case.weight)
    logp = linear_logprob(case.hidden, weight, case.target).logp
    (first,) = torch.autograd.grad(logp.sum(), weight, retain_graph=True)
    (second,) = torch.autograd.grad(logp.sum(), weight, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
        torch.autograd.grad(second.sum(), weight)


def test_one_entry_of_a_vocabulary() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    logp = linear_logprob(hidden, torch.randn(1, 4), torch.zeros(3, dtype=torch.int64)).logp
    logp.sum().backward()
    assert torch.equal(logp, torch.zeros(3))
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.zeros(3, 4))


def test_remembered_calls_are_still_checked() -> None:
    """What a call was found right for does not stand for another one that equals it as a key."""
    case = make_case(9, 4, 50, dtype=torch.float32, segments=6)
    head = (case.hidden, case.weight, case.target, case.segment_id)
    linear_logprob(*head, num_segments=6, group_size=1, norms="exact")
    with pytest.raises(ValueError, match="num_segments must be >= 0 and an int, got True"):
        linear_logprob(*head, num_segments=True)
    with pytest.raises(ValueError, match="group_size must be an int"):
        linear_logprob(*head, num_segments=6, group_size=1.0, norms="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target\[0\] = .* is not a row"):
        linear_logprob(case.hidden, case.weight, case.target + 50, case.segment_id, num_segments=6)
    with pytest.raises(ValueError, match=r"segment_id\[8\]=6"):
        linear_logprob(*head[:3], torch.full_like(head[3], 6), num_segments=6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown statistic"):
        linear_logprob(*head, num_segments=6, stats=[["top1"]])  # type: ignore[list-item]


def test_what_is_wanted_follows_the_leaves_and_the_mode() -> None:
    case = make_case(9, 4, 50, dtype=torch.float32)
    weight = case.weight.clone()
    assert not linear_logprob(case.hidden, weight, case.target).logp.requires_grad
    weight.requires_grad_()
    assert linear_logprob(case.hidden, weight, case.target).logp.requires_grad
    with torch.no_grad():
        assert not linear_logprob(case.hidden, weight, case.target).logp.requires_grad


def test_a_list_of_statistics_is_remembered_too() -> None:
    case = make_case(9, 4, 57, dtype=torch.float32)
    before = _prepare._remembered.cache_info().hits
    for _ in range(3):
        linear_logprob(case.hidden, case.weight, case.target, stats=["top1"])
    assert _prepare._remembered.cache_info().hits == before + 2
