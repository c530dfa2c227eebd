"""Where the rows of every segment lie, read on the host once, and how they are cut into blocks.

Shapes: T rows, S segments, g group_size. A *span* is a range of rows that one product covers: some
neighbouring groups that are small, or one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import accumulate
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Rows lo .. hi - 1, which are all rows of the groups first .. last - 1."""

    first: int
    last: int
    lo: int
    hi: int


def row_counts(segment_id: Tensor, num_segments: int, *, name: str = "row_counts") -> list[int]:
    """Rows of every segment (S,), on the host. `segment_id` (T,) int32 | int64, non-decreasing.

    One read of the device: do it once a batch and hand the result to every call as `counts`.

    Errors  ValueError with the first id that is out of order or out of 0 .. S - 1. `name` is what
            the message calls the caller.
    """
    if segment_id.dim() != 1 or segment_id.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: expected segment_id (T,) int32 or int64, got {tuple(segment_id.shape)} "
            f"{segment_id.dtype}."
        )
    if not isinstance(num_segments, int) or num_segments < 0:
        raise ValueError(f"{name}: num_segments must be >= 0 and an int, got {num_segments!r}.")
    if not segment_id.numel():
        return [0] * num_segments
    ids = segment_id.to(torch.int64)
    order = (ids[1:] < ids[:-1]).any().to(torch.int64).unsqueeze(0)
    inside = ids.clamp(0, max(num_segments - 1, 0))
    zeros = ids.new_zeros(max(num_segments, 1))
    counted = zeros.scatter_add_(0, inside, torch.ones_like(ids))
    wrong, first, last, *counts = torch.cat([order, ids[:1], ids[-1:], counted]).tolist()
    if wrong:
        row = int((ids[1:] < ids[:-1]).nonzero()[0]) + 1
        raise ValueError(
            f"{name}: segment_id must be non-decreasing, but segment_id[{row}]={int(ids[row])} "
            f"follows {int(ids[row - 1])}. Sort the rows first: order = segment_id.argsort("
            "stable=True), then x[order], dy[order], segment_id[order]."
        )
    if first < 0 or last >= num_segments:
        row, value = (0, first) if first < 0 else (len(ids) - 1, last)
        raise ValueError(
            f"{name}: segment_id[{row}]={value} is outside 0..{num_segments - 1} "
            f"(num_segments={num_segments})."
        )
    return counts


def starts(counts: Sequence[int]) -> list[int]:
    """First row of every segment, and the number of rows: S + 1 integers."""
    return [0, *accumulate(counts)]


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """As an int32 tensor; on CUDA from pinned memory, or the copy would wait for all that the
    device still has to do."""
    found = torch.tensor(numbers, dtype=torch.int32, device="cpu")
    if device.type != "cuda":
        return found.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "fastpref_kernels: a CUDA graph is being captured, but the tables that go with these "
            "rows of segments are not on the device. Call once with the same counts before."
        )
    return found.pin_memory().to(device, non_blocking=True)


_captured: list[Any] = []  # tables whose addresses a CUDA graph holds


def kept_tables(build: Callable[P, T]) -> Callable[P, T]:
    """`build`, which makes tables on the device, with its last results kept: every layer of a batch
    asks for the same, and a CUDA graph must not replay a copy from memory of the host."""
    cached = lru_cache(maxsize=32)(build)

    @wraps(build)
    def find(*key: P.args, **named: P.kwargs) -> T:
        found: T = cached(*key, **named)  # type: ignore[arg-type]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            _captured.append(found)
        return found

    return find


def group_counts(counts: Sequence[int], group_size: int) -> list[int]:
    """Rows of every group of `group_size` neighbouring segments."""
    if group_size == 1:
        return list(counts)
    return [sum(counts[i : i + group_size]) for i in range(0, len(counts), group_size)]


def cut(rows: Sequence[int], first: int, last: int, most: int) -> list[Span]:
    """Spans over the groups first .. last - 1 with `rows[group]` rows each; empty groups in none.

    Neighbours share a span while they have at most `most` rows together.
    """
    bounds = starts(rows)
    spans: list[Span] = []
    for group in range(first, last):
        lo, hi = bounds[group], bounds[group + 1]
        if lo == hi:
            continue
        if spans and hi - spans[-1].lo <= most:
            spans[-1] = Span(spans[-1].first, group + 1, spans[-1].lo, hi)
        else:
            spans.append(Span(group, group + 1, lo, hi))
    return spans


def runs(rows: Sequence[int], longest: int) -> list[tuple[bool, int, int]]:
    """(short, first group, last group) of the runs of neighbours with at most `longest` rows each,
    and of the longer ones, which come one by one."""
    found: list[tuple[bool, int, int]] = []
    for group, count in enumerate(rows):
        short = count <= longest
        if short and found and found[-1][0]:
            found[-1] = (True, found[-1][1], group + 1)
        else:
            found.append((short, group, group + 1))
    return found
