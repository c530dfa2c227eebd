"""Segment sums and row additions."""

from __future__ import annotations

import torch
from fastpref_kernels.segment import add_rows_, segment_expand, segment_sum


def test_sums_with_empty_segments_and_leading_dimensions() -> None:
    ids = torch.tensor([1, 1, 3, 4, 4, 4], dtype=torch.int32)
    rows = torch.arange(12.0).view(2, 6)
    expected = torch.tensor([[0.0, 1, 0, 2, 12, 0], [0.0, 13, 0, 8, 30, 0]])
    assert torch.equal(segment_sum(rows, ids, 6), expected)
    assert torch.equal(segment_sum(rows[0], None, 6), rows[0])


def test_long_segment_is_rounded_once() -> None:
    """100 000 addends of one sign: a float32 running sum is off in the fourth digit or so."""
    rows = torch.full((100_000,), -0.1)
    total = segment_sum(rows, torch.zeros(100_000, dtype=torch.int32), 1)
    assert float(total) == float((rows.double().sum()).float())


def test_expand_is_the_adjoint_of_sum() -> None:
    ids = torch.tensor([0, 0, 2, 2, 2], dtype=torch.int32)
    rows, grad = torch.randn(5).double(), torch.randn(3).double()
    left = (segment_sum(rows, ids, 3) * grad).sum()
    torch.testing.assert_close(left, (rows * segment_expand(grad, ids)).sum())


def test_rows_are_added_in_their_order() -> None:
    """Large terms that cancel show the order of addition."""
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    index = torch.zeros(4, dtype=torch.int64)
    expected = torch.zeros(1, 1)
    for row in rows:
        expected += row
    assert torch.equal(add_rows_(torch.zeros(1, 1), index, rows), expected)
