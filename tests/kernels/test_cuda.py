"""Both backends on an NVIDIA GPU: half products with float32 output, repeatability, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import linear_logprob, reference, row_counts

from tests.kernels.cases import Case, assert_no_worse, make_case, run, set_width
from tests.kernels.test_statistics import STATS
from tests.kernels.test_triton import set_tile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BACKENDS = ["triton", "torch"]


def check(case: Case, dtype: torch.dtype, scale: float, **more: Any) -> None:
    truth = run(reference.linear_logprob, case.to(torch.float64))
    naive = run(reference.linear_logprob, case)
    assert_no_worse(run(linear_logprob, case, **more), naive, truth, dtype, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("gap", [0.0, 12.0])
@pytest.mark.parametrize("cache", [-1, 0, 2])
def test_no_worse_than_plain_torch(
    dtype: torch.dtype, gap: float, cache: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_width(monkeypatch, 512)
    set_tile(monkeypatch, 512, 32)
    case = make_case(65, 48, 3001, dtype=dtype, gap=gap, segments=9).on("cuda")
    check(case, dtype, 3.0 + gap, cache=cache, backend=backend)


# The last tile narrow and of odd width; rows of D that are not aligned; a small head.
@pytest.mark.parametrize("rows,dim,vocab", [(300, 512, 32001), (64, 77, 9000), (17, 64, 500)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cache", [-1, 1])
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "bias": True, "temperature": 0.8}])
def test_the_tile_table(
    rows: int, dim: int, vocab: int, dtype: torch.dtype, cache: int, options: dict[str, Any]
) -> None:
    case = make_case(rows, dim, vocab, dtype=dtype, segments=20, **options).on("cuda")
    check(case, dtype, 4.0, cache=cache)


@pytest.mark.parametrize("gap", [3.0, 8.0, 14.0])
def test_gradient_of_confident_rows_keeps_its_digits(gap: float) -> None:
    case = make_case(40, 64, 9001, dtype=torch.bfloat16, spread=0.5, gap=gap).on("cuda")
    truth = run(reference.linear_logprob, case.to(torch.float64))
    ours = run(linear_logprob, case)
    relative = (ours["hidden"].double() - truth["hidden"]).norm(dim=1) / truth["hidden"].norm(dim=1)
    assert float(relative.max()) < 4e-3
    assert torch.allclose(ours["logp"].double(), truth["logp"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_standard_deviation_150(dtype: torch.dtype) -> None:
    case = make_case(60, 32, 20000, dtype=dtype, spread=150.0).on("cuda")
    truth, ours = run(reference.linear_logprob, case.to(torch.float64)), run(linear_logprob, case)
    assert float((ours["logp"].double() - truth["logp"]).abs().max()) < 3e-3
    for name in ("hidden", "weight"):
        error = (ours[name].double() - truth[name]).norm()
        assert float(error) < 0.02 * float(truth[name].norm()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", [-1, 1])
def test_same_bits_twice_and_whatever_else_is_asked_for(backend: str, cache: int) -> None:
    case = make_case(500, 64, 20000, dtype=torch.bfloat16, segments=40).on("cuda")
    case = replace(case, target=case.target % 7)
    first, second, third = (
        run(linear_logprob, case, backend=backend, cache=cache, stats=stats)
        for stats in ((), (), STATS)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, third[name]), name


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """An operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cache", [-1, 0])
def test_forward_and_backward_wait_for_nothing(
    dtype: torch.dtype, cache: int, request: pytest.FixtureRequest
) -> None:
    case = make_case(64, 64, 20000, dtype=dtype, segments=9, bias=True).on("cuda")
    run(linear_logprob, case, cache=cache, stats=STATS)  # compiles, and loads what is loaded late
    request.getfixturevalue("no_waiting")
    run(linear_logprob, case, cache=cache, stats=STATS)


def test_target_out_of_range_gives_nan_there() -> None:
    case = make_case(4, 64, 20000, dtype=torch.bfloat16).on("cuda")
    target = torch.tensor([3, 20000, -100, 2**40], device="cuda")
    logp = linear_logprob(case.hidden, case.weight, target).logp
    assert logp.isnan().tolist() == [False, True, True, True]


def test_gram_equals_reference() -> None:
    case = make_case(33, 16, 900, segments=12).on("cuda")
    out = [
        f(
            case.hidden,
            case.weight,
            case.target,
            case.segment_id,
            num_segments=12,
            group_size=3,
            norms="exact",
        ).gram
        for f in (linear_logprob, reference.linear_logprob)
    ]
    torch.testing.assert_close(out[0], out[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norms", ["exact", "sketch", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longest", [None, 0])
def test_norms_with_counts_wait_for_nothing_and_are_captured(
    norms: str,
    backend: str,
    longest: int | None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Groups by rows, and all of them by gradients. What a graph replays are the call's bits."""
    case = make_case(300, 64, 20000, dtype=torch.bfloat16, segments=12).on("cuda")
    if longest is not None:
        by_gradients(monkeypatch)
    assert case.segment_id is not None
    counts = row_counts(case.segment_id, 12)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def call() -> list[torch.Tensor]:
        out = linear_logprob(
            hidden,
            weight,
            case.target,
            case.segment_id,
            num_segments=12,
            counts=counts,
            group_size=3,
            norms=norms,
            backend=backend,
        )
        grads = torch.autograd.grad(out.logp.sum(), (hidden, weight))
        return [x for x in (*grads, out.gram, out.gram_error, out.sketch) if x is not None]

    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)
    request.getfixturevalue("no_waiting")
    call()


def test_a_capture_with_new_counts_is_refused() -> None:
    case = make_case(30, 64, 2000, dtype=torch.bfloat16, segments=3).on("cuda")
    inputs = (case.hidden, case.weight, case.target, case.segment_id)
    counts = row_counts(case.segment_id, 3)
    linear_logprob(*inputs, counts=counts)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="Call once with the same counts before"):  # noqa: SIM117
        with torch.cuda.graph(graph):
            linear_logprob(*inputs, counts=counts, norms="exact")


def by_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group goes by its segments' gradients."""
    from fastpref_kernels.spans import group_counts

    def sort_groups(counts: Any, group_size: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        lengths = group_counts(counts, group_size)
        return (), tuple(i for i, n in enumerate(lengths) if n)

    monkeypatch.setattr("fastpref_kernels.triton_norms.sort_groups", sort_groups)
    monkeypatch.setattr("fastpref_kernels.head_norms.longest_head_gram", lambda *_: 0)
