"""`counts`: the rows of every segment, given, so that norms of the head read nothing from the
device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fastpref_kernels import _launch, head_op, linear_dpo, linear_logprob, row_counts
from fastpref_kernels._head_checks import Described
from fastpref_kernels._plan import make_plan
from fastpref_kernels.head_norms import SketchPlan
from torch import Tensor

from tests.kernels.cases import Case, make_case

NORMS = ["exact", "sketch", "both"]


def case(**more: Any) -> Case:
    return make_case(40, 8, 300, dtype=torch.float32, segments=12, **more)


def counts_of(case: Case) -> list[int]:
    assert case.segment_id is not None
    return row_counts(case.segment_id, case.num_segments)


def head(case: Case, norms: str | None, **more: Any) -> Any:
    inputs = (case.hidden, case.weight, case.target, case.segment_id)
    return linear_logprob(*inputs, group_size=3, norms=norms, **more)


@pytest.mark.parametrize("norms", [None, *NORMS])
def test_the_same_numbers(norms: str | None) -> None:
    """Also without `num_segments`, which `counts` imply."""
    one = case()
    plain = head(one, norms, num_segments=one.num_segments)
    counted = head(one, norms, counts=counts_of(one))
    for name, value in vars(plain).items():
        other = getattr(counted, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value is other


def test_the_same_loss() -> None:
    one = make_case(20, 8, 100, dtype=torch.float32, segments=6)
    inputs = (one.hidden, one.weight, one.target, one.segment_id)
    plain = linear_dpo(*inputs, beta=0.1, num_segments=6)
    counted = linear_dpo(*inputs, beta=0.1, counts=counts_of(one))
    assert torch.equal(plain.loss, counted.loss)


def on_meta(norms: str, backend: str, rows_of: list[int] | None, train: bool = True) -> Any:
    """The op's own code on tensors that cannot be read: whoever asks for a value fails."""
    rows, dim, vocab, segments = 40, 8, 300, 12
    hidden, weight = (
        torch.empty(n, dim, device="meta", requires_grad=train) for n in (rows, vocab)
    )
    target = torch.empty(rows, device="meta", dtype=torch.int64)
    segment_id = torch.empty(rows, device="meta", dtype=torch.int32)
    plan = make_plan(Described.of(hidden), Described.of(weight), None, -1, 3, backend == "triton")
    sketch = SketchPlan(16, 64, 0, norms == "both", "lm_head")
    with torch.no_grad(), _launch.recorded(lambda launch: None):
        return head_op.forward(
            hidden.detach(),
            weight.detach(),
            target,
            segment_id,
            None,
            segments,
            [1.0, 1.0],
            [int(x) for x in plan],
            "",
            "" if norms == "exact" else sketch.text(),
            rows_of,
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("way", ["rows", "gradients"])
def test_nothing_is_read_from_the_device(
    backend: str, norms: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    if way == "gradients":
        monkeypatch.setattr("fastpref_kernels.head_norms.longest_head_gram", lambda *_: 0)
        if backend == "triton":
            monkeypatch.setattr(
                "fastpref_kernels.triton_norms.sort_groups", lambda *_: ((), (0, 1, 2, 3))
            )
    counts = [3, 0, 5, 1, 1, 1, 0, 0, 20, 2, 3, 4]
    out = on_meta(norms, backend, counts)
    assert out[4].shape == (4, 3, 3)


@pytest.mark.parametrize("norms", NORMS)
def test_without_counts_the_device_is_read(norms: str) -> None:
    """What the test above would see."""
    with pytest.raises((NotImplementedError, RuntimeError), match="Meta tensors"):
        on_meta(norms, "torch", None)


def test_rows_that_are_segments_need_no_counts() -> None:
    one = make_case(6, 4, 30, dtype=torch.float32)
    gram = linear_logprob(one.hidden, one.weight, one.target, norms="exact").gram
    assert gram is not None and gram.shape == (6, 1, 1)


@pytest.mark.parametrize(
    "counts,message",
    [
        ([40], "expected counts of 12 segments, got 1"),
        ([-1, 41, *[0] * 10], "rows of every segment, >= 0 and 40 together, got a smallest of -1"),
        ([39, *[0] * 11], "and a sum of 39"),
        ([40.0, *[0] * 11], "counts must be ints, got 40.0 among them"),
        ([True, 39, *[0] * 10], "counts must be ints, got True among them"),
        ([40, *[0] * 11], r"counts\[0\]=40, but segment_id holds \d+ rows of segment 0. Give what"),
    ],
)
@pytest.mark.parametrize("call", ["linear_logprob", "linear_dpo"])
def test_wrong_counts(call: str, counts: list[int], message: str) -> None:
    one = case()
    inputs = (one.hidden, one.weight, one.target, one.segment_id)
    with pytest.raises(ValueError, match=f"{call}: .*{message}"):
        if call == "linear_dpo":
            linear_dpo(*inputs, beta=0.1, num_segments=12, counts=counts)
        else:
            linear_logprob(*inputs, num_segments=12, norms="exact", group_size=3, counts=counts)


def test_counts_of_numpy() -> None:
    one = case()
    counts = np.array(counts_of(one))
    plain, counted = head(one, "exact", counts=counts_of(one)), head(one, "exact", counts=counts)
    assert torch.equal(plain.gram, counted.gram)


def test_compiled_with_counts() -> None:
    one = case()

    def step(hidden: Tensor) -> Tensor:
        out = head(Case(**{**vars(one), "hidden": hidden}), "exact", counts=counts)
        assert out.gram is not None
        return out.logp.sum() + out.gram.sum()

    counts = counts_of(one)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(one.hidden), step(one.hidden), rtol=1e-6, atol=0.0)
