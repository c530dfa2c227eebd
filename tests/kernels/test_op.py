"""What holds of the op as such: registration, compile, memory, repeatability, autocast, errors."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _head_checks, _launch, _prepare, head_op, linear_logprob, one_tile
from fastpref_kernels import linear_logprob as public
from fastpref_kernels._plan import Plan
from fastpref_kernels.head_op import backward_op, forward_op
from torch.profiler import ProfilerActivity, profile

from tests.kernels.cases import Onlooker, make_case, run, set_width


def plan(**changes: int) -> list[int]:
    base = Plan(width=7, kept=2, group_size=0, need_hidden=1, need_weight=1, need_bias=0)
    return [int(x) for x in base._replace(**changes)]


@pytest.mark.parametrize(
    "changes,stats,sketch,dtype",
    [
        ({}, "", "", torch.bfloat16),
        ({"kept": 0}, "", "", torch.float32),
        ({"width": 23, "kept": 1}, "row_norm_sq", "", torch.float32),
        ({"kept": 0, "need_weight": 0}, "argmax,entropy,log1m_pmax,top1", "", torch.float32),
        ({"group_size": 2, "need_bias": 1}, "mean_logit", "", torch.float32),
        ({"group_size": 4}, "log1m_pmax,row_norm_sq", "3 64 5 0 lm head", torch.float32),
        ({"group_size": 4}, "row_logp", "3 64 5 1 lm head", torch.float32),
    ],
)
def test_opcheck(changes: dict[str, int], stats: str, sketch: str, dtype: torch.dtype) -> None:
    case = make_case(9, 4, 23, dtype=dtype, segments=4, bias=bool(changes.get("need_bias")))
    bias = None if case.bias is None else case.bias.requires_grad_()
    what = plan(**changes)
    weight = case.weight.requires_grad_(bool(what[4]))
    args = (
        case.hidden.requires_grad_(),
        weight,
        case.target,
        case.segment_id,
        bias,
        4,
        [1.0, 1.0, 5.0],
        what,
        stats,
        sketch,
    )
    torch.library.opcheck(forward_op, args)
    saved = [x.detach() for x in forward_op(*args)[-4:]]
    detached = [None if x is None else x.detach() for x in (args[0], weight, *args[2:4], bias)]
    torch.library.opcheck(backward_op, (torch.randn(4), *detached, *saved, [1.0, 1.0, 5.0], what))


@pytest.mark.parametrize("norms", [None, "exact", "sketch"])
def test_compile_full_graph(norms: str | None) -> None:
    case = make_case(24, 8, 300, dtype=torch.float32, segments=6, softcap=9.0)

    def step(hidden: Any, weight: Any, target: Any, segment_id: Any) -> tuple[Any, ...]:
        out = linear_logprob(
            hidden,
            weight,
            target,
            segment_id,
            num_segments=6,
            group_size=3,
            softcap=9.0,
            stats=("entropy", "argmax", "row_norm_sq"),
            norms=norms,
        )
        of_norms = (out.gram, out.gram_error, out.sketch)
        found = (out.logp, out.entropy, out.argmax, out.row_norm_sq, *of_norms)
        return tuple(x for x in found if x is not None)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = function(hidden, weight, case.target, case.segment_id)
        results.append([*out, *torch.autograd.grad(out[0], (hidden, weight), case.grad)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("train", [("hidden", "weight", "bias"), ("hidden",), ()])
@pytest.mark.parametrize("norms", [None, "exact", "sketch", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_and_its_body_called_directly_give_the_same_bits(
    train: tuple[str, ...], norms: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode that looks on sees one op a direction, and changes nothing."""
    set_width(monkeypatch, 64)
    case = make_case(20, 8, 300, dtype=dtype, segments=6, softcap=9.0, bias=True)
    stats = () if norms is None else _head_checks.SEGMENT_STATS + _head_checks.ROW_STATS

    def step() -> list[torch.Tensor]:
        assert case.bias is not None
        head = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
        leaves = {k: x.detach().clone().requires_grad_(k in train) for k, x in head.items()}
        out = linear_logprob(
            leaves["hidden"],
            leaves["weight"],
            case.target,
            case.segment_id,
            bias=leaves["bias"],
            num_segments=6,
            group_size=3,
            stats=stats,
            norms=norms,
            softcap=9.0,
        )
        found = [x for x in vars(out).values() if x is not None]
        assert len(found) == 1 + len(stats) + {None: 0, "exact": 1, "sketch": 3, "both": 2}[norms]
        assert all(not x.requires_grad for x in found[1:])
        assert out.logp.requires_grad == bool(train)
        if train:
            trained = [leaves[k] for k in train]
            found += torch.autograd.grad(out.logp, trained, case.grad.float())
        return found

    directly = step()
    with Onlooker() as mode:
        as_op = step()
    ours = [name for name in mode.seen if name.startswith("fastpref::")]
    forward, backward = "fastpref::linear_logprob_forward", "fastpref::linear_logprob_backward"
    assert ours == [forward, backward][: 1 + bool(train)]
    for one, other in zip(directly, as_op, strict=True):
        assert torch.equal(one, other)


