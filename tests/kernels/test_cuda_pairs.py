"""`pair_loss` and `linear_dpo` on an NVIDIA GPU: Triton against torch, capture, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastpref_kernels import linear_dpo, pair_loss, reference
from fastpref_kernels.pair_checks import LOSS_TYPES
from torch import Tensor

from tests.kernels.test_pair_loss import Pairs, close, make_pairs, options_of, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(case: Pairs) -> Pairs:
    ref = (case.ref[0].cuda(), case.ref[1].cuda())
    return Pairs(case.logp.cuda(), case.segment_id.cuda(), ref, case.grad.cuda(), case.group)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_against_float64(loss_type: str, group: int, backend: str) -> None:
    for pairs, rows in ((1, 1), (7, 60), (2, 40_001)):
        case = on_gpu(make_pairs(pairs, rows, group, seed=rows))
        truth = run(reference.pair_loss, case.to(torch.float64), **options_of(loss_type))
        ours = run(pair_loss, case, backend=backend, **options_of(loss_type))
        size = 4 * torch.finfo(torch.float32).eps * max(1.0, rows / 4)
        close(ours, truth, 8 * size if loss_type == "ipo" else size)


def step(dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    """Leaves, and a call that gives loss and gradients."""
    g = torch.Generator("cuda").manual_seed(0)
    options = {"generator": g, "device": "cuda"}
    hidden = torch.randn(256, 64, **options).to(dtype).requires_grad_()  # type: ignore[call-overload]
    weight = torch.randn(3001, 64, **options).to(dtype).requires_grad_()  # type: ignore[call-overload]
    target = torch.randint(0, 3001, (256,), **options)  # type: ignore[call-overload]
    segment_id = (torch.arange(256, device="cuda") // 32).int()

    def call() -> list[Tensor]:
        out = linear_dpo(hidden, weight, target, segment_id, beta=0.1, num_segments=8)
        return [out.loss, *torch.autograd.grad(out.loss.mean(), (hidden, weight))]

    return [hidden, weight], call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_in_a_cuda_graph(dtype: torch.dtype) -> None:
    (hidden, _), call = step(dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for scale in (1.0, -0.5):  # other values in the same memory
        with torch.no_grad():
            hidden.mul_(scale)
        graph.replay()
        for one, two in zip(captured, call(), strict=True):
            assert torch.equal(one, two)


def test_nothing_waits_for_the_device() -> None:
    _, call = step(torch.bfloat16)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ids_of_no_pair_make_the_loss_nan() -> None:
    for ids in ([0, 1, 2, 4], [-1, 0, 1, 3]):
        out = pair_loss(
            torch.zeros(4, device="cuda"), torch.tensor(ids).cuda(), beta=0.1, num_segments=4
        )
        assert out.loss.isnan().all()
