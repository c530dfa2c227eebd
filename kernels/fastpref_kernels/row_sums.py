"""What is summed per row over the vocabulary tiles, and the statistics that follow from it.

Shapes: R rows, V vocab, N tiles, C tile width; tiles are (C, R). Formulas: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from .segment import add_rows_

# Least exponent relative to a row's maximum. e^-80 = 2e-35 per entry is nothing beside S' >= 1, in
# float64 too, so the target's entry, -inf before the exponential, may as well stand there with it
# instead of 0.
FLOOR = -80.0
# Reductions over as many rows as FEW or more go by PARTS.
PARTS, FEW = 8, 1024
ORDER_STATS = frozenset({"argmax", "top1", "argmax_logp", "log1m_pmax"})
REST_STATS = frozenset({"argmax_logp", "log1m_pmax"})  # need `rest`
SQUARE_STATS = frozenset({"sum_sq_prob", "log_sum_sq_prob", "residual_sq"})


@dataclass(frozen=True)
class Tiles:
    """Vocabulary tiles, and for every tile where in it the rows' targets lie."""

    bounds: list[tuple[int, int]]
    local: Sequence[Tensor]  # N of (1, R) int64, clamped into the tile where there are several
    inside: Sequence[Tensor | None]  # N of (R,) bool; None: every target

    @staticmethod
    def make(target: Tensor, vocab: int, width: int) -> Tiles:
        bounds = [(lo, min(lo + width, vocab)) for lo in range(0, vocab, width)]
        if len(bounds) == 1:
            return Tiles(bounds, [target.unsqueeze(0)], [None])
        low = torch.arange(0, vocab, width, device=target.device).unsqueeze(1)
        place, last = target - low, (vocab - 1 - low).clamp_(max=width - 1)
        local = torch.minimum(place.clamp(min=0), last)
        inside = place == local
        return Tiles(bounds, local.unsqueeze(1).unbind(0), inside.unbind(0))

    def take_target_(self, i: int, z: Tensor, fill: float) -> Tensor:
        """fill to the target's place where it lies in tile i; returns what stood at `local`."""
        index, inside = self.local[i], self.inside[i]
        value = z.gather(0, index)
        if inside is None:
            z.scatter_(0, index, fill)
        else:
            z.scatter_(0, index, value.masked_fill(inside, fill))
        return value.squeeze(0)

    def add_target_rows_(self, i: int, tile: Tensor, rows: Tensor) -> None:
        """Add row t of `rows` (R, D) to the tile's (C, D) row of target t where it lies there."""
        inside = self.inside[i]
        if inside is not None:
            rows = rows.masked_fill(~inside.unsqueeze(1), 0.0)
        add_rows_(tile, self.local[i].squeeze(0), rows)


def exp_(z: Tensor, maximum: Tensor) -> Tensor:
    """exp(max(z - maximum, FLOOR)) in place.

    Without the floor the CPU's vector exp takes a path 50 to 100 times slower for every result that
    underflows, and the products after it slow down on subnormal operands.
    """
    if maximum.dim() == 1 and _native.fits(z):
        _native.exp_sums_(z, maximum, FLOOR)
        return z
    return shift_(z, maximum).exp_()


def shift_(z: Tensor, maximum: Tensor) -> Tensor:
    """max(z - maximum, FLOOR) in place: the logarithm of what `exp_` gives."""
    return z.sub_(maximum).clamp_(min=FLOOR)


