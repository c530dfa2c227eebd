"""The lean way of a head of one tile, and what is remembered of a call's shapes and options."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from fastpref_kernels import _prepare, linear_logprob, one_tile, reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import Case, Onlooker, make_case

WAYS = [(), ("hidden",), ("weight",), ("hidden", "weight")]


def step(
    case: Case,
    train: tuple[str, ...],
    op: Any = linear_logprob,
    create_graph: bool = False,
    **more: Any,
) -> list[Tensor]:
    leaves = {
        k: x.detach().clone().requires_grad_(k in train)
        for k, x in (("hidden", case.hidden), ("weight", case.weight))
    }
    segments = None if case.segment_id is None else case.num_segments
    head = (leaves["hidden"], leaves["weight"], case.target, case.segment_id)
    logp = op(*head, num_segments=segments, **more).logp
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


@pytest.mark.parametrize(
    "more",
    [{"cache": 0}, {"stats": ("top1",)}, {"norms": "exact"}, {"softcap": 5.0}, {"bias": True}],
    ids=lambda more: next(iter(more)),
)
def test_what_one_tile_does_not_do(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls beside it take the other way, which has the numbers of the oracle."""
    public = importlib.import_module("fastpref_kernels.linear_logprob")
    monkeypatch.setattr(public, "one_tile_logprob", None)
    case = make_case(20, 8, 1303, dtype=torch.float64, segments=6)
    if "bias" in more:
        more = {"bias": torch.randn(1303, dtype=torch.float64)}
    found = step(case, ("hidden", "weight"), **more)
    asked = {k: x for k, x in more.items() if k in ("softcap", "bias")}
    expected = step(case, ("hidden", "weight"), reference.linear_logprob, **asked)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_no_exponentials_are_kept_where_the_caller_says_so() -> None:
    """cache=0: of one tile too nothing of (R, V) waits for the backward."""
    case = make_case(20, 8, 1303, dtype=torch.float32)
    weight = torch.nn.Parameter(case.weight)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    for cache, largest in ((-1, 20 * 1303), (0, 8 * 1303)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_logprob(case.hidden, weight, case.target, cache=cache)
        assert max(kept) == largest
        kept.clear()


@pytest.mark.parametrize("vocab", [2, 3, 4095, 4096])
@pytest.mark.parametrize("layout", ["rows", "columns", "sliced"])
def test_the_oracle_at_every_size_and_layout(vocab: int, layout: str) -> None:
    case = make_case(20, 8, vocab, dtype=torch.float64, segments=6)
    if layout != "rows":
        hidden, weight = (
            x.t().contiguous().t() if layout == "columns" else x.repeat_interleave(2, 1)[:, ::2]
            for x in (case.hidden, case.weight)
        )
        assert not hidden.is_contiguous()
        case = dataclasses.replace(case, hidden=hidden, weight=weight)
    for train in WAYS:
        lean = step(case, train)
        with Onlooker():
            as_op = step(case, train)
        expected = step(case, train, reference.linear_logprob)
        for one, two, three in zip(lean, as_op, expected, strict=True):
            assert torch.equal(one, two)
            torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", WAYS[1:], ids="+".join)
@pytest.mark.parametrize("around", ["forward", "backward"])
def test_checkpointing_with_an_onlooker_on_one_side(train: tuple[str, ...], around: str) -> None:
    """Once the lean way and once the op: both save the same."""
    case = make_case(9, 4, 50, dtype=torch.float32)
    leaves = {
        k: x.detach().clone().requires_grad_(k in train)
        for k, x in (("hidden", case.hidden), ("weight", case.weight))
    }

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, case.target).logp

    expected = step(case, train)[1:]
    none = contextlib.nullcontext()
    with Onlooker() if around == "forward" else none:
        logp = checkpoint(head, *leaves.values(), use_reentrant=False)
    with Onlooker() if around == "backward" else none:
        logp.backward(case.grad.float())
    for name, grad in zip(train, expected, strict=True):
        assert torch.equal(leaves[name].grad, grad)  # type: ignore[arg-type]


def test_who_looks_on_at_the_backward_sees_the_op() -> None:
    case = make_case(9, 4, 50, dtype=torch.float32)
    weight = torch.nn.Parameter(case.weight)
    logp = linear_logprob(case.hidden, weight, case.target).logp
    with Onlooker() as mode:
        logp.backward(case.grad.float())
    assert "fastpref::linear_logprob_backward" in mode.seen


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
    case = make_case(9, 4, 50, dtype=torch.float32, segments=1)
    head = (case.hidden, case.weight, case.target, case.segment_id)
    linear_logprob(*head, num_segments=1, group_size=1, norms="exact")
    for wrong in (True, 1.0):
        with pytest.raises(ValueError, match=f"num_segments must be >= 0 and an int, got {wrong}"):
            linear_logprob(*head, num_segments=wrong, group_size=1, norms="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size must be an int"):
        linear_logprob(*head, num_segments=1, group_size=1.0, norms="exact")  # type: ignore[arg-type]
    linear_logprob(*head, num_segments=1)
    with pytest.raises(ValueError, match=r"target\[0\] = .* is not a row"):
        linear_logprob(case.hidden, case.weight, case.target + 50, case.segment_id, num_segments=1)
    with pytest.raises(ValueError, match=r"segment_id\[8\]=6"):
        linear_logprob(*head[:3], torch.full_like(head[3], 6), num_segments=1)  # type: ignore[arg-type]


def test_a_tensor_is_no_scale() -> None:
    """Its value may change after it was checked, and it would get no gradient."""
    case = make_case(9, 4, 50, dtype=torch.float32)
    for name in ("temperature", "softcap", "logit_scale"):
        for wrong in (torch.tensor(2.0), "1", [1.0]):
            with pytest.raises(ValueError, match=f"{name} must be a number, got"):
                linear_logprob(case.hidden, case.weight, case.target, **{name: wrong})
        linear_logprob(case.hidden, case.weight, case.target, **{name: np.float32(2.0)})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"stats": [["top1"]]}, "unknown statistic"),
        ({"stats": [1]}, "unknown statistic 1"),
        ({"stats": 5}, "stats must be a sequence of names, got 5"),
        ({"stats": (name for name in ("top1",))}, "stats must be a sequence of names"),
        ({"backend": None}, "backend must be one of"),
        ({"hidden": [[1.0]]}, "hidden must be a tensor, got list"),
        ({"target": np.zeros(9, np.int64)}, "target must be a tensor, got ndarray"),
        ({"counts": 5}, "counts must be a sequence of ints, got 5"),
        ({"counts": [1] * 8, "segment_id": None}, "expected counts of 9 segments, got 8"),
        ({"counts": np.array([150, 150], np.uint8)}, "a sum of 300"),
        ({"num_segments": 9.0, "segment_id": None}, "num_segments must be >= 0 and an int"),
        ({"segment_id": torch.full((9,), -3), "num_segments": None}, r"segment_id\[0\]=-3"),
        ({"norms": "sketch", "sketch_dim": True}, "sketch_dim must be an int"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    case = make_case(9, 4, 50, dtype=torch.float32, segments=2)
    good: dict[str, Any] = {
        "hidden": case.hidden,
        "weight": case.weight,
        "target": case.target,
        "segment_id": case.segment_id,
        "num_segments": None if "counts" in changes else 2,
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**good, **changes})


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
