"""Dense blocks of segments against one product for every segment."""

from __future__ import annotations

import pytest
import torch
from fastpref_kernels import reference, token_blocks
from fastpref_kernels.token_blocks import TokenBlocks

CPU = torch.device("cpu")
COUNTS = [
    [3, 3, 3, 3],
    [7, 0, 1, 40, 12, 12, 13, 0, 2, 9, 41, 300],
    [1],
    [0, 0],
    [],
    [20, 5, 20, 20],
    list(range(1, 60)),
]


def rows(counts: list[int], *widths: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(counts), width, dtype=torch.float64) for width in widths]


def ids(counts: list[int]) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


@pytest.mark.parametrize("counts", COUNTS)
def test_every_row_has_one_slot(counts: list[int]) -> None:
    """And a block is little larger than its rows."""
    (x,) = rows(counts, 1)
    x = torch.arange(len(x), dtype=torch.float64).add(1).unsqueeze(1)
    seen = []
    for block in TokenBlocks.make(counts, CPU).blocks:
        dense = block.dense(x, zero=True)
        assert dense.shape == (len(block.lengths), block.length, 1)
        assert [counts[s] for s in block.segments.tolist()] == block.lengths
        slots, own = block.length * len(block.lengths), sum(block.lengths)
        assert slots <= token_blocks.MAX_PADDING * own or block.length <= token_blocks.MIN_LENGTH
        seen += dense[dense != 0].tolist()
    assert sorted(seen) == x.flatten().tolist()


@pytest.mark.parametrize("counts", COUNTS)
def test_products(counts: list[int]) -> None:
    y, x = (torch.stack(rows(counts, w, w)) for w in (3, 4))
    ours = TokenBlocks.make(counts, CPU).products(y, x)
    assert ours.shape == (2, len(counts), 3, 4)
    for s in range(len(counts)):
        own = ids(counts) == s
        torch.testing.assert_close(ours[:, s], y[:, own].transpose(1, 2) @ x[:, own])


@pytest.mark.parametrize("entries", [1 << 22, 500, 1])
@pytest.mark.parametrize("widths", [(5, 6), (30, 40), (64, 3), (9, 8, 7)])
@pytest.mark.parametrize("counts", COUNTS)
def test_norms(
    counts: list[int], widths: tuple[int, ...], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows, by gradients of a block, by gradients one by one; several dy of one x."""
    monkeypatch.setattr(token_blocks, "ENTRIES", entries)
    x, *dy = rows(counts, *widths)
    ours = TokenBlocks.make(counts, CPU).norms(x, dy)
    if not counts:
        assert ours.shape == (0,)
        return
    at = {"segment_id": ids(counts), "num_segments": len(counts)}
    truth = sum(reference.linear_norms(x, y, **at) for y in dy)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = [t.to(dtype) for t in (x, *dy)]
        found = TokenBlocks.make(counts, CPU).norms(rounded[0], rounded[1:])
        assert found.dtype == torch.float32
        exact = sum(
            reference.linear_norms(rounded[0].double(), y.double(), **at) for y in rounded[1:]
        )
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_segment_that_is_not_finite_spoils_itself_alone(bad: float) -> None:
    counts = [5, 7, 6, 5]
    x, dy = rows(counts, 8, 9)
    x[6, 2] = bad
    blocks = TokenBlocks.make(counts, CPU)
    norms, products = blocks.norms(x, [dy]), blocks.products(dy[None], x[None])[0]
    assert not norms[1].isfinite() and norms[[0, 2, 3]].isfinite().all()
    assert products[[0, 2, 3]].isfinite().all()
