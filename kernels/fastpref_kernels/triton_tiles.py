"""The Triton backend of `linear_logprob`: torch_tiles.py's two functions, one kernel a tile.

Shapes: R rows, D hidden, V vocab, C tile width, B rows of a block. Tiles are (B, C), row by row;
their rows are padded to a multiple of 16 entries. Formulas, memory, numerics: kernels/README.md.
Imports triton: import it where the backend is chosen, never from `__init__`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tile_calls as calls
from ._launch import TritonTile, padded
from .count_sketch import CountSketch, SquareSums
from .row_sums import ORDER_STATS, RowSums
from .tile_calls import Span
from .torch_tiles import Saved, Transform


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    *,
    tile: TritonTile,
    kept: int,
    need_hidden: bool,
    stats: frozenset[str],
    riders: Sequence[CountSketch | SquareSums] = (),
) -> tuple[RowSums, Saved]:
    """One pass over the vocabulary; the first `kept` tiles of E are kept for the backward.

    `Saved.exps` holds them one after the other, each (R, C), with -S' phi at the target;
    `Saved.row_state` is o, S', a and phi; `Saved.hidden_grad` is U, of which the backward makes the
    gradient in one go.
    """
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    exps = hidden.new_empty(min(kept * tile.width, padded(vocab)), rows)
    offsets = hidden.new_empty(kept, rows, dtype=torch.float32)
    state = calls.new_state(hidden)
    mixed = hidden.new_empty(rows if need_hidden else 0, dim, dtype=torch.float32)
    hidden, transform = hidden.contiguous(), _with_padded_bias(transform)
    carried = calls.Carried.of(riders, hidden, vocab, tile)
    scratch = _Scratch(hidden, tile, vocab)
    exps_RC = exps  # holds nothing, and stays so where only sums are wanted
    store = bool(kept) or need_hidden
    for i, (lo, hi) in enumerate(bounds(vocab, tile.width)):
        if store:
            exps_RC = kept_tile(exps, lo, hi) if i < kept else scratch.exps(hi - lo, rows)
        for first, end in bounds(rows, tile.row_block):
            z, part = scratch.logits(hi - lo, end - first), slice(first, end)
            e = exps_RC[part] if i < kept else exps_RC[: end - first]
            calls.product(hidden[part], weight[lo:hi].t(), z[:, : hi - lo])
            span = Span(first, lo, hi - lo, vocab)
            offset = offsets[i] if i < kept else calls.row(state, "offset")
            calls.exp_tile(
                z,
                e,
                target,
                transform,
                state,
                offset,
                span,
                tile,
                store=store,
                stats=stats,
                carried=carried,
            )
            if need_hidden:
                calls.mix(mixed[part], state, span, e[:, : hi - lo], weight[lo:hi])
    del scratch
    carried.hand_over(riders, state)
    sums, phi = _row_sums(state, stats), calls.row(state, "phi")
    if kept:
        own = -sums.total * phi
        calls.own_entries(exps, offsets, target, sums.maximum, own, tile)
    odds = sums.log_odds(may_be_certain=True)
    return sums, Saved(torch.stack([sums.maximum, sums.total, odds, phi]), mixed, exps, offsets)


def backward(
    row_grad: Tensor,  # (R,) gradient of every row's log-prob
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    saved: Saved,
    *,
    tile: TritonTile,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    hidden, transform = hidden.contiguous(), _with_padded_bias(transform)
    _, total, log_odds, phi = saved.row_state.unbind(0)
    scale = row_grad.to(torch.float32) * log_odds.sigmoid()
    if transform.slope != 1.0:
        scale.mul_(transform.slope)
    vocab, dim = weight.shape
    bias_dtype = weight.dtype if transform.bias is None else transform.bias.dtype
    grad_weight = weight.new_empty(vocab if need_weight else 0, dim)
    grad_bias = weight.new_zeros(vocab if need_bias else 0, dtype=torch.float32)
    if need_weight or need_bias:
        # S' = 0 where nothing but the target is possible; scale is then 0.
        factor = -scale / torch.where(total == 0.0, 1.0, total)
        _weight_backward_(
            grad_weight, grad_bias, factor, hidden, weight, target, transform, saved, tile
        )
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    if need_hidden:
        calls.hidden_grad(saved.hidden_grad, grad_hidden, weight, target, total, phi, scale)
    return grad_hidden, grad_weight, grad_bias.to(bias_dtype)


def _weight_backward_(
    grad_weight: Tensor,  # (V, D) written, or (0, D)
    grad_bias: Tensor,  # (V,) zeros, added to, or (0,)
    factor: Tensor,  # (R,) what stands before E of a row, relative to its final offset
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    saved: Saved,
    tile: TritonTile,
) -> None:
    vocab, rows = weight.shape[0], hidden.shape[0]
    offset, total, _, phi = saved.row_state.unbind(0)
    kept, own = saved.offsets.shape[0], -total * phi
    need_weight, need_bias = bool(len(grad_weight)), bool(len(grad_bias))
    scratch = _Scratch(hidden, tile, vocab)
    # A row's factor g (1 - p) / S' may be far below what float16 holds: there the largest one is
    # brought to about 1 by a power of two, and the product multiplied by it.
    unit = None
    if need_weight and rows and hidden.dtype == torch.float16:
        unit = power_below((factor.abs() * largest_entries(hidden)).amax())
    scaled = factor if unit is None else factor / unit
    operand = ScaledRows(hidden, scaled, offset) if need_weight else None
    bias_unit = power_below(factor.abs().amax()) if rows and hidden.dtype == torch.float16 else None
    if not rows:
        grad_weight.zero_()
    for i, (lo, hi) in enumerate(bounds(vocab, tile.width)):
        now = saved.offsets[i] if i < kept else offset
        total_CD = _RoundedOnce(grad_weight[lo:hi], scratch)
        if operand is not None:
            operand.turn_to(now)
        for first, end in bounds(rows, rows if i < kept else tile.row_block):
            if i < kept:
                e = kept_tile(saved.exps, lo, hi)
            else:
                z, e = scratch.logits(hi - lo, end - first), scratch.exps(hi - lo, end - first)
                calls.product(hidden[first:end], weight[lo:hi].t(), z[:, : hi - lo])
                span = Span(first, lo, hi - lo, vocab)
                calls.exp_again(z, e, target, transform, offset, own, span, tile)
            e = e[:, : hi - lo].t()
            if operand is not None:
                total_CD.add(e, operand.rows[first:end], unit, last=end == rows)
            if need_bias:
                column = (factor * (now - offset).exp())[first:end]
                grad_bias[lo:hi] += _matrix_vector(e, column, bias_unit)


def padded_tiles(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    saved: Saved,
    tile: TritonTile,
    first: int,
) -> Iterator[tuple[int, Tensor]]:
    """(first id, F (R, C) with padded rows) of the tiles from `first` on, formed again relative to
    the final offsets; each is gone with the next."""
    hidden, transform = hidden.contiguous(), _with_padded_bias(transform)
    offset, total, _, phi = saved.row_state.unbind(0)
    own, count, vocab = -total * phi, hidden.shape[0], weight.shape[0]
    scratch = _Scratch(hidden, tile, vocab, count)
    for lo, hi in bounds(vocab, tile.width)[first:]:
        exps = scratch.exps(hi - lo, count)
        for start, end in bounds(count, tile.row_block):
            z = scratch.logits(hi - lo, end - start)
            calls.product(hidden[start:end], weight[lo:hi].t(), z[:, : hi - lo])
            span = Span(start, lo, hi - lo, vocab)
            calls.exp_again(z, exps[start:end], target, transform, offset, own, span, tile)
        yield lo, exps


def bounds(size: int, step: int) -> list[tuple[int, int]]:
    """[(0, step), (step, 2 step), ...] up to size; nothing for size 0."""
    return [(lo, min(lo + step, size)) for lo in range(0, size, step)] if size else []


class _Scratch:
    """One tile of logits, one of E and one of a wide gradient; each allocated when first asked for,
    then used again and again."""

    def __init__(
        self, hidden: Tensor, tile: TritonTile, vocab: int, exps_rows: int | None = None
    ) -> None:
        rows, width = hidden.shape[0], min(tile.width, padded(vocab))
        self._hidden = hidden
        self._logits_size = min(rows, tile.row_block) * width
        self._exps_size = self._logits_size if exps_rows is None else exps_rows * width
        self._wide_size = width * hidden.shape[1]
        self._logits: Tensor | None = None
        self._exps: Tensor | None = None
        self._wide: Tensor | None = None

    def logits(self, width: int, rows: int) -> Tensor:
        """(rows, width, padded) float32."""
        if self._logits is None:
            self._logits = self._hidden.new_empty(self._logits_size, dtype=torch.float32)
        return self._logits[: rows * padded(width)].view(rows, padded(width))

    def exps(self, width: int, rows: int) -> Tensor:
        """(rows, width, padded), at most as many rows as there is room for."""
        if self._exps is None:
            self._exps = self._hidden.new_empty(self._exps_size)
        rows = min(rows, self._exps_size // padded(width))
        return self._exps[: rows * padded(width)].view(rows, padded(width))

    def wide(self, width: int) -> Tensor:
        """(width, D) float32."""
        if self._wide is None:
            self._wide = self._hidden.new_empty(self._wide_size, dtype=torch.float32)
        return self._wide[: width * self._hidden.shape[1]].view(width, -1)


class ScaledRows:
    """(R, D) `rows`: hidden times factor exp(offset of a tile - final offset)."""

    def __init__(self, hidden: Tensor, factor: Tensor, final: Tensor) -> None:
        self.rows = torch.empty_like(hidden)
        self._hidden, self._factor, self._final = hidden, factor, final
        self._stands_for: Tensor | None = None

    def turn_to(self, offset: Tensor) -> None:
        """Rows whose offset differs from the one of the tile before are written anew."""
        calls.scale_rows(
            self._hidden, self.rows, self._factor, offset, self._stands_for, self._final
        )
        self._stands_for = offset


class _RoundedOnce:
    """A sum of products over blocks of rows: in float32, rounded into `out` at the end. One product
    is rounded by itself, straight into `out`."""

    def __init__(self, out: Tensor, scratch: _Scratch) -> None:
        self._out, self._scratch = out, scratch
        self._sum: Tensor | None = None

    def add(self, a: Tensor, b: Tensor, unit: Tensor | None, *, last: bool) -> None:
        out = self._out
        if self._sum is None:
            if last and unit is None:
                calls.rounded_product(a, b, out)
                return
            wide = out.dtype == torch.float32
            self._sum = calls.product(a, b, out if wide else self._scratch.wide(len(out)))
        else:
            calls.add_product(self._sum, a, b)
        if last and unit is not None:
            torch.mul(self._sum, unit, out=out)
        elif last and self._sum is not out:
            out.copy_(self._sum)


def power_below(sizes: Tensor) -> Tensor:
    """Powers of two at or below `sizes` (tensors: no wait for the device)."""
    return torch.exp2(torch.floor(torch.log2(sizes.clamp(min=torch.finfo(torch.float32).tiny))))


def largest_entries(x: Tensor) -> Tensor:
    """(R,) largest absolute entry of every row, float32."""
    return torch.linalg.vector_norm(x, torch.inf, dim=1, dtype=torch.float32)


def _matrix_vector(a: Tensor, x: Tensor, unit: Tensor | None) -> Tensor:
    """a @ x in float32, for a (C, R) of a half type too: x as the sum of two rounded columns."""
    x = x if unit is None else x / unit
    columns = x.to(a.dtype).unsqueeze(1)
    if a.dtype != torch.float32:
        rest = x - columns.squeeze(1).to(torch.float32)
        columns = torch.cat([columns, rest.to(a.dtype).unsqueeze(1)], 1)
    out = calls.product(a, columns, x.new_empty(a.shape[0], columns.shape[1])).sum(1)
    return out if unit is None else out * unit


def _with_padded_bias(transform: Transform) -> Transform:
    if transform.bias is None:
        return transform
    missing = padded(len(transform.bias)) - len(transform.bias)
    bias = F.pad(transform.bias, (0, missing)) if missing else transform.bias.contiguous()
    return replace(transform, bias=bias)


def kept_tile(exps: Tensor, lo: int, hi: int) -> Tensor:
    """(R, C, padded) of the kept tiles, which lie one after the other."""
    rows, width = exps.shape[1], padded(hi - lo)
    return exps.view(-1)[lo * rows : (lo + width) * rows].view(rows, width)


def _row_sums(state: Tensor, stats: frozenset[str]) -> RowSums:
    sums = RowSums(state.dtype, stats)
    sums.maximum, sums.total = calls.row(state, "offset"), calls.row(state, "total")
    sums.target_logit, sums.top = calls.row(state, "target"), sums.maximum
    if stats & ORDER_STATS:
        sums.top, sums.rest = calls.row(state, "top"), calls.row(state, "rest")
        sums.argmax = calls.row(state, "argmax").to(torch.int64)
    sums.square, sums.plogp = calls.row(state, "square"), calls.row(state, "plogp")
    sums.logit = calls.row(state, "logit")
    return sums
