"""Values and gradients of `linear_logprob` against float64 and against plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _launch, linear_logprob, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, assert_no_worse, make_case, run, set_width

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3, "temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "softcap": 6.0, "logit_scale": -1.3, "temperature": 1.7},
}
# one row; ragged; many tiles; more rows than vocabulary; a single tile
SHAPES = [
    (1, 8, 33, 16),
    (37, 19, 501, 64),
    (65, 48, 3001, 512),
    (50, 5, 7, 3),
    (24, 12, 100, 100),
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def close(ours: dict[str, Any], truth: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        size = max(float(true.abs().max()), 1.0) if true.numel() else 1.0
        torch.testing.assert_close(
            ours[name].double(), true.double(), rtol=0, atol=tolerance * size, msg=name
        )


@pytest.mark.parametrize("cache", [-1, 0, 1, 3])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rows,dim,vocab,width", SHAPES)
def test_float64_equals_reference(
    rows: int,
    dim: int,
    vocab: int,
    width: int,
    transform: str,
    cache: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_width(monkeypatch, width)
    case = make_case(rows, dim, vocab, segments=9, **TRANSFORMS[transform])
    close(run(linear_logprob, case, cache=cache), run(reference.linear_logprob, case), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "transform,spread,gap",
    [
        ("plain", 0.1, 0.0),
        ("plain", 2.0, 0.0),
        ("plain", 4.0, 12.0),
        ("all", 0.1, 0.0),
        ("all", 2.0, 0.0),
    ],
)
@pytest.mark.parametrize("cache", [-1, 2])
@pytest.mark.parametrize("rows,dim,vocab,width", SHAPES)
def test_no_worse_than_plain_torch(
    rows: int,
    dim: int,
    vocab: int,
    width: int,
    cache: int,
    transform: str,
    spread: float,
    gap: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_width(monkeypatch, width)
    options = TRANSFORMS[transform]
    case = make_case(rows, dim, vocab, dtype=dtype, spread=spread, gap=gap, **options)
    truth = run(reference.linear_logprob, case.to(torch.float64))
    naive = run(reference.linear_logprob, case)
    ours = run(linear_logprob, case, cache=cache)
    # In half types every product is float32 inside: only the rounding of the result is left.
    scale = 1.0 + (spread + gap if dtype == torch.float32 else 0.0)
    assert_no_worse(ours, naive, truth, dtype, scale=scale)


@pytest.mark.parametrize("gap", [3.0, 8.0, 14.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 2048])
def test_gradient_of_confident_rows_keeps_its_digits(
    gap: float, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row relative to that row's own gradient, where 1 - softmax would leave nothing."""
    set_width(monkeypatch, width)
    case = make_case(40, 64, 1001, dtype=dtype, spread=0.5, gap=gap)
    truth = run(reference.linear_logprob, case.to(torch.float64))
    ours = run(linear_logprob, case)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    relative = (ours["hidden"].double() - truth["hidden"]).norm(dim=1) / truth["hidden"].norm(dim=1)
    assert float(relative.max()) < bound
    assert torch.allclose(ours["logp"].double(), truth["logp"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_standard_deviation_150(
    dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_width(monkeypatch, 50)
    case = make_case(60, 32, 333, dtype=dtype, spread=150.0, softcap=softcap)
    truth = run(reference.linear_logprob, case.to(torch.float64))
    for cache in (-1, 0, 2):
        ours = run(linear_logprob, case, cache=cache)
        for name, value in ours.items():
            assert value.isfinite().all(), name
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert float((ours["logp"].double() - truth["logp"]).abs().max()) < 32 * eps * 600
        # Errors of the logits (eps times 600) move p by as much, absolutely.
        loose = 32 * eps * 600 + torch.finfo(dtype).eps
        for name in ("hidden", "weight"):
            error = (ours[name].double() - truth[name]).norm()
            assert float(error) < loose * float(truth[name].norm())


def test_real_vocabulary_size() -> None:
    case = make_case(3, 4, 128256, dtype=torch.float32)
    truth = run(reference.linear_logprob, case.to(torch.float64))
    naive = run(reference.linear_logprob, case)
    assert _launch.tile_width(4, 128256, torch.float32) < 128256
    assert_no_worse(run(linear_logprob, case), naive, truth, torch.float32, scale=3.0)


@pytest.mark.parametrize("train", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cache", [-1, 0, 1])
def test_frozen_parts_get_no_gradient_and_change_no_other(
    train: tuple[str, ...], dtype: torch.dtype, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_width(monkeypatch, 20)
    case = make_case(21, 6, 77, dtype=dtype, bias=True, segments=4)
    every = run(linear_logprob, case, cache=cache)
    if not train:
        with torch.no_grad():
            out = linear_logprob(
                case.hidden.requires_grad_(),
                case.weight,
                case.target,
                case.segment_id,
                num_segments=4,
                bias=case.bias,
            )
        assert not out.logp.requires_grad
        assert torch.equal(out.logp, every["logp"])
        return
    some = run(linear_logprob, replace(case, train=train), cache=cache)
    assert some.keys() == {"logp", *train}
    for name, value in some.items():
        if name == "hidden" and dtype == torch.float64 and cache < 0 and "bias" not in train:
            # With the head trained, a product with all of E; with it frozen, tile by tile.
            torch.testing.assert_close(value, every[name], rtol=1e-13, atol=1e-13)
        else:
            assert torch.equal(value, every[name]), name


def test_no_rows_empty_segments_and_one_entry_vocabulary() -> None:
    none = run(linear_logprob, make_case(0, 4, 9, segments=3, bias=True))
    assert torch.equal(none["logp"], torch.zeros(3, dtype=torch.float64))
    assert none["hidden"].shape == (0, 4)
    assert not none["weight"].any() and none["weight"].shape == (9, 4)
    assert not none["bias"].any() and none["bias"].shape == (9,)

    segment_id = torch.tensor([1, 1, 4], dtype=torch.int32)
    case = replace(make_case(3, 4, 9, segments=6), segment_id=segment_id)
    some = run(linear_logprob, case)
    assert some["logp"][[0, 2, 3, 5]].tolist() == [0.0] * 4
    close(some, run(reference.linear_logprob, case), 1e-12)

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for options in ({}, {"softcap": 2.0}, {"cache": 0, "bias": True}):
            certain = run(linear_logprob, make_case(5, 3, 1, dtype=dtype, **options))
            for name, value in certain.items():
                assert not value.any(), name  # NaN would be True


def test_gradcheck_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    set_width(monkeypatch, 4)
    case = make_case(5, 3, 11, segments=3, bias=True)
    for cache in (-1, 1):

        def logp(hidden: Any, weight: Any, bias: Any, cache: int = cache) -> Any:
            return linear_logprob(
                hidden,
                weight,
                case.target,
                case.segment_id,
                num_segments=3,
                bias=bias,
                softcap=3.0,
                logit_scale=1.2,
                temperature=0.8,
                cache=cache,
            ).logp

        assert case.bias is not None
        leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        assert torch.autograd.gradcheck(logp, leaves)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int, int]:
    rows, dim, vocab = draw(st.integers(0, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    case = make_case(
        rows,
        dim,
        vocab,
        segments=draw(st.none() | st.integers(1, 7)),
        spread=draw(st.sampled_from([0.1, 2.0, 30.0])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        softcap=draw(st.none() | st.sampled_from([2.0, 50.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.25, -2.0])),
        temperature=draw(st.sampled_from([1.0, 0.6])),
    )
    return case, draw(st.integers(1, vocab)), draw(st.integers(-1, 3))


@given(cases())
@settings(max_examples=80, deadline=None)
def test_any_shape_equals_reference(drawn: tuple[Case, int, int]) -> None:
    case, width, cache = drawn
    with pytest.MonkeyPatch.context() as patch:
        set_width(patch, width)
        ours = run(linear_logprob, case, cache=cache)
    close(ours, run(reference.linear_logprob, case), 1e-12)
