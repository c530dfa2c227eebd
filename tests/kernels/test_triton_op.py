"""What holds of the Triton backend as an op: statistics, repeatability, registration, launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _launch, linear_logprob, reference
from fastpref_kernels._plan import Plan
from fastpref_kernels.head_op import backward_op, forward_op

from tests.kernels.cases import TRITON_DEVICE, Case, make_case, run
from tests.kernels.test_statistics import STATS
from tests.kernels.test_triton import set_tile


def call(function: Any, case: Case, **more: Any) -> Any:
    options = {"num_segments": case.num_segments, "bias": case.bias, **case.options, **more}
    return function(case.hidden, case.weight, case.target, case.segment_id, **options)


@pytest.mark.parametrize(
    "spread,gap,softcap",
    [(0.1, 0.0, None), (1.0, 9.0, None), (40.0, 0.0, None), (3.0, 0.0, 60.0)],
)
def test_statistics_equal_their_definition(
    spread: float, gap: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 16)
    options = {"spread": spread, "gap": gap, "softcap": softcap, "temperature": 1.1}
    case = make_case(12, 12, 61, dtype=torch.float32, segments=7, bias=True, **options)
    ours = call(linear_logprob, case.on(TRITON_DEVICE), stats=STATS, backend="triton")
    truth = call(reference.linear_logprob, case.to(torch.float64), stats=STATS)
    for name in STATS:
        value, true = getattr(ours, name).cpu(), getattr(truth, name)
        if name == "argmax":
            assert torch.equal(value, true)
            continue
        size = max(1.0, float(true.abs().max()))
        assert float((value.double() - true).abs().max()) <= 3e-5 * size, name


def test_first_of_equal_entries_is_the_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tile and across tiles; TRL's rule for top1."""
    set_tile(monkeypatch, 16)
    weight = torch.zeros(40, 1, device=TRITON_DEVICE)
    weight[[2, 5, 22, 39]] = 1.0
    hidden = torch.ones(5, 1, device=TRITON_DEVICE)
    target = torch.tensor([2, 5, 22, 39, 0], device=TRITON_DEVICE)
    out = linear_logprob(hidden, weight, target, stats=("top1", "argmax"), backend="triton")
    assert out.argmax is not None and out.top1 is not None
    assert out.argmax.tolist() == [2, 2, 2, 2, 2]
    assert out.top1.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_log1m_pmax_does_not_cancel() -> None:
    gaps = torch.tensor([5.0, 15.0, 28.0])
    hidden = torch.zeros(3, 6)
    hidden[:, 3] = gaps
    expected = torch.nn.functional.logsigmoid(torch.tensor(5.0).log().double() - gaps.double())
    for place in (3, 1):
        target = torch.full((3,), place)
        arguments = [x.to(TRITON_DEVICE) for x in (hidden, torch.eye(6), target)]
        out = linear_logprob(*arguments, stats=("log1m_pmax",), backend="triton").log1m_pmax
        assert out is not None
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-6, atol=0)


def test_statistics_where_nothing_but_the_target_is_possible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One entry, or -inf everywhere else: the sum of the others is 0."""
    set_tile(monkeypatch, 16)
    for vocab in (1, 40):
        hidden, weight = torch.randn(2, 3), torch.randn(vocab, 3)
        bias = torch.full((vocab,), -torch.inf)
        bias[0] = 0.5
        tensors = [x.to(TRITON_DEVICE) for x in (hidden, weight, torch.zeros(2, dtype=torch.int64))]
        out = linear_logprob(*tensors, bias=bias.to(TRITON_DEVICE), stats=STATS, backend="triton")
        assert out.entropy is not None and out.log1m_pmax is not None
        for name, value in (("entropy", 0), ("sum_sq_prob", 1), ("log_sum_sq_prob", 0)):
            assert getattr(out, name).tolist() == [value, value], (vocab, name)
        assert out.log1m_pmax.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("cache", [-1, 0])
def test_one_target_expanded_to_all_rows(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride of 0: kernels read R numbers in a row."""
    set_tile(monkeypatch, 32, 4)
    case = make_case(6, 5, 70, dtype=torch.float32, segments=3).on(TRITON_DEVICE)
    target = case.target[:1].expand(6)
    given, plain = (
        run(linear_logprob, replace(case, target=x), backend="triton", cache=cache)
        for x in (target, target.contiguous())
    )
    for name, value in plain.items():
        assert torch.equal(value, given[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_and_norms_change_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 32, 4)
    case = make_case(9, 6, 70, dtype=dtype, segments=6).on(TRITON_DEVICE)
    without = run(linear_logprob, case, backend="triton")
    with_all = run(linear_logprob, case, backend="triton", stats=STATS, norms="exact", group_size=3)
    for name, value in without.items():
        assert torch.equal(value, with_all[name]), name


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.4, "bias": True}])
@pytest.mark.parametrize("cache", [-1, 0])
def test_gram_equals_reference(
    options: dict[str, Any], cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 32, 4)
    case = make_case(11, 6, 70, dtype=torch.float32, segments=6, **options)
    case = replace(case, target=case.target % 5)
    more: dict[str, Any] = {"norms": "exact", "group_size": 3}
    at = case.on(TRITON_DEVICE)
    at.weight.requires_grad_()
    ours = call(linear_logprob, at, backend="triton", cache=cache, **more).gram
    truth = call(reference.linear_logprob, case.to(torch.float64), **more).gram
    torch.testing.assert_close(
        ours.cpu().double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max())
    )


