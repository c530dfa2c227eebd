"""The plain-torch backend of `linear_logprob`: a loop over vocabulary tiles around matrix products.

Shapes: R rows, D hidden, V vocab, N tiles, C tile width. Kept exponentials are transposed, (V, R),
so that a tile is one contiguous block of rows. Formulas, memory and numerics: kernels/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .row_sums import FLOOR, RowSums, Tiles, exp_
from .segment import add_rows_


@dataclass(frozen=True)
class Transform:
    """z = softcap(s (a + bias)) / temperature: bias, scale, softcap, temperature, TRL's order."""

    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    temperature: float

    @property
    def slope(self) -> float:
        """k = s / temperature: dz/da where the softcap does not bend."""
        return self.logit_scale / self.temperature

    def apply_(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Raw logits to z in place."""
        if bias is not None:
            logits.add_(bias)
        if self.softcap is not None:
            logits.mul_(self.logit_scale / self.softcap).tanh_()
            logits.mul_(self.softcap / self.temperature)
        elif self.slope != 1.0:
            logits.mul_(self.slope)
        return logits

    def bend(self, z: Tensor) -> Tensor | None:
        """phi = (dz/da) / k = 1 - tanh^2 from z (at an entry taken out, 0); None (= 1) without a
        softcap."""
        if self.softcap is None:
            return None
        bent = (z * (self.temperature / self.softcap)).clamp_(min=-1.0)
        return torch.addcmul(bent.new_ones(()), bent, bent, value=-1)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into out, accumulated and stored in out's dtype (float32 for half operands)."""
    if a.is_cuda and a.dtype == b.dtype != out.dtype:
        return out.copy_(torch.mm(a, b, out_dtype=out.dtype))
    return torch.mm(_as(a, out.dtype), _as(b, out.dtype), out=out)


class Rider(Protocol):
    """What is summed up over the tiles beside the op's own sums: for norms and sketches."""

    def add_tile(self, exps: Tensor, shrink: Tensor | None, tiles: Tiles, i: int) -> None:
        """exps (C, R): F of tile i, about 0 at the targets, relative to the running maximum.

        What was summed before shrinks by `shrink` (R,), exp(old - new maximum); None at first.
        """


@dataclass(frozen=True)
class Saved:
    """What the backward needs, and nothing of it is written by the backward.

    row_state    (3 | 4, R) the non-target maximum, the non-target sum S', a = log((1 - p) / p), and
                 with a softcap phi = (dz/da) / k at the target
    hidden_grad  (R, D) d logp / d hidden over k (1 - p); (0, D) where the backward forms it of E
    exps         (kept vocabulary, R) E, with a softcap F. All of it in the accumulation dtype: with
                 -S' phi at the target, so that both gradients are products with it (otherwise,
                 relative to an earlier maximum, that entry may overflow)
    offsets      (kept tiles, R) the maximum that each kept tile is relative to; none where that is
                 the final one
    """

    row_state: Tensor
    hidden_grad: Tensor
    exps: Tensor
    offsets: Tensor


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    *,
    width: int,
    kept: int,
    need_hidden: bool,
    stats: frozenset[str],
    riders: Sequence[Rider] = (),
) -> tuple[RowSums, Saved]:
    """One pass over the vocabulary; the first `kept` tiles of E are kept for the backward."""
    dtype = accumulate_dtype(hidden.dtype)
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    tiles = Tiles.make(target, vocab, width)
    sums = RowSums(dtype, stats)
    exps = hidden.new_empty(min(kept * width, vocab), rows)
    whole, in_place = holds_all(hidden.dtype, exps.shape[0], vocab), hidden.dtype == dtype
    scratch = exps if whole else hidden.new_empty(width, rows, dtype=dtype)
    mixing = need_hidden and not whole
    mixed = hidden.new_empty(rows if mixing else 0, dim, dtype=dtype)
    operand = _wide_on_cpu(hidden, dtype).t()
    maxima = []  # that the tiles are relative to
    for i, (lo, hi) in enumerate(tiles.bounds):
        weight_C = _wide_on_cpu(weight[lo:hi], dtype)
        z = exps[lo:hi] if in_place and i < kept else scratch[: hi - lo]
        product(weight_C, operand, z)
        transform.apply_(z, _column(transform.bias, lo, hi))
        shrink = sums.rise(z, tiles, i, transform.bias is not None)
        maxima.append(sums.maximum)
        bend = transform.bend(z)
        sums.add(z, i == 0)
        if bend is not None:
            z.mul_(bend)
        if i < kept and not in_place:
            exps[lo:hi].copy_(z)
        if mixing:
            rounded = z if in_place or not z.is_cuda else z.to(hidden.dtype)
            _accumulate_(mixed, shrink, rounded.t(), weight_C)
        for rider in riders:
            rider.add_tile(z, shrink, tiles, i)
    odds = sums.log_odds(vocab == 1 or transform.bias is not None)
    phi = transform.bend(sums.target_logit)
    if mixing:
        target_rows = weight.index_select(0, target).to(dtype)
        if phi is not None:
            target_rows.mul_(phi.unsqueeze(1))
        mixed = target_rows.addcdiv_(mixed, sums.total.unsqueeze(1), value=-1)
    if whole:
        _finish_exps(exps, maxima, tiles, target, sums.total if phi is None else sums.total * phi)
    relative = offset_rows(hidden.dtype, exps.shape[0], vocab, width)
    offsets = torch.stack(maxima[:relative]) if relative else hidden.new_empty(0, rows, dtype=dtype)
    state = [sums.maximum, sums.total, odds] + ([] if phi is None else [phi])
    return sums, Saved(torch.stack(state), mixed, exps, offsets)


