"""What the ops of `linear_logprob` do in a call: tiles, what of them is kept, what gradients."""

from __future__ import annotations

from typing import NamedTuple

from . import _launch
from ._head_checks import Described


class Plan(NamedTuple):
    """What the ops do, as a list of integers: every argument of a custom op costs time a call."""

    width: int  # vocabulary entries per tile
    kept: int  # tiles of E kept for the backward
    group_size: int  # 0: no Gram matrices
    need_hidden: int
    need_weight: int
    need_bias: int
    warps: int = 0  # of `TritonTile`; 0: the torch backend
    row_block: int = 0


def make_plan(
    hidden: Described,
    weight: Described,
    bias: Described | None,
    cache: int,
    group_size: int,
    triton: bool,
) -> Plan:
    """Tile width, tiles to keep (none with weight and bias frozen) and the gradients wanted."""
    vocab = weight.shape[0]
    head = (hidden.shape[1], vocab, hidden.dtype)
    warps = row_block = 0
    if triton:
        width, warps, row_block = _launch.triton_tile(*head, _launch.arch_of(hidden.device))
    else:
        width = _launch.tile_width(*head)
    need_weight = weight.wants_grad
    need_bias = bias is not None and bias.wants_grad
    count = -(-vocab // width) if need_weight or need_bias else 0
    kept = count if cache < 0 else min(cache, count)
    return Plan(
        width=width,
        kept=kept,
        group_size=group_size,
        need_hidden=int(hidden.wants_grad),
        need_weight=int(need_weight),
        need_bias=int(need_bias),
        warps=warps,
        row_block=row_block,
    )