class RowSums:
    """Running sums over the entries that are not the target, relative to the running maximum.

    With E = exp(z - maximum): total = sum E, and on request square = sum E^2, plogp = sum E log E,
    rest = sum E without the (first) largest entry, logit = sum of z with the target. All (R,).
    `top` is the largest entry itself; here the maximum, to which the Triton backend's offset only
    comes near.
    A row that has seen no entry yet has the least finite number as its maximum, which makes every
    rescale factor 0 or 1 and never NaN.

    A tile is met twice: `rise` to its maximum, then `add` it.
    """

    maximum: Tensor
    top: Tensor
    total: Tensor
    target_logit: Tensor
    odds: Tensor
    square: Tensor
    plogp: Tensor
    rest: Tensor
    logit: Tensor
    argmax: Tensor
    largest: Tensor  # (R,) place in the tile of what `rest` leaves out of it, -1: nothing

    def __init__(self, dtype: torch.dtype, stats: frozenset[str]) -> None:
        self.stats = stats
        self.lowest = torch.finfo(dtype).min

    def rise(self, z: Tensor, tiles: Tiles, i: int, biased: bool) -> Tensor | None:
        """Move to the running maximum with tile i, z (C, R), and take its targets out of it.

        Returns exp(old - new maximum), by which sums so far have shrunk; None at the first tile.
        """
        if "mean_logit" in self.stats:
            sum_z = column_sums(z)
            self.logit = sum_z if i == 0 else self.logit + sum_z
        value, inside = tiles.take_target_(i, z, -torch.inf), tiles.inside[i]
        if inside is None:
            self.target_logit = value
        elif i == 0:
            # A target outside the vocabulary is met in no tile and leaves NaN, which is seen.
            self.target_logit = value.masked_fill(~inside, torch.nan)
        else:
            self.target_logit = torch.where(inside, value, self.target_logit)
        top, where = self._largest(z, value, inside)
        shrink = None
        if i == 0:
            # Only a bias, or the target alone in its tile, leaves a row without an entry.
            self.maximum = top.clamp(min=self.lowest) if biased or tiles.bounds[0][1] == 1 else top
            if self.stats:
                self.square, self.plogp = torch.zeros_like(top), torch.zeros_like(top)
        else:
            shrink = self._shrink(torch.maximum(self.maximum, top))
        if where is not None:
            self._order(top, where, tiles.bounds[i][0], shrink)
        self.top = self.maximum
        return shrink

    def add(self, z: Tensor, first: bool) -> None:
        """z of the tile to E relative to the running maximum, in place, and that to the sums."""
        own, plogp, square = self._exp_sums_(z)
        self.total = own if first else self.total.add_(own)
        if self.stats & REST_STATS:
            self.rest += self._without_largest(z)
        if square is not None:
            self.square += square
        if plogp is not None:
            self.plogp += plogp

    def _exp_sums_(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """z to E in place; the tile's sums of E, and of E log E and E^2 where a statistic asks."""
        asked = "entropy" in self.stats, bool(self.stats & SQUARE_STATS)
        if _native.fits(z):
            return _native.exp_sums_(z, self.maximum, FLOOR, *asked)
        shift_(z, self.maximum)
        logs = z.clone() if asked[0] else None
        own = column_sums(z.exp_())
        square = column_sums(z * z) if asked[1] else None
        return own, None if logs is None else column_sums(logs.mul_(z)), square

    def log_odds(self, may_be_certain: bool) -> Tensor:
        """log((1 - p) / p) = log S' + maximum - z_y; -inf where nothing but the target is there."""
        if _native.fits(self.total):
            self.odds = _native.log_odds(self.maximum, self.total, self.target_logit)
        else:
            self.odds = (self.maximum - self.target_logit).add_(self.total.log())
        if may_be_certain:
            self.odds.masked_fill_(self.maximum == self.lowest, -torch.inf)
        return self.odds

    def _largest(
        self, z: Tensor, value: Tensor, inside: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The largest entry of every column of z, and where it stands if a statistic asks."""
        asked = self.stats & ORDER_STATS
        if asked == {"top1"} and z.device.type == "cpu":
            # Which entry is the largest matters where the target ties with it, and there alone.
            top = column_maxima(z)
            tied = value == top
            return top, _first_largest(z, tied if inside is None else tied & inside)
        if asked:
            top, where = z.max(0)
            return top, where
        return column_maxima(z), None

    def _shrink(self, maximum: Tensor) -> Tensor:
        """Everything summed so far, to be relative to a new maximum; returns by what it shrank."""
        shift = self.maximum - maximum
        shrink = shift.exp()
        if "entropy" in self.stats:
            self.plogp.addcmul_(self.total, shift.clamp_(min=self.lowest)).mul_(shrink)
        if self.stats & SQUARE_STATS:
            self.square.mul_(shrink).mul_(shrink)
        self.total.mul_(shrink)
        self.maximum = maximum
        return shrink

    def _order(self, top: Tensor, where: Tensor, low: int, shrink: Tensor | None) -> None:
        """The largest entry so far, and which of the tile's `rest` will leave out."""
        if shrink is None:
            self.argmax, self.rest, self.largest = where, torch.zeros_like(top), where
            return
        rises = top > self.top
        self.argmax = torch.where(rises, where + low, self.argmax)
        # What was the largest entry until now is one of the others from now on.
        self.rest = torch.where(rises, self.total, self.rest * shrink)
        self.largest = where.masked_fill(~rises, -1)

    def _without_largest(self, exp: Tensor) -> Tensor:
        # Summed with the largest entry out: total - 1 would cancel.
        index = self.largest.clamp(min=0).unsqueeze(0)
        value = exp.gather(0, index)
        exp.scatter_(0, index, value.masked_fill(self.largest >= 0, 0.0))
        others = column_sums(exp)
        exp.scatter_(0, index, value)
        return others


def log_prob(odds: Tensor) -> Tensor:
    """log p = -log(1 + e^odds), (R,)."""
    return _native.log_probs(odds) if _native.fits(odds) else F.logsigmoid(-odds)


def column_sums(x: Tensor) -> Tensor:
    """x.sum(0), see `_parts`."""
    return x.sum(0) if x.shape[0] < FEW else _parts(x, lambda part: part.sum(1)).sum(0)


def column_maxima(x: Tensor) -> Tensor:
    """x.amax(0), see `_parts`."""
    if _native.fits(x):
        return _native.column_maxima(x)
    return x.amax(0) if x.shape[0] < FEW else _parts(x, lambda part: part.amax(1)).amax(0)


def _parts(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """x (C, R) reduced to PARTS rows, and the few that do not divide.

    torch shares out a reduction over rows by columns, everything else, products included, by rows:
    then each of a CPU's cores reads what stands in the others' caches. Parts are shared out by
    rows. There are always as many, so that the sum does not depend on the number of threads.
    """
    rows = x.shape[0] // PARTS
    found = reduce(x[: PARTS * rows].view(PARTS, rows, x.shape[1]))
    return found if PARTS * rows == x.shape[0] else torch.cat((found, x[PARTS * rows :]))


def _first_largest(z: Tensor, asked: Tensor) -> Tensor:
    """(R,) index of the first largest entry of every column of z (C, R) that is ``asked`` for, else
    0: to find it takes a CPU seven times as long as the largest value does."""
    found = torch.zeros_like(asked, dtype=torch.int64)
    if bool(asked.any()):
        found[asked] = z[:, asked].max(0).indices
    return found


def row_statistics(sums: RowSums, logp: Tensor, vocab: int, target: Tensor) -> dict[str, Tensor]:
    """Statistics per row (R,) from sums over the non-target entries and a = log((1 - p) / p).

    With q the distribution given "not the target", H(q) = log S' - X / S':

        entropy = -p log p - (1-p) log(1-p) + (1-p) H(q)           every term >= 0
        sum_v p_v^2 = p^2 + (1-p)^2 Q / S'^2
        sum_v (p_v - [v = y])^2 = (1-p)^2 + (1-p)^2 Q / S'^2
        1 - p_max = 1 - p if the target is the largest entry, else (rest + e_y) / (S' + e_y), e_y =
        exp(z_y - max); and then log p_max = -log(1 + (rest + e_y) / e_top)
    """
    maximum, log_odds = sums.maximum, sums.odds
    # S' = 0 where nothing but the target is possible; what is divided by it is then 0.
    total = torch.where(sums.total == 0.0, 1.0, sums.total)
    out: dict[str, Tensor] = {}
    log1m, miss = F.logsigmoid(log_odds), log_odds.sigmoid()
    if "entropy" in sums.stats:
        own = -logp.exp() * logp + torch.special.entr(miss)
        out["entropy"] = own + miss * (total.log() - sums.plogp / total)
    if "sum_sq_prob" in sums.stats:
        out["sum_sq_prob"] = logp.exp().square() + (miss / total) ** 2 * sums.square
    if "log_sum_sq_prob" in sums.stats:
        others = 2 * log1m + sums.square.log() - 2 * total.log()
        out["log_sum_sq_prob"] = torch.logaddexp(2 * logp, others)
    if "residual_sq" in sums.stats:
        out["residual_sq"] = miss.square() + (miss / total) ** 2 * sums.square
    if "mean_logit" in sums.stats:
        out["mean_logit"] = sums.logit / vocab
    if sums.stats & ORDER_STATS:
        target_logit = sums.target_logit
        tie = (target_logit == sums.top) & (target < sums.argmax)
        top1 = (target_logit > sums.top) | tie
        if "top1" in sums.stats:
            out["top1"] = top1.to(logp.dtype)
        if "argmax" in sums.stats:
            out["argmax"] = torch.where(top1, target, sums.argmax)
        if sums.stats & REST_STATS:
            gap = target_logit - maximum
            others = torch.logaddexp(sums.rest.log(), gap)
        if "argmax_logp" in sums.stats:
            out["argmax_logp"] = torch.where(top1, logp, F.logsigmoid(sums.top - maximum - others))
        if "log1m_pmax" in sums.stats:
            out["log1m_pmax"] = torch.where(top1, log1m, others - torch.logaddexp(total.log(), gap))
    return out
