"""Norms and sketches of head gradients on the Triton backend, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _head_checks, gram_tile, linear_logprob, reference, triton_norms
from fastpref_kernels.spans import group_counts

from tests.kernels.cases import TRITON_DEVICE, Case, call, make_case
from tests.kernels.test_triton import set_tile

ALL: dict[str, Any] = {"bias": True, "softcap": 7.0, "temperature": 0.9, "logit_scale": 1.3}
BOUNDS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 2e-3}


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def triton(case: Case, group_size: int, **more: Any) -> Any:
    return call(linear_logprob, case.on(TRITON_DEVICE), group_size, backend="triton", **more)


def close(ours: torch.Tensor, truth: torch.Tensor, bound: float) -> None:
    """Relative to the largest entry of each group's matrix."""
    sizes = truth.flatten(1).abs().amax(1).clamp(min=1e-30).view(-1, 1, 1)
    assert float(((ours.cpu().double() - truth) / sizes).abs().max()) <= bound


BOTH = ("hidden", "weight")
EXACT = [
    (70, 6, 3, BOTH, -1),  # a group in two blocks of rows
    (20, 12, 1, BOTH, 1),  # a tile that is kept, and others that are not
    (20, 4, 2, ("hidden",), -1),  # none kept
    (10, 6, 3, (), 0),
]


@pytest.mark.parametrize(
    "rows,segments,group_size,train,cache,options,dtype",
    [
        (*EXACT[0], ALL, torch.float16),
        (*EXACT[1], {}, torch.float32),
        (*EXACT[2], ALL, torch.float32),
        *(
            pytest.param(*case, options, dtype, marks=pytest.mark.slow)
            for case in EXACT
            for options in ({}, ALL)
            for dtype in (torch.float32, torch.float16)
        ),
    ],
)
def test_exact(
    rows: int,
    segments: int,
    group_size: int,
    train: tuple[str, ...],
    cache: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Repeated targets, empty segments, confident rows, padding, rows of several offsets."""
    set_tile(monkeypatch, 32, 16)
    by_rows_up_to(monkeypatch, 10_000)
    case = make_case(rows, 19, 77, dtype=dtype, segments=segments, gap=4.0, **options)
    case = replace(case, target=case.target % 5)
    case.hidden.requires_grad_("hidden" in train)
    case.weight.requires_grad_("weight" in train)
    ours = triton(case, group_size, norms="exact", cache=cache, stats=("row_norm_sq",))
    truth = call(
        reference.linear_logprob,
        case.to(torch.float64),
        group_size,
        norms="exact",
        stats=("row_norm_sq",),
    )
    close(ours.gram, truth.gram, BOUNDS[dtype])
    torch.testing.assert_close(
        ours.row_norm_sq.cpu().double(), truth.row_norm_sq, rtol=1e-5, atol=1e-12
    )


def test_the_target_is_not_rounded_as_the_rest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry is the largest: as float16 holds it, norms are off by 2e-4 here, else by 3e-6."""
    set_tile(monkeypatch, 32, 16)
    by_rows_up_to(monkeypatch, 10_000)
    case = make_case(12, 19, 77, dtype=torch.float16, segments=6)
    case = replace(case, target=case.target % 5)
    case.weight.requires_grad_()
    truth = call(reference.linear_logprob, case.to(torch.float64), 3, norms="exact").gram
    close(triton(case, 3, norms="exact").gram, truth, 3e-5)


def with_counts(case: Case, counts: list[int]) -> Case:
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).int()
    return replace(case, segment_id=ids, num_segments=len(counts))


# Segments of no rows, of one, and of several steps of the kernel; groups that begin anywhere.
LONG = [
    ([0, 1, 17, 20, 0, 0], 3, 8, 100, torch.float16, BOTH, -1),
    ([3, 70, 0, 40, 1, 2], 1, 150, 77, torch.float32, BOTH, 1),
    ([3, 20, 0, 9, 1, 2], 2, 19, 180, torch.float16, BOTH, 1),
    ([35, 1, 0, 5, 3, 2, 9, 0], 4, 8, 77, torch.float32, ("hidden",), -1),  # sets of two
    ([2, 1, 0, 70, 3, 2, 9, 0, 3, 4], 5, 8, 77, torch.float16, (), 0),  # five in registers
    ([5, 1, 2, 30, 0, 7, 1, 1, 0, 2, 3, 4], 6, 8, 77, torch.float16, BOTH, -1),  # sets of two
]


