"""Norms of embedding gradients of every pair, and what a head with the same weight adds to them.

Shapes: T rows (input tokens), S segments, g group_size, D hidden, R scored rows, U ids per group.
Conventions of results and groups: `pair_norms`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _norm_checks
from ._launch import surroundings
from .segment import add_rows_, segment_sum
from .segment_products import multiply, wide_dtype
from .spans import group_counts, row_counts, starts

COLUMNS = 1 << 21  # numbers of one table of sums that stand in memory at a time


def embedding_norms(
    token_id: Tensor,  # (T,) int32 | int64: a token's id, or its position
    dy: Tensor,  # (T, D) gradient of the embedding's output
    segment_id: Tensor,  # (T,) non-decreasing
    *,
    num_segments: int,
    scale: float = 1.0,
    padding_idx: int | None = None,
    group_size: int | None = None,
) -> Tensor:  # (S,) | (S / g, g, g)
    """Squared norm of sum_t scale dy_t at row token_id_t: repeated tokens add before the square.

    Learned positions are an embedding of positions. `scale`: what the embedding's output is
    multiplied by before dy arrives (Gemma: sqrt(D), as its dtype rounds it). `padding_idx`: the
    layer's own; torch gives that row no gradient.

    Memory  g T numbers for a tile of columns, at most about COLUMNS
    """
    name = "embedding_norms"
    _norm_checks.check_rows(name, ("dy", dy))
    _norm_checks.check_matrix(name, "dy", dy)
    _norm_checks.check_ids(name, "token_id", token_id, "dy", dy)
    _norm_checks.check_ids(name, "segment_id", segment_id, "dy", dy)
    size = _norm_checks.check_segments(name, dy.shape[0], num_segments, group_size, None)
    _norm_checks.check_scale(name, scale)
    gram = _embedding_gram_op(token_id, dy.detach(), segment_id, num_segments, size, padding_idx)
    gram = gram * (scale * scale)
    return gram.flatten() if group_size is None else gram


class UniqueIds(NamedTuple):
    """The ids that occur among the tokens of every group of segments."""

    ids: Tensor  # (S / g, U) int64 ascending, filled up with -1
    column: Tensor  # (T,) int64: where a token's id stands in its group's row of `ids`; -1: padding


def unique_ids(
    token_id: Tensor,  # (T,)
    segment_id: Tensor,  # (T,) non-decreasing
    *,
    num_segments: int,
    padding_idx: int | None = None,
    group_size: int | None = None,
) -> UniqueIds:
    """Ids of every group's tokens, each once: where `tied_norms` needs the head's gradient.

    `padding_idx` as in `embedding_norms`. Reads the device once: U is the most that any group has.
    """
    name = "unique_ids"
    _norm_checks.check_ids(name, "token_id", token_id, "segment_id", segment_id)
    size = _norm_checks.check_segments(name, len(segment_id), num_segments, group_size, None)
    row_counts(segment_id, num_segments, name=name)
    groups = num_segments // size
    group = segment_id.to(torch.int64) // size
    slot = _slots(token_id, group)
    # Slots count through all groups; a column counts from its group's first slot.
    base = slot.new_full((groups,), len(slot)).scatter_reduce_(0, group, slot, "amin")
    column = slot - base[group]
    width = int(column.max()) + 1 if len(column) else 0
    ids = token_id.new_full((groups, width), -1, dtype=torch.int64)
    ids[group, column] = token_id.to(torch.int64)
    if padding_idx is not None:
        column = column.masked_fill(token_id == padding_idx, -1)
    return UniqueIds(ids, column)


def tied_norms(
    column: Tensor,  # (T,) of `unique_ids`
    dy: Tensor,  # (T, D) gradient of the embedding's output
    segment_id: Tensor,  # (T,) non-decreasing
    hidden: Tensor,  # (R, D) what the head is applied to
    dz: Tensor,  # (R, U) gradient of the row's logits at its group's ids
    row_segment: Tensor,  # (R,) non-decreasing
    *,
    num_segments: int,
    scale: float = 1.0,
    group_size: int | None = None,
) -> Tensor:  # (S,) | (S / g, g, g)
    """What a weight that is embedding and head at once adds to the sum of both squared norms.

    The gradient is E + H, so its squared norm has 2 <E, H> beside the embedding's and the head's
    own:

        <E_a, H_b> = sum over tokens t of a, rows r of b of  scale dz_r[id_t] (dy_t . h_r)

    and the result is <E_a, H_b> + <H_a, E_b>. It may be negative.
    """
    name = "tied_norms"
    _norm_checks.check_rows(name, ("dy", dy))
    _norm_checks.check_matrix(name, "dy", dy)
    _norm_checks.check_rows(name, ("hidden", hidden), ("dz", dz))
    _norm_checks.check_matrix(name, "hidden", hidden, dy.shape[1])
    _norm_checks.check_matrix(name, "dz", dz)
    _norm_checks.check_ids(name, "column", column, "dy", dy)
    _norm_checks.check_ids(name, "segment_id", segment_id, "dy", dy)
    _norm_checks.check_ids(name, "row_segment", row_segment, "hidden", hidden)
    _norm_checks.check_device(name, "dy", dy, "hidden", hidden)
    size = _norm_checks.check_segments(name, dy.shape[0], num_segments, group_size, None)
    _norm_checks.check_scale(name, scale)
    gram = _tied_gram_op(
        column,
        dy.detach(),
        segment_id,
        hidden.detach(),
        dz.detach(),
        row_segment,
        num_segments,
        size,
    )
    gram = gram * scale
    return gram.flatten() if group_size is None else gram


def _slots(token_id: Tensor, group: Tensor) -> Tensor:
    """(T,) number of every token's (group, id) in ascending order of both, without a read of the
    device."""
    ids = token_id.to(torch.int64)
    order = ids.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    ids_sorted, group_sorted = ids[order], group[order]
    first = torch.ones_like(ids_sorted, dtype=torch.bool)
    first[1:] = (ids_sorted[1:] != ids_sorted[:-1]) | (group_sorted[1:] != group_sorted[:-1])
    slot = torch.empty_like(ids)
    slot[order] = first.to(torch.int64).cumsum(0) - 1
    return slot


@torch.library.custom_op(
    "fastpref::embedding_gram",
    mutates_args=(),
    schema="(Tensor token_id, Tensor dy, Tensor segment_id, SymInt segments, int group_size, "
    "int? padding_idx) -> Tensor",
)
def _embedding_gram_op(
    token_id: Tensor,
    dy: Tensor,
    segment_id: Tensor,
    segments: int,
    group_size: int,
    padding_idx: int | None,
) -> Tensor:
    if not dy.is_cuda:
        row_counts(segment_id, segments, name="embedding_norms")
    dtype, rows = wide_dtype(dy), dy.shape[0]
    ids = segment_id.to(torch.int64)
    group, part = ids // group_size, ids % group_size
    slot = _slots(token_id, group)
    table_row = slot * group_size + part
    out = dy.new_zeros(group_size, group_size, rows, dtype=dtype)  # per slot
    step = max(COLUMNS // max(rows * group_size, 1), 1)
    for i in range(0, dy.shape[1], step):
        columns = dy[:, i : i + step].to(dtype)
        if padding_idx is not None:
            columns = columns.masked_fill((token_id == padding_idx).unsqueeze(1), 0.0)
        table = columns.new_zeros(rows * group_size, columns.shape[1])
        table = add_rows_(table, table_row, columns).unflatten(0, (rows, group_size))
        for a in range(group_size):
            for b in range(a + 1):
                out[a, b] += (table[:, a] * table[:, b]).sum(-1)
    # The group of a slot is that of its first token; unused slots come last and hold 0.
    owner = group.new_zeros(rows)
    owner[slot] = group
    owner = owner.cummax(0).values if rows else owner
    total = segment_sum(out.flatten(0, 1), owner, segments // group_size)
    total = total.unflatten(0, (group_size, group_size)).permute(2, 0, 1)
    lower = total.tril()
    return lower + total.tril(-1).transpose(1, 2)


@_embedding_gram_op.register_fake
def _embedding_gram_fake(
    token_id: Tensor, dy: Tensor, segment_id: Tensor, segments: int, group_size: int, *_: object
) -> Tensor:
    shape = (segments // group_size, group_size, group_size)
    return dy.new_empty(shape, dtype=wide_dtype(dy))


@torch.library.custom_op(
    "fastpref::tied_gram",
    mutates_args=(),
    schema="(Tensor column, Tensor dy, Tensor segment_id, Tensor hidden, Tensor dz, "
    "Tensor row_segment, SymInt segments, int group_size) -> Tensor",
)
def _tied_gram_op(
    column: Tensor,
    dy: Tensor,
    segment_id: Tensor,
    hidden: Tensor,
    dz: Tensor,
    row_segment: Tensor,
    segments: int,
    group_size: int,
) -> Tensor:
    if not dy.is_cuda and len(column) and int(column.max()) >= dz.shape[1]:
        token = int(column.argmax())
        raise ValueError(
            f"tied_norms: column[{token}]={int(column[token])} but dz has {dz.shape[1]} columns. "
            "Give dz at all ids of `unique_ids` of the same tokens and groups."
        )
    dtype, groups = wide_dtype(dy, hidden, dz), segments // group_size
    tokens = starts(group_counts(row_counts(segment_id, segments, name="tied_norms"), group_size))
    rows = starts(group_counts(row_counts(row_segment, segments, name="tied_norms"), group_size))
    out = dy.new_zeros(groups, group_size, group_size, dtype=torch.float64)
    parts = torch.arange(group_size, device=dy.device)
    with surroundings(dy.device):
        for group in range(groups):
            t, r = slice(*tokens[group : group + 2]), slice(*rows[group : group + 2])
            if t.start == t.stop or r.start == r.stop:
                continue
            dots = multiply(dy[t], hidden[r].t(), dtype)
            own = column[t].to(torch.int64)
            dots *= dz[r].to(dtype).index_select(1, own.clamp(min=0)).t()
            dots.masked_fill_((own < 0).unsqueeze(1), 0.0)
            left = (segment_id[t].unsqueeze(1) % group_size == parts).to(torch.float64)
            right = (row_segment[r].unsqueeze(1) % group_size == parts).to(torch.float64)
            cross = left.t() @ (dots.double() @ right)
            out[group] = cross + cross.t()
    return out.to(dtype)


@_tied_gram_op.register_fake
def _tied_gram_fake(
    column: Tensor,
    dy: Tensor,
    segment_id: Tensor,
    hidden: Tensor,
    dz: Tensor,
    row_segment: Tensor,
    segments: int,
    group_size: int,
) -> Tensor:
    shape = (segments // group_size, group_size, group_size)
    return dy.new_empty(shape, dtype=wide_dtype(dy, hidden, dz))