def _finish_exps(
    exps: Tensor, maxima: Sequence[Tensor], tiles: Tiles, target: Tensor, own: Tensor
) -> None:
    """All of E to what `holds_all` says, from tiles relative to the maxima so far; own: S' phi."""
    for (lo, hi), maximum in zip(tiles.bounds[:-1], maxima[:-1], strict=True):
        # On a GPU to look whether anything changed would wait for the device.
        if exps.device.type != "cpu" or not torch.equal(maximum, maxima[-1]):
            # The floor spares the products subnormal numbers, which are slow.
            floor, shrink = exps.new_full((), math.exp(FLOOR)), (maximum - maxima[-1]).exp_()
            torch.addcmul(floor, exps[lo:hi], shrink, out=exps[lo:hi])
    exps.scatter_(0, target.unsqueeze(0), own.neg().unsqueeze(0))


def holds_all(dtype: torch.dtype, entries: int, vocab: int) -> bool:
    """Whether all of E is kept, in the accumulation dtype: relative to the final maximum then, with
    -S' phi at the targets, and the backward forms hidden's gradient of it too."""
    return entries == vocab and dtype == accumulate_dtype(dtype)


def offset_rows(dtype: torch.dtype, entries: int, vocab: int, width: int) -> int:
    """Rows of `Saved.offsets`: none where what is kept is relative to the final maximum."""
    if vocab <= width or holds_all(dtype, entries, vocab):
        return 0
    return -(-entries // width)


def backward(
    row_grad: Tensor,  # (R,) gradient of every row's log-prob
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    saved: Saved,
    *,
    width: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    dtype = accumulate_dtype(hidden.dtype)
    maximum, total, log_odds, *phi = saved.row_state.unbind(0)
    scale = log_odds.sigmoid().mul_(_as(row_grad, dtype))
    if transform.slope != 1.0:
        scale.mul_(transform.slope)
    others = torch.div(scale, total).neg_()  # what a row adds per unit of E
    vocab, dim = weight.shape
    bias_like = weight if transform.bias is None else transform.bias
    grad_weight = weight.new_empty(vocab if need_weight else 0, dim)
    grad_bias = bias_like.new_zeros(vocab if need_bias else 0, dtype=dtype)
    # A scaled copy of hidden first, hidden's gradient last: (R, D) is there but once.
    buffer = hidden.new_empty(hidden.shape if need_weight or need_hidden else (0,), dtype=dtype)
    if holds_all(hidden.dtype, saved.exps.shape[0], vocab):
        if need_bias:
            torch.mv(saved.exps, others, out=grad_bias)
        if need_weight:
            product(saved.exps, torch.mul(hidden, others.unsqueeze(1), out=buffer), grad_weight)
        if need_hidden:
            product(saved.exps.t(), weight, buffer).mul_(others.unsqueeze(1))
    else:
        if need_weight or need_bias:
            own = scale * phi[0] if phi else scale  # and at its target
            _weight_backward_(
                grad_weight,
                grad_bias,
                own,
                others,
                hidden,
                weight,
                target,
                transform,
                saved,
                width,
                buffer,
            )
        if need_hidden:
            torch.mul(saved.hidden_grad, scale.unsqueeze(1), out=buffer)
    grad_hidden = _as(buffer, hidden.dtype) if need_hidden else hidden.new_empty(0)
    return grad_hidden, grad_weight, _as(grad_bias, bias_like.dtype)


def _blocks(rows: int) -> Iterator[slice]:
    """Rows 16 at a time: what (R, D) is needed for once need not be there all at once."""
    return (slice(lo, min(lo + 16, rows)) for lo in range(0, rows, 16))


def _weight_backward_(
    grad_weight: Tensor,  # (V, D) written, or (0, D)
    grad_bias: Tensor,  # (V,) zeros, added to, or (0,)
    own: Tensor,
    others: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    saved: Saved,
    width: int,
    buffer: Tensor,  # (R, D) to be overwritten, where dW is needed
) -> None:
    dtype, rows = own.dtype, hidden.shape[0]
    need_weight, need_bias = bool(grad_weight.numel()), bool(grad_bias.numel())
    tiles = Tiles.make(target, weight.shape[0], width)
    count, kept = len(tiles.bounds), -(-saved.exps.shape[0] // width)
    maximum, hidden_w, own_1 = saved.row_state[0], hidden.to(dtype), own.unsqueeze(1)
    in_place = weight.dtype == dtype
    scratch = hidden.new_empty(0 if in_place else width, hidden.shape[1], dtype=dtype)
    recomputed = hidden.new_empty(0 if kept == count else width, rows, dtype=dtype)
    for i, (lo, hi) in enumerate(tiles.bounds):
        exps, per_row = saved.exps[lo:hi], others
        if i >= kept:
            exps = recomputed[: hi - lo]
            _recompute_(exps, hidden, weight, transform, tiles, i, maximum)
        elif saved.offsets.shape[0]:
            per_row = (saved.offsets[i] - maximum).exp_().mul_(others)
        if need_bias:
            torch.mv(exps.to(dtype), per_row, out=grad_bias[lo:hi])
        if not need_weight:
            continue
        torch.mul(hidden_w, per_row.unsqueeze(1), out=buffer)
        if in_place:
            product(exps, buffer, grad_weight[lo:hi])
        else:
            # The target's term joins in float32, so that the gradient is rounded once.
            tile = scratch[: hi - lo]
            half_product(exps, buffer, weight.dtype, tile)
            tiles.add_target_rows_(i, tile, torch.mul(hidden_w, own_1, out=buffer))
            grad_weight[lo:hi].copy_(tile)
    if need_weight and in_place:
        for block in _blocks(rows):
            add_rows_(grad_weight, target[block], hidden_w[block] * own_1[block])
    if need_bias:
        add_rows_(grad_bias, target, own)


def _recompute_(
    out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    tiles: Tiles,
    i: int,
    maximum: Tensor,
) -> None:
    """F of tile i relative to the final maximum, target entry 0."""
    lo, hi = tiles.bounds[i]
    product(weight[lo:hi], hidden.t(), out)
    exps_at(out, transform, _column(transform.bias, lo, hi), maximum)
    tiles.take_target_(i, out, 0.0)


def tiles_again(
    rows: slice,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    saved: Saved,
    width: int,
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """F of every tile for some rows, kept or computed again, with about 0 or about -S' phi at the
    targets.

    A tile is (first id, last id, F (C, L), factor (L,) by which F becomes relative to the final
    maximum; None: 1).
    """
    count, kept = -(-weight.shape[0] // width), -(-saved.exps.shape[0] // width)
    dtype, maximum = saved.row_state.dtype, saved.row_state[0]
    cut = Tiles.make(target[rows], weight.shape[0], width)
    scratch = hidden.new_empty(0 if kept == count else width, len(target[rows]), dtype=dtype)
    for i, (lo, hi) in enumerate(cut.bounds):
        if i < kept:
            factor = (saved.offsets[i] - maximum).exp_()[rows] if saved.offsets.shape[0] else None
            yield lo, hi, saved.exps[lo:hi, rows], factor
        else:
            again = scratch[: hi - lo]
            _recompute_(again, hidden[rows], weight, transform, cut, i, maximum[rows])
            yield lo, hi, again, None


def exps_at(raw: Tensor, transform: Transform, bias: Tensor | None, maximum: Tensor) -> Tensor:
    """F = E times the softcap's bend, from raw logits, relative to the given maximum; in place."""
    bend = transform.bend(transform.apply_(raw, bias))
    exp_(raw, maximum)
    return raw if bend is None else raw.mul_(bend)


def _accumulate_(out: Tensor, shrink: Tensor | None, a: Tensor, b: Tensor) -> None:
    """out = shrink * out + a @ b with shrink per row; out = a @ b where it is None."""
    if shrink is None:
        product(a, b, out)
    elif a.dtype == out.dtype:
        out.mul_(shrink.unsqueeze(1)).addmm_(a, b)
    else:
        out.mul_(shrink.unsqueeze(1)).add_(torch.mm(a, b, out_dtype=out.dtype))


def half_product(exps: Tensor, rows: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """exps @ rows with E in a half type: in float32 on the CPU, with rounded operands on CUDA.

    A row's factor g (1 - p) / S' may be far below what float16 holds, so the operand is brought to
    unit size first.
    """
    if not exps.is_cuda or not rows.numel():
        product(exps, rows, out)
        return
    size = rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
    unit = torch.exp2(torch.floor(torch.log2(size)))
    product(exps.to(dtype), (rows / unit).to(dtype), out)
    out.mul_(unit)


def _wide_on_cpu(x: Tensor, dtype: torch.dtype) -> Tensor:
    # CPUs have no half product with float32 output; CUDA has, and takes the operands as they are.
    return x if x.is_cuda else _as(x, dtype)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a call that does nothing costs a microsecond


def _column(bias: Tensor | None, lo: int, hi: int) -> Tensor | None:
    return None if bias is None else bias[lo:hi].unsqueeze(1)
