"""The plain-torch backend of `linear_logprob`: a loop over vocabulary tiles around matrix products.

Shapes: R rows, D hidden, V vocab, N tiles, C tile width. Kept exponentials are transposed, (V, R),
so that a tile is one contiguous block of rows. Formulas, memory and numerics: kernels/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import GroupGram
from .segment import add_rows_

# Least exponent relative to a row's maximum. e^-80 = 2e-35 per entry is nothing beside S' >= 1, in
# float64 too, so the target's entry, -inf before the exponential, may as well stand there with it
# instead of 0.
FLOOR = -80.0
ORDER_STATS = frozenset({"argmax", "top1", "log1m_pmax"})


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

    def apply_(self, logits: Tensor, bias: Tensor | None) -> Tensor | None:
        """Raw logits to z in place; returns the bend (dz/da) / k, None (= 1) without a softcap."""
        if bias is not None:
            logits.add_(bias)
        if self.softcap is None:
            if self.slope != 1.0:
                logits.mul_(self.slope)
            return None
        logits.mul_(self.logit_scale / self.softcap).tanh_()
        bend = torch.addcmul(logits.new_ones(()), logits, logits, value=-1)
        logits.mul_(self.softcap / self.temperature)
        return bend


@dataclass(frozen=True)
class Tiles:
    """Vocabulary tiles, and for every tile and row where the row's target lies in it."""

    bounds: list[tuple[int, int]]
    local: Tensor  # (N, R) int64, clamped into the tile
    inside: Tensor  # (N, R) bool

    @staticmethod
    def make(target: Tensor, vocab: int, width: int) -> Tiles:
        bounds = [(lo, min(lo + width, vocab)) for lo in range(0, vocab, width)]
        if len(bounds) == 1:
            local = target.clamp(0, vocab - 1).unsqueeze(0)
            return Tiles(bounds, local, (target == local[0]).unsqueeze(0))
        low = torch.arange(0, vocab, width, device=target.device).unsqueeze(1)
        high = (low + width).clamp_(max=vocab)
        inside = (target >= low) & (target < high)
        return Tiles(bounds, torch.minimum(target.maximum(low), high - 1) - low, inside)

    def take_target_(self, i: int, z: Tensor, fill: float) -> Tensor:
        """fill to the target's place where it lies in tile i; returns what stood at `local`."""
        index = self.local[i].unsqueeze(0)
        value = z.gather(0, index)
        z.scatter_(0, index, value.masked_fill(self.inside[i], fill))
        return value[0]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into out, accumulated and stored in out's dtype (float32 for half operands)."""
    if a.is_cuda and a.dtype == b.dtype != out.dtype:
        return out.copy_(torch.mm(a, b, out_dtype=out.dtype))
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def exp_(z: Tensor, maximum: Tensor) -> Tensor:
    """exp(max(z - maximum, FLOOR)) in place.

    Without the floor the CPU's vector exp takes a path 50 to 100 times slower for every result that
    underflows, and the products after it slow down on subnormal operands.
    """
    return z.sub_(maximum).clamp_(min=FLOOR).exp_()


