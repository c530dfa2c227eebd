"""Norms and sketches of head gradients on the Triton backend, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _launch, gram_tile, linear_logprob, reference

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
    monkeypatch.setattr("fastpref_kernels.head_norms.longest_head_gram", lambda *_: rows)
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
    monkeypatch.setattr("fastpref_kernels.head_norms.longest_head_gram", lambda *_: 12)
    case = make_case(12, 19, 77, dtype=torch.float16, segments=6)
    case = replace(case, target=case.target % 5)
    case.weight.requires_grad_()
    truth = call(reference.linear_logprob, case.to(torch.float64), 3, norms="exact").gram
    close(triton(case, 3, norms="exact").gram, truth, 3e-5)


@pytest.mark.parametrize("dtype,cache", [(torch.float16, -1), (torch.bfloat16, 1)])
def test_long_groups_by_their_gradients(
    dtype: torch.dtype, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, 32, 16)
    # No group short in bfloat16, of which the interpreter multiplies no tiles.
    most = 0 if dtype == torch.bfloat16 else 8
    monkeypatch.setattr("fastpref_kernels.head_norms.longest_head_gram", lambda *_: most)
    case = make_case(30, 8, 77, dtype=dtype, segments=6, **ALL)
    case.weight.requires_grad_()
    ours = triton(case, 3, norms="exact", cache=cache)
    truth = call(reference.linear_logprob, case.to(torch.float64), 3, norms="exact")
    close(ours.gram, truth.gram, BOUNDS[dtype])


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


@pytest.mark.parametrize("norms", ["exact", "sketch"])
def test_same_bits_with_and_without(norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 64, 16)
    case = make_case(10, 8, 100, dtype=torch.float32, segments=6, bias=True)
    at = case.on(TRITON_DEVICE)
    results = []
    for asked in (None, norms):
        leaves = [x.clone().requires_grad_() for x in (at.hidden, at.weight)]
        moved = replace(at, hidden=leaves[0], weight=leaves[1])
        more = {"sketch_buckets": 64} if asked else {}
        stats = _launch.SEGMENT_STATS + _launch.ROW_STATS if asked else ()
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


def test_pairs_of_blocks() -> None:
    """Each pair of blocks that share a wanted group, once; block 1 holds the ends of two groups."""
    assert gram_tile.block_pairs([10, 100, 0, 200], [True, True, True, False]) == [
        (0, 0),
        (0, 1),
        (1, 1),
    ]
    assert gram_tile.block_pairs([64, 64], [True, True]) == [(0, 0), (1, 1)]
    assert gram_tile.block_pairs([], []) == []


def test_tiles_are_shared_out_where_pairs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for tiles, pairs in ((16, 1), (16, 512), (5, 200), (1, 3), (7, 100)):
        splits, each = gram_tile._split(tiles, pairs)
        assert (splits - 1) * each < tiles <= splits * each
    assert gram_tile._split(16, 1) == (16, 1) and gram_tile._split(16, 512) == (1, 16)
