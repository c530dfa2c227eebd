"""What holds of the norm and sketch ops as such: registration, compile, memory, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastpref_kernels import (
    bias_norms,
    column_sketch,
    embedding_norms,
    embedding_sketch,
    layernorm_norms,
    linear_norms,
    linear_sketch,
    lora_norms,
    lora_sketch,
    rmsnorm_norms,
    row_counts,
    tied_norms,
    unique_ids,
    weight_sketch,
)
from torch import Tensor

from tests.kernels.test_op import large_allocations
from tests.kernels.test_pair_norms import ids, rows

COUNTS = [3, 1, 0, 8]
OP = torch.ops.fastpref


def single(*shape: int) -> Tensor:
    return rows(COUNTS, *shape, dtype=torch.float32)


@pytest.mark.parametrize("group_size,counts", [(1, None), (2, COUNTS)])
def test_opcheck(group_size: int, counts: list[int] | None) -> None:
    segment_id, token_id = ids(COUNTS), torch.arange(12) % 5
    wide, dy = single(150), single(140)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (OP.pair_gram, (wide, [dy, dy], segment_id, 4, group_size, counts, "torch linear_norms")),
        (
            OP.pair_gram,
            (single(6), [single(7)], segment_id, 4, group_size, counts, "torch linear_norms"),
        ),
        (OP.column_sums, (dy, None, segment_id, 4, 0.0, False, "torch bias_norms")),
        (OP.column_sums, (dy, dy, segment_id, 4, 1e-5, True, "torch layernorm_norms")),
        (OP.column_sums, (single(2, 5), single(2, 5), segment_id, 4, 0.1, False, "torch x")),
        (OP.embedding_gram, (token_id, dy, segment_id, 4, group_size, 3)),
        (OP.project, (dy, [1, 2, 3], 5, "torch")),
        (OP.segment_products, (dy[:, :3], dy, segment_id, 4, counts, "torch linear_sketch")),
    ]
    hidden, dz = single(140), single(5)
    checks.append((OP.tied_gram, (token_id, dy, segment_id, hidden, dz, segment_id, 4, group_size)))
    for op, arguments in checks:
        torch.library.opcheck(op, arguments)


def test_compile_full_graph() -> None:
    segment_id, token_id = ids(COUNTS), torch.arange(12) % 5
    wide, dy, same = single(150), single(140), {"num_segments": 4}

    def all_of_them(wide: Tensor, dy: Tensor, segment_id: Tensor) -> list[Tensor]:
        return [
            linear_norms(wide, [dy, dy], segment_id, group_size=2, **same),
            linear_norms(wide, dy, segment_id, counts=COUNTS, **same),
            bias_norms(dy, segment_id, **same),
            rmsnorm_norms(dy, dy, segment_id, eps=1e-5, **same),
            *layernorm_norms(dy, dy, segment_id, eps=1e-5, **same),
            embedding_norms(token_id, dy, segment_id, **same),
            *lora_norms(wide, dy, wide[:4], dy[:4].t(), segment_id, scale=1.0, **same),
            linear_sketch(wide, dy, segment_id, 4, seed=0, key="a", **same),
            embedding_sketch(token_id, dy, segment_id, 4, seed=0, key="a", **same),
            column_sketch(dy, segment_id, 4, seed=0, key="a", **same),
        ]

    eager = all_of_them(wide, dy, segment_id)
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    for one, other in zip(eager, compiled(wide, dy, segment_id), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 2])
def test_autocast_changes_nothing(group_size: int | None) -> None:
    segment_id, wide, dy = ids(COUNTS), single(150), single(140)
    same: dict[str, Any] = {"num_segments": 4, "group_size": group_size}
    sketch: dict[str, Any] = {"seed": 0, "key": "a", "num_segments": 4}

    def all_of_them() -> list[Tensor]:
        return [
            linear_norms(wide, dy, segment_id, **same),
            bias_norms(dy, segment_id, **same),
            rmsnorm_norms(dy, dy, segment_id, eps=1e-5, **same),
            *layernorm_norms(dy, dy, segment_id, eps=1e-5, **same),
            embedding_norms(torch.arange(12) % 5, dy, segment_id, **same),
            *lora_norms(wide, dy, wide[:4], dy[:4].t(), segment_id, scale=1.0, **same),
            linear_sketch(wide, dy, segment_id, 4, **sketch),
            linear_sketch(wide, dy, segment_id, 4, buckets=64, **sketch),
            column_sketch(dy, segment_id, 4, **sketch),
        ]

    plain = all_of_them()
    with torch.autocast("cpu", torch.bfloat16):
        cast = all_of_them()
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == one.dtype and torch.equal(other, one)


def test_nothing_is_differentiable_in_silence() -> None:
    x = single(150).requires_grad_()
    assert not linear_norms(x, single(140), ids(COUNTS), num_segments=4).requires_grad
    assert not linear_sketch(
        x, single(140), ids(COUNTS), 2, seed=0, key="a", num_segments=4
    ).requires_grad


@pytest.mark.parametrize("counts", [[512, 512], [2048]])
def test_never_all_rows_by_all_rows(counts: list[int]) -> None:
    """A tile of one group's Gram matrix at a time; of a long group a tile of its gradient."""
    d = p = 2048 if len(counts) == 2 else 512
    x = torch.randn(sum(counts), d)
    dy = torch.randn(sum(counts), p)
    assert len(counts) == 2 or counts[0] > d * p / (d + p)
    segment_id = ids(counts)
    found, peak = large_allocations(
        512 * 512 * 4, lambda: linear_norms(x, dy, segment_id, num_segments=len(counts))
    )
    if len(counts) == 2:
        assert found == 0 and peak < 4 * 128 * 512 * 4
    else:
        assert peak < 6 * 512 * 512 * 8  # the gradient, and its copy in float64


