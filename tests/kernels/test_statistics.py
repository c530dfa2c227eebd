"""The statistics of `linear_logprob`, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from fastpref_kernels import _head_checks, linear_logprob, reference
from torch import Tensor

from tests.kernels.cases import Case, make_case, set_width

STATS = _head_checks.SEGMENT_STATS + _head_checks.ROW_STATS


def both(case: Case, stats: tuple[str, ...] = STATS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours at the case's dtype, the reference in float64)."""
    results = []
    for function, at in (
        (linear_logprob, case),
        (reference.linear_logprob, case.to(torch.float64)),
    ):
        out = function(
            at.hidden,
            at.weight,
            at.target,
            at.segment_id,
            num_segments=at.num_segments,
            bias=at.bias,
            stats=stats,
            **at.options,
        )
        results.append({name: getattr(out, name) for name in stats})
    return results[0], results[1]


@pytest.mark.parametrize("width", [1, 13, 4096])
@pytest.mark.parametrize("spread,gap", [(0.1, 0.0), (3.0, 0.0), (1.0, 9.0), (40.0, 0.0)])
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("softcap", [None, 60.0])
def test_equal_to_their_definition(
    width: int,
    spread: float,
    gap: float,
    dtype: torch.dtype,
    bound: float,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_width(monkeypatch, width)
    case = make_case(
        40,
        12,
        97,
        dtype=dtype,
        segments=11,
        spread=spread,
        gap=gap,
        softcap=softcap,
        bias=True,
        temperature=1.1,
    )
    ours, truth = both(case)
    for name in STATS:
        assert ours[name].shape == truth[name].shape
        if name == "argmax":
            assert torch.equal(ours[name], truth[name])
            continue
        size = max(1.0, float(truth[name].abs().max()))
        error = float((ours[name].double() - truth[name]).abs().max())
        assert error <= bound * size, (name, error)


def test_one_statistic_alone_equals_the_same_among_all() -> None:
    case = make_case(30, 8, 200, dtype=torch.float32, segments=5)
    every, _ = both(case)
    for name in STATS:
        alone, _ = both(case, (name,))
        assert torch.equal(alone[name], every[name]), name


def test_first_of_equal_entries_is_the_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's rule for top1: at least every entry, and above every entry before it."""
    for width in (1, 2, 3, 8):
        set_width(monkeypatch, width)
        weight = torch.zeros(8, 1)
        weight[[2, 5, 6]] = 1.0
        hidden, target = torch.ones(4, 1), torch.tensor([2, 5, 6, 0])
        out = linear_logprob(hidden, weight, target, stats=("top1", "argmax"))
        alone = linear_logprob(hidden, weight, target, stats=("top1",)).top1
        assert alone is not None and alone.tolist() == [1.0, 0.0, 0.0, 0.0]
        assert out.argmax is not None and out.top1 is not None
        assert out.argmax.tolist() == [2, 2, 2, 2]
        assert out.top1.tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("target_leads", [True, False])
def test_log1m_pmax_does_not_cancel(target_leads: bool) -> None:
    """1 - p_max down to 1e-12 in float32, where p_max itself rounds to 1."""
    gaps = torch.tensor([5.0, 15.0, 28.0])
    weight = torch.eye(6)
    hidden = torch.zeros(3, 6)
    hidden[:, 3] = gaps
    target = torch.full((3,), 3 if target_leads else 1)
    ours = linear_logprob(hidden, weight, target, stats=("log1m_pmax", "argmax_logp", "entropy"))
    others = torch.log(torch.tensor(5.0, dtype=torch.float64))
    expected = torch.nn.functional.logsigmoid(others - gaps.double())
    assert ours.log1m_pmax is not None and ours.entropy is not None
    assert ours.argmax_logp is not None
    torch.testing.assert_close(ours.log1m_pmax.double(), expected, rtol=1e-6, atol=0)
    likely = torch.log1p(-expected.exp())  # down to -4e-12, where p_max is 1 in float32
    torch.testing.assert_close(ours.argmax_logp.double(), likely, rtol=1e-5, atol=0)
    miss = expected.exp()
    entropy = -(1 - miss) * torch.log1p(-miss) - miss * (expected - others)
    # Only the terms of the target are free of cancellation.
    slack = 0.0 if target_leads else 2e-7
    torch.testing.assert_close(ours.entropy.double(), entropy, rtol=1e-5, atol=slack)


def test_one_entry_vocabulary_is_certain() -> None:
    case = make_case(3, 4, 1, dtype=torch.float32)
    ours, _ = both(case)
    assert ours["entropy"].tolist() == [0.0] * 3
    assert ours["sum_sq_prob"].tolist() == [1.0] * 3
    assert ours["log_sum_sq_prob"].tolist() == [0.0] * 3
    assert ours["residual_sq"].tolist() == [0.0] * 3
    assert ours["top1"].tolist() == [1.0] * 3
    assert ours["argmax_logp"].tolist() == [0.0] * 3
    assert ours["log1m_pmax"].tolist() == [-torch.inf] * 3


def test_statistics_carry_no_gradient() -> None:
    case = make_case(6, 4, 30)
    hidden = case.hidden.requires_grad_()
    out = linear_logprob(hidden, case.weight, case.target, stats=STATS, norms="exact")
    assert out.logp.requires_grad
    for name in (*STATS, "gram"):
        assert not getattr(out, name).requires_grad
