"""Taps of a run: attached where `track` asks for them, and held against plain gradients first.

What a layer does beside its own forward (a weight read elsewhere, a layer called twice, rows that
are not the batch's tokens) no look at the layer tells. So before a run the gradients of some pairs
are formed, one backward each, and what the taps say of the same pairs is compared with them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.pack import fed_tokens, pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.taps import Taps, attach
from fastpref.gradients import pair_gradients, segment_slopes
from fastpref.model import PairModel

log = logging.getLogger(__name__)

MODES = ("sketch", "exact")  # values of `track` that taps serve
# Largest accepted difference, relative to the norm of the pair's whole gradient. A tap that misses
# something changes tenths; rounding in the precision of the products changes this much at most.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 1e-1}
PAIRS = 2


def find_taps(model: PairModel, config: Config, pairs: Sequence[TokenPair]) -> Taps | None:
    """The taps that ``config.track`` asks for, compared on a few of ``pairs``; None: none.

    Raises ValueError as `attach` does, where the balance of routers is part of the loss, and where
    taps and plain gradients differ.
    """
    if config.track not in MODES:
        return None
    if not config.record:
        log.warning("track: %s sees nothing, as record: false writes nothing", config.track)
        return None
    where = f"track={config.track!r}: "
    if model.router:
        raise ValueError(
            f"{where}the load-balancing loss of this model's routers (router_aux_loss_coef="
            f"{model.router.coef}) ties the pairs of a step, whose gradients have then no parts of "
            "a pair each. Set router_aux_loss_coef: 0 or track: head."
        )
    try:
        taps = attach(model.module, config.track, sketch_dim=config.sketch_dim, seed=config.seed)
        worst = check_taps(model, taps, pairs)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    weights = sum(place.parameter.numel() for place in taps.places())
    log.info(
        "taps (%s) on %d weights in %d layer groups; they equal plain gradients to %.1e",
        config.track,
        weights,
        len(taps.groups),
        worst,
    )
    return taps


def check_taps(model: PairModel, taps: Taps, pairs: Sequence[TokenPair]) -> float:
    """Largest difference between what taps say of some pairs and the pairs' own gradients.

    Of sketches, and of norms where they are exact, group by group, relative to the pair's whole
    gradient. Touches no `.grad`. Raises ValueError naming the group where it is more than rounding
    explains.
    """
    some = _some(pairs)
    seen = pair_gradients(model, taps, pack_pairs(some).to(model.device))
    worst = 0.0
    for i, pair in enumerate(some):
        sketch, norm_sq = _plain(model, taps, pair)
        size = norm_sq.sum().sqrt()
        # A sketch has the gradient's norm in the mean, so both differences are in the same unit.
        apart = (seen.sketch[:, i].double() - sketch).flatten(1).norm(dim=1)
        if taps.exact:
            norm = seen.norm_sq[:, i].double().clamp(min=0).sqrt()
            apart = torch.maximum(apart, (norm - norm_sq.sqrt()).abs())
        relative = apart / size.clamp(min=torch.finfo(torch.float32).tiny)
        found = float(relative.max())
        accepted = TOLERANCE[model.dtype]
        if not found <= accepted:
            group = taps.groups[int(relative.nan_to_num(torch.inf).argmax())]
            raise ValueError(
                f"the gradients that taps see in {group} of {type(model.module).__name__} differ "
                f"from plain ones by {found:.2g} of the whole gradient, where rounding explains "
                f"{accepted:g}: a layer there does more with its weights than its forward shows "
                "(is called twice, or reads another layer's weight). Set track: head."
            )
        worst = max(worst, found)
    return worst


def _some(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """The first pairs of different lengths; short ones where there are many."""
    by_length = sorted(range(min(len(pairs), 64)), key=lambda i: fed_tokens([pairs[i]])[0])
    return [pairs[i] for i in (by_length[0], by_length[len(by_length) // 2])[:PAIRS]]


def _plain(model: PairModel, taps: Taps, pair: TokenPair) -> tuple[Tensor, Tensor]:
    """(G, k, k) sketches and (G,) squared norms of the gradient of a pair's margin, by one plain
    backward."""
    batch = pack_pairs([pair]).to(model.device)
    places = list(taps.places())
    with torch.enable_grad():
        logp = model.logp(batch).logp
        gradients = torch.autograd.grad(
            logp,
            [place.parameter for place in places],
            segment_slopes(batch, "margin").to(logp.dtype),
            allow_unused=True,
        )
    groups, k = len(taps.groups), taps.sketch_dim
    sketch = torch.zeros(groups, k, k, dtype=torch.float64, device=model.device)
    norm_sq = torch.zeros(groups, dtype=torch.float64, device=model.device)
    for place, gradient in zip(places, gradients, strict=True):
        if gradient is not None:
            sketch[place.group] += taps.sketch_of(place, gradient)
            norm_sq[place.group] += gradient.double().square().sum()
    return sketch, norm_sq
