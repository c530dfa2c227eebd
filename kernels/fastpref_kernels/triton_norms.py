"""Exact Gram matrices of head gradients on the Triton backend: which blocks of rows, which tiles.

Shapes: R rows, D hidden, V vocab, S segments, g group_size. Imports triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import Groups, RowTerms
from .gram_tile import Rows, Tiles, add_gram, block_pairs
from .torch_tiles import Saved, Transform
from .triton_tiles import TritonTile, padded_tiles


def triton_gram(
    groups: Groups,
    longest: int,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    terms: RowTerms,
    saved: Saved,
    tile: TritonTile,
) -> Tensor:  # (S / g, g, g); 0 for groups of more than `longest` rows
    """The Gram matrices: from the kept tiles in one launch, from the others as they are formed
    again, which is one more product with the head for those."""
    wanted = [length <= longest for length in groups.lengths]
    out = hidden.new_zeros(groups.count * groups.group_size, groups.group_size, dtype=torch.float64)
    shape = (groups.count, groups.group_size, groups.group_size)
    pairs = torch.tensor(block_pairs(groups.lengths, wanted), dtype=torch.int32)
    if not len(pairs):
        return out.view(shape)
    pairs, device = pairs.to(hidden.device), hidden.device
    segment = groups.segment_id.to(torch.int32)
    if not all(wanted):
        use = torch.tensor(wanted, device=device)[groups.segment_id // groups.group_size]
        segment = segment.masked_fill(~use, -1)
    final, total, _, phi = saved.row_state.unbind(0)
    rows = Rows(target, segment, final, -total * phi, terms.miss / terms.total)
    hidden = hidden.contiguous()
    kept = saved.offsets.shape[0]
    if kept:
        add_gram(
            out, Tiles(saved.exps, saved.offsets, tile.width), rows, hidden, pairs, correct=True
        )
    everything = slice(0, len(target))
    for lo, _, exps, offset in padded_tiles(
        everything, hidden, weight, target, transform, saved, tile, first=kept
    ):
        again = Tiles(exps.view(exps.shape[1], -1), offset.unsqueeze(0), exps.shape[1])
        add_gram(out, again, rows, hidden, pairs, correct=lo == 0)
    return out.view(shape)