def test_a_call_that_nobody_looks_at_goes_past_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("fastpref_kernels.linear_logprob")
    monkeypatch.setattr(module, "forward_op", None)
    monkeypatch.setattr(head_op, "backward_op", None)
    monkeypatch.setattr(one_tile, "backward_op", None)
    case = make_case(4, 3, 9, dtype=torch.float32)
    assert run(linear_logprob, case)["logp"].shape == (4,)
    weight = torch.nn.Parameter(case.weight)
    for softcap in (None, 5.0):  # of one tile, and any
        linear_logprob(case.hidden, weight, case.target, softcap=softcap).logp.sum().backward()
    for onlooker in (torch.device("cpu"), Onlooker(), torch.autograd.forward_ad.dual_level()):
        with onlooker, pytest.raises(TypeError, match="'NoneType' object is not callable"):
            linear_logprob(case.hidden, weight, case.target)


def test_compile_returns_the_dataclass() -> None:
    case = make_case(6, 4, 30, dtype=torch.float32)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    out = compiled(case.hidden, case.weight, case.target, stats=("top1",))
    eager = linear_logprob(case.hidden, case.weight, case.target, stats=("top1",))
    assert type(out) is type(eager)
    assert torch.equal(out.logp, eager.logp) and torch.equal(out.top1, eager.top1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [-1, 1, 0])
