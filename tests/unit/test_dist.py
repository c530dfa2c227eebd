"""Ranks and reductions: alone, and as two gloo processes.

Run as a script under torchrun's environment, this file is one of the two: see `_be_a_rank`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastpref import dist
from fastpref.checkpoint import load_checkpoint, save_checkpoint
from tests.ranks import run_two_ranks

CPU = torch.device("cpu")


def test_alone_everything_is_a_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (dist.rank(), dist.world_size(), dist.local_rank(), dist.is_main()) == (0, 1, 0, True)
    dist.start("cpu")
    assert not torch.distributed.is_initialized()  # noqa: TID251
    tensor = torch.ones(3)
    assert dist.all_reduce_sum(tensor) is tensor and dist.all_gather(tensor) == [tensor]
    assert torch.equal(dist.all_gather_rows(tensor[:, None])[0], tensor[:, None])
    weight = nn.Parameter(torch.ones(2))
    dist.all_reduce_gradients([weight])
    assert weight.grad is None
    assert dist.broadcast_text("ü", CPU) == "ü"
    dist.check_same("the plan", "x", CPU)
    dist.barrier()
    dist.stop()


def test_a_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE: expected a whole number, got 'two'"):
        dist.world_size()


def test_buckets_follow_order_size_and_kind() -> None:
    sizes = [(3, torch.float32), (3, torch.float32), (9, torch.float32), (1, torch.float64)]
    parameters = [nn.Parameter(torch.zeros(n, dtype=kind)) for n, kind in sizes]
    buckets = [[p.numel() for p in b] for b in dist._buckets(parameters, limit=24)]
    assert buckets == [[3, 3], [9], [1]]


def test_two_ranks(tmp_path: Path) -> None:
    run_two_ranks(__file__, str(tmp_path))


def _be_a_rank(folder: Path) -> None:
    dist.start("cpu")
    rank = dist.rank()
    assert dist.world_size() == 2 and dist.is_main() == (rank == 0)
    assert dist.all_reduce_sum(torch.tensor([1.0 + rank])).item() == 3.0
    gathered = dist.all_gather(torch.tensor([rank, 7]))
    assert [part.tolist() for part in gathered] == [[0, 7], [1, 7]]
    rows = torch.full((2 * rank, 3), float(rank), dtype=torch.float64)  # rank 0 has none
    parts = dist.all_gather_rows(rows)
    assert [part.tolist() for part in parts] == [[], [[1.0] * 3] * 2]

    # Sums, not means; every bucket split gives the same bits; no gradient counts as zero.
    results = []
    for limit in (1, 64, 10**6):
        parameters = [nn.Parameter(torch.zeros(n, 3)) for n in (2, 5, 1)]
        parameters += [nn.Parameter(torch.zeros(4), requires_grad=False)]
        for index, parameter in enumerate(parameters[:2]):
            generator = torch.Generator().manual_seed(10 * rank + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if rank == 1:
            parameters[2].grad = torch.ones(1, 3)
        dist.all_reduce_gradients(parameters, limit)
        assert parameters[3].grad is None
        results.append([p.grad for p in parameters[:3]])
    for index in range(2):
        seeds = (index, 10 + index)
        parts = [
            torch.randn(results[0][index].shape, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        for result in results:
            assert torch.equal(result[index], parts[0] + parts[1])
    assert all(torch.equal(result[2], torch.ones(1, 3)) for result in results)

    assert dist.broadcast_text(f"from {rank} ü", CPU) == "from 0 ü"
    assert dist.broadcast_text("" if rank == 0 else "x", CPU) == ""
    dist.check_same("the plan", "equal", CPU)
    try:
        dist.check_same("the plan", f"rank {rank}", CPU)
    except ValueError as error:
        assert "the plan differs between ranks: rank 0 and rank 1" in str(error)
    else:
        raise AssertionError("a difference went unnoticed")
    _keep_generators(folder)
    dist.barrier()
    dist.stop()
    print("all held")


def _keep_generators(folder: Path) -> None:
    """A checkpoint restores each rank's own generators."""
    from tests.unit.test_checkpoint import Small, new_state

    state = new_state(Small())
    torch.manual_seed(100 + dist.rank())
    path = save_checkpoint(folder, 3, state)
    expected = torch.randn(4)
    torch.manual_seed(5)
    load_checkpoint(path, state)
    assert torch.equal(torch.randn(4), expected)
    firsts = dist.all_gather(expected)
    assert not torch.equal(firsts[0], firsts[1])


if __name__ == "__main__":
    _be_a_rank(Path(sys.argv[1]))
