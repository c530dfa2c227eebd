"""Inner products of gradients that never reach memory, against float64: the kernel by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastpref_kernels import gradient_tile, triton_norms
from fastpref_kernels.gradient_tile import Lacking, gradient_products, make_sets
from fastpref_kernels.spans import row_counts, starts

from tests.kernels.cases import TRITON_DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def gradients(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:  # (S, p d) float64
    bounds = starts(counts)
    pairs = zip(bounds, bounds[1:], strict=False)
    return torch.stack([(left[a:b].double().t() @ right[a:b].double()).flatten() for a, b in pairs])


def products(
    left: Tensor, right: Tensor, counts: list[int], group_size: int, groups: tuple[int, ...]
) -> Tensor:
    dtype = torch.promote_types(left.dtype, right.dtype)
    sets = make_sets(tuple(counts), groups, group_size, dtype, left.device)
    return gradient_products(left, right, sets)[sets.pick]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(TRITON_DEVICE)


F16, F32 = torch.float16, torch.float32
COUNTS = [0, 1, 17, 300, 0, 0, 64, 65, 3, 0, 2, 31]


@pytest.mark.parametrize(
    "group_size,sides,dtypes,groups",
    [
        (1, (130, 70), (F16, F16), tuple(range(12))),
        (2, (128, 256), (F16, F16), (1, 3, 5)),  # no mask on columns
        (3, (33, 200), (F32, F32), (0, 2)),
        (4, (70, 64), (F32, F16), (0, 1, 2)),  # sets of two, types mixed
        (6, (20, 90), (F16, F16), (0, 1)),
    ],
)
def test_equal_to_gradients_in_memory(
    group_size: int,
    sides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    groups: tuple[int, ...],
) -> None:
    """Segments without rows, of one, of several steps; what is not asked for is infinite."""
    rows = sum(COUNTS)
    left, right = (draw(rows, n, seed=n, dtype=t) for n, t in zip(sides, dtypes, strict=True))
    wanted = gradients(left, right, COUNTS).view(-1, group_size, sides[0] * sides[1])[list(groups)]
    truth = wanted @ wanted.transpose(1, 2)
    of_row = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS)) // group_size
    for group in set(range(len(COUNTS) // group_size)) - set(groups):
        left[of_row == group] = torch.inf
    ours = products(left, right, COUNTS, group_size, groups)
    lengths = truth.diagonal(dim1=1, dim2=2).sqrt()
    scale = (lengths.unsqueeze(1) * lengths.unsqueeze(2)).clamp(min=1e-30)
    assert float(((ours - truth).abs() / scale).max()) < 2e-6
    again = products(left, right, COUNTS, group_size, groups)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("low", [0, 150])
def test_what_rows_lack_at_their_target(low: int) -> None:
    """Ids 150 .. 349 of 400 in a tile, or 0 .. 199; targets in and around it, some often."""
    counts, width, vocab = [0, 2, 40, 33], 200, 400
    rows = sum(counts)
    left, right = draw(rows, width, seed=0, dtype=F16), draw(rows, 70, seed=1, dtype=F16)
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, vocab, (rows,), generator=g).to(TRITON_DEVICE)
    target[5:20] = 160
    lost = draw(rows, seed=2, dtype=F32).half().float()
    segment = torch.arange(4).repeat_interleave(torch.tensor(counts)).to(TRITON_DEVICE)
    whole = left.double()
    inside = (target >= low) & (target < low + width)
    at = inside.nonzero().squeeze(1)
    whole[at, target[at] - low] += lost.double()[at]
    wanted = gradients(whole, right, counts).view(2, 2, -1)
    truth = wanted @ wanted.transpose(1, 2)
    sets = make_sets(tuple(counts), (0, 1), 2, F16, left.device)
    lacking = Lacking.of(segment, target, lost, vocab)
    ours = gradient_products(left, right, sets, lacking, low)[sets.pick]
    torch.testing.assert_close(ours, truth, rtol=2e-6, atol=2e-6 * float(truth.abs().max()))


def test_which_way_a_group_goes() -> None:
    """By rows while that loads fewer numbers; decided by counts on the host, group by group."""
    vocab, dim = 128256, 4096

    def by_rows(*counts: int, group_size: int = 1, dtype: torch.dtype = torch.bfloat16) -> bool:
        rows, gradients = triton_norms.sort_groups(counts, group_size, vocab, dim, dtype)
        assert len(rows) + len(gradients) == 1
        return bool(rows)

    assert by_rows(512) and by_rows(2048) and not by_rows(8192)
    crossing = vocab * dim // (vocab + dim)
    assert by_rows(crossing - 128) and not by_rows(crossing + 128)
    # More tiles at once are smaller tiles, and load more.
    assert by_rows(0, 2800, 2800, group_size=3) and not by_rows(0, 9000, 9000, group_size=3)
    mixed = triton_norms.sort_groups((5, 9000, 0, 1), 1, vocab, dim, torch.bfloat16)
    assert mixed == ((0, 3), (1,))


def test_no_gradient_is_kept() -> None:
    """What a call allocates: numbers for each tile of each set, nothing of (p, d)."""
    from fastpref_kernels._launch import recorded

    from bench.roofline import Counted, _Seen

    rows, p, d = 4096, 8192, 4096
    sets = make_sets((1000, 3096), (0,), 2, torch.bfloat16, torch.device("cpu"))
    counted = Counted(rows_by_dim=1)
    left, right = (torch.empty(rows, n, device="meta", dtype=torch.bfloat16) for n in (p, d))
    counted.given(left, right, *(x for x in sets if isinstance(x, Tensor)))
    with recorded(lambda launch: None), _Seen(counted):
        gradient_products(left, right, sets)
    tiles = (p // 128) * (d // 128)
    assert counted.peak <= tiles * 3 * 4 + 1000


def test_every_size_of_a_set_has_a_shape() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for group_size in range(1, 9):
            size = gradient_tile.set_size(group_size, dtype)
            assert size in (group_size, 2) and gradient_tile.tile_shape(dtype, size)


def test_counts_and_sets_agree() -> None:
    ids = torch.tensor([0, 0, 2, 5, 5, 5])
    counts: Any = tuple(row_counts(ids, 6))
    sets = make_sets(counts, (0, 1), 3, torch.float32, torch.device("cpu"))
    assert sets.first.tolist() == [0, 2, 2, 3, 3, 3] and sets.last.tolist() == [2, 2, 3, 3, 3, 6]
    assert sets.pick[1].tolist() == [[6, 7, 8], [7, 9, 10], [8, 10, 11]]