def test_second_backward_and_second_run_give_the_same_bits(
    dtype: torch.dtype, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_width(monkeypatch, 64)
    case = make_case(50, 12, 333, dtype=dtype, segments=9)
    case = replace(case, target=case.target % 4)  # many rows add into one row of dW
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    out = linear_logprob(hidden, weight, case.target, case.segment_id, num_segments=9, cache=cache)
    grad = case.grad.float()
    first = torch.autograd.grad(out.logp, (hidden, weight), grad, retain_graph=True)
    second = torch.autograd.grad(out.logp, (hidden, weight), grad)
    again = run(linear_logprob, case, cache=cache)
    for a, b, c in zip(first, second, (again["hidden"], again["weight"]), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(out.logp, again["logp"])


def test_no_second_derivative_in_silence() -> None:
    case = make_case(4, 3, 9)
    hidden = case.hidden.requires_grad_()
    logp = linear_logprob(hidden, case.weight, case.target).logp
    (grad,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
        grad.sum().backward()


def large_allocations(least: int, step: Any) -> tuple[int, int]:
    """(number of CPU allocations of at least `least` bytes, peak bytes) while step() runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [e.nbytes() for e in results if e.name() == "[memory]"]
    assert sizes, "the profiler saw no allocation"
    now = peak = 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return sum(size >= least for size in sizes), peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options,train,buffers",
    [
        ({}, ("hidden", "weight"), 1),
        ({"norms": "exact", "group_size": 2}, ("hidden", "weight"), 1),
        ({"norms": "sketch", "sketch_buckets": 64}, ("hidden", "weight"), 1),
        ({"cache": 0}, ("hidden", "weight"), 0),
        ({"cache": 2}, ("hidden", "weight"), 0),
        ({}, ("hidden",), 0),
        ({}, ("weight",), 1),
        ({"stats": ("entropy", "log1m_pmax")}, (), 0),
    ],
)
def test_at_most_one_buffer_of_rows_by_vocabulary(
    options: dict[str, Any],
    train: tuple[str, ...],
    buffers: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, dim, vocab = 256, 8, 8192
    set_width(monkeypatch, 512)
    case = make_case(rows, dim, vocab, dtype=dtype)
    hidden = case.hidden.requires_grad_("hidden" in train)
    weight = case.weight.requires_grad_("weight" in train)
    grad = case.grad.float()

    def ours() -> None:
        out = public(hidden, weight, case.target, **options)
        if train:
            out.logp.backward(grad)

    def eager() -> None:
        logits = (hidden @ weight.t()).float()
        logp = torch.log_softmax(logits, -1).gather(1, case.target[:, None]).squeeze(1)
        if train:
            logp.backward(grad)

    least = rows * vocab * dtype.itemsize
    count, peak = large_allocations(least, ours)
    assert count == buffers
    hidden.grad = weight.grad = None
    _, plain = large_allocations(least, eager)
    assert peak <= plain


def test_autocast_around_the_call_changes_nothing() -> None:
    case = make_case(20, 8, 200, dtype=torch.float32)
    plain = run(linear_logprob, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(linear_logprob, case)
    for name, value in plain.items():
        assert torch.equal(value, inside[name]), name


def test_auto_says_once_what_it_chose(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_said", set())
    monkeypatch.setattr(_prepare, "_remembered", _prepare._prepare)
    case = make_case(2, 3, 5)
    with caplog.at_level(logging.INFO, logger="fastpref_kernels"):
        for _ in range(3):
            linear_logprob(case.hidden, case.weight, case.target)
    assert [r.getMessage() for r in caplog.records] == ["linear_logprob: backend auto -> torch"]


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {
                "backend": "triton",
                "hidden": torch.zeros(5, 3).double(),
                "weight": torch.zeros(9, 3).double(),
            },
            "computes in float32, got torch.float64",
        ),
        ({"backend": "tritn"}, "Did you mean 'triton'"),
        ({"norms": "gram"}, "got 'gram'"),
        ({"norms": "exakt"}, "Did you mean 'exact'"),
        ({"norms": "sketch", "sketch_dim": 0}, "sketch_dim must be an int of at least 1, got 0"),
        ({"norms": "both", "sketch_dim": 4.0}, "sketch_dim must be an int of at least 1, got 4.0"),
        ({"norms": "sketch", "sketch_seed": 1.5}, "sketch_seed must be an int, got 1.5"),
        ({"norms": "sketch", "sketch_seed": True}, "sketch_seed must be an int, got True"),
        ({"norms": "sketch", "sketch_key": None}, "sketch_key must be a string.*got None"),
        ({"norms": "sketch", "sketch_buckets": 128.0}, "power of two from 64 to 8192, got 128.0"),
        ({"counts": torch.tensor([2, 2, 0, 1])}, r"counts must be ints on the host.*row_counts"),
        ({"norms": "sketch", "sketch_buckets": 0}, "power of two from 64 to 8192, got 0"),
        ({"norms": "sketch", "sketch_buckets": 1000}, "power of two from 64 to 8192, got 1000"),
        ({"norms": "sketch", "sketch_buckets": 16384}, "from 64 to 8192, got 16384"),
        ({"group_size": 3, "norms": "sketch"}, "num_segments=4 is not a multiple of group_size=3"),
        ({"stats": ("entropi",)}, "Did you mean 'entropy'"),
        ({"stats": "entropy"}, "must be a sequence"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite"),
        ({"cache": -2}, "cache must be -1"),
        ({"cache": 1.5}, "cache must be -1 .* got 1.5"),
        ({"group_size": 0}, "group_size must be an int of at least 1, got 0"),
        ({"group_size": 2.0}, "group_size must be an int of at least 1, got 2.0"),
        ({"group_size": 3, "norms": "exact"}, "num_segments=4 is not a multiple of group_size=3"),
        ({"num_segments": 2}, r"segment_id\[4\]=3 is outside 0..1"),
        ({"num_segments": -1}, "num_segments must be >= 0"),
        ({"segment_id": None, "num_segments": 3}, "num_segments must be None or 5"),
        ({"segment_id": torch.tensor([0, 2, 1, 3, 3])}, r"segment_id\[2\]=1 follows 2"),
        ({"segment_id": torch.tensor([-1, 0, 1, 3, 3])}, r"segment_id\[0\]=-1 is outside"),
        ({"segment_id": torch.zeros(4).int()}, r"expected segment_id \(5,\)"),
        ({"segment_id": torch.zeros(5)}, "int32 or int64, got .* torch.float32"),
        ({"target": torch.tensor([0, 1, 9, 0, 0])}, r"target\[2\] = 9 is not a row of weight"),
        ({"target": torch.tensor([0, -100, 1, 0, 0])}, "drop rows labelled -100"),
        ({"target": torch.zeros(5).int()}, "int64, got .* torch.int32"),
        ({"hidden": torch.zeros(5, 4)}, r"got \(5, 4\) and \(9, 3\)"),
        ({"hidden": torch.zeros(5, 3).bfloat16()}, "torch.bfloat16 and torch.float32"),
        ({"weight": torch.zeros(0, 3)}, "needs at least one"),
        ({"bias": torch.zeros(8)}, r"expected bias \(9,\)"),
        ({"bias": torch.zeros(9).int()}, "or float16, got .* torch.int32"),
        ({"bias": torch.zeros(9).to(torch.float8_e4m3fn)}, "or float16, got .* torch.float8_e4m3"),
        ({"weight": torch.zeros(9, 3, device="meta")}, "hidden is on cpu but weight on meta"),
    ],
)
def test_errors_name_what_came(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(5, 3),
        "weight": torch.zeros(9, 3),
        "target": torch.tensor([0, 1, 8, 0, 0]),
        "segment_id": torch.tensor([0, 0, 1, 1, 3]),
        "num_segments": 4,
    }
    arguments = good | changes
    head = [arguments.pop(name) for name in ("hidden", "weight", "target", "segment_id")]
    with pytest.raises(ValueError, match=message):
        linear_logprob(*head, **arguments)


def test_number_of_segments_is_read_off_the_last_id() -> None:
    case = make_case(7, 3, 9)
    ids = torch.tensor([0, 0, 0, 2, 2, 5, 5])
    assert linear_logprob(case.hidden, case.weight, case.target, ids).logp.shape == (6,)