def linear(**changes: Any) -> Any:
    good: dict[str, Any] = {
        "x": torch.zeros(5, 3),
        "dy": torch.zeros(5, 2),
        "segment_id": torch.tensor([0, 0, 1, 1, 3]),
        "num_segments": 4,
    }
    good.update(changes)
    return linear_norms(good.pop("x"), good.pop("dy"), good.pop("segment_id"), **good)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"segment_id": torch.tensor([0, 2, 1, 3, 3])}, r"segment_id\[2\]=1 follows 2.*Sort"),
        ({"segment_id": torch.tensor([-1, 0, 1, 3, 3])}, r"segment_id\[0\]=-1 is outside 0..3"),
        ({"num_segments": 2}, r"segment_id\[4\]=3 is outside 0..1"),
        ({"segment_id": torch.zeros(4).int()}, r"expected segment_id \(5,\) .* got \(4,\)"),
        ({"segment_id": torch.zeros(5)}, "int32 or int64, got .* torch.float32"),
        ({"num_segments": -1}, "num_segments must be >= 0 and an int, got -1"),
        ({"num_segments": 4.0}, "num_segments must be >= 0 and an int, got 4.0"),
        ({"group_size": 3}, "num_segments=4 is not a multiple of group_size=3"),
        ({"group_size": 0}, "group_size must be an int of at least 1 or None, got 0"),
        ({"group_size": 2.0}, "group_size must be an int of at least 1 or None, got 2.0"),
        ({"counts": torch.tensor([2, 2, 0, 1])}, "counts must be ints on the host.*row_counts"),
        ({"counts": [2, 2, 1]}, "counts of 4 segments, got 3"),
        ({"counts": [1, 3, 0, 1]}, r"counts\[0\]=1, but segment_id holds 2 rows of segment 0"),
        ({"counts": [2, 2, 0, 2]}, "5 together, got a smallest of 0 and a sum of 6"),
        ({"dy": torch.zeros(4, 2)}, r"dy with the 5 rows of x, got \(4, 2\)"),
        ({"dy": [torch.zeros(5, 2), torch.zeros(3, 2)]}, r"dy\[1\] with the 5 rows of x"),
        ({"dy": []}, "dy is an empty sequence"),
        ({"dy": torch.zeros(5, 2, 2)}, r"expected dy \(rows, columns\), got \(5, 2, 2\)"),
        ({"x": torch.zeros(5)}, r"expected x \(T, \.\.\.\) .* got \(5,\)"),
        ({"x": torch.zeros(5, 3).long()}, "x must have a dtype of float64, .* got torch.int64"),
        (
            {"dy": torch.zeros(5, 2, dtype=torch.complex64)},
            "dy must have a dtype of .*, got torch.complex64",
        ),
        ({"dy": torch.zeros(5, 2, device="meta")}, "x is on cpu but dy on meta"),
        ({"backend": "tritn"}, "linear_norms: backend must be .* Did you mean 'triton'"),
        (
            {"backend": "triton", "x": torch.zeros(5, 3).double()},
            "backend='triton' computes in float32, got torch.float64",
        ),
    ],
)
def test_linear_norms_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**changes)