class RowSums:
    """Running sums over the entries that are not the target, relative to the running maximum.

    With E = exp(z - max): total = sum E, and on request square = sum E^2, plogp = sum E log E, rest
    = sum E without the (first) largest entry, logit = sum of z with the target. A row that has seen
    no entry yet has the least finite number as its maximum, which makes every rescale factor 0 or 1
    and never NaN.
    """

    def __init__(self, hidden: Tensor, dtype: torch.dtype, stats: frozenset[str]) -> None:
        self.stats = stats
        self.lowest = torch.finfo(dtype).min
        zero = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        self.maximum = zero + self.lowest
        # A target outside the vocabulary is met in no tile and leaves NaN, which is seen.
        self.target_logit = zero + torch.nan
        self.total = self.square = self.plogp = self.rest = self.logit = zero
        self.argmax = zero.to(torch.int64)

    def add_tile(self, z: Tensor, tiles: Tiles, i: int) -> Tensor:
        """z to E relative to the new running maximum, in place; returns exp(old - new maximum)."""
        if "mean_logit" in self.stats:
            self.logit = self.logit + z.sum(0)
        value = tiles.take_target_(i, z, -torch.inf)
        self.target_logit = torch.where(tiles.inside[i], value, self.target_logit)
        where = None
        if self.stats & ORDER_STATS:
            top, where = z.max(0)
            self.argmax = torch.where(top > self.maximum, where + tiles.bounds[i][0], self.argmax)
        else:
            top = z.amax(0)
        maximum = torch.maximum(self.maximum, top)
        shrink = (self.maximum - maximum).exp_()
        exp_(z, maximum)
        total = z.sum(0)
        if self.stats:
            self._add_optional(z, total, top, where, maximum, shrink)
        self.total = torch.addcmul(total, self.total, shrink)
        self.maximum = maximum
        return shrink

    def _add_optional(
        self,
        exp: Tensor,
        total: Tensor,
        top: Tensor,
        where: Tensor | None,
        maximum: Tensor,
        shrink: Tensor,
    ) -> None:
        if self.stats & {"sum_sq_prob", "log_sum_sq_prob"}:
            self.square = torch.addcmul((exp * exp).sum(0), self.square, shrink * shrink)
        if "entropy" in self.stats:
            shift = (self.maximum - maximum).clamp_(min=self.lowest)
            before = torch.addcmul(self.plogp, self.total, shift) * shrink
            self.plogp = before - torch.special.entr(exp).sum(0)
        if "log1m_pmax" in self.stats and where is not None:
            # Summed with the largest entry out: total - 1 would cancel.
            index = where.unsqueeze(0)
            largest = exp.gather(0, index)
            others = exp.scatter_(0, index, 0.0).sum(0)
            exp.scatter_(0, index, largest)
            rises = top > self.maximum
            self.rest = torch.where(
                rises,
                torch.addcmul(others, self.total, shrink),
                self.rest + total,
            )


