"""The torch backend on an NVIDIA GPU: half products with float32 output, repeatability."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fastpref_kernels import _launch, linear_logprob, reference

from tests.kernels.cases import assert_no_worse, make_case, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [0.0, 12.0])
@pytest.mark.parametrize("cache", [-1, 0, 2])
def test_no_worse_than_plain_torch(
    dtype: torch.dtype, gap: float, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "tile_width", lambda dim, vocab, dtype: 512)
    case = make_case(65, 48, 3001, dtype=dtype, gap=gap, segments=9).on("cuda")
    truth = run(reference.linear_logprob, case.to(torch.float64))
    naive = run(reference.linear_logprob, case)
    assert_no_worse(run(linear_logprob, case, cache=cache), naive, truth, dtype, scale=3.0 + gap)


def test_same_bits_twice() -> None:
    case = make_case(500, 64, 5000, dtype=torch.bfloat16, segments=40).on("cuda")
    case = replace(case, target=case.target % 7)
    first, second = run(linear_logprob, case), run(linear_logprob, case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


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
