"""Gram matrices of head gradients against explicit outer products and against autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _launch, linear_logprob, reference

from tests.kernels.cases import Case, make_case

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "softcap": 5.0, "logit_scale": 1.4, "temperature": 0.8},
]


def gram(function: Any, case: Case, group_size: int, **more: Any) -> Any:
    return function(
        case.hidden,
        case.weight,
        case.target,
        case.segment_id,
        num_segments=case.num_segments,
        group_size=group_size,
        bias=case.bias,
        norms="exact",
        **case.options,
        **more,
    ).gram


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
    monkeypatch.setattr(_launch, "tile_width", lambda dim, vocab, dtype: min(width, vocab))
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


def test_same_bits_with_and_without() -> None:
    case = make_case(48, 16, 700, dtype=torch.float32, segments=12)
    results = []
    for norms in (None, "exact"):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = linear_logprob(
            hidden,
            weight,
            case.target,
            case.segment_id,
            num_segments=12,
            group_size=3,
            norms=norms,
            stats=_launch.SEGMENT_STATS + _launch.ROW_STATS if norms else (),
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