@pytest.mark.parametrize("cache", [-1, 1])
def test_second_backward_and_second_run_give_the_same_bits(
    cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 32, 4)
    case = make_case(7, 6, 70, dtype=torch.float16, segments=4, spread=9.0)
    case = replace(case, target=case.target % 4).on(TRITON_DEVICE)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    options: dict[str, Any] = {"num_segments": 4, "cache": cache, "backend": "triton"}
    out = linear_logprob(hidden, weight, case.target, case.segment_id, **options)
    grad = case.grad.float()
    first = torch.autograd.grad(out.logp, (hidden, weight), grad, retain_graph=True)
    second = torch.autograd.grad(out.logp, (hidden, weight), grad)
    again = run(linear_logprob, case, cache=cache, backend="triton")
    for a, b, c in zip(first, second, (again["hidden"], again["weight"]), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(out.logp, again["logp"])


@pytest.mark.parametrize(
    "changes,stats,sketch",
    [
        ({}, "", ""),
        ({"width": 32, "kept": 1, "need_bias": 1}, "", ""),
        ({"kept": 0, "need_weight": 0}, "argmax,entropy,log1m_pmax,top1", ""),
        ({"group_size": 3}, "row_norm_sq", ""),
        ({"width": 32, "kept": 1, "group_size": 3}, "", "2 64 0 0 lm_head"),
    ],
)
def test_opcheck(changes: dict[str, int], stats: str, sketch: str) -> None:
    base = Plan(16, 2, 0, need_hidden=1, need_weight=1, need_bias=0, warps=1, row_block=4)
    plan = [int(x) for x in base._replace(**changes)]
    case = make_case(5, 4, 27, dtype=torch.float32, segments=3, bias=True).on(TRITON_DEVICE)
    bias = case.bias if changes.get("need_bias") else None
    inputs = (case.hidden, case.weight, case.target, case.segment_id, bias)
    leaves = [x if x is None or not x.is_floating_point() else x.requires_grad_() for x in inputs]
    leaves[1] = case.weight.requires_grad_(bool(plan[4]))
    scales = [1.0, 1.0, 5.0]
    torch.library.opcheck(forward_op, (*leaves, 3, scales, plan, stats, sketch))
    saved = [x.detach() for x in forward_op(*leaves, 3, scales, plan, stats, sketch)[-4:]]
    detached = [None if x is None else x.detach() for x in leaves]
    grad = torch.randn(3, device=TRITON_DEVICE)
    torch.library.opcheck(backward_op, (grad, *detached, *saved, scales, plan))


def test_compile_full_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan, tile table and device included, is made while torch.compile traces."""
    case = make_case(6, 8, 90, dtype=torch.float32, segments=6, softcap=9.0).on(TRITON_DEVICE)

    def step(hidden: Any, weight: Any, target: Any, segment_id: Any) -> tuple[Any, ...]:
        options: dict[str, Any] = {"num_segments": 6, "softcap": 9.0, "backend": "triton"}
        out = linear_logprob(hidden, weight, target, segment_id, stats=("entropy",), **options)
        return out.logp, out.entropy

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = function(hidden, weight, case.target, case.segment_id)
        results.append([*out, *torch.autograd.grad(out[0], (hidden, weight), case.grad)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_autocast_around_the_call_changes_nothing() -> None:
    case = make_case(4, 8, 50, dtype=torch.float32).on(TRITON_DEVICE)
    plain = run(linear_logprob, case, backend="triton")
    with torch.autocast(TRITON_DEVICE, dtype=torch.bfloat16):
        inside = run(linear_logprob, case, backend="triton")
    for name, value in plain.items():
        assert torch.equal(value, inside[name]), name


def test_tile_table_covers_every_head_and_pads_small_ones() -> None:
    tile = _launch.triton_tile(4096, 128256, torch.bfloat16, 90)
    assert tile.width == 8192
    assert _launch.triton_tile(8, 37, torch.float32, 80).width == 48
    for *_, entry in _launch.TRITON_TILES:
        assert entry.width % 16 == 0 and entry.row_block * entry.width <= 2**27
