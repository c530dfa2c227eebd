"""The Triton kernels of norms and sketches: interpreted without a GPU, else on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastpref_kernels import (
    bias_norms,
    column_sketch,
    layernorm_norms,
    linear_norms,
    linear_sketch,
    lora_norms,
    pair_gram,
    reference,
    rmsnorm_norms,
)
from fastpref_kernels.projection import Projection, project
from torch import Tensor

from tests.kernels.test_pair_norms import ids, rows

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes products of bfloat16 wrongly.
HALF = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]
# Interpreted products are exact in float32; on a GPU float32 is split in three tf32 parts.
CLOSE: dict[str, float] = {"rtol": 2e-5, "atol": 0.0}


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def data(counts: list[int], *shape: int, seed: int = 0, dtype: Any = torch.float32) -> Tensor:
    return rows(counts, *shape, seed=seed, dtype=dtype).to(DEVICE)


def both(function: Any, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """By Triton, and by plain torch in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    return (
        function(*tensors, backend="triton", **options).double(),
        function(*wide, backend="torch", **options),
    )


# Groups that share a tile, that need several, and ones whose gradients are formed; ragged sides.
@pytest.mark.parametrize("counts", [[1, 5, 0, 40, 30, 2], [70, 3, 200, 1, 0, 0]])
@pytest.mark.parametrize("group_size", [None, 2, 3])
@pytest.mark.parametrize("shape", [(300, (200,)), (133, (70, 64, 131)), (192, (160, 8, 20, 36))])
def test_linear(
    counts: list[int], group_size: int | None, shape: tuple[int, tuple[int, ...]]
) -> None:
    d, outputs = shape
    x, dy = data(counts, d), [data(counts, p, seed=p) for p in outputs]
    segment_id = ids(counts).to(DEVICE)
    options: dict[str, Any] = {"num_segments": 6, "group_size": group_size}
    ours = linear_norms(x, dy, segment_id, backend="triton", **options)
    joined = torch.cat(dy, 1).double()
    truth = reference.linear_norms(x.double(), joined, segment_id, **options)
    scale = float(truth.abs().max())
    torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=1e-6 * scale)
    assert torch.equal(ours, linear_norms(x, dy, segment_id, backend="triton", **options))


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(dtype: torch.dtype) -> None:
    counts = [30, 100, 2]
    x, dy = data(counts, 192, dtype=dtype), data(counts, 256, seed=1, dtype=dtype)
    segment_id = ids(counts).to(DEVICE)
    ours = linear_norms(x, dy, segment_id, num_segments=3, backend="triton")
    truth = reference.linear_norms(x.double(), dy.double(), segment_id, num_segments=3)
    torch.testing.assert_close(ours.double(), truth, **CLOSE)
    sketch = linear_sketch(x, dy, segment_id, 8, seed=0, key="a", num_segments=3, backend="triton")
    exact = linear_sketch(
        x.double(), dy.double(), segment_id, 8, seed=0, key="a", num_segments=3, backend="torch"
    )
    assert float((sketch - exact).norm() / exact.norm()) < 1e-5


def test_ids_that_are_not_contiguous() -> None:
    counts = [30, 1, 20]
    x, dy, segment_id = data(counts, 130), data(counts, 140, seed=1), ids(counts).to(DEVICE)
    apart = torch.stack((segment_id, torch.full_like(segment_id, 7)), 1)[:, 0]
    assert not apart.is_contiguous()
    one, other = (
        linear_norms(x, dy, of, num_segments=3, backend="triton") for of in (segment_id, apart)
    )
    assert torch.equal(one, other)


def test_several_tiles_of_one_group_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel sums is every pair of rows once: also if no group goes by gradients."""
    from fastpref_kernels import triton_pair_gram

    monkeypatch.setattr(triton_pair_gram, "longest_pair_gram", lambda d, p: 10_000)
    counts = [200, 1, 129, 64]
    x, dy, segment_id = data(counts, 130), data(counts, 140, seed=1), ids(counts).to(DEVICE)
    for group_size in (None, 2):
        ours = linear_norms(
            x, dy, segment_id, num_segments=4, group_size=group_size, backend="triton"
        )
        truth = reference.linear_norms(
            x.double(), dy.double(), segment_id, num_segments=4, group_size=group_size
        )
        torch.testing.assert_close(ours.double(), truth, **CLOSE)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_pair_that_is_not_finite_spoils_no_other() -> None:
    counts = [4, 3, 5, 2]
    x, dy, segment_id = data(counts, 150), data(counts, 160, seed=1), ids(counts).to(DEVICE)
    good = linear_norms(x, dy, segment_id, num_segments=4, backend="triton")
    dy[0, 0] = torch.inf
    bad = linear_norms(x, dy, segment_id, num_segments=4, backend="triton")
    assert not bool(bad[0].isfinite()) and torch.equal(bad[1:], good[1:])


@pytest.mark.parametrize("group_size", [None, 2])
def test_adapters(group_size: int | None) -> None:
    counts = [40, 3, 0, 17]
    x, dy, segment_id = data(counts, 50), data(counts, 70, seed=1), ids(counts).to(DEVICE)
    assert pair_gram.is_narrow(x, [dy])
    a, b = data([4], 50, seed=2), data([70], 4, seed=3)
    options: dict[str, Any] = {"num_segments": 4, "group_size": group_size, "scale": 0.5}

    def stacked(*tensors: Tensor, **more: Any) -> Tensor:
        return torch.stack(lora_norms(*tensors, **more))

    for ours, truth in zip(*both(stacked, x, dy, a, b, segment_id, **options), strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=1e-6 * float(truth.abs().max()))


def layer(*tensors: Tensor, **options: Any) -> Tensor:
    return torch.stack(layernorm_norms(*tensors, **options))


@pytest.mark.parametrize("shape", [(40,), (1300,), (3, 20)])
def test_column_sums(shape: tuple[int, ...]) -> None:
    counts = [5, 0, 40, 1]
    x, dy, segment_id = data(counts, *shape), data(counts, *shape, seed=1), ids(counts).to(DEVICE)
    options: dict[str, Any] = {"num_segments": 4, "eps": 1e-3}
    calls = [both(rmsnorm_norms, x, dy, segment_id, **options)]
    if len(shape) == 1:
        calls.append(both(bias_norms, dy, segment_id, num_segments=4))
        calls.append(both(layer, x, dy, segment_id, **options))
    for ours, truth in calls:
        torch.testing.assert_close(ours, truth, **CLOSE)


@pytest.mark.parametrize(
    "rows_,features,k,first",
    [
        (50, 70, 8, 5),
        (130, 128, 32, 0),
        (65, 200, 48, 2**32 - 200),
        (33, 64, 100, 0),
        (3, 40, 1, 0),
        (2, 5, 65600, 3),
    ],
)
def test_projection(rows_: int, features: int, k: int, first: int) -> None:
    """The hash gives the same signs on the chip, beyond 2^31 too."""
    x, side = data([rows_], features), Projection.of(3, "a", "in")
    ours, truth = both(lambda t, **o: project(t, side, k, first_row=first, **o), x)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)


def test_sketches() -> None:
    counts = [5, 0, 70, 1]
    x, dy, segment_id = data(counts, 90), data(counts, 33, seed=1), ids(counts).to(DEVICE)
    options: dict[str, Any] = {"seed": 0, "key": "a", "num_segments": 4}
    for ours, truth in (
        both(linear_sketch, x, dy, segment_id, k=12, **options),
        both(column_sketch, dy, segment_id, k=5, **options),
    ):
        scale = float(truth.abs().max())
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6 * scale)
