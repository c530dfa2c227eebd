"""Gradients of every pair over all trained weights: norms and sketches by layer group.

What the taps saw of a backward (fastpref.dynamics.taps) and what the head's op tells of its own
weight, put together. Shapes: P pairs, G layer groups, S segments, k sketch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from fastpref_kernels import sketch_dot, tied_norms, unique_ids
from fastpref_kernels.segment import segment_sum
from torch import Tensor, nn

from fastpref.batch import GROUP_WITH_TAILS, PairBatch
from fastpref.dynamics.tap_layers import Embedding
from fastpref.dynamics.taps import Taps, TapValues
from fastpref.losses import sequence_sums
from fastpref.model import Head, HeadNorms, PairModel, Scored
from fastpref.transfer import numbers

ROWS = 256  # scored rows whose logits stand in memory at a time, where a change of the head is met


@dataclass(frozen=True)
class PairGradients:
    """Of one quantity of each of the P pairs, over all trained weights."""

    groups: tuple[str, ...]  # layer groups, see fastpref.dynamics.taps
    norm_sq: Tensor  # (G, P) squared norms; estimates where the error is not 0
    norm_sq_error: Tensor  # (G, P) one standard error
    sketch: Tensor  # (G, P, k, k), additive over pairs, batches and ranks
    of: str  # margin | chosen | rejected | loss
    method: str  # gram: exact; sketch: estimated
    # (G, P) inner products of the gradient with a given change of the weights, exact
    change: Tensor | None = None
    logp_chosen: Tensor | None = None  # (P,) of `pair_gradients`, detached
    logp_rejected: Tensor | None = None

    def gnorm(self) -> Tensor:
        """(P,) norm over all trained weights."""
        return self.norm_sq.sum(0).clamp(min=0).sqrt()

    def error(self, gnorm: Tensor | None = None) -> Tensor:
        """(P,) one standard error of `gnorm`, to first order; 0 where it is exact."""
        gnorm = self.gnorm() if gnorm is None else gnorm
        error = torch.linalg.vector_norm(self.norm_sq_error, dim=0)
        return torch.where(error > 0, error / (2 * gnorm), 0.0)

    def gnorm_groups(self) -> Tensor:
        """(P, G) norm within each layer group."""
        return self.norm_sq.clamp(min=0).sqrt().t()

    def scaled(self, factor: Tensor | float, of: str) -> PairGradients:
        """Of ``factor`` (P,) times the quantity, which is called ``of``."""
        sides = factor
        if isinstance(factor, Tensor):
            factor = factor.to(self.norm_sq.dtype)
            sides = factor.unsqueeze(-1).unsqueeze(-1)
        square = factor * factor
        return replace(
            self,
            norm_sq=self.norm_sq * square,
            norm_sq_error=self.norm_sq_error * square,
            sketch=self.sketch * sides,
            change=None if self.change is None else self.change * factor,
            of=of,
        )

    def as_margin(self, weight: Tensor) -> PairGradients:
        """From gradients of losses that see the margin alone, grad L = - weight grad m: those of m.

        NaN for a pair of weight (P,) 0, whose loss does not tell it.
        """
        assert self.of == "loss"
        return self.scaled(margin_factor(weight), "margin")


def margin_factor(weight: Tensor) -> Tensor:
    """(P,) what grad m is of the gradient of a loss that sees the margin alone: -1 / weight, NaN
    where that is 0."""
    return torch.where(weight == 0, torch.nan, -1.0 / weight)


def head_norms(taps: Taps, changed: bool = False) -> HeadNorms:
    """What the head's op is to bring beside what the taps see. ``changed``: a change of the weights
    is met."""
    if taps.head is None:
        return HeadNorms()
    rows = changed or (taps.exact and taps.tied is not None)
    return HeadNorms("both", taps.sketch_dim, taps.seed, taps.head.key, rows)


def pair_gradients(
    model: PairModel,
    taps: Taps,
    batch: PairBatch,
    *,
    of: str = "margin",
    change: Mapping[nn.Parameter, Tensor] | None = None,
    tail_weight: float = 1.0,
) -> PairGradients:
    """Gradients of every pair's margin (or log-prob of its ``chosen``, ``rejected``), beta-free.

    A forward and the backward of unit slopes, down to the embedding's output: no weight's gradient
    is formed, and no `.grad` is touched. With ``change``, parameter -> change of it, also <grad,
    change> of every pair and group: what the change does to the quantity, to first order.
    """
    slope = segment_slopes(batch, of, tail_weight)
    with torch.enable_grad(), taps.watching(batch, change=change, anchored=True):
        scored = model.logp(batch, head_norms(taps, change is not None), head_frozen=True)
        if taps.anchors:  # there are none where a batch brings its states
            found = torch.autograd.grad(
                scored.logp,
                [y for _, _, y in taps.anchors],
                slope.to(scored.logp.dtype),
                allow_unused=True,
            )
            for (tap, ids, _), dy in zip(taps.anchors, found, strict=True):
                if dy is not None:
                    taps.add_anchor(tap, ids, dy)
    values = put_together(model, taps, batch, scored, slope, of, change)
    chosen, rejected = sequence_sums(scored.logp.detach(), batch.num_pairs, tail_weight)
    return replace(values, logp_chosen=chosen, logp_rejected=rejected)


def segment_slopes(batch: PairBatch, of: str, tail_weight: float = 1.0) -> Tensor:
    """(S,) derivative of the quantity ``of`` of a pair in the log-prob of each of its segments."""
    parts = {"margin": (0, 1, -1), "chosen": (1, 1, 0), "rejected": (1, 0, 1)}
    if of not in parts:
        raise ValueError(f"of must be one of {', '.join(parts)}, got {of!r}.")
    shared, chosen, rejected = parts[of]
    row: list[float] = [shared, chosen, rejected]
    if batch.group == GROUP_WITH_TAILS:
        w = tail_weight
        row = [shared, chosen, w * chosen, rejected, w * rejected]
    own = numbers(row, batch.segment_id.device, torch.float64)
    return own.repeat(batch.num_pairs)


@torch.no_grad()
def put_together(
    model: PairModel,
    taps: Taps,
    batch: PairBatch,
    scored: Scored,
    slope: Tensor,  # (S,) of the quantity in the segments' log-probs
    of: str,
    change: Mapping[nn.Parameter, Tensor] | None = None,
) -> PairGradients:
    """What the taps saw and what the head's op found, of one batch, as one."""
    tied = taps.parts.tied if taps.parts is not None else None
    values = taps.collect()
    sketch, norm_sq, error = _without_head(taps, values)
    total = PairGradients(
        taps.groups,
        norm_sq,
        error,
        sketch,
        of,
        "gram" if taps.exact else "sketch",
        values.change,
    )
    if taps.head is None:
        return total
    group, slope = taps.head.group, slope.to(scored.logp.dtype)
    own_norm, own_sketch = combine_head(batch, scored, slope)
    sketch, norm_sq = total.sketch, total.norm_sq
    sketch[group] += own_sketch
    if taps.tied is None:
        norm_sq[group] = own_norm.to(norm_sq.dtype)
    elif taps.exact:
        assert tied is not None
        norm_sq[group] += own_norm + _common_term(model.head, taps, batch, scored, slope, *tied)
    else:
        norm_sq[group], total.norm_sq_error[group] = sketch_dot(sketch[group])
    if total.change is not None and change is not None and taps.head.parameter in change:
        per_row = _head_change(model.head, batch, scored, change[taps.head.parameter])
        per_row *= slope.index_select(0, batch.segment_id.long())
        sums = segment_sum(per_row, batch.segment_id.long() // batch.group, batch.num_pairs)
        total.change[group] += sums.to(total.change.dtype)
    return total


def combine_head(batch: PairBatch, scored: Scored, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm (P,) and sketch (P, k, k) of the head's gradient of sum over a pair's segments
    of slope x logp, from those of the segments."""
    assert scored.gram is not None and scored.sketch is not None
    own = slope.view(batch.num_pairs, 1, -1)
    norms = own @ scored.gram.to(own.dtype) @ own.mT
    k = scored.sketch.shape[-1]
    parts = scored.sketch.view(batch.num_pairs, -1, k * k)
    sketch = (own.to(parts.dtype) @ parts).view(-1, k, k)
    return norms.view(-1).clamp_(min=0), sketch


def _without_head(taps: Taps, values: TapValues) -> tuple[Tensor, Tensor, Tensor]:
    """Sketches (G, P, k, k), squared norms and their errors (G, P); 0 for the head."""
    sketch = values.sketch
    norm_sq, error = (x.to(sketch.dtype) for x in sketch_dot(sketch))
    for name, exact in values.norm_sq.items():
        i = taps.groups.index(name)
        norm_sq[i], error[i] = exact, 0.0
    if "head" in taps.groups:
        error[taps.groups.index("head")] = 0.0
    return sketch, norm_sq, error


def _common_term(
    head: Head,
    taps: Taps,
    batch: PairBatch,
    scored: Scored,
    slope: Tensor,
    ids: Tensor,  # (T,) tokens of the embedding
    dy: Tensor,  # (T, D) gradient of its output
    factor: float,  # of dy
) -> Tensor:
    """(P,) 2 <E, H> of a weight that is embedding and head at once."""
    assert taps.tied is not None and isinstance(taps.tied.kind, Embedding)
    assert scored.hidden is not None and scored.row_logp is not None
    kind, pairs = taps.tied.kind, batch.num_pairs
    tokens = batch.pair_of_token
    unique = unique_ids(ids, tokens, num_segments=pairs, padding_idx=kind.padding_idx)
    segment = batch.segment_id.long()
    row_pair = segment // batch.group
    dz = logit_gradients_at(
        head, scored.hidden, scored.row_logp, batch.target, unique.ids, row_pair
    )
    dz *= slope.index_select(0, segment).unsqueeze(1)
    return tied_norms(
        unique.column,
        dy,
        tokens,
        scored.hidden.to(dz.dtype),
        dz,
        row_pair,
        num_segments=pairs,
        scale=factor * kind.scale,
    )


def logit_gradients_at(
    head: Head,
    hidden: Tensor,  # (R, D)
    row_logp: Tensor,  # (R,) of the targets
    target: Tensor,  # (R,)
    ids: Tensor,  # (P, U) -1: none
    row_pair: Tensor,  # (R,) non-decreasing
) -> Tensor:  # (R, U)
    """d logp / d raw logits of every row at its pair's ids: p_v = exp(z_v - lse), lse = z_y - logp.

    1 - p_y is formed of logp, without a difference of numbers near 1.
    """
    wide = row_logp.dtype
    out = hidden.new_zeros(len(hidden), ids.shape[1], dtype=wide)
    weight = head.weight.detach()

    def logits(rows: Tensor, entries: Tensor, product: str) -> tuple[Tensor, Tensor]:
        raw = torch.einsum(product, rows, weight.index_select(0, entries).to(wide))
        if head.bias is not None:
            raw = raw + head.bias.detach().index_select(0, entries).to(wide)
        raw = raw * head.logit_scale
        if head.softcap is None:
            return raw, torch.ones_like(raw)
        bent = torch.tanh(raw / head.softcap)
        return head.softcap * bent, 1 - bent.square()

    counts = torch.bincount(row_pair, minlength=len(ids)).tolist()
    start = 0
    for pair, count in enumerate(counts):
        own = slice(start, start + count)
        start += count
        at = ids[pair][ids[pair] >= 0]
        if not count or not len(at):
            continue
        rows = hidden[own].to(wide)
        own_logit, _ = logits(rows, target[own], "rd,rd->r")
        z, slope = logits(rows, at, "rd,ud->ru")
        prob = torch.exp(z - (own_logit - row_logp[own]).unsqueeze(1))
        hit = at.unsqueeze(0) == target[own].unsqueeze(1)
        miss = -torch.expm1(row_logp[own]).unsqueeze(1)
        out[own, : len(at)] = torch.where(hit, miss, -prob) * slope * head.logit_scale
    return out


def _head_change(head: Head, batch: PairBatch, scored: Scored, moved: Tensor) -> Tensor:
    """(R,) inner products of d logp_r / d W with a change ``moved`` (V, D) of W."""
    assert scored.hidden is not None and scored.row_logp is not None
    wide = scored.row_logp.dtype
    weight, moved = head.weight.detach().to(wide), moved.to(wide)
    found = []
    for hidden, target in zip(scored.hidden.split(ROWS), batch.target.split(ROWS), strict=True):
        rows = hidden.to(wide)
        raw = rows @ weight.t()
        if head.bias is not None:
            raw += head.bias.detach().to(wide)
        raw *= head.logit_scale
        push = (rows @ moved.t()) * head.logit_scale
        if head.softcap is not None:
            bent = torch.tanh(raw / head.softcap)
            raw, push = head.softcap * bent, push * (1 - bent.square())
        mean = (raw.softmax(-1) * push).sum(-1)
        found.append(push.gather(1, target.unsqueeze(1)).squeeze(1) - mean)
    return torch.cat(found)