X, DY, IDS, Z = torch.zeros(5, 3), torch.zeros(5, 2), torch.tensor([0, 0, 1, 1, 3]), torch.zeros
TOKENS = torch.zeros(5, dtype=torch.int64)
A, B = Z(4, 3), Z(2, 4)
BACK = torch.tensor([0, 2, 1, 3, 3])
SAME: dict[str, Any] = {"num_segments": 4}
KEY: dict[str, Any] = {"seed": 0, "key": "a", **SAME}


@pytest.mark.parametrize(
    "call,message",
    [
        (
            lambda: linear_sketch(X, DY, IDS, 0, **KEY),
            "linear_sketch: k must be an int of at least 1, got 0",
        ),
        (lambda: linear_sketch(X, DY, BACK, 2, **KEY), r"linear_sketch: .*\[2\]=1 follows 2"),
        (lambda: linear_sketch(X, DY[:4], IDS, 2, **KEY), r"dy with the 5 rows of x"),
        (
            lambda: embedding_sketch(TOKENS, X, IDS, -1, **KEY),
            "k must be an int of at least 1, got -1",
        ),
        (lambda: embedding_sketch(X, X, IDS, 2, **KEY), "expected token_id"),
        (lambda: column_sketch(DY, IDS, 0, **KEY), "column_sketch: k must be an int of at least 1"),
        (lambda: column_sketch(DY, IDS, 2, x=X, **KEY), r"of one shape, .* \(5, 2\) and \(5, 3\)"),
        (lambda: column_sketch(DY, BACK, 2, **KEY), "column_sketch: .* follows"),
        (lambda: weight_sketch(X, DY, 2, seed=0, key="a"), r"old of new's shape \(5, 3\)"),
        (lambda: weight_sketch(X, None, 0, seed=0, key="a"), "weight_sketch: k must be"),
        (lambda: weight_sketch(Z(2, 2, 2), None, 2, seed=0, key="a"), "one by one, each under"),
        (lambda: weight_sketch(TOKENS, None, 2, seed=0, key="a"), "new must have a dtype"),
        (lambda: bias_norms(DY, BACK, **SAME), "bias_norms: .* follows"),
        (lambda: bias_norms(DY, IDS, group_size=3, **SAME), "bias_norms: num_segments=4 is not"),
        (lambda: rmsnorm_norms(X, DY, IDS, eps=0.1, **SAME), r"\(5, 3\) and \(5, 2\)"),
        (lambda: rmsnorm_norms(X, X, IDS, eps=-1.0, **SAME), "eps must be >= 0, got -1.0"),
        (lambda: rmsnorm_norms(X, X, IDS, eps=float("nan"), **SAME), "eps must be >= 0, got nan"),
        (lambda: layernorm_norms(X, X.long(), IDS, eps=0.1, **SAME), "dy must have a dtype"),
        (lambda: embedding_norms(TOKENS[:3], X, IDS, **SAME), r"expected token_id \(5,\)"),
        (lambda: embedding_norms(TOKENS, X, BACK, **SAME), "embedding_norms: .* follows"),
        (lambda: unique_ids(TOKENS, BACK, **SAME), "unique_ids: .* follows"),
        (lambda: row_counts(BACK, 4), "row_counts: .* follows"),
        (lambda: row_counts(IDS.float(), 4), r"row_counts: expected segment_id .* torch.float32"),
        (lambda: row_counts(IDS[None], 4), r"expected segment_id \(T,\) .* \(1, 5\)"),
        (lambda: unique_ids(TOKENS, IDS.short(), **SAME), "unique_ids: .* torch.int16"),
        (lambda: linear_sketch(X, DY, IDS, 2.0, **KEY), "k must be an int of at least 1, got 2.0"),
        (
            lambda: weight_sketch(X, None, 2.0, seed=0, key="a"),
            "k must be an int of at least 1, got 2.0",
        ),
        (lambda: linear_sketch(X, DY, IDS, 2, buckets=0, **KEY), "buckets must be a power .* 0"),
        (lambda: linear_sketch(X, DY, IDS, 2, first_input=-1, **KEY), "first_input must be >= 0 "),
        (lambda: weight_sketch(X, None, 2, seed=0, key="a", first_output=1.5), "an int, got 1.5"),
        (
            lambda: embedding_norms(TOKENS, X, IDS, scale=math.nan, **SAME),
            "must be finite, got nan",
        ),
        (lambda: row_counts(IDS, -1), "row_counts: num_segments must be >= 0 and an int, got -1"),
        (lambda: embedding_sketch(TOKENS, X, IDS, 2, buckets=100, **KEY), "power .* got 100"),
        (lambda: weight_sketch(X, None, 2, seed=0, key="a", buckets=-64), "power .* got -64"),
        (lambda: lora_norms(X, DY, A, B, BACK, scale=1.0, **SAME), "lora_norms: .* follows"),
        (lambda: lora_norms(X, DY, A, B, IDS, scale=1.0, num_segments=2), "lora_norms: .*outside"),
        (
            lambda: lora_norms(X, DY, A, B, IDS, scale=1.0, group_size=3, **SAME),
            "lora_norms: num_segments=4 is not a multiple of group_size=3",
        ),
        (
            lambda: lora_norms(X, DY, A.to("meta"), B, IDS, scale=1.0, **SAME),
            "x is on cpu but lora_a on meta",
        ),
        (lambda: lora_sketch(X, DY, A, B, BACK, 2, scale=1.0, **KEY), "lora_sketch: .* follows"),
        (lambda: lora_sketch(X, DY, A, B, IDS[:4], 2, scale=1.0, **KEY), "lora_sketch: expected"),
        (
            lambda: lora_norms(X, DY, Z(4, 2), Z(2, 4), IDS, scale=1.0, **SAME),
            r"lora_a \(rows, 3\), got \(4, 2\)",
        ),
        (
            lambda: lora_norms(X, DY, Z(4, 3), Z(3, 4), IDS, scale=1.0, **SAME),
            r"lora_b with the 2 outputs of dy as rows, got \(3, 4\)",
        ),
        (
            lambda: linear_sketch(X, DY, IDS, 2, counts=[2, 1, 1, 1], **KEY),
            r"linear_sketch: counts\[1\]=1, but segment_id holds 2 rows of segment 1",
        ),
        (
            lambda: column_sketch(X, IDS, 2, x=X, eps=-1.0, **KEY),
            "column_sketch: eps must be >= 0, got -1.0",
        ),
        (
            lambda: column_sketch(X, IDS, 2, centred=True, **KEY),
            "column_sketch: centred=True .* needs x",
        ),
        (
            lambda: weight_sketch(X, None, 2, seed=1.0, key="a"),
            "weight_sketch: seed must be an int, got 1.0",
        ),
        (
            lambda: weight_sketch(X, None, 2, seed=1, key=None),
            "weight_sketch: key must be a string.*got None",
        ),
        (
            lambda: tied_norms(TOKENS, X, IDS, Z(2, 3), Z(3, 1), TOKENS[:2], **SAME),
            r"dz with the 2 rows of hidden, got \(3, 1\)",
        ),
        (
            lambda: tied_norms(TOKENS, X, IDS, Z(2, 4), Z(2, 1), TOKENS[:2], **SAME),
            r"hidden \(rows, 3\), got \(2, 4\)",
        ),
        (
            lambda: tied_norms(TOKENS + 1, X, IDS, Z(2, 3), Z(2, 1), TOKENS[:2], **SAME),
            r"column\[0\]=1 .* dz has 1 column",
        ),
    ],
)
def test_the_others_name_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_rows_and_no_segments() -> None:
    for segments in (0, 3):
        x, dy, segment_id = Z(0, 150), Z(0, 140), torch.zeros(0).int()
        for group_size in (None, 1):
            same: dict[str, Any] = {"num_segments": segments, "group_size": group_size}
            found = [
                linear_norms(x, dy, segment_id, **same),
                linear_norms(x[:, :4], dy, segment_id, **same),
                bias_norms(dy, segment_id, **same),
                rmsnorm_norms(x, x, segment_id, eps=1.0, **same),
                embedding_norms(segment_id, dy, segment_id, **same),
            ]
            shape = (segments,) if group_size is None else (segments, 1, 1)
            assert all(norms.shape == shape and not bool(norms.any()) for norms in found)
        sketches = linear_sketch(x, dy, segment_id, 2, seed=0, key="a", num_segments=segments)
        assert sketches.shape == (segments, 2, 2) and not bool(sketches.any())
