"""The Triton backend of `linear_logprob` against float64: interpreted without a GPU, else on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _launch, _prepare, linear_logprob, reference, triton_tiles
from fastpref_kernels._launch import TritonTile, padded
from fastpref_kernels.torch_tiles import Transform
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import TRITON_DEVICE, Case, assert_no_worse, make_case, run
from tests.kernels.test_linear_logprob import TRANSFORMS

# One row; ragged, three blocks of rows; one tile; several tiles without padding.
SHAPES = [(1, 8, 33, 16, 8), (5, 19, 101, 32, 2), (3, 12, 100, 128, 4), (3, 7, 96, 32, 64)]
LONG_SHAPES = [(37, 19, 501, 64, 16), (65, 48, 3001, 512, 64), (50, 5, 7, 16, 8)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def set_tile(monkeypatch: pytest.MonkeyPatch, width: int, row_block: int = 8) -> None:
    def tile(dim: int, vocab: int, dtype: torch.dtype, arch: int) -> TritonTile:
        return TritonTile(min(width, padded(vocab)), 1, row_block)

    monkeypatch.setattr(_launch, "triton_tile", tile)
    monkeypatch.setattr(_prepare, "_remembered", _prepare._prepare)


def triton(case: Case, **more: Any) -> dict[str, Any]:
    """Values and gradients of the Triton backend, on the CPU."""
    out = run(linear_logprob, case.on(TRITON_DEVICE), backend="triton", **more)
    return {name: value.cpu() for name, value in out.items()}


def check(case: Case, dtype: torch.dtype, scale: float, **more: Any) -> None:
    truth = run(reference.linear_logprob, case.to(torch.float64))
    naive = run(reference.linear_logprob, case)
    assert_no_worse(triton(case, **more), naive, truth, dtype, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transform,cache", [*((name, -1) for name in TRANSFORMS), ("all", 1)])
def test_every_transform(
    transform: str, cache: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 32, 2)
    case = make_case(4, 19, 77, dtype=dtype, segments=4, **TRANSFORMS[transform])
    check(case, dtype, 3.0 if dtype == torch.float32 else 1.0, cache=cache)


@pytest.mark.parametrize("cache", [0, 2])
@pytest.mark.parametrize("rows,dim,vocab,width,block", SHAPES)
def test_every_shape(
    rows: int,
    dim: int,
    vocab: int,
    width: int,
    block: int,
    cache: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_tile(monkeypatch, width, block)
    case = make_case(rows, dim, vocab, dtype=torch.float32, **TRANSFORMS["all"])
    check(case, torch.float32, 3.0, cache=cache)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("spread,gap", [(0.1, 0.0), (2.0, 0.0), (4.0, 12.0)])
@pytest.mark.parametrize("cache", [-1, 2])
@pytest.mark.parametrize("rows,dim,vocab,width,block", LONG_SHAPES)
def test_larger_shapes(
    rows: int,
    dim: int,
    vocab: int,
    width: int,
    block: int,
    cache: int,
    transform: str,
    spread: float,
    gap: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_tile(monkeypatch, width, block)
    options = TRANSFORMS[transform]
    case = make_case(rows, dim, vocab, dtype=dtype, spread=spread, gap=gap, **options)
    check(case, dtype, 1.0 + (spread + gap if dtype == torch.float32 else 0.0), cache=cache)


@pytest.mark.parametrize("gap", [3.0, 14.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_of_confident_rows_keeps_its_digits(
    gap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row relative to that row's own gradient, where 1 - softmax would leave nothing."""
    set_tile(monkeypatch, 128)
    case = make_case(8, 64, 501, dtype=dtype, spread=0.5, gap=gap)
    truth, ours = run(reference.linear_logprob, case.to(torch.float64)), triton(case)
    relative = (ours["hidden"].double() - truth["hidden"]).norm(dim=1) / truth["hidden"].norm(dim=1)
    # A float16 gradient of 1e-6 or less has no digits left to keep.
    bound = 1e-5 if dtype == torch.float32 else 1e-3
    if not (dtype == torch.float16 and gap > 10):
        assert float(relative.max()) < bound
    assert torch.allclose(ours["logp"].double(), truth["logp"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", [-1, 0])
def test_logits_of_standard_deviation_150(
    dtype: torch.dtype, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 48)
    case = make_case(6, 32, 233, dtype=dtype, spread=150.0)
    truth, ours = run(reference.linear_logprob, case.to(torch.float64)), triton(case, cache=cache)
    eps = torch.finfo(torch.float32).eps
    assert float((ours["logp"].double() - truth["logp"]).abs().max()) < 32 * eps * 600
    loose = 32 * eps * 600 + 2 * torch.finfo(dtype).eps
    for name in ("hidden", "weight"):
        assert ours[name].isfinite().all(), name
        error = (ours[name].double() - truth[name]).norm()
        assert float(error) < loose * float(truth[name].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("step", [30.0, -30.0, 3.0])
@pytest.mark.parametrize("cache", [-1, 1])
def test_offsets_that_rise_from_tile_to_tile(
    step: float, cache: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets in every tile, in the first ones too, far below what comes later: the kept tiles'
    offsets differ, and a target's row of E is brought to the final one."""
    set_tile(monkeypatch, 16)
    case = make_case(5, 6, 80, dtype=dtype, spread=1.0, bias=True)
    assert case.bias is not None
    case = replace(
        case,
        bias=case.bias + (step * (torch.arange(80) // 16)).to(dtype),
        target=torch.tensor([3, 20, 40, 63, 79]),
    )
    size = 4 * abs(step)
    check(case, dtype, 1.0 + (size if dtype == torch.float32 else size / 100), cache=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_flat_rows_fit_the_range(dtype: torch.dtype) -> None:
    """All 128256 entries alike: -S' is the largest number that a tile holds. The real table."""
    case = make_case(2, 4, 128256, dtype=dtype, spread=0.01, segments=1)
    check(case, dtype, 2.0)
    check(replace(case, train=("hidden",)), dtype, 2.0)


def test_padding_of_kept_tiles_is_zero() -> None:
    """It enters no product, but it is part of what the forward op returns."""
    case = make_case(3, 6, 21, dtype=torch.float32, bias=True).on(TRITON_DEVICE)
    _, saved = triton_tiles.forward(
        case.hidden,
        case.weight,
        case.target,
        Transform(case.bias, 1.0, 5.0, 1.0),
        tile=TritonTile(32, 1, 8),
        kept=1,
        need_hidden=False,
        stats=frozenset(),
    )
    exps = saved.exps.view(3, 32)
    assert not exps[:, 21:].any() and bool(exps[:, :21].all())


def test_target_out_of_range_gives_nan_there_and_nowhere_else() -> None:
    """On CUDA nobody has looked at the targets: no address may be formed of them."""
    case = make_case(4, 6, 40, dtype=torch.float32).on(TRITON_DEVICE)
    target = torch.tensor([3, 40, -100, 2**40 + 5], device=TRITON_DEVICE)
    sums, saved = triton_tiles.forward(
        case.hidden,
        case.weight,
        target,
        Transform(None, 1.0, None, 1.0),
        tile=TritonTile(16, 1, 8),
        kept=3,
        need_hidden=True,
        stats=frozenset(),
    )
    assert sums.odds.isnan().tolist() == [False, True, True, True]
    grad, *_ = triton_tiles.backward(
        torch.ones(4, device=TRITON_DEVICE),
        case.hidden,
        case.weight,
        target,
        Transform(None, 1.0, None, 1.0),
        saved,
        tile=TritonTile(16, 1, 8),
        need_hidden=True,
        need_weight=False,
        need_bias=False,
    )
    assert grad.isnan().all(1).tolist() == [False, True, True, True]
    assert grad[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_rows_empty_segments_and_one_entry_vocabulary(dtype: torch.dtype) -> None:
    none = triton(make_case(0, 4, 9, segments=3, bias=True, dtype=dtype))
    assert torch.equal(none["logp"], torch.zeros(3))
    assert none["hidden"].shape == (0, 4)
    assert not none["weight"].any() and none["weight"].shape == (9, 4)
    assert not none["bias"].any() and none["bias"].shape == (9,)
    segment_id = torch.tensor([1, 1, 4], dtype=torch.int32)
    some = triton(replace(make_case(3, 4, 9, segments=6, dtype=dtype), segment_id=segment_id))
    assert some["logp"][[0, 2, 3, 5]].tolist() == [0.0] * 4
    for options in ({}, {"softcap": 2.0}, {"cache": 0, "bias": True}):
        certain = triton(make_case(5, 3, 1, dtype=dtype, **options))
        for name, value in certain.items():
            assert not value.any(), name  # NaN would be True


def test_nothing_but_the_target_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 16)
    case = make_case(2, 4, 40, dtype=torch.float32, bias=True)
    bias = torch.full((40,), -torch.inf)
    bias[[3, 20]] = 0.0
    case = replace(case, bias=bias, target=torch.tensor([20, 20]), train=("hidden", "weight"))
    possible = triton(case)
    expected = torch.stack([case.hidden @ case.weight[3], case.hidden @ case.weight[20]]).T
    torch.testing.assert_close(possible["logp"], torch.log_softmax(expected, 1)[:, 1])
    bias[3] = -torch.inf
    for name, value in triton(case).items():
        assert not value.any(), name


@pytest.mark.parametrize("train", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ()])
@pytest.mark.parametrize("cache", [-1, 1])
def test_frozen_parts_get_no_gradient_and_change_no_other(
    train: tuple[str, ...], cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 16)
    case = make_case(6, 6, 37, dtype=torch.float16, bias=True, segments=4)
    every = triton(case, cache=cache)
    if not train:
        with torch.no_grad():
            at = case.on(TRITON_DEVICE)
            arguments = (at.hidden.requires_grad_(), at.weight, at.target, at.segment_id)
            out = linear_logprob(*arguments, num_segments=4, bias=at.bias, backend="triton")
        assert not out.logp.requires_grad
        assert torch.equal(out.logp.cpu(), every["logp"])
        return
    some = triton(replace(case, train=train), cache=cache)
    assert some.keys() == {"logp", *train}
    for name, value in some.items():
        assert torch.equal(value, every[name]), name


def test_tensors_of_any_stride() -> None:
    case = make_case(6, 8, 37, dtype=torch.float32, bias=True)
    assert case.bias is not None
    loose = replace(
        case,
        hidden=case.hidden.t().contiguous().t(),
        weight=case.weight.t().contiguous().t(),
        bias=case.bias.repeat_interleave(2)[::2],
        target=torch.stack((case.target, case.target.flip(0)), 1)[:, 0],
    )
    strided = run_strided(loose)
    for name, value in triton(case).items():
        torch.testing.assert_close(strided[name], value, rtol=1e-5, atol=1e-6)


def run_strided(case: Case) -> dict[str, Any]:
    """Like `triton`, without the copies that would make every tensor contiguous."""
    at = case.on(TRITON_DEVICE)
    assert at.bias is not None
    leaves = {"hidden": at.hidden, "weight": at.weight, "bias": at.bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    assert not at.weight.is_contiguous() and not at.target.is_contiguous()
    logp = linear_logprob(at.hidden, at.weight, at.target, bias=at.bias, backend="triton").logp
    grads = torch.autograd.grad(logp, list(leaves.values()), at.grad)
    return {"logp": logp.detach().cpu(), **{n: g.cpu() for n, g in zip(leaves, grads, strict=True)}}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int, int, int]:
    rows, dim, vocab = draw(st.integers(0, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 70))
    case = make_case(
        rows,
        dim,
        vocab,
        dtype=torch.float32,
        segments=draw(st.none() | st.integers(1, 7)),
        spread=draw(st.sampled_from([0.1, 2.0, 30.0])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        softcap=draw(st.none() | st.sampled_from([2.0, 50.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.25, -2.0])),
        temperature=draw(st.sampled_from([1.0, 0.6])),
    )
    width = 16 * draw(st.integers(1, 3))
    return case, width, draw(st.integers(1, 5)), draw(st.integers(-1, 3))


def check_any_shape(drawn: tuple[Case, int, int, int]) -> None:
    case, width, block, cache = drawn
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, width, block)
        ours = triton(case, cache=cache)
    truth = run(reference.linear_logprob, case.to(torch.float64))
    naive = run(reference.linear_logprob, case)
    # Logits up to 30 * 4 * 2 / 0.6 in size, whose rounding moves p by eps times that.
    floor = 400.0 * torch.finfo(torch.float64).eps
    assert_no_worse(ours, naive, truth, torch.float32, scale=400.0, floor=floor)


@given(cases())
@settings(max_examples=8, deadline=None)
def test_any_shape(drawn: tuple[Case, int, int, int]) -> None:
    check_any_shape(drawn)


@pytest.mark.slow
@given(cases())
@settings(max_examples=200, deadline=None)
def test_any_shape_often(drawn: tuple[Case, int, int, int]) -> None:
    check_any_shape(drawn)
