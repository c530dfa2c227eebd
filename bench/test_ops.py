"""The head op and the pair loss under pytest-benchmark, for regressions: `pytest bench
--benchmark-only`, `--benchmark-compare` against a run saved before. On the GPU where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from fastpref_kernels import pair_loss  # noqa: E402

from bench import head_ops  # noqa: E402
from bench.gpu_op import call_of  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
SHAPE = (8192, 4096, 128256) if CUDA else (128, 256, 4096)  # R, D, V
DTYPE = torch.bfloat16 if CUDA else torch.float32


def _finished(call: Any) -> Any:
    """`call` that returns when the device is done."""

    def run() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("mode", ["full", "frozen", "nograd"])
@pytest.mark.parametrize("name", ["ours", "ours_cache0", "eager"])
def test_head_step(benchmark: Any, name: str, mode: str) -> None:
    """Forward and backward of a DPO step of the head."""
    (op,), _ = head_ops.load([name])
    problem = head_ops.make_problem(*SHAPE, pairs=4, dtype=DTYPE, device=DEVICE)
    benchmark.group = f"head step, {mode}"
    benchmark(_finished(call_of(op, problem, mode)))


@pytest.mark.parametrize("name", ["ours", "torch"])
def test_pair_loss(benchmark: Any, name: str) -> None:
    """From row log-probs to the rows' gradient: the op, and what is written without it."""
    rows, pairs = SHAPE[0], 8
    logp = -torch.rand(rows, device=DEVICE).requires_grad_()
    segment_id = torch.arange(rows, device=DEVICE, dtype=torch.int32) // (rows // (2 * pairs))

    def ours() -> Any:
        out = pair_loss(logp, segment_id, beta=0.1, num_segments=2 * pairs)
        return torch.autograd.grad(out.loss.mean(), logp)

    def torch_ops() -> Any:
        return torch.autograd.grad(head_ops.dpo_loss(logp, pairs), logp)

    benchmark.group = "pair loss"
    benchmark(_finished(ours if name == "ours" else torch_ops))