@dataclass(frozen=True)
class Saved:
    """What the backward needs, and nothing of it is written by the backward.

    row_state    (3 | 4, R) the non-target maximum, the non-target sum S', a = log((1 - p) / p), and
                 with a softcap phi = (dz/da) / k at the target
    hidden_grad  (R, D) d logp / d hidden over k (1 - p)
    exps         (kept vocabulary, R) E, with a softcap F
    offsets      (kept tiles, R) the maximum that each kept tile is relative to
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
    gram: GroupGram | None,
) -> tuple[RowSums, Saved]:
    """One pass over the vocabulary; the first `kept` tiles of E are kept for the backward."""
    dtype = accumulate_dtype(hidden.dtype)
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    tiles = Tiles.make(target, vocab, width)
    sums = RowSums(hidden, dtype, stats)
    exps = hidden.new_empty(min(kept * width, vocab), rows)
    offsets = hidden.new_empty(kept, rows, dtype=dtype)
    in_place = hidden.dtype == dtype
    scratch = hidden.new_empty(
        0 if in_place and kept == len(tiles.bounds) else width, rows, dtype=dtype
    )
    mixed = hidden.new_empty(rows if need_hidden else 0, dim, dtype=dtype)
    operand = _wide_on_cpu(hidden, dtype).t().contiguous()  # read by every tile
    for i, (lo, hi) in enumerate(tiles.bounds):
        weight_C = _wide_on_cpu(weight[lo:hi], dtype)
        z = exps[lo:hi] if in_place and i < kept else scratch[: hi - lo]
        product(weight_C, operand, z)
        bend = transform.apply_(z, _column(transform.bias, lo, hi))
        shrink = sums.add_tile(z, tiles, i)
        if bend is not None:
            z.mul_(bend)
        if i < kept:
            offsets[i] = sums.maximum
            if not in_place:
                exps[lo:hi].copy_(z)
        if need_hidden:
            rounded = z if in_place or not z.is_cuda else z.to(hidden.dtype)
            _accumulate_(mixed, shrink, rounded.t(), weight_C, first=i == 0)
        if gram is not None:
            gram.add_tile(z, shrink)
    row_state = _row_state(sums, transform)
    if need_hidden:
        target_rows = weight.index_select(0, target).to(dtype)
        if transform.softcap is not None:
            target_rows.mul_(row_state[3].unsqueeze(1))
        mixed.div_(sums.total.unsqueeze(1).neg()).add_(target_rows)
    return sums, Saved(row_state, mixed, exps, offsets)


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
    maximum, total, log_odds, *phi = saved.row_state
    scale = row_grad.to(dtype) * log_odds.sigmoid() * transform.slope
    grad_hidden = hidden.new_empty(0)
    if need_hidden:
        grad_hidden = (saved.hidden_grad * scale.unsqueeze(1)).to(hidden.dtype)
    vocab, dim = weight.shape
    grad_weight = weight.new_empty(vocab if need_weight else 0, dim)
    bias_like = weight if transform.bias is None else transform.bias
    grad_bias = bias_like.new_zeros(vocab if need_bias else 0, dtype=dtype)
    if not (need_weight or need_bias):
        return grad_hidden, grad_weight, grad_bias.to(bias_like.dtype)

    tiles = Tiles.make(target, vocab, width)
    kept = saved.offsets.shape[0]
    # What a row adds per unit of E, and at its target.
    others, own = -scale / total, scale * phi[0] if phi else scale
    hidden_w = hidden.to(dtype)
    base = hidden_w * others.unsqueeze(1)
    # One tile is relative to the final maximum already.
    rescale = len(tiles.bounds) > 1
    scaled = torch.empty_like(base) if rescale and kept else base
    own_rows = hidden_w * own.unsqueeze(1)
    in_place = weight.dtype == dtype
    scratch = hidden.new_empty(0 if in_place or not need_weight else width, dim, dtype=dtype)
    recomputed = hidden.new_empty(
        0 if kept == len(tiles.bounds) else width, hidden.shape[0], dtype=dtype
    )
    for i, (lo, hi) in enumerate(tiles.bounds):
        if i < kept:
            exps = saved.exps[lo:hi]
            factor = (saved.offsets[i] - maximum).exp_() if rescale else None
        else:
            exps = recomputed[: hi - lo]
            _recompute_(exps, hidden, weight, transform, tiles, i, maximum)
            factor = None
        if need_bias:
            per_row = others if factor is None else others * factor
            torch.mv(exps.to(dtype), per_row, out=grad_bias[lo:hi])
        if not need_weight:
            continue
        rows = base if factor is None else torch.mul(base, factor.unsqueeze(1), out=scaled)
        if in_place:
            product(exps, rows, grad_weight[lo:hi])
            continue
        tile = scratch[: hi - lo]
        _half_product(exps, rows, weight.dtype, tile)
        inside = tiles.inside[i].unsqueeze(1)
        add_rows_(tile, tiles.local[i], own_rows.masked_fill(~inside, 0.0))
        grad_weight[lo:hi].copy_(tile)
    if need_weight and in_place:
        add_rows_(grad_weight, target, own_rows)
    if need_bias:
        add_rows_(grad_bias, target, own)
    return grad_hidden, grad_weight, grad_bias.to(bias_like.dtype)


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


def exps_at(raw: Tensor, transform: Transform, bias: Tensor | None, maximum: Tensor) -> Tensor:
    """F = E times the softcap's bend, from raw logits, relative to the given maximum; in place."""
    bend = transform.apply_(raw, bias)
    exp_(raw, maximum)
    return raw if bend is None else raw.mul_(bend)


def _row_state(sums: RowSums, transform: Transform) -> Tensor:
    """(3 | 4, R): maximum, S', a = log S' + max - z_y, and with a softcap phi."""
    log_odds = (sums.maximum - sums.target_logit).add_(sums.total.log())
    # The target is the whole vocabulary: p = 1.
    log_odds.masked_fill_(sums.maximum == sums.lowest, -torch.inf)
    rows = [sums.maximum, sums.total, log_odds]
    if transform.softcap is not None:
        bent = sums.target_logit * (transform.temperature / transform.softcap)
        rows.append(1.0 - bent * bent)
    return torch.stack(rows)


def _accumulate_(out: Tensor, shrink: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out = shrink * out + a @ b, rows of out rescaled."""
    if first:
        product(a, b, out)
    elif a.dtype == out.dtype:
        out.mul_(shrink.unsqueeze(1)).addmm_(a, b)
    else:
        out.mul_(shrink.unsqueeze(1)).add_(torch.mm(a, b, out_dtype=out.dtype))


def _half_product(exps: Tensor, rows: Tensor, dtype: torch.dtype, out: Tensor) -> None:
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
    return x if x.is_cuda else x.to(dtype)


def _column(bias: Tensor | None, lo: int, hi: int) -> Tensor | None:
    return None if bias is None else bias[lo:hi].unsqueeze(1)
