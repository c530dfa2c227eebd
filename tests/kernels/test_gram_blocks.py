"""Blocks of rows of the Triton Gram matrices: the kernels by themselves against float64, and the
operations and reads of E of a call, counted from its launches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastpref_kernels import gram_tile
from fastpref_kernels._launch import Launch, recorded
from fastpref_kernels.gram_tile import Rows, Tiles, add_gram, block_rows, plan_blocks
from fastpref_kernels.spans import starts

from tests.kernels.cases import TRITON_DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Groups of a few rows, that share a block, of one block and of several of every size.
LENGTHS = {1: [1, 1, 0, 2, 3, 4, 1], 2: [5, 8, 0, 7, 9], 3: [16, 32, 20, 0], 4: [64, 3, 40, 130]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", LENGTHS)
@pytest.mark.parametrize("group_size", [1, 3])
def test_equal_to_outer_products(dtype: torch.dtype, which: int, group_size: int) -> None:
    """Two tiles, of which the second is narrower and relative to other offsets; targets that are
    equal, and corrected to float32."""
    lengths, width, vocab, dim = LENGTHS[which], 48, 80, 40
    g = torch.Generator().manual_seed(which)
    counts = lengths
    if group_size > 1:  # each group in three segments, one of them without rows now and then
        counts = sum(([n // 3, 0 if n % 2 else n // 4, n - n // 3 - (n % 2 == 0) * (n // 4)]
                      for n in lengths), [])  # fmt: skip
    rows = sum(counts)

    def draw(*shape: int) -> Any:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    exps, hidden = draw(rows, vocab).to(dtype), (draw(rows, dim) - 0.5).to(dtype)
    target = torch.randint(0, 3, (rows,), generator=g) * 39
    own, scale, final = -5 * draw(rows).float() - 1, draw(rows).float(), draw(rows).float()
    offsets = torch.stack([final - draw(rows).float(), final])
    offsets[0, target < width] = final[target < width]
    exps[torch.arange(rows), target] = own.to(dtype)
    segment = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    wide = exps.double() * (offsets[0] - final).double().exp().unsqueeze(1)
    wide[:, width:] = exps.double()[:, width:]
    dots = wide @ wide.t()
    kept = own.to(dtype).double()
    same = target.unsqueeze(1) == target  # what E rounds is made good where two targets are equal
    dots += same * (torch.outer(own.double(), own.double()) - torch.outer(kept, kept))
    dots *= torch.outer(scale.double(), scale.double()) * (hidden.double() @ hidden.double().t())
    ends = starts(counts)
    sums = [[dots[a:b, c:d].sum() for c, d in pairwise(ends)] for a, b in pairwise(ends)]
    whole = torch.tensor(sums).view(len(lengths), group_size, len(lengths), group_size)
    truth = whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    tiles = torch.cat([exps[:, :width].flatten(), exps[:, width:].flatten()]).view(vocab, rows)
    on = [x.to(TRITON_DEVICE) for x in (target.int(), segment.int(), final, own, scale)]
    out = torch.zeros(len(counts), group_size, dtype=torch.float64, device=TRITON_DEVICE)
    plan = plan_blocks(tuple(counts), group_size, tuple(range(len(lengths))), dtype, out.device)
    add_gram(
        out,
        Tiles(tiles.to(TRITON_DEVICE), offsets.to(TRITON_DEVICE), width),
        Rows(*on),
        hidden.to(TRITON_DEVICE),
        plan,
        correct=True,
    )
    ours = out.view(len(lengths), group_size, group_size).cpu()
    sizes = truth.diagonal(dim1=1, dim2=2).sqrt()
    scale_of = (sizes.unsqueeze(1) * sizes.unsqueeze(2)).clamp(min=1e-30)
    assert float(((ours - truth).abs() / scale_of).max()) < 3e-6


R, D, V = 8192, 4096, 128256


def launched(length: int) -> list[Launch]:
    """What the Gram matrices of R / L groups of L rows launch, all tiles of E kept."""
    counts = (length,) * (R // length)
    rows, seen = sum(counts), []
    width, device = 8192, torch.device("meta")

    def numbers(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=kind)

    plan = plan_blocks(counts, 1, tuple(range(len(counts))), torch.bfloat16, torch.device("cpu"))
    plan = [blocks._replace(pairs=blocks.pairs.to(device)) for blocks in plan]
    of_rows = [numbers(rows, kind=torch.int32) for _ in range(2)]
    with recorded(seen.append):
        add_gram(
            numbers(len(counts), 1, kind=torch.float64),
            Tiles(numbers(V, rows, kind=torch.bfloat16), numbers(-(-V // width), rows), width),
            Rows(*of_rows, *(numbers(rows) for _ in range(3))),
            numbers(rows, D, kind=torch.bfloat16),
            plan,
            correct=True,
        )
    return seen


def operations(launch: Launch) -> int:
    """Multiplications and additions of products of rows; each share of tiles forms h . h again."""
    programs, shares = launch.grid
    length = launch.arguments.get("L")
    entries = launch.arguments["B"] ** 2 if length is None else length * (length + 1) // 2
    return 2 * programs * entries * (V + shares * D)


def reads_of_exps(launch: Launch) -> float:
    """Times that programs load all of E."""
    length, programs = launch.arguments.get("L"), launch.grid[0]
    rows = launch.arguments["B"] * (1 if launch.arguments["ALONE"] else 2) if not length else length
    return programs * rows / R


# Below 16 rows a product on tensor cores is padded to 16 x 16, from 5 rows on.
@pytest.mark.parametrize(
    "length,over_bound,reads",
    [(1, 1.0, 1), (2, 1.0, 1), (4, 1.0, 1), (8, 2.0, 1), (16, 1.0, 1), (64, 1.0, 1),
     (128, 1.0, 3), (192, 1.0, 4), (512, 1.0, 9)],
)  # fmt: skip
def test_at_most_2_R_L_V_plus_D_operations(length: int, over_bound: float, reads: int) -> None:
    """For segments of L rows. E is handed to one launch, in which a group's n blocks are each
    loaded by n + 1 programs (one, where n is 1) that share out the tiles in the same way."""
    seen = launched(length)
    rows = R // length * length
    assert len(seen) == 1
    counted = sum(operations(launch) for launch in seen)
    assert counted <= over_bound * 2 * rows * length * (V + D)
    assert reads_of_exps(seen[0]) <= reads


def test_where_the_bound_holds() -> None:
    """Entries of block pairs over L^2 for every length: README says where they are more."""
    worst = {}
    for length in range(5, 600):
        size = block_rows(length, torch.bfloat16)
        count = -(-length // size)
        in_block = 1 if length > size else size // length
        worst[length] = count * (count + 1) / 2 * size * size / in_block / length**2
    over = [length for length, ratio in worst.items() if ratio > 1]
    assert over == [*range(5, 16), *range(17, 28), *range(33, 40), 49, 50]
    assert max(worst.values()) == worst[6] == pytest.approx(3.56, abs=0.01)
    assert max(ratio for length, ratio in worst.items() if length > 16) == worst[17] < 2.66


def test_sizes() -> None:
    assert [block_rows(n, torch.bfloat16) for n in (1, 4, 5, 16, 17, 32, 48, 64, 79, 512)] == [
        1, 4, 16, 16, 16, 32, 16, 64, 32, 64]  # fmt: skip
    assert set(gram_tile.HALF_BLOCKS) == set(gram_tile.FLOAT_BLOCKS)