@pytest.mark.parametrize(
    "counts,group_size,dim,vocab,dtype,train,cache,options,most",
    [
        pytest.param(*case, *rest, marks=() if i in (0, 2) and j == 0 else pytest.mark.slow)
        for i, case in enumerate(LONG)
        for j, rest in enumerate(((ALL, 0), ({}, 10)))
    ],
)
def test_long_groups_by_their_gradients(
    counts: list[int],
    group_size: int,
    dim: int,
    vocab: int,
    dtype: torch.dtype,
    train: tuple[str, ...],
    cache: int,
    options: dict[str, Any],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, and beside groups that go by rows; repeated and confident targets; tiles of E that are
    kept, and formed again."""
    set_tile(monkeypatch, 64, 128)
    by_rows_up_to(monkeypatch, most)
    case = make_case(sum(counts), dim, vocab, dtype=dtype, segments=1, gap=4.0, **options)
    case = with_counts(replace(case, target=case.target % 5), counts)
    case.hidden.requires_grad_("hidden" in train)
    case.weight.requires_grad_("weight" in train)
    ours = triton(case, group_size, norms="exact", cache=cache)
    truth = call(reference.linear_logprob, case.to(torch.float64), group_size, norms="exact")
    close(ours.gram, truth.gram, BOUNDS[dtype])


def test_long_groups_keep_the_digits_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `test_the_target_is_not_rounded_as_the_rest_is`: 2e-4 without the correction."""
    set_tile(monkeypatch, 32, 16)
    by_rows_up_to(monkeypatch, 0)
    case = make_case(12, 19, 77, dtype=torch.float16, segments=6)
    case = replace(case, target=case.target % 5)
    case.weight.requires_grad_()
    truth = call(reference.linear_logprob, case.to(torch.float64), 3, norms="exact").gram
    close(triton(case, 3, norms="exact").gram, truth, 1e-4)


@pytest.mark.parametrize("most", [0, 10_000])
def test_sure_sequences_keep_their_digits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - p of 1e-9 and less, which float16 could not hold; beside sequences that are not sure."""
    set_tile(monkeypatch, 32, 16)
    by_rows_up_to(monkeypatch, most)
    case = make_case(18, 64, 40, dtype=torch.float16, segments=1, spread=0.3)
    case = with_counts(case, [3] * 6)
    lead = case.weight[case.target].double()
    gap = 5.0 * (torch.arange(18).double() // 3).unsqueeze(1)
    hidden = case.hidden.double() + gap * lead / lead.square().sum(1, keepdim=True)
    case = replace(case, hidden=hidden.half())
    case.weight.requires_grad_()
    ours = triton(case, 1, norms="exact").gram.double().flatten().cpu()
    truth = call(reference.linear_logprob, case.to(torch.float64), 1, norms="exact").gram.flatten()
    assert float(truth[truth > 0].min()) < 1e-12 * float(truth.max())
    torch.testing.assert_close(ours, truth.detach(), rtol=1e-2, atol=0.0)


def by_rows_up_to(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Groups of at most so many rows go by products of rows."""

    def sort_groups(counts: Any, group_size: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        lengths = group_counts(counts, group_size)
        rows = tuple(i for i, n in enumerate(lengths) if 0 < n <= most)
        return rows, tuple(i for i, n in enumerate(lengths) if n > most)

    monkeypatch.setattr(triton_norms, "sort_groups", sort_groups)


@pytest.mark.parametrize(
    "vocab,width,options,dtype",
    [
        (300, 128, ALL, torch.float32),
        (200, 64, {}, torch.float16),
        (40, 128, ALL, torch.float16),
    ],
)
def test_sketch(
    vocab: int,
    width: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same buckets as torch's in float64; more buckets than ids, too."""
    set_tile(monkeypatch, width, 16)
    case = make_case(12, 8, vocab, dtype=dtype, segments=6, gap=3.0, **options)
    case.weight.requires_grad_()
    at: dict[str, Any] = {"norms": "sketch", "sketch_buckets": 64, "sketch_dim": 5}
    ours = triton(case, 3, **at)
    truth = call(linear_logprob, case.to(torch.float64), 3, backend="torch", **at)
    for name in ("gram", "sketch", "gram_error"):
        assert getattr(ours, name).shape == getattr(truth, name).shape
        # The error estimate is a difference of estimates.
        bound = 2e-6 if name != "gram_error" else 1e-4
        close(getattr(ours, name), getattr(truth, name).detach(), bound)


def test_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact Gram matrices and the sketches, as each alone."""
    set_tile(monkeypatch, 64, 16)
    case = make_case(14, 8, 100, dtype=torch.float32, segments=6)
    case.weight.requires_grad_()
    at: dict[str, Any] = {"sketch_buckets": 64, "sketch_dim": 5, "stats": ("row_logp",)}
    ours, exact = triton(case, 3, norms="both", **at), triton(case, 3, norms="exact")
    sketched = triton(case, 3, norms="sketch", **at)
    assert torch.equal(ours.gram, exact.gram) and torch.equal(ours.sketch, sketched.sketch)
    assert torch.equal(ours.logp, exact.logp) and ours.gram_error is None
    truth = call(reference.linear_logprob, case.to(torch.float64), stats=("row_logp",)).row_logp
    torch.testing.assert_close(ours.row_logp.cpu().double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norms", ["exact", "sketch", "both"])
def test_same_bits_with_and_without(norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 64, 16)
    case = make_case(10, 8, 100, dtype=torch.float32, segments=6, bias=True)
    at = case.on(TRITON_DEVICE)
    results = []
    for asked in (None, norms):
        leaves = [x.clone().requires_grad_() for x in (at.hidden, at.weight)]
        moved = replace(at, hidden=leaves[0], weight=leaves[1])
        more = {"sketch_buckets": 64} if asked else {}
        stats = _head_checks.SEGMENT_STATS + _head_checks.ROW_STATS if asked else ()
        out = triton(moved, 3, norms=asked, stats=stats, **more)
        results.append((out.logp, *torch.autograd.grad(out.logp.sum(), leaves)))
    for without, with_norms in zip(*results, strict=True):
        assert torch.equal(without, with_norms)


def test_no_rows_and_one_entry_vocabulary() -> None:
    for rows, vocab in ((0, 9), (6, 1)):
        case = make_case(rows, 3, vocab, segments=4, dtype=torch.float32)
        for norms in ("exact", "sketch"):
            out = triton(case, 2, norms=norms, stats=("row_norm_sq",))
            assert not out.gram.any() and not out.row_norm_sq.any()


def test_blocks_begin_with_groups() -> None:
    """Groups that fit share a block; a group of several blocks has each pair of them once."""
    cpu = torch.device("cpu")

    def planned(counts: tuple[int, ...], groups: tuple[int, ...]) -> dict[int, Any]:
        plan = gram_tile.plan_blocks(counts, 1, groups, torch.float16, cpu)
        return {blocks.rows: (blocks.alone, blocks.pairs.tolist()) for blocks in plan}

    found = planned((5, 8, 0, 6, 64, 130, 7), (0, 1, 2, 3, 4, 6))
    assert found[16] == (True, [[0, 13, 0, 13], [13, 19, 13, 19], [213, 220, 213, 220]])
    assert found[64] == (True, [[19, 83, 19, 83]])
    assert planned((40,), (0,)) == {
        16: (
            False,
            [[0, 16, 0, 16], [0, 16, 16, 32], [0, 16, 32, 40], [16, 32, 16, 32]]
            + [[16, 32, 32, 40], [32, 40, 32, 40]],
        )
    }
    assert planned((), ()) == {}


def test_tiles_are_shared_out_where_pairs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for tiles, pairs in ((16, 1), (16, 512), (5, 200), (1, 3), (7, 100)):
        splits, each = gram_tile._split(tiles, pairs)
        assert (splits - 1) * each < tiles <= splits * each
    assert gram_tile._split(16, 1) == (16, 1) and gram_tile._split(16, 512) == (1, 16)
